"""The carve and the fence: what is local to lo answers all the time, and the pool fails at once.

A busy prober talks to loopback while the host is carved and restored again and again, whatever stood on lo before and
whatever routing rules there are. The addresses of lo are compared with all that the kernel tells about them.
"""

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

import pytest

from tests.kernel.net import Guest, Laptop
from tests.kernel.warm import Warm

STAYS = ("127.0.0.1", "127.0.0.53", "127.0.1.1", "127.200.0.1")
FENCED = ("127.1.0.2", "127.5.6.7", "127.63.255.254", "247.1.0.2", "247.63.255.254", "247.200.0.1")
AT_ONCE = {errno.EHOSTUNREACH, errno.ENETUNREACH}
PATIENCE = 5.0
_PERMANENT = 0xFFFFFFFF
_HOST, _GLOBAL = 254, 0

Attributes: TypeAlias = tuple[tuple[str, object], ...]


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as made:
        yield made


class Prober:
    """A thread inside the laptop that never rests: whatever does not answer stands in `failures`, with its errno.

    For each address it keeps a TCP connection and a UDP socket talking, binds, connects anew, and sends a datagram
    from a socket without an address of its own.
    """

    def __init__(self, laptop: Laptop, addresses: Sequence[str] = STAYS) -> None:
        self.failures: list[str] = []
        self.rounds = 0
        self._laptop = laptop
        self._stack = ExitStack()
        self._ending = threading.Event()
        with laptop.entered():
            self._lines = [Line(address, self._stack) for address in addresses]
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        self._stack.close()
        if kind is None:
            assert self.rounds
            assert not self.failures

    def _run(self) -> None:
        with self._laptop.entered():
            while not self._ending.is_set() and len(self.failures) < 20:
                for line in self._lines:
                    self.failures += line.probe()
                self.rounds += 1


class Line:
    """The sockets that talk to one address, at both ends."""

    def __init__(self, address: str, stack: ExitStack) -> None:
        self._address = address
        listener = _socket(socket.SOCK_STREAM, stack)
        listener.bind((address, 0))
        listener.listen()
        self._tcp_port = listener.getsockname()[1]
        self._listener = listener
        self._client = _socket(socket.SOCK_STREAM, stack)
        self._client.connect((address, self._tcp_port))
        self._server, (self._source, _) = listener.accept()
        stack.callback(self._server.close)
        # The first address of a subnet gives the source; that of 127.0.0.1 remains, another one may change.
        self._steady = self._source == "127.0.0.1" and address in STAYS
        self._server.settimeout(PATIENCE)
        self._udp = _socket(socket.SOCK_DGRAM, stack)
        self._udp.bind((address, 0))
        self._pinger = _socket(socket.SOCK_DGRAM, stack)
        self._pinger.connect(self._udp.getsockname())

    def probe(self) -> list[str]:
        """Return what does not work."""
        found = []
        for ask in (self._open_connection, self._ping_pong, self._new_connection, self._no_address):
            try:
                ask()
            except (OSError, AssertionError) as error:
                found.append(f"{ask.__name__} {self._address}: {error!r}")
        return found

    def _open_connection(self) -> None:
        for one, other in ((self._client, self._server), (self._server, self._client)):
            one.sendall(b"token")
            assert other.recv(5) == b"token"

    def _ping_pong(self) -> None:
        self._pinger.send(b"ping")
        data, sender = self._udp.recvfrom(9)
        self._udp.sendto(data, sender)
        assert self._pinger.recv(9) == b"ping"

    def _new_connection(self) -> None:
        with ExitStack() as stack:
            client = _socket(socket.SOCK_STREAM, stack)
            # Reset at its end: a connection that is closed in order keeps its port for a minute.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.connect((self._address, self._tcp_port))
            server, peer = self._listener.accept()
            server.close()
            assert peer[0] == self._source or not self._steady
            _socket(socket.SOCK_DGRAM, stack).bind((self._address, 0))

    def _no_address(self) -> None:
        with ExitStack() as stack:
            client = _socket(socket.SOCK_DGRAM, stack)
            client.sendto(b"hi", self._udp.getsockname())
            data, (source, _) = self._udp.recvfrom(9)
            assert data == b"hi"
            assert source == self._source or not self._steady


def _socket(kind: int, stack: ExitStack) -> socket.socket:
    made = stack.enter_context(socket.socket(socket.AF_INET, kind))
    made.settimeout(PATIENCE)
    return made


def on_lo(laptop: Laptop) -> list[Attributes]:
    """Return lo's IPv4 addresses in their order, with all attributes but the times at which they were set."""
    from pyroute2 import IPRoute

    found = []
    with laptop.entered(), IPRoute() as ipr:
        for one in ipr.get_addr(family=socket.AF_INET, index=1):
            attributes = {name: value for name, value in one["attrs"] if name != "IFA_CACHEINFO"}
            fields = {name: one[name] for name in ("prefixlen", "scope", "flags")}
            found.append(tuple({**fields, **attributes}.items()))
    return found


def values(addresses: Sequence[Attributes]) -> list[str]:
    """Return addresses as they are written: 127.0.0.1/8."""
    return [f"{dict(one)['IFA_LOCAL']}/{dict(one)['prefixlen']}" for one in addresses]


def fails_at_once(laptop: Laptop, address: str) -> bool:
    """Tell whether TCP and UDP to an address are refused by the kernel's own routing."""
    codes = set()
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with laptop.socket(socket.AF_INET, kind) as client:
            client.settimeout(PATIENCE)
            codes.add(client.connect_ex((address, 7)))
    return codes <= AT_ONCE


@dataclass(frozen=True)
class Lo:
    """What somebody made of lo: lines of ip(8), and addresses that ip(8) cannot add (with a protocol of their own)."""

    lines: tuple[str, ...] = ()
    stays: tuple[str, ...] = STAYS
    promote: bool = False
    proto: int = 0


def adds(*addresses: str) -> tuple[str, ...]:
    return tuple(f"addr add {address} dev lo" for address in addresses)


MANY = adds("127.0.0.2/8", "10.9.9.9/32", "127.0.5.5/32 label lo:web", "127.0.0.3/8", "127.77.0.1/24", "10.9.9.10/24")
LO = {
    "plain": Lo(),
    "many": Lo(MANY, (*STAYS, "127.0.5.5", "10.9.9.9", "127.0.0.3")),
    "many, the next is promoted": Lo(MANY, (*STAYS, "127.0.5.5", "10.9.9.9", "127.0.0.3"), promote=True),
    "another /8 first": Lo(("addr flush dev lo", *adds("127.0.0.2/8", "127.0.0.1/8", "127.0.0.3/8", "127.9.0.9/8"))),
    "others first": Lo(("addr flush dev lo", *adds("127.0.0.9/32", "10.9.9.9/32 scope host", "127.0.0.1/8"))),
    "a /16 of somebody's": Lo(adds("127.0.5.5/16", "127.0.6.6/16")),
    "a protocol and a metric": Lo(adds("127.0.0.4/8 metric 7"), proto=77),
    "global": Lo(("addr flush dev lo", *adds("127.0.0.1/8 scope global", "127.0.0.2/8 scope global"))),
    "shrunk by hand": Lo(adds("127.0.0.1/16") + ("addr del 127.0.0.1/8 dev lo",), STAYS[:3]),
    "shrunk to nothing": Lo(adds("127.0.0.1/32") + ("addr del 127.0.0.1/8 dev lo",), STAYS[:1]),
    "both": Lo(adds("127.0.0.1/16", "127.0.0.2/8")),
    "both, turned": Lo(("addr flush dev lo", *adds("127.0.0.1/16", "127.0.0.2/32", "127.0.0.1/8"))),
}


@pytest.mark.parametrize("name", LO)
def test_loopback_answers_all_the_time_and_comes_back_as_it_was(name: str, laptop: Laptop, warm: Warm) -> None:
    lo = LO[name]
    laptop.sysctl("ipv4/conf/all/promote_secondaries", int(lo.promote))
    laptop.ip(*lo.lines)
    if lo.proto:
        add_address(laptop, "127.0.0.6", 8, lo.proto)
    before, start = on_lo(laptop), laptop.snapshot()
    kept = [one for one in values(before) if one not in ("127.0.0.1/8", "127.0.0.1/16")]
    with Prober(laptop, lo.stays):
        for _ in range(2):
            warm.vmnet(laptop, "carve")
            carved = on_lo(laptop)
            assert "127.0.0.1/8" not in values(carved)
            assert sorted(set(kept) - set(values(carved))) == []
            assert [address for address in STAYS if not answers(laptop, address)] == []
            assert [address for address in FENCED if not fails_at_once(laptop, address)] == []
            warm.vmnet(laptop, "restore")
            assert on_lo(laptop) == before
    assert laptop.snapshot() == start


def add_address(laptop: Laptop, address: str, length: int, proto: int) -> None:
    from pyroute2 import IPRoute

    with laptop.entered(), IPRoute() as ipr:
        ipr.addr("add", index=1, address=address, prefixlen=length, scope=_HOST, proto=proto)


def answers(laptop: Laptop, address: str) -> bool:
    """Tell whether a program can bind an address of this host and another one talk to it."""
    with laptop.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        try:
            server.bind((address, 0))
            client = laptop.socket(socket.AF_INET, socket.SOCK_DGRAM)
            client.sendto(b"hi", server.getsockname())
            server.settimeout(PATIENCE)
            return server.recv(9) == b"hi"
        except OSError:
            return False
