"""Hear from the kernel what changes: netlink multicast, inotify, and a timer that tells of a resume.

Events only say where to look. Any of them may be lost (rtnetlink(7): a full socket says ENOBUFS), so whoever relies
on them also looks without any.
"""

import ctypes
import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from vmnet.aliases import address_of
from vmnet.linux import wire
from vmnet.linux.netlink import (
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    RTM_DELADDR,
    RTM_GETLINK,
    RTM_NEWLINK,
    SOL_NETLINK,
    Netlink,
    join_group,
    open_listener,
    parse_attrs,
)
from vmnet.linux.places import NAMED, call
from vmnet.model import KernelRefused, Lease
from vmnet.ops import ROUTE_PROTOCOL
from vmnet.plan import ALIAS_PREFIX
from vmnet.platform import Heard

# include/uapi/linux/rtnetlink.h: links, neighbours, tc, IPv4 addresses, IPv4 routes, IPv4 sysctls, namespaces
_ROUTE_GROUPS = (1, 3, 4, 5, 7, 24, 28)
_NFTABLES_GROUPS = (7,)  # include/uapi/linux/netfilter/nfnetlink.h
_LISTEN_ALL_NSID = 8
_SO_RCVBUFFORCE = 33
_BUFFER = 4 << 20
_RECEIVE_SIZE = 64 * 1024
_MOST_ADDRESSES = 100
_CHUNKS = 256  # read at once: then whoever waits may act, whatever goes on
_HEADER = struct.Struct("=IHHII")
_INDEX = struct.Struct("=4xI")
_LO = 1

_LINKS, _ADDRESSES, _ROUTES, _NEIGHBOURS, _QDISCS, _FILTERS = (16, 17), (20, 21), (24, 25), (28, 29), (36, 37), (44, 45)
_CHAINS, _CONF, _NAMESPACES = (100, 101), (80, 81), (88, 89)
_BY_INDEX = {*_ADDRESSES, *_NEIGHBOURS, *_QDISCS, *_FILTERS, *_CHAINS}
_RTA_OIF, _NETCONFA_IFINDEX = 4, 1
_OURS = ALIAS_PREFIX.encode()
_NFT_NEWGEN, _NFTA_GEN_PROC_NAME, _NFTA_GEN_PROC_PID = 10 << 8 | 15, 3, 2

# include/uapi/linux/inotify.h: written, moved, made, deleted
_INOTIFY_MASK = 0x0002 | 0x0008 | 0x0040 | 0x0080 | 0x0100 | 0x0200
_INOTIFY_EVENT = struct.Struct("=iIII")
_TIMER_ABSTIME, _TIMER_CANCEL_ON_SET = 1, 2  # include/linux/timerfd.h
_FAR = 1 << 40  # seconds


class Events:
    """What is open to hear the kernel; `file` is one whose folder is watched; `wakeup` is one more to wait for.

    `netlink` is the socket by which this process itself changes things. Raises KernelRefused where the kernel will
    not tell.
    """

    def __init__(self, netlink: Netlink, file: Path | None, wakeup: int) -> None:
        self._netlink = netlink
        self._own: set[int] = set()
        # Whose devices and namespaces are: guests' names by the index of their device, and by the kernel's number.
        self._names: dict[str, str] = {}
        self._macs: dict[bytes, str] = {}
        self._aliases: dict[str, str] = {}
        self._devices: dict[int, str] = {}
        self._insides: dict[int, str] = {}
        self._heard = Heard()
        self._programs: dict[int, str] = {}
        self._buffer = bytearray(_RECEIVE_SIZE)
        self._readers: dict[int, Callable[[], None]] = {}
        self._attended: int | None = None
        self._closers: list[Callable[[], None]] = []
        self._file = file
        self._watches: dict[int, Path] = {}
        self._poll = select.poll()
        self._poll.register(wakeup, select.POLLIN)
        try:
            self._open()
        except OSError as error:
            self.close()
            raise KernelRefused(f"the kernel does not tell of changes: {error.strerror}") from error

    def _open(self) -> None:
        route = self._listen(NETLINK_ROUTE, _ROUTE_GROUPS)
        # Of guests' namespaces too, where the kernel lets us (CAP_NET_BROADCAST).
        with suppress(PermissionError):
            route.setsockopt(SOL_NETLINK, _LISTEN_ALL_NSID, 1)
        self._add(route.fileno(), lambda: self._drain(route, self._read_route), route.close)
        rules = self._listen(NETLINK_NETFILTER, _NFTABLES_GROUPS)
        self._add(rules.fileno(), lambda: self._drain(rules, self._read_rules), rules.close)
        files = call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)
        self._add(files, lambda: self._read_files(files), lambda: os.close(files))
        for folder in (self._file.parent, NAMED) if self._file else (NAMED,):
            with suppress(OSError):  # a folder that is not there is looked at without any event
                self._watches[call("inotify_add_watch", files, bytes(folder), _INOTIFY_MASK)] = folder
        timer = _set_timer()
        self._add(timer, lambda: self._read_timer(timer), lambda: os.close(timer))

    def _listen(self, protocol: int, groups: Sequence[int]) -> socket.socket:
        listener = open_listener(protocol)
        with suppress(PermissionError):
            listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        for group in groups:
            with suppress(OSError):  # a kernel without it
                join_group(listener, group)
        return listener

    def _add(self, fd: int, read: Callable[[], None], close: Callable[[], None]) -> None:
        self._readers[fd] = read
        self._closers.append(close)
        self._poll.register(fd, select.POLLIN)

    def close(self) -> None:
        """Close all of it."""
        self.attend(None)
        while self._closers:
            self._closers.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def expect(self, leases: Sequence[Lease]) -> None:
        """Learn which devices and namespaces belong to the guests of `leases`."""
        self._names = {lease.device: lease.name for lease in leases}
        self._macs = {
            wire.mac_bytes(lease.mac)[1:]: lease.name for lease in leases if lease.mac and lease.maker == "libvirt"
        }
        self._aliases = {address_of(lease): lease.name for lease in leases if lease.kind == "alias"}
        self._devices.clear()
        self._insides.clear()
        for body in self._netlink.dump(RTM_GETLINK, wire.link_query()):
            self._learn(body)
        self._own = {self._netlink.port}

    def attend(self, process: int | None) -> None:
        """Hear of the end of a process, by its pidfd (pidfd_open(2)), instead of the former's; it is closed here."""
        if self._attended is not None:
            self._poll.unregister(self._attended)
            del self._readers[self._attended]
            os.close(self._attended)
        self._attended = process
        if process is not None:
            self._readers[process] = self._read_end
            self._poll.register(process, select.POLLIN)

    def _read_end(self) -> None:
        self.attend(None)
        self._heard = self._heard._replace(answers=True)

    def _learn(self, link: bytes) -> None:
        """Learn whose device this is, if it is a guest's."""
        name = self._names.get(wire.parse_name(link))
        if name is None:
            return
        self._devices[_INDEX.unpack_from(link)[0]] = name
        netns = wire.parse_far_netns(link)
        if netns is not None:
            self._insides[netns] = name

    def hear(self, timeout: float) -> Heard:
        """Return what was heard within `timeout` seconds, at once when there is anything, also on the wakeup.

        Raises OSError when a socket is dead.
        """
        self._heard = Heard()
        self._programs.clear()
        for fd, _ in self._poll.poll(max(0.0, timeout) * 1000):
            read = self._readers.get(fd)
            if read:
                read()
        programs = tuple(self._programs.values())
        return self._heard._replace(programs=programs) if programs and self._heard.anything else self._heard

    # Netlink

    def _drain(self, listener: socket.socket, read: Callable[[bytes, int | None], None]) -> None:
        for _ in range(_CHUNKS):
            try:
                size, ancillary, _, _ = listener.recvmsg_into([self._buffer], 64)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._heard = self._heard._replace(lost=True)
                continue
            numbers = [data for level, kind, data in ancillary if (level, kind) == (SOL_NETLINK, _LISTEN_ALL_NSID)]
            netns = struct.unpack("=i", numbers[0])[0] if numbers else None
            read(bytes(self._buffer[:size]), netns)

    def _read_route(self, data: bytes, netns: int | None) -> None:
        start = 0
        while start + 16 <= len(data):
            size, kind, _, _, port = _HEADER.unpack_from(data, start)
            if size < 16 + _INDEX.size or start + size > len(data):
                return  # nothing that the kernel sends
            body = data[start + 16 : start + size]
            # One that was made anew while whose devices there are was read, by this very process most often.
            if kind == RTM_NEWLINK and netns is None and _OURS in body:
                self._learn(body)
            if port not in self._own or netns is not None:
                before = self._heard
                if netns is None or netns < 0:
                    self._read_own(kind, body)
                # A guest's IPv6 learns and forgets neighbours all the time, even while nothing else happens.
                elif netns in self._insides and (kind not in _NEIGHBOURS or body[0] == socket.AF_INET):
                    self._name(self._insides[netns])
                if port and self._heard is not before:
                    self._remember(port, "")
            start += (size + 3) & ~3

    def _read_own(self, kind: int, body: bytes) -> None:
        """Read an event of the host's own namespace."""
        if kind in _LINKS:
            self._read_link(body)
        elif kind in _BY_INDEX:
            index = _INDEX.unpack_from(body)[0]
            self._index(index)
            if kind in _ADDRESSES and index == _LO and (name := self._aliases.get(wire.parse_local(body))):
                self._name(name)
            if kind == RTM_DELADDR and index != _LO and index not in self._devices:
                self._lose(wire.parse_local(body))
        elif kind in _ROUTES:
            if body[1] == 0 and not self._heard.host:
                self._heard = self._heard._replace(host=True)  # a default route: a bridge may lead out now, or no more
            elif body[5] == ROUTE_PROTOCOL:
                self._index(int.from_bytes(parse_attrs(body, 12).get(_RTA_OIF, b""), "little") or _LO)
        elif kind in _CONF:
            index = int.from_bytes(parse_attrs(body, 4).get(_NETCONFA_IFINDEX, b""), "little", signed=True)
            self._index(index if index > 0 else _LO)
        elif kind in _NAMESPACES:
            self._heard = self._heard._replace(marks=True)

    def _read_link(self, body: bytes) -> None:
        index = _INDEX.unpack_from(body)[0]
        if index in self._devices or index == _LO:
            self._index(index)
        elif _OURS in body:
            self._heard = self._heard._replace(marks=True)
        elif wire.BRIDGE in body:
            self._heard = self._heard._replace(host=True)
        elif self._macs:
            # A tap that libvirt offers: its first byte is another than the guest's.
            name = self._macs.get(parse_attrs(body, 16).get(wire.IFLA_ADDRESS, b"")[1:])
            if name:
                self._name(name)

    def _lose(self, address: str) -> None:
        """Remember an address that went; of very many, that anything may have changed."""
        known = self._heard.addresses
        if len(known) < _MOST_ADDRESSES:
            self._heard = self._heard._replace(addresses=known | {address})
        elif not self._heard.lost:
            self._heard = self._heard._replace(lost=True)

    def _index(self, index: int) -> None:
        if index == _LO:
            if not self._heard.host:
                self._heard = self._heard._replace(host=True)
        elif index in self._devices:
            self._name(self._devices[index])

    def _name(self, name: str) -> None:
        if name not in self._heard.names:
            self._heard = self._heard._replace(names=self._heard.names | {name})

    def _read_rules(self, data: bytes, _: int | None) -> None:
        start = 0
        while start + 20 <= len(data):
            size, kind, _, _, port = _HEADER.unpack_from(data, start)
            if size < 20:
                return
            body = data[start + 20 : start + size]
            if kind == _NFT_NEWGEN:
                attrs = parse_attrs(body)
                name = attrs.get(_NFTA_GEN_PROC_NAME, b"").rstrip(b"\0").decode(errors="replace")
                self._remember(int.from_bytes(attrs.get(_NFTA_GEN_PROC_PID, b""), "big"), name)
            if port not in self._own and not self._heard.host:
                self._heard = self._heard._replace(host=True)
            start += (size + 3) & ~3

    def _remember(self, pid: int, name: str) -> None:
        """Remember who changed something: a netlink port is most often its program's process id."""
        if len(self._programs) < 8 and pid not in self._programs:
            with suppress(OSError):
                name = name or Path(f"/proc/{pid}/comm").read_text().strip()
            self._programs[pid] = f"{name or 'process'}[{pid}]"

    # Files and time

    def _read_files(self, handle: int) -> None:
        with suppress(BlockingIOError):
            data = os.read(handle, _RECEIVE_SIZE)
            start = 0
            while start + 16 <= len(data):
                number, mask, _, size = _INOTIFY_EVENT.unpack_from(data, start)
                name = data[start + 16 : start + 16 + size].rstrip(b"\0").decode(errors="replace")
                start += 16 + size
                folder = self._watches.get(number)
                if folder == NAMED:
                    self._heard = self._heard._replace(marks=True)
                elif folder is None or (self._file and self._file.name == name) or mask & 0x4000:  # IN_Q_OVERFLOW
                    self._heard = self._heard._replace(names_file=True)

    def _read_timer(self, handle: int) -> None:
        with suppress(OSError):
            os.read(handle, 8)  # ECANCELED: the clock was set, or the machine was asleep (timerfd_create(2))
        self._heard = self._heard._replace(clock=True)
        _arm(handle)


def _set_timer() -> int:
    """Return a timer that fires when the wall clock jumps, which it does at a resume."""
    handle = call("timerfd_create", 0, os.O_NONBLOCK | os.O_CLOEXEC)  # CLOCK_REALTIME
    _arm(handle)
    return handle


def _arm(handle: int) -> None:
    value = (ctypes.c_long * 4)(0, 0, _FAR, 0)  # struct itimerspec: no interval; when
    call("timerfd_settime", handle, _TIMER_ABSTIME | _TIMER_CANCEL_ON_SET, ctypes.byref(value), None)
