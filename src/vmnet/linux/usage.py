"""Find who uses addresses that vmnet is about to take: addresses, routes, sockets, the hosts file.

It runs once before the host is carved. Afterwards nobody can take an address of the pool by chance: the fence says no.
What it looks at is anybody's, of any kind: pyroute2 knows how all of that is spelled.
"""

import re
import socket
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, TypeAlias

from netaddr import IPNetwork

from vmnet.linux import nft
from vmnet.model import HOST_PART, LOOPBACK, POOL_SPAN
from vmnet.ops import ROUTE_PROTOCOL, TABLE_LOCAL, TABLE_MAIN, Route
from vmnet.plan import ALIAS_PREFIX, Use

_SOCKET_TABLES = ("tcp", "udp", "udplite", "raw", "icmp", "tcp6", "udp6", "udplite6", "raw6", "icmp6")
_LO = 1
# 127/8 and class E. All else is elsewhere, or covers so much that it is a piece of a default route: VPNs write
# 128.0.0.0/1. A router knows a million routes, which are not worth a closer look.
_FIRST_OCTETS = ("127.", "24", "25")

_Routes: TypeAlias = Sequence[tuple[int, int, Route]]


def find_uses(shadow: IPNetwork, hosts: Path | None) -> list[Use]:
    """Return who else uses 127/8 beside the host part, or the shadow: disjoint networks, lowest first.

    A network that lies outside of 127/8, or that covers the whole pool, is one that vmnet cannot do without.
    """
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        links = list(ipr.get_links())
        names = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in links}
        ours = {one["index"] for one in links if str(one.get_attr("IFLA_IFALIAS") or "").startswith(ALIAS_PREFIX)}
        addresses = [one for one in ipr.get_addr(family=socket.AF_INET) if one["index"] not in ours]
        routes = [
            _read_route(one, names)
            for one in ipr.get_routes(family=socket.AF_INET)
            if (one.get_attr("RTA_DST") or "").startswith(_FIRST_OCTETS)
        ]
    guests = [IPNetwork(route.destination) for protocol, index, route in routes if protocol == ROUTE_PROTOCOL and index]
    return _outermost(
        [
            *_addresses(addresses, shadow, names),
            *_routes([one for one in routes if one[0] != ROUTE_PROTOCOL and one[1] not in ours], shadow),
            *_sockets(guests),
            *_hosts_lines(hosts),
        ]
    )


def _read_route(message: Any, names: dict[int, str]) -> tuple[int, int, Route]:
    """Return a route's protocol, the index of its device (0: none), and the route."""
    from pyroute2.netlink.rtnl import rt_type

    index = message.get_attr("RTA_OIF") or 0
    kinds = {number: name for name, number in rt_type.items()}
    route = Route(
        destination=f"{message.get_attr('RTA_DST')}/{message['dst_len']}",
        table=message.get_attr("RTA_TABLE") or message["table"],
        type=kinds.get(message["type"], str(message["type"])),
        device=names.get(index, f"#{index}") if index else None,
    )
    return message["proto"], index, route


def _outermost(uses: Iterable[Use]) -> list[Use]:
    """Return one use for each network, and none within another's, except that of something else in a local one."""
    kept: list[Use] = []
    ends = {"foreign": -1, "local": -1}
    for use in sorted(uses, key=lambda one: (one.network.first, one.network.prefixlen, one.kind)):
        first = use.network.first
        if first <= ends["foreign"] or (use.kind == "local" and first <= ends["local"]):
            continue
        ends[use.kind] = use.network.last
        kept.append(use)
    return kept


def _is_in_pool(network: IPNetwork) -> bool:
    return network in POOL_SPAN and network not in HOST_PART


def _is_taken(network: IPNetwork, shadow: IPNetwork) -> bool:
    """Say whether something else than lo in `network` is in the way of vmnet, or vmnet in its."""
    return network in LOOPBACK or network in shadow or shadow in network


def _addresses(addresses: Iterable[Any], shadow: IPNetwork, names: dict[int, str]) -> Iterator[Use]:
    for one in addresses:
        index, length, far = one["index"], one["prefixlen"], one.get_attr("IFA_ADDRESS")
        address = one.get_attr("IFA_LOCAL") or far
        network = IPNetwork(f"{address}/{length}").cidr
        what = f"an address of {names.get(index, index)}"
        if index != _LO:
            far_end = IPNetwork(f"{far or address}/{length}").cidr
            yield from (Use("foreign", end, what) for end in {network, far_end} if _is_taken(end, shadow))
        elif _is_in_pool(network):
            yield Use("local", network, what)
        elif _is_in_pool(alone := IPNetwork(address)):
            yield Use("local", alone, what)  # a wide one, such as 127.9.0.1/8, uses itself alone
        elif network not in LOOPBACK and _is_taken(network, shadow):
            yield Use("foreign", network, what)


def _routes(routes: _Routes, shadow: IPNetwork) -> Iterator[Use]:
    for _, index, route in routes:
        network = IPNetwork(route.destination)
        what = _describe(route)
        if POOL_SPAN in network and network in LOOPBACK:
            # Nothing of ours can stand beside one in table local; elsewhere only what leads away is a use.
            same_place = network == POOL_SPAN and route.table == TABLE_LOCAL
            if same_place or (route.type == "unicast" and index != _LO):
                yield Use("foreign", network, what)
        elif index == _LO and network in LOOPBACK:
            if route.type in ("local", "unicast") and _is_in_pool(network):
                yield Use("local", network, what)
        elif _is_taken(network, shadow):
            yield Use("foreign", network, what)


def _describe(route: Route) -> str:
    kind = "" if route.type == "unicast" else f" of type {route.type}"
    way = f" over {route.device}" if route.device else ""
    table = "" if route.table in (TABLE_MAIN, TABLE_LOCAL) else f" in table {route.table}"
    return f"a route{kind}{way}{table}"


def _sockets(guests: Sequence[IPNetwork]) -> Iterator[Use]:
    for table in _SOCKET_TABLES:
        protocol = table.removesuffix("6")
        try:
            lines = Path("/proc/thread-self/net", table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, remote, _, _, _, _, _, _, inode, *_ = line.split()
            if protocol == "tcp" and inode == "0":
                continue  # what is left of a connection that no program has any more, such as TIME_WAIT
            for end, does in ((local, "is bound"), (remote, "talks")):
                address = local_address(end.partition(":")[0])
                if address is None or not address.startswith("127."):
                    continue
                network = IPNetwork(address)
                if _is_in_pool(network) and not any(network in guest for guest in guests):
                    yield Use("local", network, f"a {protocol} socket {does} to it")


def local_address(field: str) -> str | None:
    """Return an IPv4 address that /proc/net/* spells in hex, or None for an IPv6 one (proc(5))."""
    raw = bytes.fromhex(field)
    if len(raw) == 16:
        words = b"".join(raw[i : i + 4][::-1] for i in range(0, 16, 4))
        if words[:12] != b"\0" * 10 + b"\xff\xff":
            return None
        return socket.inet_ntoa(words[12:])
    return socket.inet_ntoa(raw[::-1])


def _hosts_lines(hosts: Path | None) -> Iterator[Use]:
    if hosts is None:
        return
    from vmnet.hostsfile import render

    try:
        content = render(hosts.read_bytes(), {})
    except OSError:
        return
    for line in content.decode(errors="replace").splitlines():
        words = line.partition("#")[0].split()
        address = _plain_address(words[0]) if len(words) > 1 else None
        if address and _is_in_pool(IPNetwork(str(address))):
            yield Use("local", IPNetwork(str(address)), f"{hosts} gives it the name {words[1]}")


def _plain_address(word: str) -> IPv4Address | None:
    """Return the IPv4 address that a line of the hosts file begins with, IPv6-mapped or not, or None."""
    try:
        return IPv6Address(word).ipv4_mapped if ":" in word else IPv4Address(word)
    except AddressValueError:
        return None


def forwards_for_others() -> bool:
    """Say whether somebody else's rules translate source addresses: who does so wants the host to forward."""
    listed = _output(nft.program(), "list", "ruleset")
    if listed is None or _translates(re.sub(r"(?ms)^table ip vmnet \{.*?^\}", "", listed)):
        return True
    try:
        legacy = "nat" in Path("/proc/thread-self/net/ip_tables_names").read_text().split()
    except OSError:
        return False
    if not legacy:
        return False
    # The table is there as soon as anybody has looked at it; only its own program can tell what is in it.
    saved = _output("iptables-legacy-save", "-t", "nat")
    return saved is None or _translates(saved)


def _translates(rules: str) -> bool:
    """Say whether any rule, of nft or iptables, translates addresses of a network.

    One that goes by a mark alone is no sign: Tailscale has one on every host, and leaves forwarding to its user.
    """
    translating = [
        line for line in rules.splitlines() if re.search(r"\b(masquerade|snat|netmap)\b", line, re.IGNORECASE)
    ]
    return any(
        not re.search(r"\bmark\b", line) or re.search(r"\b(saddr|[io]if\w*)\b| -[sio] ", line) for line in translating
    )


def _output(*argv: str) -> str | None:
    """Return what a program prints, or None where it fails or is missing."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        )  # fmt: skip
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
