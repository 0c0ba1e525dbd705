"""Find who uses addresses that vmnet is about to take: sockets, addresses, routes, the hosts file.

It runs once before the host is carved, and asks about all that there is, whoever made it: pyroute2 knows how all
of that is spelled.
"""

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from netaddr import AddrFormatError, IPAddress, IPNetwork

from vmnet.linux import nft
from vmnet.model import HOST_PART, POOL_SPAN
from vmnet.ops import ROUTE_PROTOCOL
from vmnet.plan import ALIAS_PREFIX, Use

_SOCKET_TABLES = ("tcp", "udp", "udplite", "raw", "icmp", "tcp6", "udp6", "udplite6", "raw6")
_LO = 1


def find_uses(shadow: IPNetwork, hosts: Path | None) -> list[Use]:
    """Return each use of the pool and of the shadow by somebody else."""
    uses = [*_sockets(), *_addresses_and_routes(shadow), *_hosts_lines(hosts)]
    return sorted(set(uses), key=lambda use: (use.network, use.what))


def _is_in_pool(network: IPNetwork) -> bool:
    return network in POOL_SPAN and network not in HOST_PART


def _sockets() -> Iterator[Use]:
    for table in _SOCKET_TABLES:
        try:
            lines = Path("/proc/thread-self/net", table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            address = local_address(line.split()[1].partition(":")[0])
            if address and _is_in_pool(IPNetwork(address)):
                yield Use("local", IPNetwork(address), f"a {table.removesuffix('6')} socket is bound to it")


def local_address(field: str) -> str | None:
    """Return an IPv4 address that /proc/net/* spells in hex, or None for an IPv6 one (proc(5))."""
    raw = bytes.fromhex(field)
    if len(raw) == 16:
        words = b"".join(raw[i : i + 4][::-1] for i in range(0, 16, 4))
        if words[:12] != b"\0" * 10 + b"\xff\xff":
            return None
        return socket.inet_ntoa(words[12:])
    return socket.inet_ntoa(raw[::-1])


def _addresses_and_routes(shadow: IPNetwork) -> Iterator[Use]:
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        links: dict[int, Any] = {link["index"]: link for link in ipr.get_links()}
        names = {index: str(link.get_attr("IFLA_IFNAME")) for index, link in links.items()}
        ours = {i for i, link in links.items() if str(link.get_attr("IFLA_IFALIAS") or "").startswith(ALIAS_PREFIX)}
        for address in ipr.get_addr(family=socket.AF_INET):
            value = address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS")
            index, length = address["index"], address["prefixlen"]
            if index in ours or not value:
                continue
            network = IPNetwork(f"{value}/{length}").cidr
            what = f"an address of {names.get(index, index)}"
            if index == _LO:
                # A wide one, such as 127.0.0.2/8, uses itself alone; a subnet within the pool is used whole.
                used = network if _is_in_pool(network) else IPNetwork(value)
                if _is_in_pool(used):
                    yield Use("local", used, what)
            elif _is_in_pool(network) or network in shadow or shadow in network:
                yield Use("foreign", network, what)
        for route in ipr.get_routes(family=socket.AF_INET):
            yield from _route_use(route, shadow, names, ours)


def _route_use(route: Any, shadow: IPNetwork, names: dict[int, str], ours: set[int]) -> Iterator[Use]:
    target, oif = route.get_attr("RTA_DST"), route.get_attr("RTA_OIF")
    if route["proto"] == ROUTE_PROTOCOL or oif in ours or not target:
        return
    network = IPNetwork(f"{target}/{route['dst_len']}")
    if oif == _LO and route["type"] in (2, 3):  # the kernel's own for an address of lo: seen with the address
        if route["proto"] != 2 and _is_in_pool(network):
            yield Use("local", network, "a local route on lo")
        return
    if _is_in_pool(network) or network in shadow or shadow in network:
        way = f" over {names.get(oif, oif)}" if oif else ""
        yield Use("foreign", network, f"a route to it{way}")


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
        if len(words) < 2 or not re.fullmatch(r"127(\.\d{1,3}){3}", words[0]):
            continue
        try:
            address = IPNetwork(IPAddress(words[0]))
        except AddrFormatError:
            continue
        if _is_in_pool(address):
            yield Use("local", address, f"{hosts} gives it the name {words[1]}")


def forwards_for_others() -> bool:
    """Say whether somebody else's rules translate source addresses: who does so wants the host to forward."""
    try:
        listed = subprocess.run(
            (nft.program(), "list", "ruleset", "ip"), capture_output=True, text=True, check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        ).stdout  # fmt: skip
    except OSError:
        return True
    others = re.sub(r"(?ms)^table ip vmnet \{.*?^\}", "", listed)
    if re.search(r"\b(masquerade|snat|MASQUERADE|SNAT)\b", others):
        return True
    try:
        return "nat" in Path("/proc/net/ip_tables_names").read_text().split()
    except OSError:
        return False
