"""Let an address go to whatever MAC its device shows. Pure, and without other imports, for the keeper."""

import re
from collections.abc import Mapping

# As dnsmasq writes it: bytes in hex, behind the number of another kind of hardware than Ethernet.
_MAC = re.compile(r"([0-9a-f]{2}-)?[0-9a-f]{2}(:[0-9a-f]{2}){0,15}", re.ASCII)


def holders(leases: str) -> dict[str, str]:
    """Return the MAC that holds each address, of dnsmasq's file of leases: "EXPIRY MAC ADDRESS NAME CLIENT-ID".

    Names and identifiers are the clients' own words: a line without a MAC in its place counts for nothing.
    """
    fields = (line.split(" ") for line in leases.splitlines())
    return {one[2]: one[1] for one in fields if len(one) == 5 and _MAC.fullmatch(one[1])}


def with_holders(hosts: str, holding: Mapping[str, str]) -> str:
    """Return dhcp.hosts with the MACs that hold the addresses now put first.

    dnsmasq gives an address to another MAC only when the one that holds it is named there (config_has_mac in its
    dhcp-common.c): a device's next MAC would have to wait until the lease of the former has run out.
    """
    return "".join(_with_holder(line, holding) for line in hosts.splitlines(keepends=True))


def _with_holder(line: str, holding: Mapping[str, str]) -> str:
    fields = line.split(",")
    mac = holding.get(fields[-2]) if len(fields) > 1 else None
    return line if mac is None or mac == fields[0] else f"{mac},{line}"
