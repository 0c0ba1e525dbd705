"""What dnsmasq reads: its settings, the names of guests in either spelling, and who gets which address. Pure."""

from collections.abc import Iterable, Mapping
from string import Template
from typing import NamedTuple

from vmnet.model import USUAL_MTU, Lease
from vmnet.plan import Plane, dotted, shadow_of


class Where(NamedTuple):
    """The paths that dnsmasq's settings name: the folder of its files, the leases it gave, the host's resolvers."""

    folder: str
    leases: str
    resolv: str


def render_settings(
    templates: Mapping[str, str], where: Where, domain: str, plane: Plane, leases: Iterable[Lease]
) -> dict[str, str]:
    """Return the settings of each of the three, by file name; `templates` has those of "dns" and "dhcp"."""
    # Forced, which only settings can: udhcpc does not ask for its MTU.
    mtus = sorted({lease.mtu for lease in leases} - {USUAL_MTU})
    forced = "".join(f"dhcp-option-force=tag:mtu{mtu},option:mtu,{mtu}\n" for mtu in mtus)
    common = {**where._asdict(), "domain": domain, "shadow": str(plane.shadow)}
    dns = Template(templates["dns"])
    return {
        "mapped.conf": dns.substitute(common, mode="mapped", port=plane.dns_port),
        "native.conf": dns.substitute(common, mode="native", port=plane.dns_port + 1),
        "dhcp.conf": Template(templates["dhcp"]).substitute(common) + forced,
    }


def render_tables(leases: Iterable[Lease], domain: str, plane: Plane) -> dict[str, str]:
    """Return the tables of those guests, by file name.

    The .hosts files are for dnsmasq's addn-hosts, as hosts(5): names in the spelling of mapped guests, and of native
    ones. dhcp.hosts is for its dhcp-hostsfile: the device, known by the tag that dnsmasq makes of it, gets its address
    whatever its MAC; the first MAC is that of the record.
    """
    mapped, native, hosts = [], [], []
    for lease in leases:
        address = lease.block.first + 2
        shadow = dotted(shadow_of(address, plane))
        short = "" if lease.name == "localhost" else f" {lease.name}"  # RFC 6761: that is each guest itself
        names = f"{lease.name}.{domain}{short}\n"
        if lease.kind != "alias":  # which is the host itself: mapped guests have no way there
            mapped.append(f"{shadow} {names}")
        native.append(f"{dotted(address)} {names}")
        if lease.mode == "mapped" and lease.mac:
            option = f",set:mtu{lease.mtu}" if lease.mtu != USUAL_MTU else ""
            hosts.append(f"{lease.mac},*:*:*:*:*:*,tag:{lease.device}{option},{shadow},{lease.name}\n")
    return {
        "mapped.hosts": "".join(mapped),
        "native.hosts": "".join(native),
        "dhcp.hosts": "".join(hosts),
    }
