"""Look at the kernel: guests, the host part, and what is ours without a lease. Nothing is changed or decided."""

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from socket import inet_aton

from vmnet.aliases import address_of
from vmnet.firewalls import Bridge, Chain
from vmnet.linux import wire
from vmnet.linux.hostroutes import host_routes
from vmnet.linux.netlink import (
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETNEIGH,
    RTM_GETNSID,
    RTM_GETROUTE,
    RTM_GETTFILTER,
    Message,
    Netlink,
    nested,
    u32,
)
from vmnet.linux.places import NAMED, Places, identify, is_stub
from vmnet.model import LIBVIRT_BRIDGE, KernelRefused, Lease, NetnsId
from vmnet.ops import ROUTE_PROTOCOL, TABLE_LOCAL, TABLE_MAIN, Address, LoAddress, Route
from vmnet.plan import (
    ALIAS_PREFIX,
    DEFAULT_ROUTE,
    PEER_NAME,
    Filter,
    GuestView,
    HostView,
    Inside,
    Link,
    Side,
    dotted,
    link_index,
)

_DIRECTIONS = ("ingress", "egress")
_LO = 1
# From so many guests on, one dump of everything is cheaper than asking about each.
_MANY = 16
# Kinds of devices that are cards, or stand for some. Those that stand for a guest have others: veth, tun.
_CARDS = ("", "bond", "team", "vlan")


def link_by_name(netlink: Netlink, name: str) -> Link | None:
    """Return the device of that name, or None."""
    body = netlink.get(Message(RTM_GETLINK, 0, wire.link_query(name)))
    return wire.parse_link(body) if body else None


def _links_by_name(netlink: Netlink, names: Sequence[str]) -> dict[str, Link]:
    """Return those devices that are there; asked for one by one, because a dump of all grows with what is there."""
    bodies = netlink.get_each([Message(RTM_GETLINK, 0, wire.link_query(name)) for name in names])
    return {name: wire.parse_link(body) for name, body in zip(names, bodies, strict=True) if body}


def _renamed(netlink: Netlink, leases: Sequence[Lease]) -> dict[str, Link]:
    """Return those guests' devices that somebody gave another name, by the name they should have."""
    bodies = netlink.get_each([Message(RTM_GETLINK, 0, wire.link_query(index=link_index(one.block))) for one in leases])
    links = [(lease, wire.parse_link(body)) for lease, body in zip(leases, bodies, strict=True) if body]
    return {lease.device: link for lease, link in links if link.alias == ALIAS_PREFIX + lease.name}


def _offered(netlink: Netlink, leases: Sequence[Lease], known: Mapping[str, Link]) -> dict[str, Link]:
    """Return the taps that libvirt has made for guests, by the name that they are to have.

    They are ports of the bridge of its network `vmnet`, named by the domain or vnetN, and have the guest's MAC but for
    its first byte (virnetdevtap.c, virNetDevTapCreateInBridgePort).
    """
    wanted = [one for one in leases if one.maker == "libvirt" and one.wish == "up"]
    bridge = link_by_name(netlink, LIBVIRT_BRIDGE) if wanted else None
    if bridge is None:
        return {}
    bodies = netlink.dump(RTM_GETLINK, wire.link_query() + u32(wire.IFLA_MASTER, bridge.ifindex))
    ports = [one for one in map(wire.parse_link, bodies) if one.kind == "tap" and one.master == bridge.ifindex]
    by_mac = {str(one.mac)[2:]: one for one in ports if not one.alias}
    by_name = {one.name: one for one in ports}
    found = {}
    for lease in wanted:
        port = by_name.get(lease.device) or (None if lease.device in known else by_mac.get(str(lease.mac)[2:]))
        if port:
            found[lease.device] = port
    return found


def all_links(netlink: Netlink) -> list[Link]:
    """Return all devices."""
    return [wire.parse_link(body) for body in netlink.dump(RTM_GETLINK, wire.link_query())]


class _Tables:
    """Addresses, routes of ours and permanent neighbours, by index of their device; `made` has those just made."""

    def __init__(self, netlink: Netlink, links: Sequence[Link], made: Mapping[int, Lease]) -> None:
        self.addresses: dict[int, list[LoAddress]] = defaultdict(list)
        self.routes: dict[int, set[Route]] = defaultdict(set)
        self.neighbours: dict[int, set[tuple[str, str]]] = defaultdict(set)
        self._netlink = netlink
        self._names = {link.ifindex: link.name for link in links}
        for index in [0] if len(links) > _MANY else self._names:
            self._read_addresses(index)
            if not (index in made and self._ask(index, made[index])):
                self._read(index)

    def _read_addresses(self, only: int) -> None:
        for body in self._netlink.dump(RTM_GETADDR, wire.address_query(only)):
            index, address = wire.parse_address(body)
            self.addresses[index].append(address)

    def _read(self, only: int) -> None:
        for body in self._netlink.dump(RTM_GETROUTE, wire.route_query(ROUTE_PROTOCOL, index=only)):
            _, index, route = wire.parse_route(body, self._names)
            self.routes[index].add(route)
        for body in self._netlink.dump(RTM_GETNEIGH, wire.neighbour_query(only)):
            self._note_neighbour(body)

    def _note_neighbour(self, body: bytes) -> None:
        index, neighbour = wire.parse_neighbour(body)
        if neighbour:
            self.neighbours[index].add(neighbour)

    def _ask(self, index: int, lease: Lease) -> bool:
        """Ask for the routes and neighbours that a guest has; False where not all of these routes are there.

        On a device just made there are no others. For a dump the kernel walks those of all guests. The table of a
        route is the one thing that the answer does not tell: where no rules are but the kernel's own, it looks ways up
        in local and main at once (fib_lookup, include/net/ip_fib.h). Ours over a device of the host are all in local.
        """
        first = lease.block.first
        guest = [dotted(first + 2), *(dotted(_number(one.value) + 1) for one in self.addresses[index])]
        ways = [Message(RTM_GETROUTE, 0, wire.route_question(one)) for one in (dotted(first), *guest)]
        neighbours = [Message(RTM_GETNEIGH, 0, wire.neighbour_question(index, one)) for one in guest]
        try:
            answers = self._netlink.get_each(ways + neighbours)
        except KernelRefused:  # the fence stands in the place of a route, or somebody's rules come first
            return False
        found = [wire.parse_route(body, self._names) for body in answers[: len(ways)] if body]
        routes = [route for protocol, on, route in found if (protocol, on) == (ROUTE_PROTOCOL, index)]
        if len(routes) < len(ways):
            return False
        self.routes[index] = {route._replace(table=TABLE_LOCAL) for route in routes}
        for body in answers[len(ways) :]:
            if body:
                self._note_neighbour(body)
        return True


def _number(address: str) -> int:
    return int.from_bytes(inet_aton(address.partition("/")[0]), "big")


def _filters(netlink: Netlink, index: int) -> dict[str, Filter]:
    found = {}
    for direction in _DIRECTIONS:
        there = [
            one
            for body in netlink.dump(RTM_GETTFILTER, wire.filter_query(index, direction))
            if (one := wire.parse_filter(body))
        ]
        if there:
            found[direction] = there[0] if len(there) == 1 else Filter(None)
    return found


def observe_guests(
    places: Places, leases: Sequence[Lease], *, for_removal: bool = False, made: Collection[str] = ()
) -> dict[str, GuestView]:
    """Return what the kernel shows of each lease's guest, by name.

    `for_removal` looks at what does not go by itself: the device, whose the namespace is, and inside of one that
    vmnet did not make. `made` are the names of guests whose devices this process has made just now.
    """
    aliases = [lease for lease in leases if lease.kind == "alias"]
    views = _aliases(places.host, aliases) if aliases else {}
    leases = [lease for lease in leases if lease.kind != "alias"] if aliases else leases
    netlink = places.host
    by_name = _links_by_name(netlink, [lease.device for lease in leases])
    by_name |= _renamed(netlink, [lease for lease in leases if lease.device not in by_name])
    offered = {} if for_removal else _offered(netlink, leases, by_name)
    by_name |= offered
    links = [by_name[lease.device] for lease in leases if lease.device in by_name]
    new = {link.ifindex: lease for lease in leases if lease.name in made and (link := by_name.get(lease.device))}
    tables = _Tables(netlink, links, new) if links and not for_removal else None
    for lease in leases:
        link = by_name.get(lease.device)
        side = Side(link)
        if link and tables:
            side = Side(
                link=link,
                addresses=frozenset(Address(one.value, one.scope) for one in tables.addresses[link.ifindex]),
                routes=frozenset(tables.routes[link.ifindex]),
                neighbours=frozenset(tables.neighbours[link.ifindex]),
                filters=_filters(netlink, link.ifindex),
            )
        view = GuestView(side, offered=lease.device in offered)
        views[lease.name] = _look_inside(view, places, lease, for_removal=for_removal)
    return views


def _aliases(netlink: Netlink, leases: Sequence[Lease]) -> dict[str, GuestView]:
    """Return how the addresses of aliases are on lo."""
    there: dict[str, set[Address]] = defaultdict(set)
    for body in netlink.dump(RTM_GETADDR, wire.address_query(_LO)):
        one = wire.parse_address(body)[1]
        there[one.value.partition("/")[0]].add(Address(one.value, one.scope))
    return {lease.name: GuestView(alias=frozenset(there[address_of(lease)])) for lease in leases}


def _look_inside(view: GuestView, places: Places, lease: Lease, *, for_removal: bool) -> GuestView:
    if lease.netns is None:
        return view
    path, recorded = lease.netns.path, lease.netns.identity
    try:
        found = identify(path, closely=for_removal)
        if found is None:
            places.forget(path)
            return view._replace(netns="absent", stub=is_stub(path))
        if for_removal and lease.netns.owned and found == recorded:
            return view._replace(netns="ours", netns_id=found)
        netlink = places.open(path, found)
        found = replace(found, cookie=netlink.netns_cookie)
    except ProcessLookupError:
        return view._replace(netns="stranger")
    except FileNotFoundError:  # its last process has ended since
        return view._replace(netns="absent")
    except OSError:
        return view._replace(netns="ours")  # not for this caller to see: nothing is known against it
    if found != recorded:
        lo = link_by_name(netlink, "lo")
        if not (lease.netns.owned and lo and lo.alias == ALIAS_PREFIX + lease.name):
            places.forget(path)
            return view._replace(netns="stranger")
    return view._replace(netns="ours", inside=observe_inside(netlink), netns_id=found)


def observe_inside(netlink: Netlink) -> Inside:
    """Return what a guest's namespace shows."""
    links = _links_by_name(netlink, (PEER_NAME, "lo"))
    link, lo = links.get(PEER_NAME), links.get("lo")
    index = link.ifindex if link else -1
    names = {_LO: "lo", index: PEER_NAME}
    addresses: dict[int, list[LoAddress]] = defaultdict(list)
    for body in netlink.dump(RTM_GETADDR, wire.address_query()):
        on, address = wire.parse_address(body)
        addresses[on].append(address)
    ours: dict[int, set[Route]] = defaultdict(set)
    has_default = False
    for body in netlink.dump(RTM_GETROUTE, wire.route_query()):
        if not wire.is_ours_or_default(body):
            continue
        protocol, on, route = wire.parse_route(body, names)
        has_default |= route.destination == DEFAULT_ROUTE and route.table == TABLE_MAIN and route.type == "unicast"
        if protocol == ROUTE_PROTOCOL:
            ours[on].add(route)
    neighbours = set()
    for body in netlink.dump(RTM_GETNEIGH, wire.neighbour_query(index)) if link else ():
        _, neighbour = wire.parse_neighbour(body)
        if neighbour:
            neighbours.add(neighbour)
    side = Side(
        link=link,
        addresses=frozenset(Address(one.value, one.scope) for one in addresses[index]),
        routes=frozenset(ours[index]),
        neighbours=frozenset(neighbours),
    )
    return Inside(
        side, tuple(addresses[_LO]), bool(lo and lo.up), frozenset(ours[_LO]), has_default, lo.alias if lo else ""
    )


def observe_host(netlink: Netlink, listing: str | None, chains: tuple[Chain, ...] = ()) -> HostView:
    """Return the host part; `listing` is our table as nft lists it, `chains` those that other firewalls offer."""
    lo = link_by_name(netlink, "lo")
    addresses = [wire.parse_address(body)[1] for body in netlink.dump(RTM_GETADDR, wire.address_query(_LO))]
    return HostView(
        lo=tuple(addresses),
        lo_up=bool(lo and lo.up),
        routes=frozenset(wire.parse_route(body, {_LO: "lo"})[2] for body in host_routes(netlink)),
        listing=listing,
        ip_forward=sysctl("net.ipv4.ip_forward"),
        chains=chains,
        bridges=_bridges(netlink) if chains else (),
        libvirt=link_by_name(netlink, LIBVIRT_BRIDGE),
    )


def _bridges(netlink: Netlink) -> tuple[Bridge, ...]:
    """Return all bridges, by name."""
    query = wire.link_query() + nested(wire.IFLA_LINKINFO, wire.BRIDGE)
    # A kernel that has never seen a bridge does not know the word, and tells of all devices.
    links = [wire.parse_link(body) for body in netlink.dump(RTM_GETLINK, query) if wire.BRIDGE in body]
    others = [one for one in links if one.name != LIBVIRT_BRIDGE]
    return tuple(sorted(Bridge(one.name, leads_out(netlink, one.ifindex)) for one in others))


def leads_out(netlink: Netlink, bridge: int) -> bool:
    """Say whether a bridge, given by its index, has a card of the machine's for a port, or a default route over it."""
    ports = netlink.dump(RTM_GETLINK, wire.link_query() + u32(wire.IFLA_MASTER, bridge))
    if any(wire.parse_link(body).kind in _CARDS for body in ports):
        return True
    routes = netlink.dump(RTM_GETROUTE, wire.route_query(index=bridge))
    return any(wire.parse_route(body, {})[2].destination == DEFAULT_ROUTE for body in routes)


def addresses(netlink: Netlink) -> frozenset[str]:
    """Return all IPv4 addresses of the host."""
    return frozenset(map(wire.parse_local, netlink.dump(RTM_GETADDR, wire.address_query())))


def sysctl(key: str) -> int:
    """Return a sysctl that is a number."""
    return int(Path("/proc/sys", *key.split(".")).read_text())


def forwarding_by_device() -> dict[str, int]:
    """Return net.ipv4.conf.*.forwarding of each device and of `default`; `all` is ip_forward by another name."""
    found = {}
    for device in Path("/proc/sys/net/ipv4/conf").iterdir():
        with suppress(FileNotFoundError):  # gone meanwhile
            found[device.name] = int((device / "forwarding").read_text())
    found.pop("all", None)
    return found


def orphan_links(netlink: Netlink, known: Iterable[str]) -> list[Link]:
    """Return devices that bear our alias for a name that is not among `known`."""
    names = set(known)
    return [
        link
        for link in all_links(netlink)
        if link.alias.startswith(ALIAS_PREFIX) and link.alias.removeprefix(ALIAS_PREFIX) not in names
    ]


def orphan_insides(places: Places, links: Sequence[Link]) -> list[tuple[str, Inside]]:
    """Return where the far ends of `links` are, and what their namespaces show, those that vmnet made left out.

    Without records nothing but the kernel's own number for a namespace leads from a device to its far end.
    """
    bodies = places.host.get_each([Message(RTM_GETLINK, 0, wire.link_query(index=link.ifindex)) for link in links])
    wanted = {wire.parse_far_netns(body) for body in bodies if body} - {None}
    found = []
    for path in _netns_paths() if wanted else ():
        try:
            with open(path, "rb") as handle:
                answer = places.host.get(Message(RTM_GETNSID, 0, wire.netns_query(handle.fileno())))
            number = wire.parse_netns(answer) if answer else None
            if number not in wanted:
                continue
            wanted.discard(number)
            inside = observe_inside(places.open(path, identify(path)))
        except OSError:
            continue
        if not inside.lo_alias.startswith(ALIAS_PREFIX):
            found.append((path, inside))
    return found


def _netns_paths() -> list[str]:
    """Return a way to each network namespace that has a name or a process."""
    ways: dict[NetnsId, str] = {}
    for path in [*NAMED.glob("*"), *Path("/proc").glob("[0-9]*/ns/net")]:
        with suppress(OSError):
            identity = identify(str(path))
            if identity:
                ways.setdefault(identity, str(path))
    return list(ways.values())


def orphan_netns(places: Places, known: Iterable[str]) -> list[str]:
    """Return the paths of named namespaces that vmnet made for a name that is not among `known`."""
    names = set(known)
    found = []
    try:
        paths = sorted(os.listdir(NAMED))
    except OSError:
        return []
    for name in paths:
        path = str(NAMED / name)
        try:
            identity: NetnsId | None = identify(path)
            lo = link_by_name(places.open(path, identity), "lo") if identity else None
        except OSError:
            continue
        if lo and lo.alias.startswith(ALIAS_PREFIX) and lo.alias.removeprefix(ALIAS_PREFIX) not in names:
            found.append(path)
        else:
            places.forget(path)
    return found
