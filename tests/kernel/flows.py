"""What NAT takes for one connection though it is many questions: one port's datagrams, one ping's echo requests.

New TCP connections have a new port each, and so a new entry in the kernel's connection tracking. A flow finds the old
one, with the translation of the uplink that was: that is what a move can black-hole.
"""

import itertools
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

from tests.kernel.machine import ECHO_PORT, TIMEOUT, Machine, checksum, drain, wait_until

_SOON = 0.2
_PORT = 4001
_IDENTIFIER = 0x1234
_ECHO, _ECHO_REPLY = 8, 0


class Flow:
    """Datagrams of one port to the echo server of `address`, or echo requests of one identifier."""

    def __init__(self, machine: Machine, address: str, kind: Literal["udp", "ping"], port: int = _PORT) -> None:
        self._machine, self._kind = machine, kind
        self._tokens = itertools.count()
        self._answer = b""
        if kind == "udp":
            self._socket = machine.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.bind(("0.0.0.0", port))
        else:
            self._socket = machine.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self._to = (address, ECHO_PORT if kind == "udp" else 0)
        self._socket.setblocking(False)

    def __repr__(self) -> str:
        return f"{self._kind} of {self._machine.name}"

    def ask(self) -> None:
        """Send one packet, if the kernel takes it: with no way out it does not."""
        drain(self._socket)
        data = struct.pack("!HI", next(self._tokens) & 0xFFFF, 0xC0FFEE)
        self._answer = data if self._kind == "udp" else _echo(_ECHO_REPLY, data)
        with suppress(OSError):
            self._socket.sendto(data if self._kind == "udp" else _echo(_ECHO, data), self._to)

    def is_answered(self) -> bool:
        """Tell whether the answer to what was sent last has come by now."""
        return any(packet.endswith(self._answer) for packet in drain(self._socket))


def unanswered(flows: Iterable[Flow], patience: float = TIMEOUT) -> list[Flow]:
    """Send one packet of each flow, and return the flows that get no answer within `patience` seconds."""
    left = list(flows)
    for flow in left:
        flow.ask()

    def all_answered() -> bool:
        left[:] = [flow for flow in left if not flow.is_answered()]
        return not left

    wait_until(all_answered, patience)
    return left


def black_holes(flows: Iterable[Flow]) -> list[Flow]:
    """Return the flows that go on to get no answer; one packet of each may be lost, as a move takes it."""
    return unanswered(unanswered(flows, _SOON))


def _echo(kind: int, data: bytes) -> bytes:
    """Return an ICMP echo message (RFC 792) whose sequence number is the first two bytes of `data`."""
    rest = struct.pack("!H", _IDENTIFIER) + data
    return struct.pack("!BBH", kind, 0, checksum(struct.pack("!BBH", kind, 0, 0) + rest)) + rest
