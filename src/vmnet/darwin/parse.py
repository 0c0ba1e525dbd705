"""Read what ifconfig(8) of macOS or FreeBSD shows: the IPv4 addresses of each link. Pure.

A link begins with a line that is not indented, `lo0: flags=...`, and lines that begin with `inet` are its addresses, in
the order in which the kernel has them. Words count, columns do not: releases differ in what they put between and after
them (Apple's network_cmds, `in_status`; FreeBSD's sbin/ifconfig/af_inet.c).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from netaddr import INET_PTON, AddrFormatError, IPAddress

from vmnet.model import VmnetError

_LINK = re.compile(r"(\S+):(\s|$)")
_MASK = re.compile(r"0x[0-9a-f]{1,8}", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """An IPv4 address of a link, with its mask as a number in host order: 0xffffffff is a /32."""

    address: IPAddress
    mask: int


def parse_ifconfig(text: str) -> dict[str, list[LinkAddress]]:
    """Return the IPv4 addresses of every link that ifconfig shows, none for a link that has none.

    A point-to-point link's address is its own end. Raises VmnetError, with the line, for what does not begin as
    ifconfig's lines do, and for an address or a mask that cannot be read.
    """
    links: dict[str, list[LinkAddress]] = {}
    addresses: list[LinkAddress] | None = None
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if not line[0].isspace():
            found = _LINK.match(line)
            if found is None:
                raise _unread(line, "a link's name and a colon are missing")
            addresses = links.setdefault(found[1], [])
        elif addresses is None:
            raise _unread(line, "no link comes before it")
        elif words[0] == "inet":
            addresses.append(_address(line, iter(words[1:])))
    return links


def _address(line: str, words: Iterator[str]) -> LinkAddress:
    try:
        address = IPAddress(next(words, ""), 4, INET_PTON)
    except AddrFormatError:
        raise _unread(line, "inet comes before an IPv4 address") from None
    if "netmask" not in words:  # which takes the words up to it, too
        raise _unread(line, "it has no netmask")
    mask = next(words, "")
    if not _MASK.fullmatch(mask):
        raise _unread(line, f"{mask or 'nothing'} is no mask such as 0xffffffff")
    return LinkAddress(address, int(mask, 16))


def _unread(line: str, why: str) -> VmnetError:
    return VmnetError(
        f"ifconfig shows a line that cannot be read, {line.strip()[:200]!r}: {why}",
        hint="`ifconfig -a` shows all of it; `type -a ifconfig` tells which program that is",
    )
