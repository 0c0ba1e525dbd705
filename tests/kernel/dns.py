"""Questions for names (RFC 1035), asked from inside a machine, and servers that answer them and remember them.

ask(guest, guest.guest_gateway, "web.vmnet.internal")        # Answer(NOERROR, ("127.1.0.2",))
"""

import socket
import struct
from typing import NamedTuple

from tests.kernel.machine import TIMEOUT, Machine

NOERROR, SERVFAIL, NXDOMAIN, REFUSED = 0, 2, 3, 5
TYPES = {"A": 1, "PTR": 12, "TXT": 16, "AAAA": 28}
_IN, _CHAOS = 1, 3


class Answer(NamedTuple):
    """The code of a response, and the addresses or names in it."""

    code: int
    values: tuple[str, ...] = ()


def question(name: str, kind: str = "A", *, number: int = 0x1234, chaos: bool = False) -> bytes:
    """Return the message that asks for a name."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.rstrip(".").split("."))
    head = struct.pack(">6H", number, 0x0100, 1, 0, 0, 0)
    return head + labels + b"\0" + struct.pack(">HH", TYPES[kind], _CHAOS if chaos else _IN)


def parse(message: bytes) -> Answer:
    """Return what a response says."""
    _, flags, questions, answers = struct.unpack_from(">4H", message)
    at = 12
    for _ in range(questions):
        at = _name(message, at)[1] + 4
    values = []
    for _ in range(answers):
        at = _name(message, at)[1]
        kind, _, _, length = struct.unpack_from(">HHIH", message, at)
        at += 10
        if kind == TYPES["A"]:
            values.append(socket.inet_ntoa(message[at : at + 4]))
        elif kind == TYPES["PTR"]:
            values.append(_name(message, at)[0])
        elif kind == TYPES["TXT"]:
            values.append(message[at + 1 : at + length].decode())
        at += length
    return Answer(flags & 15, tuple(values))


def _name(message: bytes, at: int) -> tuple[str, int]:
    """Return the name at a place of a message, and where it ends."""
    labels: list[str] = []
    while length := message[at]:
        if length >= 0xC0:
            rest, _ = _name(message, struct.unpack_from(">H", message, at)[0] & 0x3FFF)
            return ".".join([*labels, rest]), at + 2
        labels.append(message[at + 1 : at + 1 + length].decode())
        at += 1 + length
    return ".".join(labels), at + 1


def ask(
    machine: Machine, server: str, name: str, kind: str = "A", *,
    port: int = 53, tcp: bool = False, wait: float = TIMEOUT, chaos: bool = False,
) -> Answer:  # fmt: skip
    """Ask `server` for a name; raises OSError when there is no answer."""
    asked = question(name, kind, chaos=chaos)
    if not tcp:
        return parse(machine.udp(server, port, asked, wait=wait))
    with machine.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(wait)
        client.connect((server, port))
        client.sendall(struct.pack(">H", len(asked)) + asked)
        answer = client.makefile("rb")
        head = answer.read(2)
        if len(head) < 2:
            raise ConnectionError(f"{server} hung up")
        return parse(answer.read(struct.unpack(">H", head)[0]))


class Upstream:
    """A server for names at an address of a machine: each has the address `value`; `heard` are the names asked for."""

    def __init__(self, machine: Machine, address: str, value: str, port: int = 53) -> None:
        self.heard: list[str] = []
        self._value = socket.inet_aton(value)
        self._udp = machine.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.setblocking(False)
        self._udp.bind((address, port))
        machine.lab.loop.watch(self._udp.fileno(), self._answer)

    def _answer(self) -> None:
        try:
            message, client = self._udp.recvfrom(65535)
            name, end = _name(message, 12)
            self.heard.append(name)
            record = b"\xc0\x0c" + struct.pack(">HHIH", 1, _IN, 0, 4) + self._value
            is_address = message[end : end + 2] == struct.pack(">H", TYPES["A"])
            head = message[:2] + struct.pack(">5H", 0x8180, 1, is_address, 0, 0)
            self._udp.sendto(head + message[12 : end + 4] + (record if is_address else b""), client)
        except OSError:
            return  # an ICMP error for an earlier answer
