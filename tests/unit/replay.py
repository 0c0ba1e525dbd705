"""What ops would make of a view: a model of the kernel, small enough to be read, for the laws of the plan."""

from netaddr import IPNetwork

from vmnet import filters, ops
from vmnet.firewalls import Chain
from vmnet.ops import Op
from vmnet.plan import HOST, HOST_CONF, Filter, GuestView, HostView, Inside, Link, Side

_MADE = Link(
    ifindex=0, name="", kind="", group=0, alias="", mac=None, mtu=1500, up=False, multicast=True,
    conf=dict.fromkeys(HOST_CONF, 7), disable_ipv6=False, persist=False,
)  # fmt: skip
WIDE = ops.LoAddress("127.0.0.1/8", ops.SCOPE_HOST, 0, ())


def on_guest(view: GuestView, op: Op) -> GuestView:
    """Return the guest's view after one op."""
    match op:
        case ops.AddNetns():
            return view._replace(netns="ours", inside=Inside(Side(), (WIDE,), True, frozenset(), False))
        case ops.DelNetns():
            return view._replace(netns="absent", inside=None)
        case ops.AddVeth():
            link = _MADE._replace(
                ifindex=op.ifindex, name=op.device, kind="veth", group=op.group, mac=op.mac, mtu=op.mtu
            )
            assert view.host.link is None
            assert view.inside
            peer = _MADE._replace(
                ifindex=op.peer.ifindex, name=op.peer.name, kind="veth", mac=op.peer.mac, mtu=op.mtu, conf={}
            )
            return view._replace(host=Side(link._replace(persist=True)), inside=view.inside._replace(side=Side(peer)))
        case ops.AddTun():
            assert view.host.link is None
            link = _MADE._replace(ifindex=op.ifindex, name=op.device, kind=op.kind, multi_queue=op.queues > 1)
            return view._replace(host=Side(link))
        case ops.DelLink(place=""):
            inside = view.inside and view.inside._replace(side=Side())
            return view._replace(host=Side(), inside=inside)
        case ops.PersistTun():
            assert view.host.link
            return view._replace(host=view.host._replace(link=view.host.link._replace(persist=True, owner=op.owner)))
        case ops.SetSysctl():
            assert view.host.link
            assert op.key == f"net/ipv6/conf/{view.host.link.name}/disable_ipv6"
            return view._replace(host=view.host._replace(link=view.host.link._replace(disable_ipv6=True)))
        case ops.OwnTap():
            assert view.host.link
            return view._replace(host=view.host._replace(link=view.host.link._replace(owner=op.owner)))
        case ops.AddClsact() | ops.AddAltName():
            return view
    place = getattr(op, "place", HOST)
    if place == HOST:
        return view._replace(host=on_side(view.host, op))
    assert view.inside
    if on_lo(op):
        return view._replace(inside=on_inside_lo(view.inside, op))
    side = on_side(view.inside.side, op)
    has_default = any(route.destination == "0.0.0.0/0" for route in side.routes) or view.inside.has_default
    return view._replace(inside=view.inside._replace(side=side, has_default=has_default))


def on_lo(op: Op) -> bool:
    """Say whether an op of a place is about its lo."""
    if isinstance(op, ops.AddRoute | ops.DelRoute):
        return op.route.device == "lo"
    return isinstance(op, ops.PutBackAddress) or getattr(op, "device", "") == "lo"


def on_inside_lo(inside: Inside, op: Op) -> Inside:
    """Return a namespace's view after an op on its lo."""
    match op:
        case ops.SetLink(up=True):
            return inside._replace(lo_up=True, lo=inside.lo or (WIDE,))
        case ops.AddRoute():
            return inside._replace(lo_routes=inside.lo_routes | {op.route})
        case ops.DelRoute():
            return inside._replace(lo_routes=inside.lo_routes - {op.route})
    return inside._replace(lo=on_lo_addresses(inside.lo, op))


def on_lo_addresses(lo: tuple[ops.LoAddress, ...], op: Op) -> tuple[ops.LoAddress, ...]:
    """Return lo's addresses after an op: ordered by scope, and those of a subnet gone with its first."""
    match op:
        case ops.AddAddress():
            new = ops.LoAddress(op.address.value, op.address.scope, 0, ())
        case ops.PutBackAddress():
            new = op.address
        case ops.DelAddress():
            subnet = IPNetwork(op.address.value).cidr
            same = [one.value for one in lo if IPNetwork(one.value).cidr == subnet]
            if same and same[0] == op.address.value:
                return tuple(one for one in lo if one.value not in same)
            return tuple(one for one in lo if one.value != op.address.value)
        case _:
            raise AssertionError(op)
    if new.value in [one.value for one in lo]:
        return lo
    after = [position for position, one in enumerate(lo) if one.scope >= new.scope]
    position = after[-1] + 1 if after else 0
    return (*lo[:position], new, *lo[position:])


def on_side(side: Side, op: Op) -> Side:
    """Return a device and what hangs on it after an op."""
    assert side.link, op
    match op:
        case ops.SetLink():
            assert op.name is None or not side.link.up, "before Linux 6.2 a device that is up keeps its name"
            changes = {
                key: value
                for key in ("alias", "group", "mac", "mtu", "up", "multicast", "name", "master")
                if (value := getattr(op, key)) is not None
            }
            left = side if op.up is not False else side._replace(routes=frozenset(), neighbours=frozenset())
            return left._replace(link=side.link._replace(**changes))
        case ops.SetConf():
            return side._replace(link=side.link._replace(conf={**side.link.conf, **dict(op.values)}))
        case ops.SetFilter():
            there = side.filters.get(op.direction)
            assert there is None or there.program is not None, "a filter of another kind is in the way"
            return side._replace(filters={**side.filters, op.direction: Filter(filters.encode(op.program))})
        case ops.DelFilter():
            return side._replace(filters={key: one for key, one in side.filters.items() if key != op.direction})
        case ops.AddAddress():
            return side._replace(addresses=side.addresses | {op.address})
        case ops.DelAddress():
            return side._replace(addresses=side.addresses - {op.address})
        case ops.AddRoute():
            assert side.link.up, "a route needs its device up"
            return side._replace(routes=side.routes | {op.route})
        case ops.DelRoute():
            return side._replace(routes=side.routes - {op.route})
        case ops.DelNeighbour():
            return side._replace(neighbours=side.neighbours - {(op.address, op.mac)})
        case ops.SetNeighbour():
            kept = {one for one in side.neighbours if one[0] != op.address}
            return side._replace(neighbours=frozenset(kept | {(op.address, op.mac)}))
        case _:
            raise AssertionError(op)


def on_host(view: HostView, op: Op, listing: str) -> HostView:
    """Return the host part after one op; `listing` is how the wished ruleset is listed."""
    match op:
        case ops.AddRoute():
            return view._replace(routes=view.routes | {op.route})
        case ops.DelRoute():
            return view._replace(routes=view.routes - {op.route})
        case ops.LoadRules():
            return view._replace(listing=listing)
        case ops.DelRules():
            return view._replace(listing=None)
        case ops.PutRules():
            return view._replace(chains=tuple(_with_rules(one, op) for one in view.chains))
        case ops.SetSysctl(key="net/ipv4/ip_forward"):
            return view._replace(ip_forward=op.value)
        case ops.SetSysctl() | ops.ForgetFlows():
            return view
        case ops.SetLink():
            return view._replace(lo_up=True)
    return view._replace(lo=on_lo_addresses(view.lo, op))


def _with_rules(chain: Chain, op: ops.PutRules) -> Chain:
    if (chain.program, chain.name) != (op.program, op.chain):
        return chain
    assert chain.rules == op.old, "iptables refuses to delete what is not there"
    return chain._replace(rules=op.new)
