"""Decide what must change so that the kernel shows what the records ask for.

Everything here is pure: what is desired is made from a lease, what is observed is a view, and the difference
is a list of ops in the order in which they must run. A second plan, made after the ops have run, is empty.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from netaddr import IPNetwork, IPSet

from vmnet import filters
from vmnet.firewalls import Bridge, Chain, plan_chains, plan_chains_removal
from vmnet.ipam import gateway_mac
from vmnet.model import (
    HOST_PART,
    LIBVIRT_BRIDGE,
    LOOPBACK,
    POOL_SPAN,
    Block,
    Conflict,
    Lease,
    Maker,
    NetnsGone,
    NetnsId,
)
from vmnet.ops import (
    SCOPE_HOST,
    SCOPE_LINK,
    TABLE_LOCAL,
    TABLE_MAIN,
    AddAddress,
    AddAltName,
    AddBridge,
    AddClsact,
    AddNetns,
    Address,
    AddRoute,
    AddTun,
    AddVeth,
    DelAddress,
    DelFilter,
    DelLink,
    DelNeighbour,
    DelNetns,
    DelRoute,
    DelRules,
    ForgetFlows,
    LoAddress,
    LoadRules,
    Op,
    OwnTap,
    Peer,
    PersistTun,
    PutBackAddress,
    Route,
    SetConf,
    SetFilter,
    SetLink,
    SetNeighbour,
    SetSysctl,
)

HOST = ""
PEER_NAME = "eth0"
ALIAS_PREFIX = "vmnet:"
INDEX_BASE = 100_000
DEFAULT_ROUTE = "0.0.0.0/0"
_LAST_METRIC = 0xFFFFFFFF
_LO_INDEX = 1
_LO_WIDE = "127.0.0.1/8"
_LO_CARVED = "127.0.0.1/16"
# What stands on the lo of somebody else's namespace that vmnet set up: it was down, without or with 127.0.0.1/8.
_LO_WAS = {False: "was down without 127.0.0.1/8 before vmnet", True: "was down before vmnet"}
_LOCAL_SOURCE = "127.0.0.1"
# What stays local to lo beside the pool: the host part, and what programs may already use.
_KEPT_LOCAL = ("127.0.0.0/16", "127.64.0.0/10", "127.128.0.0/9")

Conf: TypeAlias = dict[str, int]
HOST_CONF: Conf = {"route_localnet": 0, "accept_local": 0, "forwarding": 1, "rp_filter": 1}
# Nothing of ours depends on it, and udev and systemd-sysctl write theirs soon after a device has come up.
_SET_ONCE = "rp_filter"


class Plane(NamedTuple):
    """The settings that the data plane is made from: first octet of the shadow, mark bit, link groups, ports.

    Names are answered to mapped guests at `dns_port` of the host, to native ones at the next.
    """

    shadow: int = 247
    mark: int = 0x08000000
    group_mapped: int = 32001
    group_native: int = 32002
    dns_port: int = 12753


class Link(NamedTuple):
    """A device as the kernel shows it; `kind` is veth, tap, tun or whatever else it is.

    `conf` holds the IPv4 sysctls of HOST_CONF; `disable_ipv6` is None on a kernel without IPv6, `owner` is None
    for a tap that anybody may open; `master` is the index of the bridge whose port it is, 0 for none.
    """

    ifindex: int
    name: str
    kind: str
    group: int
    alias: str
    mac: str | None
    mtu: int
    up: bool
    multicast: bool
    conf: Conf
    disable_ipv6: bool | None
    owner: int | None = None
    multi_queue: bool = False
    persist: bool = True
    master: int = 0


class Filter(NamedTuple):
    """What stands at pref 1 of a hook: our program's bytes, or None for something of another kind."""

    program: bytes | None


class Side(NamedTuple):
    """A device and all that hangs on it; `routes` are those of our protocol, `neighbours` the permanent ones."""

    link: Link | None = None
    addresses: frozenset[Address] = frozenset()
    routes: frozenset[Route] = frozenset()
    neighbours: frozenset[tuple[str, str]] = frozenset()
    filters: Mapping[str, Filter] = MappingProxyType({})


class Inside(NamedTuple):
    """What a guest's namespace shows: its device, its lo, our routes on lo, and whether it has a way out."""

    side: Side
    lo: tuple[LoAddress, ...]
    lo_up: bool
    lo_routes: frozenset[Route]
    has_default: bool
    lo_alias: str = ""


class GuestView(NamedTuple):
    """A guest as observed. `netns` is none (not a veth), absent, ours (the one recorded) or stranger.

    `inside` is None where the namespace is not there, is not ours, or may not be looked into, `netns_id` which one was
    seen to be ours. `stub`: an absent one's path is an empty file, as a run leaves it that is killed while it makes or
    deletes a namespace. `offered`: the device is one that libvirt made for the guest, and is not taken over yet.
    `alias` is how the address of an alias is there.
    """

    host: Side = Side()
    netns: str = "none"
    inside: Inside | None = None
    stub: bool = False
    netns_id: NetnsId | None = None
    offered: bool = False
    alias: frozenset[Address] = frozenset()


class Guest(NamedTuple):
    """A guest as desired, on both of its sides; `maker` is who makes its device."""

    name: str
    kind: str
    ifindex: int
    host: Side
    programs: dict[str, filters.Program]
    peer: Peer | None = None
    inside: Side | None = None
    inside_lo_routes: frozenset[Route] = frozenset()
    owned_netns: bool = False
    owner: int = 0
    queues: int = 1
    maker: Maker = "vmnet"


def dotted(number: int) -> str:
    """Return an IPv4 address, given as a number in host order, in dotted form."""
    return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def shadow_of(number: int, plane: Plane) -> int:
    """Return the shadow of an address of the pool: the same lower 24 bits under the shadow's first octet."""
    return plane.shadow << 24 | number & 0xFFFFFF


def link_index(block: Block) -> int:
    """Return the index that the device of a guest in `block` gets, unless somebody else's has it."""
    return INDEX_BASE + 2 * block.number


def desire(lease: Lease, plane: Plane, *, index_shift: int = 0) -> Guest:
    """Return what the kernel must show for `lease`."""
    first = lease.block.first
    native = lease.mode == "native"
    shadow_gateway = dotted(shadow_of(first + 1, plane))
    own_address = first + 2 if native else shadow_of(first + 2, plane)
    device = lease.device
    index = link_index(lease.block) + index_shift
    host_mac = None if lease.kind == "tun" else gateway_mac(lease.block)
    programs = {
        "ingress": filters.ingress(lease.kind, lease.mode, own_address),
        "egress": filters.egress(lease.kind, lease.mode, plane.mark),
    }
    host = Side(
        link=Link(
            ifindex=index,
            name=device,
            kind=lease.kind,
            group=plane.group_native if native else plane.group_mapped,
            alias=ALIAS_PREFIX + lease.name,
            mac=host_mac,
            mtu=lease.mtu,
            up=True,
            multicast=False,
            conf=HOST_CONF,
            disable_ipv6=True,
            owner=None if lease.kind == "veth" else lease.owner,
            multi_queue=lease.queues > 1,
        ),
        addresses=frozenset({Address(f"{shadow_gateway}/30")}),
        # The guest's own addresses alone too, and first: the DHCP server of a LAN may give the host just these. And the
        # shadow's, though the kernel has a route to it in table main: the rules of a VPN may come before that.
        routes=frozenset(
            Route(network, TABLE_LOCAL, "unicast", device, source=shadow_gateway, scope=SCOPE_LINK)
            for network in (
                f"{dotted(first)}/30",
                f"{dotted(first + 2)}/32",
                f"{dotted(shadow_of(first + 2, plane))}/32",
            )
        ),
        # In native mode the look-up comes after the rewriting, so the neighbour has the guest's own spelling.
        # Of a VM nobody knows the MAC for sure: it answers for itself.
        neighbours=frozenset({(dotted(own_address), lease.mac)} if lease.mac and lease.kind == "veth" else ()),
        filters={direction: Filter(filters.encode(program)) for direction, program in programs.items()},
    )
    guest = Guest(
        name=lease.name, kind=lease.kind, ifindex=index, host=host, programs=programs, owner=lease.owner,
        queues=lease.queues, maker=lease.maker,
    )  # fmt: skip
    if lease.kind != "veth" or lease.netns is None or lease.mac is None:
        return guest
    peer = Peer(PEER_NAME, index + 1, lease.mac, lease.netns.path)
    return guest._replace(
        peer=peer,
        inside=_desire_inside(lease, peer, own_address, host_mac or ""),
        inside_lo_routes=frozenset(_local_routes(_KEPT_LOCAL) if native else ()),
        owned_netns=lease.netns.owned,
    )


def _local_routes(networks: Iterable[object]) -> list[Route]:
    return [Route(str(one), TABLE_LOCAL, "local", "lo", source=_LOCAL_SOURCE, scope=SCOPE_HOST) for one in networks]


def _desire_inside(lease: Lease, peer: Peer, address: int, host_mac: str) -> Side:
    native = lease.mode == "native"
    own = dotted(address)
    gateway = dotted(address - 1)
    routes = {Route(DEFAULT_ROUTE, TABLE_MAIN, "unicast", peer.name, gateway=gateway)}
    if native:
        # These three keep a lo that goes down and up, and so has its /8 again, from cutting the guest off.
        routes |= {
            Route(f"{gateway}/32", TABLE_LOCAL, "unicast", peer.name, source=own, scope=SCOPE_LINK),
            Route(str(POOL_SPAN), TABLE_LOCAL, "unicast", peer.name, gateway=gateway, source=own, onlink=True),
        }
    return Side(
        link=Link(
            ifindex=peer.ifindex,
            name=peer.name,
            kind="veth",
            group=0,
            alias="",
            mac=peer.mac,
            mtu=lease.mtu,
            up=True,
            multicast=True,
            conf={"route_localnet": 1} if native else {},
            disable_ipv6=None,
        ),
        addresses=frozenset({Address(f"{own}/30")}),
        routes=frozenset(routes),
        neighbours=frozenset({(gateway, host_mac)} if native else ()),
    )


def is_ours(link: Link, desired: Guest) -> bool:
    """Say whether a device of a guest's name is the guest's: by its alias, or by kind, group and MAC."""
    wanted = desired.host.link
    assert wanted is not None
    if link.alias == wanted.alias:
        return True
    same = link.kind == wanted.kind and link.group == wanted.group
    return same and not link.alias and (link.mac == wanted.mac or link.kind == "tun")


def plan_guest(desired: Guest, observed: GuestView) -> list[Op]:
    """Return the ops that make a guest as desired.

    Raises Conflict where a device or a namespace of that name is somebody else's.
    """
    wanted = desired.host.link
    assert wanted is not None
    link = observed.host.link
    _refuse_others(link, desired, offered=observed.offered)
    if desired.maker == "libvirt":
        return _plan_taken_over(desired, observed.host)
    ops: list[Op] = []
    if desired.peer:
        if observed.netns == "stranger":
            raise Conflict(
                f"{desired.peer.place} is another network namespace than the one recorded for {desired.name}",
                hint=f"vmnet delete {desired.name}, then create it anew",
            )
        if observed.netns == "absent":
            if not desired.owned_netns:
                raise NetnsGone(
                    f"the network namespace {desired.peer.place} of {desired.name} is gone",
                    hint=f"start what made it, or vmnet delete {desired.name}",
                )
            ops.append(AddNetns(desired.peer.place, ALIAS_PREFIX + desired.name))
        inside = observed.inside
        if link and (inside is None or inside.side.link is None):
            # The far end went away or lies in another namespace: a veth is whole or it is not there.
            if inside is not None or observed.netns == "absent":
                ops.insert(0, DelLink(HOST, link.name, link.ifindex))
                link = None
        elif not link and inside and inside.side.link:
            raise Conflict(
                f"the network namespace {desired.peer.place} already has a device {PEER_NAME}",
                hint="give the guest a namespace without one",
            )
    elif link and (link.kind != wanted.kind or link.multi_queue != wanted.multi_queue):
        ops.append(DelLink(HOST, link.name, link.ifindex))
        link = None
    host = observed.host if link else Side()
    if link is None:
        ops += _make_device(desired)
        link = _as_made(desired, wanted)
    ops += _plan_host_side(desired, link, host)
    if desired.inside and desired.peer and (observed.inside or observed.netns == "absent"):
        seen = observed.inside or Inside(Side(), (), True, frozenset(), False)
        ops += _plan_inside(desired, desired.peer, seen, fresh=observed.netns == "absent")
    return ops


def _refuse_others(link: Link | None, desired: Guest, *, offered: bool) -> None:
    if link and not (offered or is_ours(link, desired)):
        raise Conflict(
            f"a device {link.name} is there that is not ours ({link.kind}, group {link.group}, alias {link.alias!r})",
            hint=f"rename or delete it (ip link del {link.name}), or give the guest another name",
        )


def _plan_taken_over(desired: Guest, observed: Side) -> list[Op]:
    """Return the ops that make a tap of libvirt's the guest's; without one there is nothing to do.

    It is taken off the bridge while it is down: up, it is to have its filters.
    """
    link = observed.link
    if link is None:
        return []
    if link.persist:
        return [DelLink(HOST, link.name, link.ifindex)]  # made by vmnet, when that made the guest's
    return (_down_first if link.master and link.up else _plan_host_side)(desired, link, observed)


def _down_first(desired: Guest, link: Link, observed: Side) -> list[Op]:
    """Return the ops for a device that has to be down for them; with that it loses routes and neighbours."""
    down: Op = SetLink(HOST, link.name, link.ifindex, up=False)
    observed = observed._replace(routes=frozenset(), neighbours=frozenset())
    return [down, *_plan_host_side(desired, link._replace(up=False), observed)]


def _make_device(desired: Guest) -> list[Op]:
    wanted = desired.host.link
    assert wanted is not None
    if desired.peer:
        return [AddVeth(wanted.name, wanted.ifindex, wanted.group, wanted.mac or "", wanted.mtu, desired.peer)]
    return [AddTun(wanted.name, wanted.ifindex, desired.kind, desired.owner, desired.queues)]


def _as_made(desired: Guest, wanted: Link) -> Link:
    """Return what a device is before anything is set that its making does not set."""
    made = wanted._replace(alias="", up=False, multicast=True, conf={}, disable_ipv6=False, persist=False)
    if desired.peer:
        return made
    return made._replace(mac=None, group=0, mtu=0)


def _plan_renamed(desired: Guest, wanted: Link, link: Link, observed: Side) -> list[Op]:
    """Return the ops for a device of another name. Before Linux 6.2 one that is up keeps its."""
    if link.up:
        return _down_first(desired, link, observed)
    named: list[Op] = [SetLink(HOST, link.name, link.ifindex, name=wanted.name)]
    if desired.maker == "libvirt" and link.alias != wanted.alias:
        named.append(AddAltName(wanted.name, link.ifindex, link.name))  # libvirt goes on to call it so
    return named + _plan_host_side(desired, link._replace(name=wanted.name), observed)


def _plan_host_side(desired: Guest, link: Link, observed: Side) -> list[Op]:
    """Return the ops for the host's side: sysctls and filters stand before the device goes up."""
    wanted = desired.host.link
    assert wanted is not None
    name, index = link.name, link.ifindex
    if name != wanted.name:
        return _plan_renamed(desired, wanted, link, observed)
    ops: list[Op] = []
    change = SetLink(
        HOST, name, index,
        alias=wanted.alias if link.alias != wanted.alias else None,
        group=wanted.group if link.group != wanted.group else None,
        mac=wanted.mac if wanted.mac and link.mac != wanted.mac else None,
        mtu=wanted.mtu if link.mtu != wanted.mtu else None,
        multicast=False if link.multicast else None,
        master=0 if link.master else None,
    )  # fmt: skip
    if change != SetLink(HOST, name, index):
        ops.append(change)
    values = tuple(
        (key, value)
        for key, value in wanted.conf.items()
        if link.conf.get(key) != value and (key != _SET_ONCE or key not in link.conf)
    )
    if values:
        ops.append(SetConf(HOST, name, index, values))
    hooks = {direction: observed.filters.get(direction) for direction in desired.programs}
    if not any(hooks.values()):
        ops.append(AddClsact(name, index))
    for direction, program in desired.programs.items():
        there = hooks[direction]
        if there == desired.host.filters[direction]:
            continue
        if there and there.program is None:
            ops.append(DelFilter(name, index, direction))
        ops.append(SetFilter(name, index, direction, program))
    if link.disable_ipv6 is False:
        # A guest's router advertisement would give the host a default route through the guest.
        ops.append(SetSysctl(f"net/ipv6/conf/{name}/disable_ipv6", 1))
    ops += [AddAddress(HOST, name, index, address) for address in sorted(desired.host.addresses - observed.addresses)]
    ops += [DelAddress(HOST, name, index, address) for address in sorted(observed.addresses - desired.host.addresses)]
    if not link.up:
        ops.append(SetLink(HOST, name, index, up=True))
    ops += [DelRoute(HOST, route, index) for route in sorted(observed.routes - desired.host.routes, key=str)]
    ops += [AddRoute(HOST, route, index, "prepend") for route in sorted(desired.host.routes - observed.routes)]
    known = {address for address, _ in desired.host.neighbours}
    ops += [
        DelNeighbour(name, index, address, mac) for address, mac in sorted(observed.neighbours) if address not in known
    ]
    ops += [
        SetNeighbour(HOST, name, index, address, mac)
        for address, mac in sorted(desired.host.neighbours - observed.neighbours)
    ]
    if desired.kind != "veth":
        ops += _plan_owner(desired, link)
    return ops


def _plan_owner(desired: Guest, link: Link) -> list[Op]:
    if desired.maker == "libvirt":
        # With one queue nobody else can open it, and while it is there libvirt has it open.
        return [OwnTap(link.name, desired.owner)] if link.multi_queue and link.owner != desired.owner else []
    if link.persist and link.owner == desired.owner:
        return []
    return [PersistTun(link.name, desired.kind, desired.owner, desired.queues)]


def _gateways_last(route: Route) -> tuple[bool, str]:
    return route.gateway is not None, route.destination


def _plan_inside(desired: Guest, peer: Peer, observed: Inside, *, fresh: bool) -> list[Op]:
    side = desired.inside
    assert side is not None
    assert side.link is not None
    place, wanted = peer.place, side.link
    link = observed.side.link
    index = link.ifindex if link else peer.ifindex
    ops: list[Op] = []
    # In mapped mode nothing needs lo: that of somebody else's namespace stays as it is.
    if not observed.lo_up and (desired.owned_netns or desired.inside_lo_routes):
        note = None
        if not desired.owned_netns and not observed.lo_alias:
            note = _LO_WAS[_LO_WIDE in [one.value for one in observed.lo]]
        ops.append(SetLink(place, "lo", _LO_INDEX, alias=note, up=True))
    elif desired.owned_netns and desired.inside_lo_routes and not fresh:
        ops += _plan_source(place, observed.lo)
    if desired.inside_lo_routes:
        ops += [
            AddRoute(place, route, _LO_INDEX, "append")
            for route in sorted(desired.inside_lo_routes - observed.lo_routes)
        ]
    # The routes are enough; the lo of somebody else's namespace keeps its addresses.
    if desired.inside_lo_routes and desired.owned_netns:
        lo = observed.lo
        if fresh or not observed.lo_up:
            # The kernel gives a lo that goes up its address by itself.
            lo = (LoAddress(_LO_WIDE, SCOPE_HOST, 0, ()),)
        ops += plan_carved_lo(place, lo)
    change = SetLink(
        place, peer.name, index,
        mac=wanted.mac if link and link.mac != wanted.mac else None,
        mtu=wanted.mtu if link and link.mtu != wanted.mtu else None,
    )  # fmt: skip
    if change != SetLink(place, peer.name, index):
        ops.append(change)
    conf = link.conf if link else {}
    values = tuple((key, value) for key, value in wanted.conf.items() if conf.get(key) != value)
    if values:
        ops.append(SetConf(place, peer.name, index, values))
    ops += [AddAddress(place, peer.name, index, one) for one in sorted(side.addresses - observed.side.addresses)]
    if not (link and link.up):
        ops.append(SetLink(place, peer.name, index, up=True))
    routes = side.routes
    if observed.has_default:
        # Any way out will do: a guest that has one of its own keeps it.
        routes = frozenset(route for route in routes if route.destination != DEFAULT_ROUTE)
    ops += [AddRoute(place, one, index) for one in sorted(routes - observed.side.routes, key=_gateways_last)]
    ops += [
        SetNeighbour(place, peer.name, index, address, mac)
        for address, mac in sorted(side.neighbours - observed.side.neighbours)
    ]
    return ops


def plan_removal(desired: Guest, observed: GuestView, *, keep_netns: bool = False) -> list[Op]:
    """Return the ops after which nothing of a guest is left in the kernel; what is not ours stays.

    With `keep_netns` a namespace that vmnet made stays too, and with it what runs in it.
    """
    ops: list[Op] = []
    link = observed.host.link if observed.host.link and is_ours(observed.host.link, desired) else None
    if link:
        ops.append(DelLink(HOST, link.name, link.ifindex))
    if desired.peer and (observed.netns == "ours" or observed.stub):
        place = desired.peer.place
        if desired.owned_netns:
            if not keep_netns:
                ops.append(DelNetns(place))
        elif observed.inside and (link or observed.inside.side.link is None):
            # Else the device in there is somebody else's, and so is what else there is of ours: another guest's.
            ops += plan_left(place, observed.inside)
    return ops


def plan_left(place: str, inside: Inside) -> list[Op]:
    """Return the ops after which nothing of a guest is left on lo in a namespace that is not vmnet's own."""
    ops: list[Op] = [DelRoute(place, route, _LO_INDEX) for route in sorted(inside.lo_routes)]
    if inside.lo_alias not in _LO_WAS.values():
        return ops
    ops.append(SetLink(place, "lo", _LO_INDEX, up=False))
    # Going down takes routes that an address has while its device was never up: only a new address has them.
    ops += [_take_off(place, one) for one in inside.lo]
    had_wide = inside.lo_alias == _LO_WAS[True]
    ops += [PutBackAddress(place, one) for one in inside.lo if one.value != _LO_WIDE or had_wide]
    # Last: until then it says what is still to be done.
    return [*ops, SetLink(place, "lo", _LO_INDEX, alias="")]


# The host part


class Found(NamedTuple):
    """How the host was at the first carve of this boot; `forwarding` is that of each device, and `default`, by name."""

    lo: tuple[LoAddress, ...]
    ip_forward: int
    accept_redirects: int
    forwarding: dict[str, int]


class Use(NamedTuple):
    """Somebody else's use of addresses: `kind` is local (this host answers there) or foreign (something else does)."""

    kind: str
    network: IPNetwork
    what: str

    def __str__(self) -> str:
        return f"{self.network}: {self.what}"


class HostView(NamedTuple):
    """The host part as observed: lo, routes of our protocol, the listing of our table, ip_forward.

    `chains` are those of other firewalls, seen only with rights; `bridges` matter only where there are such chains.
    `libvirt` is the device on which libvirt puts the taps of its network `vmnet`.
    """

    lo: tuple[LoAddress, ...]
    lo_up: bool
    routes: frozenset[Route]
    listing: str | None
    ip_forward: int
    chains: tuple[Chain, ...] = ()
    bridges: tuple[Bridge, ...] = ()
    libvirt: Link | None = None


class HostWish(NamedTuple):
    """The host part as desired: `kept` are ranges of the pool that stay local, `holes` those left to others.

    `text` is the ruleset as it is loaded, `listing` how nft lists it; None where the caller may not see rules.
    `libvirt`: a bridge is needed on which libvirt can put its taps.
    """

    plane: Plane
    kept: tuple[IPNetwork, ...]
    holes: tuple[IPNetwork, ...]
    text: str
    listing: str | None
    libvirt: bool = False


@lru_cache(maxsize=4)
def kept_local(
    pool: tuple[IPNetwork, ...], reserved: tuple[IPNetwork, ...], used: tuple[IPNetwork, ...]
) -> tuple[IPNetwork, ...]:
    """Return the parts of 127.1.0.0 to 127.63.255.255 that stay local to lo: beside the pool, reserved, or used."""
    beside = IPSet([POOL_SPAN]) - IPSet([HOST_PART]) - IPSet(pool)
    kept = beside | ((IPSet(reserved) | IPSet(used)) & IPSet([POOL_SPAN])) - IPSet([HOST_PART])
    return tuple(sorted(kept.iter_cidrs()))


def without(networks: Sequence[IPNetwork], holes: Sequence[IPNetwork]) -> list[IPNetwork]:
    """Return networks that hold what is in `networks` and not in `holes`."""
    return list((IPSet(networks) - IPSet(holes)).iter_cidrs()) if holes else list(networks)


def host_routes(wish: HostWish) -> list[Route]:
    """Return the routes of the host part, in the order in which they are to be added."""
    local = [IPNetwork(prefix) for prefix in _KEPT_LOCAL]
    fence = [POOL_SPAN]
    # Where routing rules part table local from the others, what stands in it would hide their routes.
    local = without(local, wish.holes)
    if wish.holes or wish.kept:
        # The local routes go when lo goes down: the /8 that comes back with it must find no fence in their place.
        fence = without(fence, [*wish.holes, *wish.kept, HOST_PART])
    routes = _local_routes([*local, *wish.kept])
    # A piece of the fence may be just a guest's block: by its metric it comes last.
    routes += [
        Route(str(part), TABLE_LOCAL, "unreachable", metric=0 if part == POOL_SPAN else _LAST_METRIC) for part in fence
    ]
    routes.append(Route(f"{wish.plane.shadow}.0.0.0/8", TABLE_MAIN, "unreachable", metric=_LAST_METRIC))
    return routes


def _index(route: Route) -> int:
    return _LO_INDEX if route.device else 0


def plan_host(wish: HostWish, observed: HostView) -> list[Op]:
    """Return the ops that carve and fence the host: the carve last, when nothing depends on the /8 any more."""
    routes = host_routes(wish)
    ops: list[Op] = []
    if not observed.lo_up:
        ops.append(SetLink(HOST, "lo", _LO_INDEX, up=True))
    else:
        ops += _plan_source(HOST, observed.lo)
    ops += [
        AddRoute(HOST, route, _index(route), "append" if route.device else "add")
        for route in routes
        if route not in observed.routes or not observed.lo_up
    ]
    ops += [DelRoute(HOST, route, _index(route)) for route in sorted(observed.routes - set(routes), key=str)]
    if wish.listing is not None and observed.listing != wish.listing:
        ops.append(LoadRules(wish.text))
        if observed.routes:
            ops.append(ForgetFlows(wish.plane.shadow))
    ops += plan_chains(observed.chains, observed.bridges, wish.plane.dns_port)
    if observed.ip_forward != 1:
        ops.append(SetSysctl("net/ipv4/ip_forward", 1))
    return ops + plan_bridge(observed.libvirt, wanted=wish.libvirt) + plan_carved_lo(HOST, observed.lo)


def plan_bridge(link: Link | None, *, wanted: bool) -> list[Op]:
    """Return the ops that make the bridge of libvirt's network where it is wanted, and always have it down.

    Down it passes nothing from port to port. It stays where nobody's tap is on it: libvirt takes a network whose bridge
    is not there when libvirtd starts for one that is not active.
    """
    if link is None:
        return [AddBridge(LIBVIRT_BRIDGE)] if wanted else []
    return [SetLink(HOST, link.name, link.ifindex, up=False)] if link.kind == "bridge" and link.up else []


def plan_bridge_removal(link: Link | None) -> list[Op]:
    """Return the ops after which there is no bridge; a device of its name that is none is somebody else's."""
    return [DelLink(HOST, link.name, link.ifindex)] if link and link.kind == "bridge" else []


def _plan_source(place: str, lo: Sequence[LoAddress]) -> list[Op]:
    """Return the op that gives a lo that is up its 127.0.0.1, the source of our routes on it, if it has lost that."""
    if any(one.value.startswith(f"{_LOCAL_SOURCE}/") for one in lo):
        return []
    return [AddAddress(place, "lo", _LO_INDEX, Address(_LO_CARVED, SCOPE_HOST))]


def plan_carved_lo(place: str, lo: Sequence[LoAddress]) -> list[Op]:
    """Return the ops that take 127.0.0.1/8 off lo, with /16 in its stead, and keep all its other addresses."""
    wide = next((one for one in lo if one.value == _LO_WIDE), None)
    if wide is None:
        return []
    others = [one for one in lo if one.value not in (_LO_WIDE, _LO_CARVED)]
    # The first address of a subnet gives the source of what comes from this host, and takes the others with it.
    moved = {HOST_PART, LOOPBACK}
    ops: list[Op] = []
    if _LO_CARVED not in [one.value for one in lo]:
        same_subnet = [one for one in others if IPNetwork(one.value).cidr == HOST_PART]
        ops += [_take_off(place, one) for one in same_subnet]
        scope = same_subnet[0].scope if same_subnet else wide.scope
        ops.append(PutBackAddress(place, wide._replace(value=_LO_CARVED, scope=scope)))
    else:
        moved = {LOOPBACK}
    ops.append(_take_off(place, wide))
    return ops + [PutBackAddress(place, one) for one in others if IPNetwork(one.value).cidr in moved]


def plan_restored_lo(place: str, lo: Sequence[LoAddress], found: Sequence[LoAddress] | None) -> list[Op]:
    """Return the ops that put lo back: as it was found, or with a 127.0.0.1/8 where that is not known.

    Addresses that others added or took away meanwhile are left so. Those outside of 127/8 are not touched, not even
    for their order: while they are off, their routes go, and nothing of ours answers for them.
    """
    values = [one.value for one in lo]
    carved = next((one for one in lo if one.value == _LO_CARVED), None)
    if found is None:
        found = [carved._replace(value=_LO_WIDE)] if carved else []
    order = {one.value: position for position, one in enumerate(found)}
    wide = next((one for one in found if one.value == _LO_WIDE), None)
    surplus = carved is not None and _LO_CARVED not in order
    has_first = carved is None and any(value.startswith("127.0.0.1/") for value in values)
    if not surplus and (wide is None or _LO_WIDE in values or has_first):
        return []
    if wide is None or carved is None:
        return [_take_off(place, carved)] if carved else [PutBackAddress(place, wide)] if wide else []
    # The kernel puts a new address behind those of its scope, and makes it a secondary of one of its subnet: so
    # those that stood behind this one step aside.
    last = len(order)
    behind = sorted(
        (one for one in lo if IPNetwork(one.value) in LOOPBACK and order.get(one.value, last) > order[_LO_WIDE]),
        key=lambda one: order.get(one.value, last),
    )
    ops: list[Op] = [_take_off(place, one) for one in behind if one != carved]
    ops.append(PutBackAddress(place, wide))
    if carved in behind:
        ops.append(_take_off(place, carved))
    return ops + [PutBackAddress(place, one) for one in behind if one != carved or not surplus]


def _take_off(place: str, address: LoAddress) -> DelAddress:
    return DelAddress(place, "lo", _LO_INDEX, Address(address.value, address.scope))


def guess_found(observed: HostView, *, guarded: bool) -> Found | None:
    """Return how a host may have been found that bears our routes and of which nothing is noted, else None.

    Like most: with a 127.0.0.1/8 that came first. It did not forward if our rules guarded it (`guarded`).
    """
    if not observed.routes:
        return None
    lo = [one for one in observed.lo if one.value != _LO_CARVED]
    carved = next((one for one in observed.lo if one.value == _LO_CARVED), None)
    if carved and _LO_WIDE not in [one.value for one in lo]:
        lo.insert(0, carved._replace(value=_LO_WIDE))
    return Found(tuple(lo), 0 if guarded else observed.ip_forward, 1, {})


def plan_host_removal(
    observed: HostView, found: Found | None, *, others_forward: bool, now: Found | None = None
) -> list[Op]:
    """Return the ops that put the host back as it was found: rules, lo, our routes, forwarding.

    `now` is how forwarding is at present, where that is known: a run that was killed may have put back half of it.
    """
    ops = plan_chains_removal(observed.chains)
    if observed.listing is not None:
        ops.append(DelRules())
    ops += plan_bridge_removal(observed.libvirt)
    if found or observed.routes:
        ops += plan_restored_lo(HOST, observed.lo, found.lo if found else None)
    ops += [DelRoute(HOST, route, _index(route)) for route in sorted(observed.routes, key=_fence_first)]
    if found and not found.ip_forward and not others_forward and (observed.ip_forward or now):
        ops += _plan_forwarding_off(found, None if observed.ip_forward else now)
    return ops


def _plan_forwarding_off(found: Found, now: Found | None) -> list[Op]:
    """Return the ops that take forwarding back; with `now` it is off already, and only what differs is put right."""
    # The kernel sets all of the others together with ip_forward (inet_forward_change, net/ipv4/devinet.c).
    ops: list[Op] = [] if now else [SetSysctl("net/ipv4/ip_forward", 0)]
    if now is None or now.accept_redirects != found.accept_redirects:
        ops.append(SetSysctl("net/ipv4/conf/all/accept_redirects", found.accept_redirects))
    return ops + [
        SetSysctl(f"net/ipv4/conf/{name}/forwarding", value)
        for name, value in sorted(found.forwarding.items())
        if value and (now is None or now.forwarding.get(name) == 0)
    ]


def _fence_first(route: Route) -> tuple[bool, str]:
    return route.type != "unreachable", str(route)
