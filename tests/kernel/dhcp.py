"""A DHCP client (RFC 2131) that shows whatever MAC it likes, from inside a guest, by packets of its own."""

import os
import socket
import struct
import time
from typing import NamedTuple

from tests.kernel.frames import BROADCAST, IPV4, ether, mac_bytes, udp
from tests.kernel.machine import TIMEOUT
from tests.kernel.net import Guest

DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)
MASK, ROUTER, RESOLVER, HOST_NAME, DOMAIN, MTU, BROADCAST_ADDRESS = 1, 3, 6, 12, 15, 26, 28
WANTED, LEASE_TIME, TYPE, SERVER, ASKED_FOR, CLIENT, SEARCH = 50, 51, 53, 54, 55, 61, 119
FOR_EVER = 0xFFFFFFFF
_COOKIE = b"\x63\x82\x53\x63"


class Reply(NamedTuple):
    """What the server says: the kind of message, the address, options by number."""

    kind: int
    address: str
    options: dict[int, bytes]

    def addresses(self, option: int) -> list[str]:
        """Return an option as addresses."""
        value = self.options.get(option, b"")
        return [socket.inet_ntoa(value[at : at + 4]) for at in range(0, len(value), 4)]

    def text(self, option: int) -> str:
        """Return an option as text."""
        return self.options.get(option, b"").decode().rstrip("\0")

    def number(self, option: int) -> int:
        """Return an option as a number."""
        return int.from_bytes(self.options.get(option, b""), "big")


class Client:
    """A client of a guest's; `identifier` is its client identifier (option 61), none without."""

    def __init__(self, guest: Guest, mac: str, identifier: bytes = b"") -> None:
        self._guest = guest
        self._mac = mac
        self._identifier = identifier
        self._sniffer = guest.sniff(guest.device, kind=IPV4)

    def lease(self) -> Reply:
        """Discover and request; raises TimeoutError where nobody offers, or answers."""
        offer = self.ask(DISCOVER)
        assert offer.kind == OFFER
        return self.ask(REQUEST, wanted=offer.address, server=offer.addresses(SERVER)[0])

    def ask(self, kind: int, *, wanted: str = "", server: str = "", here: str = "", wait: float = TIMEOUT) -> Reply:
        """Send one message, again each second, and return the reply; `here` is the address it has and renews."""
        number = os.urandom(4)
        frame = self._frame(kind, number, wanted, server, here)
        end = time.monotonic() + wait
        again = 0.0
        while time.monotonic() < end:
            if time.monotonic() >= again:
                self._guest.send(self._guest.device, frame)
                again = time.monotonic() + 1
            for received in self._sniffer.frames():
                reply = _parse(received, number)
                if reply:
                    return reply
            time.sleep(0.002)
        raise TimeoutError(f"{self._guest.name}: no reply to DHCP message {kind} of {self._mac}")

    def _frame(self, kind: int, number: bytes, wanted: str, server: str, here: str) -> bytes:
        options = [(TYPE, bytes([kind])), (ASKED_FOR, bytes([MASK, ROUTER, RESOLVER, HOST_NAME, DOMAIN, MTU, SEARCH]))]
        options += [(WANTED, socket.inet_aton(wanted))] if wanted else []
        options += [(SERVER, socket.inet_aton(server))] if server else []
        options += [(CLIENT, self._identifier)] if self._identifier else []
        # A client without an address asks for answers to all, for it may hear no others (RFC 2131 4.1).
        head = struct.pack("!BBBB4sHH", 1, 1, 6, 0, number, 0, 0 if here else 0x8000)
        addresses = socket.inet_aton(here or "0.0.0.0") + bytes(12)
        body = head + addresses + mac_bytes(self._mac).ljust(16, b"\0") + bytes(192) + _COOKIE
        body += b"".join(bytes([code, len(value)]) + value for code, value in options) + b"\xff"
        source, target = (here, self._guest.guest_gateway) if here else ("0.0.0.0", "255.255.255.255")
        packet = udp(source, target, 67, body.ljust(300, b"\0"), source_port=68)
        return ether(BROADCAST, self._mac, IPV4, packet)


def _parse(frame: bytes, number: bytes) -> Reply | None:
    """Return a reply to the message of that number, if it is one."""
    packet = frame[14:]
    if len(packet) < 28 or packet[9] != socket.IPPROTO_UDP:
        return None
    head = (packet[0] & 15) * 4
    body = packet[head + 8 :]
    if struct.unpack_from("!HH", packet, head) != (67, 68) or body[4:8] != number:
        return None
    options, at = {}, 240
    while at < len(body) and body[at] != 0xFF:
        if body[at] == 0:
            at += 1
            continue
        options[body[at]] = body[at + 2 : at + 2 + body[at + 1]]
        at += 2 + body[at + 1]
    return Reply(options[TYPE][0], socket.inet_ntoa(body[16:20]), options)
