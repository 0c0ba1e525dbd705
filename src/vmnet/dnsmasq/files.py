"""What dnsmasq reads: its settings, the names of guests in either spelling, and who gets which address. Pure."""

from collections.abc import Callable, Collection, Iterable, Mapping
from socket import inet_aton
from string import Template
from typing import NamedTuple

from vmnet.addressed import put
from vmnet.model import USUAL_MTU, Block, Lease
from vmnet.plan import Plane, dotted, shadow_of


class Where(NamedTuple):
    """The paths that dnsmasq's settings name: the folder of its files, the leases it gave, the host's resolvers."""

    folder: str
    leases: str
    resolv: str


SETTINGS = ("mapped.conf", "native.conf", "dhcp.conf")
"""The settings, by file name."""
FOLDERS = ("mapped", "native")
"""Where the tables of names are."""
DHCP = "dhcp.hosts"
"""The table of addresses."""


def render_settings(
    templates: Mapping[str, str], where: Where, domain: str, plane: Plane, mtus: Iterable[int]
) -> dict[str, str]:
    """Return the settings of each of the three, by file name, for guests with these MTUs.

    `templates` has those of "dns" and "dhcp".
    """
    # Forced, which only settings can: udhcpc does not ask for its MTU.
    unusual = sorted(set(mtus) - {USUAL_MTU})
    forced = "".join(f"dhcp-option-force=tag:mtu{mtu},option:mtu,{mtu}\n" for mtu in unusual)
    common = {**where._asdict(), "domain": domain, "shadow": str(plane.shadow)}
    dns = Template(templates["dns"])
    return {
        "mapped.conf": dns.substitute(common, mode="mapped", port=plane.dns_port),
        "native.conf": dns.substitute(common, mode="native", port=plane.dns_port + 1),
        "dhcp.conf": Template(templates["dhcp"]).substitute(common) + forced,
    }


def render_tables(leases: Iterable[Lease], domain: str, plane: Plane) -> dict[str, str]:
    """Return the tables of those guests, which are ordered by block, by file name.

    Those in mapped/ and native/ are for dnsmasq's hostsdir, as hosts(5): names in the spelling of mapped guests, and of
    native ones, a file for each /24, so that a new guest costs the same however many there are. dhcp.hosts is for its
    dhcp-hostsfile: the device, known by the tag that dnsmasq makes of it, gets its address whatever its MAC; the first
    MAC is that of the record.
    """
    lines: dict[str, list[str]] = {DHCP: []}
    for lease in leases:
        for name, line in _lines(lease, domain, plane).items():
            lines.setdefault(name, []).append(line)
    return {name: "".join(those) for name, those in lines.items()}


def tables_of(blocks: Iterable[Block], plane: Plane) -> set[str]:
    """Return the names of the tables that may say anything of guests in those blocks."""
    return {DHCP} | {name for block in blocks for name in _places(block, plane)}


def amend_tables(
    tables: Mapping[str, str], blocks: Collection[Block], leases: Iterable[Lease], domain: str, plane: Plane
) -> dict[str, str]:
    """Return tables as `render_tables` made them, changed: of the guests in `blocks` there are those `leases` alone.

    `tables` has those that `tables_of` names; a table without a guest is empty. Raises ValueError for what is no table.
    """
    new = {lease.block: _lines(lease, domain, plane) for lease in leases}
    changes: dict[str, dict[bytes, str]] = {name: {} for name in tables}
    for block in blocks:
        lines = new.get(block, {})
        for name, address in _places(block, plane).items():
            changes[name][inet_aton(address)] = lines.get(name, "")
    try:
        return {name: put(tables[name], "\n", _address_of(name), changes[name]) for name in tables}
    except (OSError, IndexError) as error:
        raise ValueError("a table is not as it was made") from error


def _places(block: Block, plane: Plane) -> dict[str, str]:
    """Return the tables for a guest, mapped, native and DHCP, each with the address that its line there has."""
    address = block.first + 2
    native, shadow = dotted(address), dotted(shadow_of(address, plane))
    return {
        f"mapped/{shadow.rpartition('.')[0]}": shadow,
        f"native/{native.rpartition('.')[0]}": native,
        DHCP: shadow,
    }


def _address_of(table: str) -> Callable[[str], bytes]:
    if table == DHCP:
        return lambda line: inet_aton(line.rsplit(",", 2)[1])
    return lambda line: inet_aton(line.partition(" ")[0])


def _lines(lease: Lease, domain: str, plane: Plane) -> dict[str, str]:
    """Return a guest's line of each table that has one of it."""
    (mapped, shadow), (native, address), _ = _places(lease.block, plane).items()
    short = "" if lease.name == "localhost" else f" {lease.name}"  # RFC 6761: that is each guest itself
    names = f"{lease.name}.{domain}{short}\n"
    lines = {native: f"{address} {names}"}
    if lease.kind != "alias":  # which is the host itself: mapped guests have no way there
        lines[mapped] = f"{shadow} {names}"
    if lease.mode == "mapped" and lease.mac:
        option = f",set:mtu{lease.mtu}" if lease.mtu != USUAL_MTU else ""
        lines[DHCP] = f"{lease.mac},*:*:*:*:*:*,tag:{lease.device}{option},{shadow},{lease.name}\n"
    return lines
