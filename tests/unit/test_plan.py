"""Laws of the plan: a second one is empty, whatever was observed; a stop at any op heals; the foreign stays."""

from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from netaddr import IPNetwork, IPSet

from tests.unit.replay import WIDE, on_guest, on_host, on_lo_addresses
from vmnet import ops
from vmnet.ipam import guest_mac
from vmnet.model import POOL_BLOCKS, Block, Conflict, Kind, Lease, Mode, Netns, NetnsId
from vmnet.ops import SCOPE_GLOBAL, SCOPE_HOST, Address, LoAddress, Op, Route
from vmnet.plan import (
    HOST,
    Filter,
    Found,
    Guest,
    GuestView,
    HostView,
    HostWish,
    Inside,
    Link,
    Plane,
    Side,
    desire,
    host_routes,
    kept_local,
    plan_guest,
    plan_host,
    plan_host_removal,
    plan_removal,
)

T = TypeVar("T")
KINDS: list[tuple[Kind, Mode]] = [
    ("tap", "mapped"), ("tun", "native"), ("tun", "mapped"), ("veth", "native"), ("veth", "mapped"),
]  # fmt: skip
IDENTITY = NetnsId(4, 4026532000, "boot")


def lease_of(kind: Kind, mode: Mode, number: int = 0, *, owned: bool = True, queues: int = 1) -> Lease:
    block = Block(number)
    return Lease(
        name="web", block=block, kind=kind, mode=mode, mac=None if kind == "tun" else guest_mac(block), mtu=1500,
        owner=1000, queues=queues, netns=Netns("/run/netns/web", owned, IDENTITY) if kind == "veth" else None,
        wish="up", created="2026-01-01T00:00:00Z",
    )  # fmt: skip


def absent(kind: Kind, *, owned: bool = True) -> GuestView:
    if kind != "veth":
        return GuestView()
    if owned:
        return GuestView(netns="absent")
    return GuestView(netns="ours", inside=Inside(Side(), (WIDE,), True, frozenset(), False))


def replay(view: GuestView, steps: list[Op]) -> GuestView:
    for op in steps:
        view = on_guest(view, op)
    return view


def right(desired: Guest, kind: Kind, *, owned: bool = True) -> GuestView:
    view = absent(kind, owned=owned)
    return replay(view, plan_guest(desired, view))


@st.composite
def guests(draw: st.DrawFn) -> tuple[Guest, Kind, bool]:
    kind, mode = draw(st.sampled_from(KINDS))
    owned = draw(st.booleans())
    lease = lease_of(kind, mode, draw(st.integers(0, POOL_BLOCKS - 1)), owned=owned)
    return desire(lease, Plane(shadow=draw(st.integers(240, 254)))), kind, owned


@st.composite
def drifted(draw: st.DrawFn) -> tuple[Guest, GuestView]:
    """A guest, and a view of it in which things are missing, altered or added."""
    desired, kind, owned = draw(guests())
    view = right(desired, kind, owned=owned)
    link = view.host.link
    assert link
    alterations: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
        {},
        optional={
            "alias": st.just(""), "mtu": st.integers(576, 9000), "up": st.booleans(), "multicast": st.booleans(),
            "disable_ipv6": st.sampled_from([False, True, None]), "persist": st.booleans(),
            "conf": st.just({"route_localnet": 1, "forwarding": 0}), "master": st.just(7), "name": st.just("other0"),
        },
    )  # fmt: skip
    link = link._replace(**draw(alterations))
    if not link.alias:
        link = link._replace(name="vmn-web")  # by one of both it is known
    side = view.host
    foreign = Route("127.9.9.0/30", ops.TABLE_LOCAL, "unicast", link.name)
    keep = st.booleans()
    side = Side(
        link=link,
        addresses=frozenset(one for one in side.addresses if draw(keep)) | draw(extra(Address("10.1.1.1/24"))),
        routes=frozenset(one for one in side.routes if link.up and draw(keep)) | draw(extra(foreign)),
        neighbours=frozenset(one for one in side.neighbours if draw(keep)),
        filters={key: draw(st.sampled_from([one, Filter(None)])) for key, one in side.filters.items() if draw(keep)},
    )
    view = view._replace(host=side)
    if draw(st.integers(0, 9)) == 0:
        view = view._replace(host=Side(), inside=view.inside and view.inside._replace(side=Side()))
    if view.inside and view.inside.side.link:
        inner = view.inside.side
        inner_link = inner.link
        assert inner_link
        up = draw(keep)
        inner = Side(
            link=inner_link._replace(up=up, conf=draw(st.sampled_from([{}, inner_link.conf]))),
            addresses=frozenset(one for one in inner.addresses if draw(keep)),
            routes=frozenset(one for one in inner.routes if up and draw(keep)),
            neighbours=frozenset(one for one in inner.neighbours if draw(keep)),
        )
        default = any(route.destination == "0.0.0.0/0" for route in inner.routes)
        no_lo: tuple[LoAddress, ...] = ()
        lo = draw(st.sampled_from([no_lo, (WIDE,), view.inside.lo]))
        lo_up = bool(lo)
        view = view._replace(inside=Inside(
                inner if draw(st.integers(0, 9)) else Side(),
                lo, lo_up, frozenset(one for one in view.inside.lo_routes if lo_up and draw(keep)), default,
            ),
        )  # fmt: skip
    return desired, view


def extra(value: T) -> st.SearchStrategy[frozenset[T]]:
    return st.sampled_from([frozenset(), frozenset({value})])


@pytest.mark.parametrize(("kind", "mode"), KINDS)
@pytest.mark.parametrize("owned", [True, False])
def test_a_second_plan_is_empty(kind: Kind, mode: Mode, owned: bool) -> None:
    desired = desire(lease_of(kind, mode, owned=owned), Plane())
    view = absent(kind, owned=owned)
    assert plan_guest(desired, replay(view, plan_guest(desired, view))) == []


@given(drifted())
def test_any_drift_heals(case: tuple[Guest, GuestView]) -> None:
    desired, view = case
    assert plan_guest(desired, replay(view, plan_guest(desired, view))) == []


@given(drifted(), st.data())
def test_a_stop_at_any_op_heals(case: tuple[Guest, GuestView], data: st.DataObject) -> None:
    desired, view = case
    steps = plan_guest(desired, view)
    done = steps[: data.draw(st.integers(0, len(steps)))]
    view = replay(view, done)
    if any(isinstance(op, ops.AddTun) for op in done) and not any(isinstance(op, ops.PersistTun) for op in done):
        view = view._replace(host=Side())  # it went with the process that had it open
    assert plan_guest(desired, replay(view, plan_guest(desired, view))) == []


@given(drifted(), st.booleans())
def test_removal_leaves_nothing(case: tuple[Guest, GuestView], keep_netns: bool) -> None:
    desired, view = case
    after = replay(view, plan_removal(desired, view, keep_netns=keep_netns))
    assert after.host.link is None
    assert plan_removal(desired, after, keep_netns=keep_netns) == []
    if after.inside:
        assert desired.peer
        if not desired.owned_netns:
            assert not after.inside.lo_routes
            assert "127.0.0.1/8" in [one.value for one in after.inside.lo] or not view.inside.lo_routes  # type: ignore[union-attr]


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_nothing_goes_up_before_its_filters_stand(kind: Kind, mode: Mode) -> None:
    desired = desire(lease_of(kind, mode), Plane())
    steps = plan_guest(desired, absent(kind))
    goes_up = next(i for i, op in enumerate(steps) if isinstance(op, ops.SetLink) and op.up and op.place == HOST)
    before = steps[:goes_up]
    assert {op.direction for op in before if isinstance(op, ops.SetFilter)} == {"ingress", "egress"}
    assert any(isinstance(op, ops.SetConf) and ("route_localnet", 0) in op.values for op in before)
    assert any(isinstance(op, ops.SetSysctl) and op.key.endswith("disable_ipv6") for op in before)


def test_a_tap_becomes_persistent_last() -> None:
    steps = plan_guest(desire(lease_of("tap", "mapped"), Plane()), absent("tap"))
    assert isinstance(steps[-1], ops.PersistTun)


@pytest.mark.parametrize(
    "change",
    [{"alias": "vmnet:other"}, {"alias": "", "group": 5}, {"alias": "", "mac": "02:00:00:00:00:09"}, {"alias": "x"}],
    ids=["another guest's", "group", "mac", "alias"],
)
def test_a_device_that_is_not_ours_is_left_alone(change: dict[str, object]) -> None:
    desired = desire(lease_of("tap", "mapped"), Plane())
    view = right(desired, "tap")
    assert view.host.link
    view = view._replace(host=view.host._replace(link=view.host.link._replace(**change)))  # type: ignore[arg-type]
    with pytest.raises(Conflict, match="vmn-web"):
        plan_guest(desired, view)
    assert plan_removal(desired, view) == []


OFFERED = Link(
    ifindex=9, name="vnet0", kind="tap", group=0, alias="", mac="fe:76:7f:01:00:02", mtu=1500, up=True, multicast=True,
    conf={"route_localnet": 0, "forwarding": 1}, disable_ipv6=False, persist=False, master=5,
)  # fmt: skip
LIBVIRTS = desire(lease_of("tap", "mapped")._replace(maker="libvirt"), Plane())


@given(st.sampled_from(["vnet0", "vmn-web"]), st.booleans(), st.booleans(), st.sampled_from([0, 5]), st.data())
def test_a_tap_of_libvirts_becomes_the_guests(
    name: str, up: bool, is_known: bool, master: int, data: st.DataObject
) -> None:
    link = OFFERED._replace(name=name, up=up, master=master, multi_queue=data.draw(st.booleans()))
    if is_known:
        link = link._replace(alias="vmnet:web")
    view = GuestView(Side(link), offered=not is_known)
    steps = plan_guest(LIBVIRTS, view)
    done = replay(view, steps[: data.draw(st.integers(0, len(steps)))])
    assert done.host.link
    after = replay(done, plan_guest(LIBVIRTS, done))
    assert plan_guest(LIBVIRTS, after) == []
    assert after.host.link
    assert (after.host.link.name, after.host.link.master, after.host.link.up) == ("vmn-web", 0, True)
    assert not any(isinstance(op, ops.AddTun | ops.PersistTun | ops.DelLink) for op in steps)
    renames = [op for op in steps if isinstance(op, ops.AddAltName)]
    assert [op.name for op in renames] == (["vnet0"] if name == "vnet0" and not is_known else [])


def test_a_tap_of_libvirts_leaves_its_bridge_before_it_goes_up_with_its_filters() -> None:
    steps = plan_guest(LIBVIRTS, GuestView(Side(OFFERED), offered=True))
    places = {
        "down": next(i for i, op in enumerate(steps) if isinstance(op, ops.SetLink) and op.up is False),
        "off": next(i for i, op in enumerate(steps) if isinstance(op, ops.SetLink) and op.master == 0),
        "filters": max(i for i, op in enumerate(steps) if isinstance(op, ops.SetFilter)),
        "up": next(i for i, op in enumerate(steps) if isinstance(op, ops.SetLink) and op.up),
    }
    assert sorted(places, key=places.__getitem__) == ["down", "off", "filters", "up"]


def test_a_tap_that_libvirt_has_not_made_yet_is_waited_for() -> None:
    assert plan_guest(LIBVIRTS, GuestView()) == []


def test_a_tap_that_vmnet_made_gives_way_to_libvirts() -> None:
    view = right(desire(lease_of("tap", "mapped"), Plane()), "tap")
    [op] = plan_guest(LIBVIRTS, view)
    assert isinstance(op, ops.DelLink)


def test_a_tap_on_libvirts_bridge_that_is_not_the_guests_is_left_alone() -> None:
    with pytest.raises(Conflict, match="vmn-web"):
        plan_guest(LIBVIRTS, GuestView(Side(OFFERED._replace(name="vmn-web", master=6))))


def test_a_lost_alias_is_drift() -> None:
    desired = desire(lease_of("tap", "mapped"), Plane())
    view = right(desired, "tap")
    assert view.host.link
    view = view._replace(host=view.host._replace(link=view.host.link._replace(alias="")))
    [op] = plan_guest(desired, view)
    assert isinstance(op, ops.SetLink)
    assert op.alias == "vmnet:web"


def test_a_strangers_namespace_is_never_entered() -> None:
    desired = desire(lease_of("veth", "native"), Plane())
    with pytest.raises(Conflict, match="another network namespace"):
        plan_guest(desired, GuestView(netns="stranger"))
    assert plan_removal(desired, GuestView(netns="stranger")) == []


# The host part

EXTRA_LO = [
    LoAddress("127.0.0.2/8", SCOPE_HOST, 0, ()),
    LoAddress("127.0.5.5/32", SCOPE_HOST, 0, ()),
    LoAddress("10.9.9.9/32", SCOPE_GLOBAL, 0, ()),
    LoAddress("192.0.2.1/24", SCOPE_GLOBAL, 0, ()),
]
ranges = st.lists(
    st.builds(
        lambda number, length: IPNetwork((0x7F010000 + number, length)).cidr,
        st.integers(0, 4 * POOL_BLOCKS - 1), st.integers(20, 32),
    ),
    max_size=4,
)  # fmt: skip


@st.composite
def hosts(draw: st.DrawFn) -> tuple[HostWish, HostView]:
    used = draw(ranges)
    wish = HostWish(
        plane=Plane(),
        kept=kept_local((IPNetwork("127.0.0.0/10"),), (), tuple(used)),
        holes=tuple(draw(ranges)),
        text="text",
        listing="listing",
    )
    others = draw(st.lists(st.sampled_from(EXTRA_LO), unique=True))
    lo: tuple[LoAddress, ...] = ()
    for address in [WIDE, *others]:
        lo = on_lo_addresses(lo, ops.PutBackAddress(HOST, address))
    return wish, HostView(lo, True, frozenset(), draw(st.sampled_from([None, "other"])), draw(st.integers(0, 1)))


def stop(draw: st.DataObject, steps: list[Op]) -> list[Op]:
    """Return the ops that ran before a stop: those that change lo's addresses travel in one send, all or none."""
    on_lo = [i for i, op in enumerate(steps) if isinstance(op, ops.AddAddress | ops.DelAddress | ops.PutBackAddress)]
    if on_lo:
        assert on_lo == list(range(on_lo[0], on_lo[-1] + 1))
    at = draw.draw(st.integers(0, len(steps)))
    return steps[: at if not on_lo or not on_lo[0] < at <= on_lo[-1] else on_lo[0]]


def replay_host(view: HostView, steps: list[Op]) -> HostView:
    for op in steps:
        view = on_host(view, op, "listing")
    return view


@given(hosts(), st.data())
def test_the_host_part_heals_from_a_stop_at_any_op(case: tuple[HostWish, HostView], data: st.DataObject) -> None:
    wish, view = case
    steps = plan_host(wish, view)
    view = replay_host(view, stop(data, steps))
    view = replay_host(view, plan_host(wish, view))
    assert plan_host(wish, view) == []
    assert "127.0.0.1/8" not in [one.value for one in view.lo]


@given(hosts(), st.data())
def test_restore_puts_lo_back_in_its_order(case: tuple[HostWish, HostView], data: st.DataObject) -> None:
    wish, before = case
    found = Found(before.lo, before.ip_forward, 1, {})
    steps = plan_host(wish, before)
    view = replay_host(before, stop(data, steps))
    after = replay_host(view, plan_host_removal(view, found, others_forward=False))
    assert after.lo == before.lo
    assert not after.routes
    assert after.listing is None
    assert after.ip_forward == before.ip_forward
    assert plan_host_removal(after, found, others_forward=False) == []


@given(hosts())
def test_the_lo_loses_its_8_last(case: tuple[HostWish, HostView]) -> None:
    wish, view = case
    steps = plan_host(wish, view)
    carve = next(i for i, op in enumerate(steps) if isinstance(op, ops.DelAddress))
    routes = [op.route for op in steps[:carve] if isinstance(op, ops.AddRoute)]
    assert set(routes) == set(host_routes(wish))


@given(ranges, ranges)
def test_the_fence_leaves_out_the_holes_and_nothing_else(used: list[IPNetwork], holes: list[IPNetwork]) -> None:
    wish = HostWish(Plane(), kept_local((IPNetwork("127.0.0.0/10"),), (), tuple(used)), tuple(holes), "", None)
    routes = host_routes(wish)
    fenced = IPSet([one.destination for one in routes if one.type == "unreachable" and one.table == ops.TABLE_LOCAL])
    local = IPSet([one.destination for one in routes if one.type == "local"])
    assert fenced - local == IPSet(["127.0.0.0/10"]) - IPSet(holes) - local
    assert IPSet(used) <= local
    destinations = [one.destination for one in routes]
    assert len(destinations) == len(set(destinations))


def test_every_address_outside_the_pool_stays_local() -> None:
    kept = kept_local((IPNetwork("127.5.0.0/16"),), (IPNetwork("127.5.7.0/24"),), ())
    wish = HostWish(Plane(), tuple(kept), (), "", None)
    local = [IPNetwork(one.destination) for one in host_routes(wish) if one.type == "local"]
    for address in ("127.1.0.1", "127.63.255.254", "127.5.7.9", "127.4.255.255", "127.6.0.0", "127.200.0.1"):
        assert any(address in network for network in local), address
    assert not any("127.5.8.1" in network for network in local)
