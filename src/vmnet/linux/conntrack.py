"""Forget tracked connections (ctnetlink: include/uapi/linux/netfilter/nfnetlink_conntrack.h)."""

import socket
from collections.abc import Callable
from contextlib import suppress

from vmnet.flows import Flow
from vmnet.linux.netlink import NETLINK_NETFILTER, Attrs, Message, Netlink, attr, nested, parse_attrs
from vmnet.model import KernelRefused

_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_IPV4 = bytes((socket.AF_INET, 0, 0, 0))  # struct nfgenmsg
_ORIGINAL, _REPLY, _ZONE, _ID = 1, 2, 18, 12
_IP, _SOURCE, _DESTINATION = 1, 1, 2


def forget(is_to_go: Callable[[Flow], bool]) -> None:
    """Forget those connections that are to go; none where the kernel does not tell of them."""
    netlink = Netlink(NETLINK_NETFILTER)
    try:
        gone = []
        with suppress(KernelRefused, OSError):
            for body in netlink.dump(_GET, _IPV4):
                attrs = parse_attrs(body, 4)
                if is_to_go(_flow(attrs)):
                    gone.append(Message(_DELETE, 0, _IPV4 + _key(attrs)))
        netlink.send(gone)  # one that is refused has gone by itself
    finally:
        netlink.close()


def _flow(attrs: Attrs) -> Flow:
    numbers = []
    for direction in (_ORIGINAL, _REPLY):
        addresses = parse_attrs(parse_attrs(attrs.get(direction, b"")).get(_IP, b""))
        numbers += [int.from_bytes(addresses.get(end, b""), "big") for end in (_SOURCE, _DESTINATION)]
    return Flow(*numbers)


def _key(attrs: Attrs) -> bytes:
    """Return what tells this connection from all others, a later one of the same addresses and ports included."""
    parts = [nested(_ORIGINAL, attrs.get(_ORIGINAL, b""))]
    return b"".join(parts + [attr(kind, attrs[kind]) for kind in (_ID, _ZONE) if kind in attrs])
