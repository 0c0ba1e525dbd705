"""Rtnetlink, lean: build messages, send many at once, read acknowledgements and dumps.

pyroute2 encodes a message in 40 to 130 us, decodes one in 200 us and takes 140 ms to import; a guest is twenty
messages out and ten in, and the kernel needs 1 ms for all of them. The formats are those of rtnetlink(7) and
Documentation/userspace-api/netlink/intro.rst: native byte order, attributes padded to four bytes.
"""

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from vmnet.model import KernelRefused

NETLINK_ROUTE, NETLINK_NETFILTER = socket.NETLINK_ROUTE, 12  # include/uapi/linux/netlink.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK, RTM_NEWLINKPROP = 16, 17, 18, 19, 108
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46
RTM_GETNSID = 90

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_ACK_TLVS, _NLM_F_CAPPED = 0x200, 0x100
_NLMSGERR_ATTR_MSG = 1
SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 10, 11, 12
_SO_RCVBUFFORCE, _SO_NETNS_COOKIE = 33, 71  # include/uapi/asm-generic/socket.h
_NESTED = 0x8000
_SEND_LIMIT = 64 * 1024
# The kernel builds dumps in pieces of 32 KiB at most; a larger buffer is mapped anew for each call.
_RECEIVE_SIZE = 64 * 1024
# So many answers fit into the receive buffer that a socket has at the least.
_QUESTIONS = 32

_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")

Attrs: TypeAlias = dict[int, bytes]


def attr(kind: int, payload: bytes) -> bytes:
    """Return one attribute, padded."""
    size = len(payload)
    return _ATTR.pack(size + 4, kind) + payload + b"\0" * (-size % 4)


def nested(kind: int, *attrs: bytes) -> bytes:
    """Return an attribute that holds attributes."""
    return attr(kind | _NESTED, b"".join(attrs))


def text(kind: int, value: str) -> bytes:
    """Return an attribute that holds a string with its final NUL."""
    return attr(kind, value.encode() + b"\0")


def u32(kind: int, value: int) -> bytes:
    """Return an attribute that holds a number of 32 bits."""
    return attr(kind, struct.pack("=I", value))


def parse_attrs(data: bytes, start: int = 0) -> Attrs:
    """Return the attributes of `data` from `start` on, by number; the last of a number wins."""
    found: Attrs = {}
    end = len(data)
    while start + 4 <= end:
        size, kind = _ATTR.unpack_from(data, start)
        if size < 4:
            break
        found[kind & 0x3FFF] = data[start + 4 : start + size]
        start += (size + 3) & ~3
    return found


class Message(NamedTuple):
    """One request: its type, its flags beyond REQUEST, and what follows the netlink header."""

    kind: int
    flags: int
    body: bytes


class Failure(NamedTuple):
    """The kernel's refusal of message number `position`: errno and its own words, if it gave any."""

    position: int
    errno: int
    words: str

    def __str__(self) -> str:
        name = os.strerror(self.errno)
        return f"{name} ({self.words})" if self.words else name


def netns_cookie(inside: socket.socket) -> int | None:
    """Return the number that the kernel gives a socket's namespace and no other of this boot, since Linux 5.14."""
    try:
        return int.from_bytes(inside.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)
    except OSError:
        return None


def open_listener(protocol: int) -> socket.socket:
    """Return a socket that hears what the kernel tells those who join a group of that part of it; it never waits."""
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
    listener.bind((0, 0))  # one that has no port hears nothing of what the kernel itself does
    return listener


def join_group(listener: socket.socket, group: int) -> None:
    """Have a listener hear of one more group; raises OSError where the kernel has none of that number."""
    listener.setsockopt(SOL_NETLINK, _ADD_MEMBERSHIP, group)


class Netlink:
    """A socket to a part of the kernel, by default the routing tables, of the namespace in which it was opened."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 4 << 20)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._sequence = 0

    @property
    def port(self) -> int:
        """The number by which the kernel tells others who asked for a change; 0 before anything was asked."""
        return int(self._socket.getsockname()[0])

    @property
    def netns_cookie(self) -> int | None:
        """What tells the namespace of the socket from all others of this boot."""
        return netns_cookie(self._socket)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self, messages: Sequence[Message]) -> list[Failure]:
        """Send `messages` in order, as many at once as fit, and return what the kernel refused.

        The kernel goes on after a refusal, so messages that depend on each other belong into different calls
        where the later ones could hit something else.
        """
        failures: list[Failure] = []
        start = 0
        while start < len(messages):
            size, end = 0, start
            while end < len(messages) and size < _SEND_LIMIT:
                size += 16 + len(messages[end].body)
                end += 1
            failures += self._send_batch(messages[start:end], start)
            start = end
        return failures

    def _send_batch(self, messages: Sequence[Message], offset: int) -> Iterator[Failure]:
        first = self._sequence + 1
        last = self._sequence = self._sequence + len(messages)
        # One acknowledgement, of the last message, is enough: refusals are sent in any case.
        parts = [
            _HEADER.pack(
                16 + len(message.body),
                message.kind,
                NLM_F_REQUEST | message.flags | (NLM_F_ACK if number == last else 0),
                number,
                0,
            )
            + message.body
            for number, message in enumerate(messages, first)
        ]
        self._socket.send(b"".join(parts))
        failures = []
        while True:
            for kind, flags, number, body in self._receive():
                if kind != _NLMSG_ERROR or not first <= number <= last:
                    continue
                code = -int.from_bytes(body[:4], "little", signed=True)
                if code:
                    failures.append(Failure(offset + number - first, code, _words(flags, body)))
                if number == last:
                    return iter(failures)

    def get(self, message: Message) -> bytes | None:
        """Return the body of the one answer to `message`, or None where the kernel knows no such thing."""
        return self.get_each([message])[0]

    def get_each(self, messages: Sequence[Message]) -> list[bytes | None]:
        """Return the body of the one answer to each of `messages`, or None where the kernel knows no such thing."""
        answers: list[bytes | None] = []
        for start in range(0, len(messages), _QUESTIONS):
            answers += self._ask(messages[start : start + _QUESTIONS])
        return answers

    def _ask(self, messages: Sequence[Message]) -> Iterator[bytes | None]:
        first = self._sequence + 1
        self._sequence += len(messages)
        parts = [
            _HEADER.pack(16 + len(message.body), message.kind, NLM_F_REQUEST, number, 0) + message.body
            for number, message in enumerate(messages, first)
        ]
        self._socket.send(b"".join(parts))
        answers: dict[int, bytes | None] = {}
        while len(answers) < len(messages):
            for kind, flags, number, body in self._receive():
                if number < first:
                    continue  # of a question that was given up
                if kind != _NLMSG_ERROR:
                    answers[number] = body
                    continue
                code = -int.from_bytes(body[:4], "little", signed=True)
                if code not in (errno.ENODEV, errno.ENOENT):
                    raise KernelRefused(
                        f"the kernel refused a netlink request: {Failure(0, code, _words(flags, body))}"
                    )
                answers[number] = None
        return (answers[number] for number in range(first, first + len(messages)))

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """Yield the body of each answer to a dump request; a device that is not there has none.

        A dump that the kernel marks as interrupted by a change is what it is: the caller looks again before it
        believes that something is gone.
        """
        self._sequence += 1
        sequence = self._sequence
        self._socket.send(_HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, sequence, 0) + body)
        while True:
            for kind_, flags, number, answer in self._receive():
                if number != sequence:
                    continue
                if kind_ == _NLMSG_DONE:
                    return
                if kind_ == _NLMSG_ERROR:
                    code = -int.from_bytes(answer[:4], "little", signed=True)
                    if code in (errno.ENODEV, errno.ENOENT, 0):
                        return
                    raise KernelRefused(f"the kernel refused a netlink dump: {Failure(0, code, _words(flags, answer))}")
                yield answer

    def _receive(self) -> Iterable[tuple[int, int, int, bytes]]:
        data = self._socket.recv(_RECEIVE_SIZE)
        start = 0
        messages = []
        while start + 16 <= len(data):
            size, kind, flags, number, _ = _HEADER.unpack_from(data, start)
            if size < 16:
                break
            messages.append((kind, flags, number, data[start + 16 : start + size]))
            start += (size + 3) & ~3
        return messages


def _words(flags: int, body: bytes) -> str:
    """Return the kernel's own words for a refusal (extended acknowledgement), or an empty string."""
    if not flags & _NLM_F_ACK_TLVS:
        return ""
    # The refused request follows the error code: its header alone where the kernel capped it.
    start = 20 if flags & _NLM_F_CAPPED else 4 + ((int.from_bytes(body[4:8], "little") + 3) & ~3)
    return parse_attrs(body, start).get(_NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode(errors="replace")
