"""How rtnetlink spells devices, addresses, routes, neighbours and filters: both ways, without sending anything.

Numbers are those of include/uapi/linux/{if_link,if_addr,rtnetlink,neighbour,pkt_cls,ip}.h.
"""

import socket
import struct
from typing import Final

from vmnet.linux.netlink import attr, nested, parse_attrs, text, u32
from vmnet.ops import ROUTE_PROTOCOL, Address, LoAddress, Route
from vmnet.plan import Filter, Link

IFF_UP, IFF_MULTICAST = 0x1, 0x1000
RTN_UNICAST: Final = 1
RTN_LOCAL: Final = 2
RTN_UNREACHABLE: Final = 7

_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxHiHBB")
_TRAFFIC = struct.Struct("=BxHiIII")

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 10, 18
IFLA_IFALIAS, IFLA_AF_SPEC, IFLA_GROUP, IFLA_NET_NS_FD, IFLA_EXT_MASK = 20, 26, 27, 28, 29
IFLA_NUM_TX_QUEUES, IFLA_NUM_RX_QUEUES = 31, 32
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFLA_INET_CONF, _IFLA_INET6_CONF = 1, 2
_SKIP_STATISTICS = 8
_IFLA_LINK_NETNSID = 37
_IFLA_PROP_LIST, _IFLA_ALT_IFNAME = 52, 53
_NETNSA_NSID, _NETNSA_FD = 1, 3  # include/uapi/linux/net_namespace.h
_TUN_OWNER, _TUN_TYPE, _TUN_PI, _TUN_VNET_HDR, _TUN_PERSIST, _TUN_MULTI_QUEUE = 1, 3, 4, 5, 6, 7
_TUN_NUM_QUEUES, _TUN_NUM_DISABLED_QUEUES = 8, 9  # only of those with several
_NOBODY = 0xFFFFFFFF

# IPV4_DEVCONF_* of include/uapi/linux/ip.h
_CONF_NUMBERS = {"forwarding": 1, "rp_filter": 8, "accept_local": 23, "route_localnet": 26}
_DISABLE_IPV6 = 26  # DEVCONF_DISABLE_IPV6 of include/uapi/linux/ipv6.h

_ROUTE_TYPES = {
    "unicast": RTN_UNICAST, "local": RTN_LOCAL, "broadcast": 3, "anycast": 4, "multicast": 5, "blackhole": 6,
    "unreachable": RTN_UNREACHABLE, "prohibit": 8, "throw": 9,
}  # fmt: skip
_ROUTE_TYPE_NAMES = {number: name for name, number in _ROUTE_TYPES.items()}
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE = 1, 4, 5, 6, 7, 15
_RTNH_F_ONLINK = 4
_RTM_F_FIB_MATCH = 0x2000
_IFA_ADDRESS, _IFA_LOCAL, _IFA_CACHEINFO, _IFA_FLAGS = 1, 2, 6, 8
_IFA_F_SECONDARY, _IFA_F_PERMANENT = 0x01, 0x80
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX = 1, 2, 8
_NUD_PERMANENT = 0x80
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_OPS_LEN, _TCA_BPF_OPS, _TCA_BPF_FLAGS = 4, 5, 8
_TCA_BPF_FLAG_ACT_DIRECT = 1
_CLSACT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_ETH_P_ALL = 3
_PREF = 1

# How the kind of a bridge stands in an RTM_NEWLINK.
BRIDGE: Final = attr(_IFLA_INFO_KIND, b"bridge\0")


def link_header(index: int = 0, flags: int = 0, change: int = 0) -> bytes:
    """Return a struct ifinfomsg."""
    return _LINK.pack(0, 0, index, flags, change)


def link_query(name: str | None = None, index: int = 0) -> bytes:
    """Return the body of a request for one device, by name or index, or of a dump of all."""
    body = link_header(index) + u32(IFLA_EXT_MASK, _SKIP_STATISTICS)
    return body + text(IFLA_IFNAME, name) if name else body


def _mac(payload: bytes | None) -> str | None:
    return payload.hex(":") if payload else None


def mac_bytes(mac: str) -> bytes:
    """Return the six bytes of a MAC such as 02:00:00:00:00:01."""
    return bytes.fromhex(mac.replace(":", ""))


def mac_attr(mac: str) -> bytes:
    """Return the attribute with a device's MAC."""
    return attr(IFLA_ADDRESS, mac_bytes(mac))


def parse_link(body: bytes) -> Link:
    """Return the device that an RTM_NEWLINK describes."""
    _, _, index, flags, _ = _LINK.unpack_from(body)
    attrs = parse_attrs(body, 16)
    info = parse_attrs(attrs.get(IFLA_LINKINFO, b""))
    kind = info.get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode()
    owner, multi_queue, persist = None, False, True
    if kind == "tun":
        data = parse_attrs(info.get(_IFLA_INFO_DATA, b""))
        kind = "tap" if data.get(_TUN_TYPE) == b"\x02" else "tun"
        owner = int.from_bytes(data[_TUN_OWNER], "little") if _TUN_OWNER in data else None
        multi_queue = data.get(_TUN_MULTI_QUEUE) == b"\x01"
        persist = data.get(_TUN_PERSIST) == b"\x01"
    families = parse_attrs(attrs.get(IFLA_AF_SPEC, b""))
    conf4 = parse_attrs(families.get(socket.AF_INET, b"")).get(_IFLA_INET_CONF, b"")
    conf6 = parse_attrs(families.get(socket.AF_INET6, b"")).get(_IFLA_INET6_CONF, b"")
    return Link(
        ifindex=index,
        name=attrs[IFLA_IFNAME].rstrip(b"\0").decode(),
        kind=kind,
        group=int.from_bytes(attrs.get(IFLA_GROUP, b""), "little"),
        alias=attrs.get(IFLA_IFALIAS, b"").rstrip(b"\0").decode(errors="replace"),
        mac=None if kind == "tun" else _mac(attrs.get(IFLA_ADDRESS)),
        mtu=int.from_bytes(attrs.get(IFLA_MTU, b""), "little"),
        up=bool(flags & IFF_UP),
        multicast=bool(flags & IFF_MULTICAST),
        conf={name: _word(conf4, number - 1) for name, number in _CONF_NUMBERS.items()} if conf4 else {},
        disable_ipv6=bool(_word(conf6, _DISABLE_IPV6)) if conf6 else None,
        owner=None if owner == _NOBODY else owner,
        multi_queue=multi_queue,
        persist=persist,
        master=int.from_bytes(attrs.get(IFLA_MASTER, b""), "little"),
    )


def parse_queues(body: bytes) -> int:
    """Return how many queues of a tap with several, described by an RTM_NEWLINK, programs have open."""
    info = parse_attrs(parse_attrs(body, 16).get(IFLA_LINKINFO, b""))
    data = parse_attrs(info.get(_IFLA_INFO_DATA, b""))
    return sum(int.from_bytes(data.get(kind, b""), "little") for kind in (_TUN_NUM_QUEUES, _TUN_NUM_DISABLED_QUEUES))


def parse_tun_flags(body: bytes) -> int:
    """Return how frames of a tap, described by an RTM_NEWLINK, look to programs: IFF_NO_PI and IFF_VNET_HDR."""
    info = parse_attrs(parse_attrs(body, 16).get(IFLA_LINKINFO, b""))
    data = parse_attrs(info.get(_IFLA_INFO_DATA, b""))
    return (0 if data.get(_TUN_PI) == b"\x01" else 0x1000) | (0x4000 if data.get(_TUN_VNET_HDR) == b"\x01" else 0)


def parse_name(body: bytes) -> str:
    """Return the name of the device that an RTM_NEWLINK describes: its first attribute, as the kernel sends it."""
    size, kind = struct.unpack_from("=HH", body, 16)
    return (body[20 : 16 + size] if kind == IFLA_IFNAME else parse_attrs(body, 16)[IFLA_IFNAME]).rstrip(b"\0").decode()


def parse_far_netns(body: bytes) -> int | None:
    """Return the number of the namespace in which the far end of a device is, None for one that is here."""
    number = parse_attrs(body, 16).get(_IFLA_LINK_NETNSID)
    return int.from_bytes(number, "little", signed=True) if number else None


def netns_query(handle: int) -> bytes:
    """Return the body of RTM_GETNSID for the namespace behind a descriptor."""
    return bytes(4) + u32(_NETNSA_FD, handle)


def parse_netns(body: bytes) -> int:
    """Return the number of a namespace that RTM_NEWNSID tells, -1 where it has none."""
    return int.from_bytes(parse_attrs(body, 4)[_NETNSA_NSID], "little", signed=True)


def _word(data: bytes, position: int) -> int:
    return int.from_bytes(data[4 * position : 4 * position + 4], "little")


def bridge(device: str) -> bytes:
    """Return the body of RTM_NEWLINK for a bridge."""
    return link_header() + text(IFLA_IFNAME, device) + nested(IFLA_LINKINFO, text(_IFLA_INFO_KIND, "bridge"))


def alternative_name(index: int, name: str) -> bytes:
    """Return the body of RTM_NEWLINKPROP that gives a device one more name."""
    return link_header(index) + nested(_IFLA_PROP_LIST, text(_IFLA_ALT_IFNAME, name))


def veth(device: str, index: int, group: int, mac: str, mtu: int) -> bytes:
    """Return the body of RTM_NEWLINK for a veth without its peer, one queue."""
    return (
        link_header(index)
        + text(IFLA_IFNAME, device)
        + mac_attr(mac)
        + u32(IFLA_MTU, mtu)
        + u32(IFLA_GROUP, group)
        + u32(IFLA_NUM_TX_QUEUES, 1)
        + u32(IFLA_NUM_RX_QUEUES, 1)
    )


def veth_peer(name: str, index: int, mac: str, mtu: int, netns: int) -> bytes:
    """Return the attribute with a veth's peer, made in the namespace behind the descriptor `netns`."""
    peer = (
        link_header(index)
        + text(IFLA_IFNAME, name)
        + mac_attr(mac)
        + u32(IFLA_MTU, mtu)
        + u32(IFLA_NUM_TX_QUEUES, 1)
        + u32(IFLA_NUM_RX_QUEUES, 1)
        + u32(IFLA_NET_NS_FD, netns)
    )
    data = nested(_IFLA_INFO_DATA, attr(_VETH_INFO_PEER, peer))
    return nested(IFLA_LINKINFO, text(_IFLA_INFO_KIND, "veth"), data)


def conf_spec(values: tuple[tuple[str, int], ...]) -> bytes:
    """Return the attribute that sets IPv4 sysctls of a device (IFLA_AF_SPEC, taken by RTM_SETLINK alone)."""
    numbered = (u32(_CONF_NUMBERS[name], value) for name, value in values)
    return nested(IFLA_AF_SPEC, nested(socket.AF_INET, nested(_IFLA_INET_CONF, *numbered)))


def address(index: int, one: Address) -> bytes:
    """Return the body of RTM_NEWADDR or RTM_DELADDR."""
    ip, _, length = one.value.partition("/")
    packed = socket.inet_aton(ip)
    header = _ADDRESS.pack(socket.AF_INET, int(length), 0, one.scope, index)
    return header + attr(_IFA_LOCAL, packed) + attr(_IFA_ADDRESS, packed)


def address_query(index: int = 0) -> bytes:
    """Return the body of a dump of IPv4 addresses, of one device or all."""
    return _ADDRESS.pack(socket.AF_INET, 0, 0, 0, index)


def parse_address(body: bytes) -> tuple[int, LoAddress]:
    """Return a device's index and an address of it, with all that is needed to put it back."""
    _, length, flags, scope, index = _ADDRESS.unpack_from(body)
    attrs = parse_attrs(body, 8)
    if _IFA_FLAGS in attrs:
        flags = int.from_bytes(attrs[_IFA_FLAGS], "little")
    local = attrs.get(_IFA_LOCAL) or attrs.get(_IFA_ADDRESS, b"\0\0\0\0")
    kept = {number: payload for number, payload in attrs.items() if number not in (_IFA_CACHEINFO, _IFA_FLAGS)}
    if not flags & _IFA_F_PERMANENT and _IFA_CACHEINFO in attrs:
        kept[_IFA_CACHEINFO] = attrs[_IFA_CACHEINFO]
    value = f"{socket.inet_ntoa(local)}/{length}"
    flags &= ~(_IFA_F_SECONDARY | _IFA_F_PERMANENT)
    return index, LoAddress(value, scope, flags, tuple((number, payload.hex()) for number, payload in kept.items()))


def parse_local(body: bytes) -> str:
    """Return the address alone that an RTM_NEWADDR describes."""
    attrs = parse_attrs(body, 8)
    return socket.inet_ntoa((attrs.get(_IFA_LOCAL) or attrs.get(_IFA_ADDRESS, b"")).rjust(4, b"\0")[:4])


def lo_address(one: LoAddress) -> bytes:
    """Return the body of RTM_NEWADDR that puts an address back on lo."""
    if not one.attributes:
        return address(1, Address(one.value, one.scope))
    header = _ADDRESS.pack(socket.AF_INET, int(one.value.partition("/")[2]), 0, one.scope, 1)
    attrs = b"".join(attr(number, bytes.fromhex(payload)) for number, payload in one.attributes)
    return header + attrs + u32(_IFA_FLAGS, one.flags)


def route(one: Route, index: int | None) -> bytes:
    """Return the body of RTM_NEWROUTE or RTM_DELROUTE; `index` is that of the route's device."""
    ip, _, length = one.destination.partition("/")
    flags = _RTNH_F_ONLINK if one.onlink else 0
    body = _ROUTE.pack(
        socket.AF_INET, int(length), 0, 0, one.table, ROUTE_PROTOCOL, one.scope, _ROUTE_TYPES[one.type], flags
    )
    if int(length):
        body += attr(_RTA_DST, socket.inet_aton(ip))
    if index:
        body += u32(_RTA_OIF, index)
    if one.gateway:
        body += attr(_RTA_GATEWAY, socket.inet_aton(one.gateway))
    if one.source:
        body += attr(_RTA_PREFSRC, socket.inet_aton(one.source))
    if one.metric:
        body += u32(_RTA_PRIORITY, one.metric)
    return body


def route_query(protocol: int = 0, kind: int = 0, index: int = 0) -> bytes:
    """Return the body of a dump of IPv4 routes: of one protocol, type and device, where given."""
    body = _ROUTE.pack(socket.AF_INET, 0, 0, 0, 0, protocol, 0, kind, 0)
    return body + u32(_RTA_OIF, index) if index else body


def route_question(destination: str) -> bytes:
    """Return the body of a question which route the host takes to an address: that itself, not what comes of it."""
    header = _ROUTE.pack(socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
    return header + attr(_RTA_DST, socket.inet_aton(destination))


def is_ours_or_default(body: bytes) -> bool:
    """Say whether a route is of our protocol or leads everywhere, by its header alone."""
    _, length, _, _, _, protocol, _, _, _ = _ROUTE.unpack_from(body)
    return bool(protocol == ROUTE_PROTOCOL or length == 0)


def parse_route(body: bytes, names: dict[int, str]) -> tuple[int, int, Route]:
    """Return a route's protocol, the index of its device (0: none), and the route; `names` are device names."""
    _, length, _, _, table, protocol, scope, kind, flags = _ROUTE.unpack_from(body)
    attrs = parse_attrs(body, 12)
    index = int.from_bytes(attrs.get(_RTA_OIF, b""), "little")
    destination = socket.inet_ntoa(attrs[_RTA_DST]) if _RTA_DST in attrs else "0.0.0.0"
    return (
        protocol,
        index,
        Route(
            destination=f"{destination}/{length}",
            table=int.from_bytes(attrs[_RTA_TABLE], "little") if _RTA_TABLE in attrs else table,
            type=_ROUTE_TYPE_NAMES.get(kind, str(kind)),
            device=names.get(index, f"#{index}") if index else None,
            gateway=socket.inet_ntoa(attrs[_RTA_GATEWAY]) if _RTA_GATEWAY in attrs else None,
            source=socket.inet_ntoa(attrs[_RTA_PREFSRC]) if _RTA_PREFSRC in attrs else None,
            scope=scope,
            metric=int.from_bytes(attrs.get(_RTA_PRIORITY, b""), "little"),
            onlink=bool(flags & _RTNH_F_ONLINK),
        ),
    )


def neighbour(index: int, ip: str, mac: str) -> bytes:
    """Return the body of RTM_NEWNEIGH and RTM_DELNEIGH for a neighbour that is known for good."""
    header = _NEIGHBOUR.pack(socket.AF_INET, 0, index, _NUD_PERMANENT, 0, 0)
    return header + attr(_NDA_DST, socket.inet_aton(ip)) + attr(_NDA_LLADDR, mac_bytes(mac))


def neighbour_query(index: int = 0) -> bytes:
    """Return the body of a dump of IPv4 neighbours, of one device or all."""
    body = _NEIGHBOUR.pack(socket.AF_INET, 0, 0, 0, 0, 0)
    return body + u32(_NDA_IFINDEX, index) if index else body


def neighbour_question(index: int, ip: str) -> bytes:
    """Return the body of a question for one neighbour."""
    return _NEIGHBOUR.pack(socket.AF_INET, 0, index, 0, 0, 0) + attr(_NDA_DST, socket.inet_aton(ip))


def parse_neighbour(body: bytes) -> tuple[int, tuple[str, str] | None]:
    """Return a device's index and a permanent neighbour (address, MAC), or None for one that was learnt."""
    _, _, index, state, _, _ = _NEIGHBOUR.unpack_from(body)
    attrs = parse_attrs(body, 12)
    if not state & _NUD_PERMANENT or _NDA_LLADDR not in attrs or _NDA_DST not in attrs:
        return index, None
    return index, (socket.inet_ntoa(attrs[_NDA_DST]), attrs[_NDA_LLADDR].hex(":"))


def clsact(index: int) -> bytes:
    """Return the body of RTM_NEWQDISC for the hook of a device's filters."""
    return _TRAFFIC.pack(0, 0, index, _CLSACT_HANDLE, _CLSACT, 0) + text(_TCA_KIND, "clsact")


def _filter_header(index: int, direction: str, handle: int, protocol: int) -> bytes:
    info = _PREF << 16 | socket.htons(protocol) if handle else _PREF << 16
    return _TRAFFIC.pack(0, 0, index, handle, _PARENTS[direction], info)


def filter_program(index: int, direction: str, program: bytes) -> bytes:
    """Return the body of RTM_NEWTFILTER for one of our two filters."""
    options = nested(
        _TCA_OPTIONS,
        attr(_TCA_BPF_OPS_LEN, struct.pack("=H", len(program) // 8)),
        attr(_TCA_BPF_OPS, program),
        u32(_TCA_BPF_FLAGS, _TCA_BPF_FLAG_ACT_DIRECT),
    )
    return _filter_header(index, direction, 1, _ETH_P_ALL) + text(_TCA_KIND, "bpf") + options


def filter_place(index: int, direction: str) -> bytes:
    """Return the body of RTM_DELTFILTER for all that stands at our preference."""
    return _filter_header(index, direction, 0, 0)


def filter_query(index: int, direction: str) -> bytes:
    """Return the body of a dump of a hook's filters."""
    return _TRAFFIC.pack(0, 0, index, 0, _PARENTS[direction], 0)


def parse_filter(body: bytes) -> Filter | None:
    """Return what an RTM_NEWTFILTER shows at our preference, or None for one at another preference."""
    _, _, _, handle, _, info = _TRAFFIC.unpack_from(body)
    if info >> 16 != _PREF:
        return None
    attrs = parse_attrs(body, 20)
    options = parse_attrs(attrs.get(_TCA_OPTIONS, b""))
    if not handle and not options:
        return None  # the head of the chain, which the kernel dumps before the filters in it
    flags = int.from_bytes(options.get(_TCA_BPF_FLAGS, b""), "little")
    ours = attrs.get(_TCA_KIND) == b"bpf\0" and flags & _TCA_BPF_FLAG_ACT_DIRECT
    right = handle == 1 and info & 0xFFFF == socket.htons(_ETH_P_ALL)
    return Filter(options.get(_TCA_BPF_OPS) if ours and right else None)
