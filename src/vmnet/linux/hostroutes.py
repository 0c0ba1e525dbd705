"""The routes of the host part. To find them the kernel walks those of all guests, so nobody has it do so needlessly.

A process that keeps them knows them for as long as the kernel tells of nothing by which they can have changed.
"""

import ctypes
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from vmnet import filters
from vmnet.linux import wire
from vmnet.linux.netlink import (
    NETLINK_ROUTE,
    RTM_DELROUTE,
    RTM_GETROUTE,
    RTM_NEWROUTE,
    Netlink,
    join_group,
    netns_cookie,
    open_listener,
)
from vmnet.ops import ROUTE_PROTOCOL

_LO = 1
_GROUPS = (1, 5, 7)  # include/uapi/linux/rtnetlink.h: links, IPv4 addresses, IPv4 routes
_SO_ATTACH_FILTER = 26  # include/uapi/asm-generic/socket.h
_FPROG = struct.Struct("@HP")  # struct sock_fprog of include/uapi/linux/filter.h


class _Kept(NamedTuple):
    listener: socket.socket
    routes: list[bytes]


_kept: list[_Kept] = []


def host_routes(netlink: Netlink) -> Sequence[bytes]:
    """Return the routes of the host part, as the kernel spells them."""
    if _kept:
        listener, routes = _kept[0]
        if netns_cookie(listener) == netlink.netns_cookie and not _has_heard(listener):
            return routes
        forget_host_routes()
    return _dump(netlink)


def keep_host_routes(netlink: Netlink) -> None:
    """Have `host_routes` of this process, which must not fork before, know them until they may have changed."""
    forget_host_routes()
    if netlink.netns_cookie is not None:  # else nothing would tell one namespace from another
        with suppress(OSError):  # a kernel that does not tell
            listener = _listen()
            _kept.append(_Kept(listener, _dump(netlink)))


def forget_host_routes() -> None:
    """Forget what was kept."""
    while _kept:
        _kept.pop().listener.close()


def _dump(netlink: Netlink) -> list[bytes]:
    # Two narrow dumps: the routes of guests, which may be thousands, are of neither kind.
    queries = (
        wire.route_query(ROUTE_PROTOCOL, kind=wire.RTN_LOCAL, index=_LO),
        wire.route_query(ROUTE_PROTOCOL, kind=wire.RTN_UNREACHABLE),
    )
    return [body for query in queries for body in netlink.dump(RTM_GETROUTE, query)]


def _listen() -> socket.socket:
    """Return what hears of all by which the routes of the host part can change, and of little else.

    The kernel does not tell of routes that go with an address, or because a device goes down, but of that itself. All
    of them have 127.0.0.1, an address of lo, for a source, or no device.
    """
    listener = open_listener(NETLINK_ROUTE)
    try:
        program = filters.encode(_PROGRAM)
        held = ctypes.create_string_buffer(program, len(program))
        fprog = _FPROG.pack(len(_PROGRAM), ctypes.addressof(held))
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
        for group in _GROUPS:
            join_group(listener, group)
    except OSError:
        listener.close()
        raise
    return listener


def _loaded(form: str, value: int) -> int:
    """Return how a filter, which loads in network order, sees a number that the kernel wrote in its own."""
    return int.from_bytes(struct.pack(form, value), "big")


# A message's type stands at 4, behind its header of 16 bytes the index of a link or an address at 4, and of a route
# the protocol at 5, the kind at 7. Classic BPF: Documentation/networking/filter.rst.
_PROGRAM: filters.Program = (
    (40, 0, 0, 4), (21, 3, 0, _loaded("=H", RTM_NEWROUTE)), (21, 2, 0, _loaded("=H", RTM_DELROUTE)),
    (32, 0, 0, 20), (21, 4, 5, _loaded("=I", _LO)),
    (48, 0, 0, 21), (21, 0, 3, ROUTE_PROTOCOL),
    (48, 0, 0, 23), (21, 1, 0, wire.RTN_UNICAST),  # a guest's
    (6, 0, 0, 0xFFFFFFFF), (6, 0, 0, 0),
)  # fmt: skip


def _has_heard(listener: socket.socket) -> bool:
    try:
        listener.recv(1)
    except BlockingIOError:
        return False
    except OSError:  # ENOBUFS: more than it can hold
        return True
    return True
