"""The carve and the fence: what is local to lo answers all the time, and the pool fails at once.

A busy prober talks to loopback while the host is carved and restored again and again, whatever stood on lo before and
whatever routing rules there are. The addresses of lo are compared with all that the kernel tells about them.
"""

import errno
import shutil
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

import pytest

from tests.kernel import frames
from tests.kernel.frames import addresses_of
from tests.kernel.machine import QUIET, TIMEOUT, Machine, wait_until
from tests.kernel.net import Lab, Laptop
from tests.kernel.warm import Warm

STAYS = ("127.0.0.1", "127.0.0.53", "127.0.1.1", "127.200.0.1")
FENCED = ("127.1.0.2", "127.5.6.7", "127.63.255.254", "247.1.0.2", "247.63.255.254", "247.200.0.1")
AT_ONCE = {errno.EHOSTUNREACH, errno.ENETUNREACH}
PATIENCE = 5.0
DENSE = 100
"""Datagrams: as many as fit into a socket's buffer."""
VETH = ("--kind", "veth")
_HOST = 254

Attributes: TypeAlias = tuple[tuple[str, object], ...]


pytestmark = pytest.mark.usefixtures("settled")


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
                # No address of lo's own stands behind the last one: a gap between two routes is seen there first.
                self.failures += self._lines[-1].hammer()
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
        self._sender = _socket(socket.SOCK_DGRAM, stack)
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

    def hammer(self) -> list[str]:
        """Send as fast as can be, and say how many of the datagrams are lost."""
        there = self._udp.getsockname()
        heard = 0
        try:
            for _ in range(DENSE):
                self._sender.sendto(b"", there)
            while heard < DENSE:
                self._udp.recv(1)
                heard += 1
        except OSError as error:
            return [f"hammer {self._address}: {DENSE - heard} are lost: {error!r}"]
        return []

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
    "shrunk by hand": Lo((*adds("127.0.0.1/16"), "addr del 127.0.0.1/8 dev lo"), STAYS[:3]),
    "shrunk to nothing": Lo((*adds("127.0.0.1/32"), "addr del 127.0.0.1/8 dev lo"), STAYS[:1]),
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


# Routing rules, and a lo that goes down and up

RULES: dict[str, tuple[str, ...]] = {
    "a rule": ("rule add pref 100 lookup main",),
    "a VPN's": ("route add default via 192.168.77.1 table 51", "rule add pref 50 not fwmark 51 lookup 51"),
    "a VPN's pieces": ("route add 0.0.0.0/1 via 192.168.77.1", "route add 128.0.0.0/1 via 192.168.77.1"),
    "local behind others": (
        "rule add pref 10 iif wlan0 lookup main",
        "rule add pref 200 lookup local",
        "rule del pref 0 lookup local",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_routing_rules_of_others_change_nothing(name: str, laptop: Laptop, lan: Machine, warm: Warm) -> None:
    laptop.ip(*RULES[name], *adds("127.0.5.5/32"))
    start = laptop.snapshot()
    leaks = lan.sniff("lan0")
    with Prober(laptop):
        [info] = warm.vmnet(laptop, "create", "g", *VETH, "--json").json
        guest = laptop.boot(info)
        guest.serve()
        unused = [address for address in FENCED if address not in (info["address"], info["shadow"])]
        # Beyond table local a VPN's default route comes before the fence of the shadow: our rules drop what it takes.
        fenced = [address for address in unused if address.startswith("127") or name != "a VPN's"]
        assert [address for address in fenced if not fails_at_once(laptop, address)] == []
        assert not any(laptop.reaches(address, wait=QUIET) for address in unused if address not in fenced)
        assert laptop.tcp(info["address"]) == b"hello"
        warm.vmnet(laptop, "restore")
    assert laptop.snapshot() == start
    assert [frame for frame in leaks.frames() if addresses_of(frame) & set(FENCED)] == []


@pytest.mark.parametrize("rules", [(), RULES["a rule"]], ids=["merged", "a rule"])
def test_a_lo_that_goes_down_and_up_disturbs_nobody(rules: tuple[str, ...], laptop: Laptop, warm: Warm) -> None:
    laptop.ip(*rules, *adds("127.0.0.2/8", "127.0.5.5/32"))
    (laptop.folder / "config.toml").write_text('reserved = ["127.7.0.0/16"]\n')
    start, lo = laptop.snapshot(), on_lo(laptop)
    [info] = warm.vmnet(laptop, "create", "g", *VETH, "--json").json
    laptop.boot(info).serve()
    carved = on_lo(laptop)
    with ExitStack() as stack:
        with laptop.entered():
            lines = [Line(address, stack) for address in (*STAYS, "127.7.0.1")]
        laptop.ip("link set lo down", "link set lo up")
        with laptop.entered():
            assert [failure for line in lines for failure in line.probe()] == []
        assert [address for address in ("127.9.9.9", "247.9.9.9") if not fails_at_once(laptop, address)] == []
        assert laptop.tcp(info["address"]) == b"hello"
        warm.vmnet(laptop, "up")
        assert warm.vmnet(laptop, "plan").out == ""
        assert [one for one in on_lo(laptop) if one not in carved] == []
        with laptop.entered():
            assert [failure for line in lines for failure in line.probe()] == []
    assert laptop.tcp(info["address"]) == b"hello"
    warm.vmnet(laptop, "restore")
    assert on_lo(laptop) == lo
    assert laptop.snapshot() == start


# The guard of forwarding: docs/decisions/forwarding.md

ALL = {"ping", "tcp", "udp"}
GUARDS = {"off before": (0, "", set()), "on before": (1, "", ALL), "unguarded": (0, "guard_forwarding = false\n", ALL)}


@pytest.mark.parametrize("name", GUARDS)
def test_a_neighbour_uses_no_laptop_as_a_router_that_was_none(name: str, lab: Lab, warm: Warm) -> None:
    forwarding, settings, reached = GUARDS[name]
    laptop, lan, office = lab.laptop, lab.lan, lab.plug("eth9", "10.9.0.0/24", default=False)
    lan.ip("route add 10.9.0.0/24 via 192.168.77.2")
    office.ip("route add 192.168.77.0/24 via 10.9.0.2")
    office.serve()
    laptop.sysctl("ipv4/ip_forward", forwarding)
    (laptop.folder / "config.toml").write_text(settings)
    [info] = warm.vmnet(laptop, "create", "g", *VETH, "--json").json
    assert lan.reaches(office.address, wait=TIMEOUT if reached else QUIET) == reached
    heard = office.sniff("lan0")
    token = b"an answer to nobody"
    frame = frames.icmp("192.168.77.1", office.address, 0, 0, token)  # no connection: conntrack calls it invalid
    lan.send("lan0", frames.ether(laptop.mac("wlan0"), lan.mac("lan0"), frames.IPV4, frame))
    arrived = wait_until(lambda: any(token in one for one in heard.frames()), TIMEOUT if reached else QUIET)
    assert arrived == bool(reached)
    assert laptop.tcp(office.address) == b"hello"
    assert laptop.boot(info).reaches(office.address) == ALL


DOCKER_NFT = """
table ip docker {
  chain pre { type nat hook prerouting priority -100; iifname != "docker0" tcp dport 8080 dnat to 172.17.0.2:7; }
  chain post { type nat hook postrouting priority 100; ip saddr 172.17.0.0/16 oifname != "docker0" masquerade; }
}
"""
DOCKER_IPTABLES = """*nat
-A PREROUTING ! -i docker0 -p tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:7
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
COMMIT
"""
ENGINES = {"nft": DOCKER_NFT, "iptables-nft": DOCKER_IPTABLES, "iptables-legacy": DOCKER_IPTABLES}


@pytest.mark.parametrize("program", ENGINES)
def test_containers_behind_somebody_elses_masquerade_work_both_ways(program: str, lab: Lab, warm: Warm) -> None:
    loader = ["nft", "-f", "-"] if program == "nft" else [f"{program}-restore"]
    if shutil.which(loader[0]) is None:
        pytest.skip(f"{loader[0]} is missing")
    laptop, lan, internet = lab.laptop, lab.lan, lab.internet
    [info] = warm.vmnet(laptop, "create", "g", *VETH, "--json").json
    container = lab.machine("container", "172.17.0.2")
    laptop.ip("link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "link set docker0 up")
    lab.wire(laptop, "c0", container, "eth0")
    laptop.ip("link set c0 master docker0")
    container.ip("addr add 172.17.0.2/16 dev eth0", "route add default via 172.17.0.1")
    laptop.run(*loader, stdin=ENGINES[program])
    container.serve()
    internet.serve()
    lan.serve()
    assert container.reaches(internet.address) == ALL
    assert container.reaches(lan.address) == ALL
    assert lan.tcp("192.168.77.2", 8080) == b"hello"
    assert laptop.reaches(container.address) == ALL
    lan.ip("route add 172.17.0.0/16 via 192.168.77.2")
    assert lan.reaches(container.address, wait=QUIET) == set()
    assert laptop.boot(info).reaches(internet.address) == ALL
