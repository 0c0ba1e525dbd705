"""Relays between real sockets, in a machine with nothing but its lo: what goes in comes out, and nothing stays."""

import asyncio
import gc
import hashlib
import os
import random
import resource
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernel.machine import QUIET, Machine, wait_until
from tests.kernel.net import SOURCES, Lab, Laptop, need_own_etc
from vmnet.model import UsageError
from vmnet.relay import Forward, Protocol
from vmnet.relay.relays import Relays

HERE, PORT = "127.1.0.2", 80
PATIENCE = 30.0
"""Seconds after which what has not happened on a busy machine never will."""
NOW = struct.pack("ii", 1, 0)  # SO_LINGER: close by a reset


class Host:
    """A machine and what relays on it."""

    def __init__(self, machine: Machine, made: ExitStack) -> None:
        self.machine = machine
        self._made = made
        self.relays = Relays()

    def use(self, relays: Relays) -> Relays:
        """Relay by these, which are closed with the test at the latest."""
        self._made.callback(relays.close)
        self.relays = relays
        return relays

    def open(self, kind: socket.SocketKind = socket.SOCK_STREAM, family: int = socket.AF_INET) -> socket.socket:
        with self.machine.entered():
            made = socket.socket(family, kind)
        made.settimeout(PATIENCE)
        return self._made.enter_context(made)

    def target(self, address: str = "127.0.0.1", port: int = 0, *, backlog: int = 4096) -> socket.socket:
        """Return a socket that listens, TCP."""
        made = self.open(family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        if backlog:
            made.listen(backlog)
        return made

    def udp(self, port: int = 0) -> socket.socket:
        made = self.open(socket.SOCK_DGRAM)
        made.bind(("127.0.0.1", port))
        return made

    def want(self, *forwards: Forward) -> None:
        """Relay these, and wait until they are listened for."""
        self.wish(*forwards)
        assert wait_until(lambda: self.relays.counts().keys() == set(forwards), PATIENCE), self.relays.problems()

    def wish(self, *forwards: Forward) -> None:
        with self.machine.entered():
            self.relays.want(forwards)

    def relay(self, target: socket.socket, *, port: int = PORT, protocol: Protocol = "tcp") -> Forward:
        """Relay to a target alone, and wait until that is listened for."""
        forward = Forward(HERE, port, protocol, "127.0.0.1", target.getsockname()[1])
        self.want(forward)
        return forward

    def client(self, forward: Forward) -> socket.socket:
        made = self.open(family=socket.AF_INET6 if ":" in forward.address else socket.AF_INET)
        made.connect((forward.address, forward.port))
        return made

    def pair(self, forward: Forward, target: socket.socket) -> tuple[socket.socket, socket.socket]:
        """Return both ends of a connection: the client's and the target's."""
        client = self.client(forward)
        return client, self.accept(target)

    def accept(self, target: socket.socket) -> socket.socket:
        end, _ = target.accept()
        end.settimeout(PATIENCE)
        return self._made.enter_context(end)

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """Start a program there."""
        pipe, env = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(SOURCES)}
        with self.machine.entered():
            return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env)

    def settles(self, forward: Forward, count: int = 0) -> bool:
        return wait_until(lambda: self.relays.counts().get(forward) == count, PATIENCE)

    def problem(self, forward: Forward, words: str) -> bool:
        return wait_until(lambda: words in self.relays.problems().get(forward, ""), PATIENCE)

    def is_fine(self) -> bool:
        return wait_until(lambda: not self.relays.problems(), PATIENCE)


@pytest.fixture
def host(lab: Lab, caplog: pytest.LogCaptureFixture) -> Iterator[Host]:
    """A host whose relays are closed at the end: no thread is left then, no task, and no complaint of asyncio's."""
    threads = set(threading.enumerate())
    with ExitStack() as made:
        host = Host(lab.machine("host"), made)
        host.use(host.relays)
        yield host
        host.relays.close()
    assert wait_until(lambda: set(threading.enumerate()) <= threads, PATIENCE)
    assert [task for task in tasks() if not task.done()] == []
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def tasks() -> list[asyncio.Task[object]]:
    return [one for one in gc.get_objects() if isinstance(one, asyncio.Task)]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def receive(end: socket.socket) -> bytes:
    """Return all that comes until the other side has said everything."""
    parts = []
    while data := end.recv(1 << 16):
        parts.append(data)
    return b"".join(parts)


def receive_exactly(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := end.recv(count - len(data))):
        data += more
    return data


def reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOW)
    end.close()


def is_reset(end: socket.socket) -> bool:
    """Say whether a connection is reset in the end, and not just over."""
    try:
        receive(end)
    except ConnectionResetError:
        return True
    return False


def fill(end: socket.socket, most: int = 1 << 26) -> int:
    """Send until nothing is taken any more, and return how much that was."""
    sent, block = 0, bytes(1 << 16)
    end.setblocking(False)
    while sent < most and select.select([], [end], [], QUIET)[1]:
        with suppress(BlockingIOError):
            sent += end.send(block)
    end.settimeout(PATIENCE)
    return sent


# TCP


@pytest.mark.parametrize("first", ["client", "target"])
def test_each_way_ends_by_itself(host: Host, first: str) -> None:
    target = host.target()
    forward = host.relay(target)
    ends = host.pair(forward, target)
    early, late = ends if first == "client" else ends[::-1]
    early.sendall(b"question")
    early.shutdown(socket.SHUT_WR)
    assert receive(late) == b"question"
    for part in (b"a long ", b"answer"):
        late.sendall(part)
        assert receive_exactly(early, len(part)) == part
    late.shutdown(socket.SHUT_WR)
    assert receive(early) == b""
    assert host.settles(forward)
    assert host.relays.problems() == {}


@pytest.mark.parametrize("writer", ["client", "target"])
def test_a_slow_reader_slows_the_writer(host: Host, writer: str) -> None:
    target = host.target()
    forward = host.relay(target)
    ends = host.pair(forward, target)
    source, sink = ends if writer == "client" else ends[::-1]
    rest = random.randbytes(1 << 20)
    stalled = fill(source)
    assert 0 < stalled < 1 << 26
    said = hashlib.sha256(bytes(stalled))
    heard = hashlib.sha256()

    def say() -> None:
        for _ in range(64):
            source.sendall(rest)
            said.update(rest)
        source.shutdown(socket.SHUT_WR)

    saying = threading.Thread(target=say)
    saying.start()
    while data := sink.recv(1 << 16):
        heard.update(data)
    saying.join()
    assert heard.digest() == said.digest()


def test_a_full_way_leaves_the_other_way_open(host: Host) -> None:
    target = host.target()
    client, end = host.pair(host.relay(target), target)
    assert fill(client) > 0
    end.sendall(b"meanwhile")
    assert receive_exactly(client, 9) == b"meanwhile"


def test_a_thousand_connections_at_once(host: Host) -> None:
    target = host.target()
    forward = host.relay(target)
    clients = [host.client(forward) for _ in range(1000)]
    words = [random.randbytes(random.randrange(8, 2000)) for _ in clients]
    for client, word in zip(clients, words, strict=True):
        client.sendall(struct.pack("!I", len(word)) + word)
    for _ in clients:
        end = host.accept(target)
        end.sendall(receive_exactly(end, struct.unpack("!I", receive_exactly(end, 4))[0])[::-1])
    assert host.relays.counts() == {forward: 1000}
    for client, word in zip(clients, words, strict=True):
        assert receive_exactly(client, len(word)) == word[::-1]
        client.close()
    # Their other ends are still open: to be gone is not to be reset.
    assert host.relays.counts() == {forward: 1000}


@pytest.mark.parametrize("rude", ["client", "target"])
def test_a_reset_is_passed_on_as_one(host: Host, rude: str) -> None:
    target = host.target()
    forward = host.relay(target)
    ends = host.pair(forward, target)
    one, other = ends if rude == "client" else ends[::-1]
    one.sendall(b"half a sen")
    assert receive_exactly(other, 10) == b"half a sen"
    reset(one)
    assert is_reset(other)
    assert host.settles(forward)


@pytest.mark.parametrize("rude", ["client", "target"])
def test_a_reset_is_noticed_of_one_that_is_not_read_from(host: Host, rude: str) -> None:
    target = host.target()
    forward = host.relay(target)
    ends = host.pair(forward, target)
    one, other = ends if rude == "client" else ends[::-1]
    assert fill(one) > 0
    reset(one)
    assert host.settles(forward)
    assert is_reset(other)


def test_a_reset_is_noticed_of_one_that_has_said_all(host: Host) -> None:
    target = host.target()
    forward = host.relay(target)
    client, end = host.pair(forward, target)
    client.shutdown(socket.SHUT_WR)
    assert receive(end) == b""
    reset(client)
    assert host.settles(forward)
    with pytest.raises(BrokenPipeError):
        end.send(b"to nobody")


def test_an_answer_before_a_reset_arrives(host: Host) -> None:
    target = host.target()
    client, end = host.pair(host.relay(target), target)
    client.sendall(b"more than is read")
    assert receive_exactly(end, 4) == b"more"
    end.sendall(b"413")
    end.close()  # a reset: there was more to read
    assert receive_exactly(client, 3) == b"413"
    assert is_reset(client)


def test_a_target_that_resets_at_once_is_not_asked_again(host: Host) -> None:
    target = host.target()
    forward = host.relay(target)
    for number in range(100):
        client, end = host.pair(forward, target)
        end.sendall(b"go away")
        reset(end)
        assert receive_exactly(client, 7) == b"go away", number
        assert is_reset(client)
    assert host.settles(forward)
    assert select.select([target], [], [], 0)[0] == []


def test_a_target_that_is_down_is_told_until_it_is_up(host: Host) -> None:
    target = host.target(backlog=0)
    forward = host.relay(target)
    client = host.client(forward)
    assert is_reset(client)
    [(told, text)] = host.relays.problems().items()
    assert told == forward
    assert text == (
        f"127.1.0.2:80/tcp leads to 127.0.0.1:{forward.target_port}, which cannot be reached: Connection refused"
    )
    assert host.settles(forward)
    target.listen()
    client, end = host.pair(forward, target)
    client.sendall(b"now")
    assert receive_exactly(end, 3) == b"now"
    assert host.is_fine()


def test_a_target_that_starts_meanwhile_gets_all(host: Host) -> None:
    target = host.target(backlog=0)
    forward = host.relay(target)
    client = host.client(forward)
    client.sendall(b"early")
    client.shutdown(socket.SHUT_WR)
    assert host.settles(forward, 1)
    target.listen()
    assert receive(host.accept(target)) == b"early"
    assert host.is_fine()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_target_that_is_down_is_not_the_relay_itself(host: Host, protocol: Protocol) -> None:
    # Whoever calls gets this port of the kernel, and a call to oneself succeeds.
    host.machine.sysctl("ipv4/ip_local_port_range", "40001 40001")
    forward = Forward(HERE, PORT, protocol, "127.0.0.1", 40001)
    host.want(forward)
    client = host.open(socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    client.bind(("127.0.0.1", 4711))
    client.connect((HERE, PORT))
    client.send(b"hello")
    assert host.problem(forward, "Connection refused")
    assert host.settles(forward)


def test_a_target_without_a_way_there_is_told(host: Host) -> None:
    forward = Forward(HERE, PORT, "tcp", "192.0.2.1", 80)
    host.want(forward)
    assert is_reset(host.client(forward))
    assert host.problem(forward, "Network is unreachable")


def test_a_name_that_nobody_knows_is_told(host: Host) -> None:
    forward = Forward(HERE, PORT, "tcp", "nobody.invalid", 80)
    host.want(forward)
    assert is_reset(host.client(forward))
    assert host.problem(forward, "leads to nobody.invalid:80, which cannot be reached: ")


def test_what_cannot_be_a_name_is_told(host: Host) -> None:
    forward = Forward(HERE, PORT, "tcp", "a..b", 80)
    host.want(forward)
    assert is_reset(host.client(forward))
    assert host.problem(forward, "that cannot be a name")


def test_ipv6_at_either_end(host: Host) -> None:
    target = host.target("::1")
    forward = Forward("::1", PORT, "tcp", "::1", target.getsockname()[1])
    host.want(forward)
    assert str(forward) == "[::1]:80/tcp"
    client, end = host.pair(forward, target)
    client.sendall(b"hello")
    assert receive_exactly(end, 5) == b"hello"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_circle_is_told_and_does_no_harm(host: Host, protocol: Protocol) -> None:
    circle = [Forward(HERE, PORT, protocol, "127.1.0.6", 81), Forward("127.1.0.6", 81, protocol, HERE, PORT)]
    host.want(*circle)
    if protocol == "tcp":
        assert is_reset(host.client(circle[0]))
        assert wait_until(lambda: set(host.relays.counts().values()) == {0}, PATIENCE)
    else:
        host.open(socket.SOCK_DGRAM).sendto(b"round and round", (HERE, PORT))
    assert wait_until(lambda: any("circles" in one for one in host.relays.problems().values()), PATIENCE)
    assert sum(host.relays.counts().values()) <= 8


def test_a_relay_may_lead_to_a_relay(host: Host) -> None:
    target = host.target()
    last = Forward("127.1.0.6", 81, "tcp", "127.0.0.1", target.getsockname()[1])
    first = Forward(HERE, PORT, "tcp", "127.1.0.6", 81)
    host.want(first, last)
    client, end = host.pair(first, target)
    client.sendall(b"hello")
    assert receive_exactly(end, 5) == b"hello"


def test_more_than_the_most_wait(host: Host) -> None:
    host.use(Relays(most=3))
    target = host.target()
    forward = host.relay(target)
    clients = [host.client(forward) for _ in range(5)]
    ends = [host.accept(target) for _ in range(3)]
    assert host.problem(forward, "has 3 connections, and no more at a time: others wait")
    for end in ends:
        end.close()
    for client in clients[:3]:
        assert receive(client) == b""
        client.close()
    for client in clients[3:]:
        client.sendall(b"at last")
        assert receive_exactly(host.accept(target), 7) == b"at last"
    assert host.is_fine()


_TURNS = st.lists(
    st.tuples(
        st.sampled_from(["client", "target"]),
        st.one_of(st.just("end"), st.just("read"), st.integers(1, 300_000)),
    ),
    max_size=12,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=_TURNS, seed=st.integers(0, 1 << 32))
def test_any_stream_arrives_unchanged(host: Host, turns: list[tuple[str, str | int]], seed: int) -> None:
    target = getattr(host, "_target", None) or host.target()
    host._target = target  # type: ignore[attr-defined]
    forward = host.relay(target)
    chance = random.Random(seed)
    client, end = host.pair(forward, target)
    with client, end:
        talk = Talk({"client": client, "target": end})
        for who, what in turns:
            if what == "read":
                talk.read(who)
            elif what == "end":
                talk.end(who)
            elif isinstance(what, int):
                talk.say(who, chance.randbytes(what))
        talk.finish()
        assert talk.heard["target"] == talk.said["client"]
        assert talk.heard["client"] == talk.said["target"]
    assert host.settles(forward)


class Talk:
    """Two ends of a connection which say what they are told to, as far as it is taken, and keep what they hear."""

    def __init__(self, ends: dict[str, socket.socket]) -> None:
        self._ends = ends
        self.said = {who: bytearray() for who in ends}
        self.heard = {who: bytearray() for who in ends}
        self._left = {who: bytearray() for who in ends}
        self._ending: set[str] = set()
        self._ended: set[str] = set()
        self._deaf: set[str] = set()
        for end in ends.values():
            end.setblocking(False)

    def say(self, who: str, data: bytes) -> None:
        if who not in self._ending:
            self.said[who] += data
            self._left[who] += data
            self._push(who)

    def end(self, who: str) -> None:
        self._ending.add(who)
        self._push(who)

    def read(self, who: str) -> None:
        with suppress(BlockingIOError):
            data = self._ends[who].recv(1 << 18)
            self.heard[who] += data
            if not data:
                self._deaf.add(who)

    def finish(self) -> None:
        for who in self._ends:
            self.end(who)
        while self._deaf != set(self._ends):
            readers = [self._ends[who] for who in self._ends if who not in self._deaf]
            writers = [self._ends[who] for who in self._ends if self._left[who]]
            ready = select.select(readers, writers, [], PATIENCE)
            assert ready[0] or ready[1], "nothing moves"
            for who, end in self._ends.items():
                if end in ready[0]:
                    self.read(who)
                if end in ready[1]:
                    self._push(who)

    def _push(self, who: str) -> None:
        with suppress(BlockingIOError):
            while self._left[who]:
                del self._left[who][: self._ends[who].send(self._left[who])]
            if who in self._ending - self._ended:
                self._ended.add(who)
                self._ends[who].shutdown(socket.SHUT_WR)


# What is wanted


def test_what_is_wanted_changes_and_the_rest_goes_on(host: Host) -> None:
    target = host.target()
    port = target.getsockname()[1]
    kept, gone, new = (Forward(HERE, number, "tcp", "127.0.0.1", port) for number in (80, 81, 82))
    host.want(kept, gone)
    kept_client, kept_end = host.pair(kept, target)
    gone_client, gone_end = host.pair(gone, target)
    host.want(new, kept)
    assert is_reset(gone_client)
    assert is_reset(gone_end)
    with pytest.raises(ConnectionRefusedError):
        host.client(gone)
    kept_client.sendall(b"still here")
    assert receive_exactly(kept_end, 10) == b"still here"
    new_client, new_end = host.pair(new, target)
    new_client.sendall(b"here too")
    assert receive_exactly(new_end, 8) == b"here too"


def test_a_target_is_replaced(host: Host) -> None:
    before, after = host.target(), host.target()
    old, _ = host.pair(host.relay(before), before)
    client, end = host.pair(host.relay(after), after)
    assert is_reset(old)
    client.sendall(b"hello")
    assert receive_exactly(end, 5) == b"hello"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_an_address_that_comes_later_is_listened_on_then(host: Host, protocol: Protocol) -> None:
    forward = Forward("10.9.8.7", PORT, protocol, "127.0.0.1", 9)
    host.wish(forward)
    assert host.problem(forward, "10.9.8.7:80/")
    assert host.relays.problems()[forward].endswith("tried again: this host does not have the address")
    assert host.relays.counts() == {}
    host.machine.ip("addr add 10.9.8.7/32 dev lo")
    assert host.settles(forward)
    assert host.relays.problems() == {}


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_in_use_is_had_when_it_is_free(host: Host, protocol: Protocol) -> None:
    other = host.open(socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    other.bind((HERE, PORT))
    if protocol == "tcp":
        other.listen()
    forward = Forward(HERE, PORT, protocol, "127.0.0.1", 9)
    host.wish(forward)
    assert host.problem(forward, "another program has the port")
    other.close()
    assert host.settles(forward)
    assert host.relays.problems() == {}


def test_of_two_for_one_port_one_is_relayed(host: Host) -> None:
    target = host.target()
    port = target.getsockname()[1]
    one, other = (Forward(HERE, PORT, "udp", "127.0.0.1", number) for number in (port, port + 1))
    host.wish(one, other)
    assert wait_until(lambda: len(host.relays.problems()) == 1, PATIENCE)
    assert len(host.relays.counts()) == 1
    assert host.relays.counts().keys() | host.relays.problems().keys() == {one, other}


def test_nothing_but_the_address_is_listened_on(host: Host) -> None:
    target = host.target()
    forward = host.relay(target)
    listening = host.machine.run("ss", "-Hltn").split()
    assert f"{HERE}:{PORT}" in listening
    assert [one for one in listening if one.endswith(f":{PORT}")] == [f"{HERE}:{PORT}"]
    with pytest.raises(ConnectionRefusedError):
        host.client(Forward("127.1.0.3", PORT, "tcp", "127.0.0.1", forward.target_port))


@pytest.mark.parametrize(
    ("address", "port", "protocol", "target", "words"),
    [
        ("0.0.0.0", 80, "tcp", "127.0.0.1", "'0.0.0.0' is no address to listen on"),
        ("::", 80, "tcp", "127.0.0.1", "'::' is no address to listen on"),
        ("224.0.0.1", 80, "udp", "127.0.0.1", "'224.0.0.1' is no address to listen on"),
        ("localhost", 80, "tcp", "127.0.0.1", "'localhost' is no address to listen on"),
        ("", 80, "tcp", "127.0.0.1", "'' is no address to listen on"),
        (HERE, 0, "tcp", "127.0.0.1", "0 is not a port"),
        (HERE, 65536, "tcp", "127.0.0.1", "65536 is not a port"),
        (HERE, 80, "sctp", "127.0.0.1", "'sctp' cannot be relayed"),
        (HERE, 80, "tcp", "", "a relay's target has no address"),
    ],
)
def test_a_forward_says_what_is_wrong_with_it(
    address: str, port: int, protocol: Protocol, target: str, words: str
) -> None:
    with pytest.raises(UsageError) as refused:
        Forward(address, port, protocol, target, 80)
    assert refused.value.message == words
    assert refused.value.hint


# UDP


def test_answers_go_to_the_client_that_asked(host: Host) -> None:
    target = host.udp()
    host.relay(target, protocol="udp")
    clients = [host.open(socket.SOCK_DGRAM) for _ in range(2)]
    for number, client in enumerate(clients):
        client.connect((HERE, PORT))
        client.send(b"%d" % number)
    seen = dict(target.recvfrom(9) for _ in clients)
    assert len(set(seen.values())) == 2
    for word, peer in seen.items():
        target.sendto(b"answer to " + word, peer)
    # A connected socket hears nobody but the address it sent to.
    assert [client.recv(99) for client in clients] == [b"answer to 0", b"answer to 1"]


@pytest.mark.parametrize("size", [0, 1, 1472, 9217, 65507])
def test_datagrams_of_any_size(host: Host, size: int) -> None:
    target = host.udp()
    host.relay(target, protocol="udp")
    client = host.open(socket.SOCK_DGRAM)
    client.connect((HERE, PORT))
    data = random.randbytes(size)
    client.send(data)
    heard, peer = target.recvfrom(65536)
    assert heard == data
    target.sendto(data[::-1], peer)
    assert client.recv(65536) == data[::-1]


def test_a_silent_client_is_forgotten(host: Host) -> None:
    host.use(Relays(udp_idle=0.1))
    target = host.udp()
    forward = host.relay(target, protocol="udp")
    client = host.open(socket.SOCK_DGRAM)
    for word in (b"one", b"two"):
        client.sendto(word, (HERE, PORT))
        heard, peer = target.recvfrom(9)
        assert heard == word
        assert host.settles(forward)
        target.sendto(b"too late", peer)
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.recv(9)


def test_the_longest_silent_client_makes_room(host: Host) -> None:
    host.use(Relays(most=2))
    target = host.udp()
    forward = host.relay(target, protocol="udp")
    clients = [host.open(socket.SOCK_DGRAM) for _ in range(3)]
    peers = []
    for number in (0, 1, 0, 2):
        clients[number].sendto(b"hello", (HERE, PORT))
        peers.append(target.recvfrom(9)[1])
    assert host.relays.counts() == {forward: 2}
    for peer in (peers[1], peers[0], peers[3]):
        with suppress(ConnectionRefusedError):
            target.sendto(b"answer", peer)
    assert [clients[number].recv(9) for number in (0, 2)] == [b"answer"] * 2
    clients[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        clients[1].recv(9)


def test_a_target_that_refuses_datagrams_is_told_until_it_answers(host: Host) -> None:
    target = host.udp()
    port = target.getsockname()[1]
    forward = host.relay(target, protocol="udp")
    target.close()
    client = host.open(socket.SOCK_DGRAM)
    client.sendto(b"lost", (HERE, PORT))
    assert host.problem(forward, f"leads to 127.0.0.1:{port}, which cannot be reached: Connection refused")
    target = host.udp(port)
    client.sendto(b"hello", (HERE, PORT))
    heard, peer = target.recvfrom(9)
    target.sendto(heard, peer)
    assert client.recv(9) == b"hello"
    assert host.is_fine()


def test_datagrams_wait_for_a_name(host: Host) -> None:
    target = host.udp()
    forward = Forward(HERE, PORT, "udp", "localhost", target.getsockname()[1])
    host.want(forward)
    client = host.open(socket.SOCK_DGRAM)
    # The first address of localhost may be ::1, where nobody is: what is refused there goes no further.
    with host.machine.entered(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
        other.bind(("::1", forward.target_port))
        for number in range(5):
            client.sendto(b"%d" % number, (HERE, PORT))
        assert wait_until(lambda: bool(select.select([target, other], [], [], 0)[0]), PATIENCE)
        [there] = select.select([target, other], [], [], 0)[0]
        there.settimeout(PATIENCE)
        assert [there.recv(9) for _ in range(5)] == [b"%d" % number for number in range(5)]


def test_a_name_that_nobody_knows_loses_datagrams_alone(host: Host) -> None:
    forward = Forward(HERE, PORT, "udp", "nobody.invalid", 80)
    host.want(forward)
    host.open(socket.SOCK_DGRAM).sendto(b"hello", (HERE, PORT))
    assert host.problem(forward, "leads to nobody.invalid:80, which cannot be reached: ")
    assert host.settles(forward)


# Nothing stays


def test_closing_ends_all(host: Host) -> None:
    target, datagrams = host.target(), host.udp()
    before = descriptors()
    stream = Forward(HERE, PORT, "tcp", "127.0.0.1", target.getsockname()[1])
    down = Forward(HERE, 81, "tcp", "127.0.0.1", 1)
    udp = Forward(HERE, PORT, "udp", "127.0.0.1", datagrams.getsockname()[1])
    absent = Forward("10.9.8.7", PORT, "tcp", "127.0.0.1", 1)
    host.wish(stream, down, udp, absent)
    assert wait_until(lambda: len(host.relays.counts()) == 3 and len(host.relays.problems()) == 1, PATIENCE)
    pairs = [host.pair(stream, target) for _ in range(10)]
    waiting = host.client(down)
    assert host.settles(down, 1)
    assert fill(pairs[0][0]) > 0
    client = host.open(socket.SOCK_DGRAM)
    client.sendto(b"hello", (HERE, PORT))
    assert datagrams.recv(9) == b"hello"
    host.relays.close()
    for end in (waiting, *(end for pair in pairs for end in pair)):
        assert is_reset(end)
        end.close()
    client.close()
    assert descriptors() == before
    assert host.relays.counts() == {}
    assert host.relays.problems() == {}
    host.wish(stream)
    host.relays.close()
    assert host.relays.counts() == {}
    with pytest.raises(ConnectionRefusedError):
        host.client(stream)


def test_without_a_wish_there_is_no_thread(host: Host) -> None:
    threads = threading.active_count()
    host.wish()
    assert threading.active_count() == threads
    host.relays.close()


def test_no_end_of_a_connection_leaves_anything(host: Host) -> None:
    target = host.target()
    forward = host.relay(target)
    dead = Forward(HERE, 81, "tcp", "127.0.0.1", 1)
    host.want(forward, dead)
    before = descriptors()
    for number in range(1000):
        client = host.client(forward)
        end = host.accept(target)
        if number % 5 == 0:
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            assert receive(end) == b"hello"
        elif number % 5 == 1:
            reset(client)
        elif number % 5 == 2:
            end.sendall(b"unread")
            reset(end)
        elif number % 5 == 3:
            end.shutdown(socket.SHUT_WR)
            client.sendall(b"unread")
        if number % 10 == 0:
            host.client(dead).close()
        client.close()
        end.close()
    assert host.settles(forward)
    assert host.settles(dead)
    assert descriptors() == before
    assert [task for task in tasks() if not task.done()] == []


# Descriptors: in a process of its own, whose limit is not that of the tests

_RELAY = """
import os, resource, sys
from vmnet.relay import Forward
from vmnet.relay.relays import Relays
soft, hard, port = map(int, sys.argv[1:4])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
relays, forward, taken = Relays(), Forward("127.1.0.2", 80, sys.argv[5], sys.argv[4], port), []
relays.want([forward])
for line in sys.stdin:
    match line.strip():
        case "count": print(relays.counts().get(forward))
        case "problem": print(relays.problems().get(forward))
        case "limit": print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        case "take":
            try:
                while True: taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError as error: print(error.errno)
        case "give":
            while taken: os.close(taken.pop())
            print("given")
    sys.stdout.flush()
relays.close()
"""


@contextmanager
def relaying(
    start: Callable[..., subprocess.Popen[str]],
    port: int,
    *,
    soft: int = 300,
    hard: int = 300,
    target: str = "127.0.0.1",
    protocol: str = "tcp",
) -> Iterator[tuple[int, Callable[[str], str]]]:
    """Relay in a process that has so many descriptors; it ends without a word on stderr."""
    process = start(sys.executable, "-c", _RELAY, str(soft), str(hard), str(port), target, protocol)

    def ask(what: str) -> str:
        assert process.stdin
        assert process.stdout
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    try:
        assert wait_until(lambda: ask("count") == "0", PATIENCE)
        yield process.pid, ask
        assert process.communicate(timeout=PATIENCE)[1] == ""
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0


def is_asleep(pid: int) -> bool:
    """Say whether no thread of a process was at work in any of fifty looks."""

    def states() -> set[str]:
        return {stat.read_text().rpartition(")")[2].split()[0] for stat in Path("/proc", str(pid)).glob("task/*/stat")}

    poll = select.poll()
    return all(states() == {"S"} and poll.poll(2) == [] for _ in range(50))


def test_connections_wait_for_descriptors(host: Host) -> None:
    target = host.target()
    forward = Forward(HERE, PORT, "tcp", "127.0.0.1", target.getsockname()[1])
    with relaying(host.start, forward.target_port, soft=200, hard=200) as (pid, ask):
        clients = [host.client(forward) for _ in range(50)]
        assert wait_until(lambda: "no file descriptors left" in ask("problem"), PATIENCE)
        assert 20 < int(ask("count")) < 50
        assert wait_until(lambda: is_asleep(pid), PATIENCE)
        # What is left is for the rest of the process.
        assert len(os.listdir(f"/proc/{pid}/fd")) < 110
        for client in clients:
            client.sendall(b"hello")
        for _ in clients:
            end = host.accept(target)
            assert receive_exactly(end, 5) == b"hello"
            reset(end)
        assert wait_until(lambda: (ask("count"), ask("problem")) == ("0", "None"), PATIENCE)


def test_others_may_take_all_descriptors(host: Host) -> None:
    target = host.target()
    forward = Forward(HERE, PORT, "tcp", "127.0.0.1", target.getsockname()[1])
    with relaying(host.start, forward.target_port, soft=400, hard=400) as (pid, ask):
        assert ask("take") == "24"  # EMFILE
        client = host.client(forward)
        assert wait_until(lambda: ask("problem").endswith("tries again: Too many open files"), PATIENCE)
        assert wait_until(lambda: is_asleep(pid), PATIENCE)
        assert ask("give") == "given"
        client.sendall(b"hello")
        assert receive_exactly(host.accept(target), 5) == b"hello"
        assert wait_until(lambda: ask("problem") == "None", PATIENCE)


def test_a_low_limit_is_raised(host: Host) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard == resource.RLIM_INFINITY or hard > 300
    with relaying(host.start, 9, soft=100, hard=300) as (_, ask):
        assert ask("limit") == "300"


# Names: in a laptop, whose hosts file is its own


def test_the_second_address_of_a_name_does_too(laptop: Laptop) -> None:
    need_own_etc()
    laptop.path("/etc/hosts").write_text("127.0.0.1 localhost two\n::1 two\n")
    target = laptop.serve(4711, "127.0.0.1")
    with relaying(laptop.start, target.port, target="two") as (_, ask):
        assert laptop.tcp(HERE, PORT, b"hello") == b"hello"
        assert ask("problem") == "None"


def test_the_second_address_of_a_name_takes_the_next_datagrams(laptop: Laptop) -> None:
    need_own_etc()
    laptop.path("/etc/hosts").write_text("127.0.0.1 localhost two\n::1 two\n")
    target = laptop.serve(4711, "127.0.0.1")
    with relaying(laptop.start, target.port, target="two", protocol="udp") as (_, ask):

        def is_answered() -> bool:
            with suppress(TimeoutError):
                return laptop.udp(HERE, PORT, b"hello", wait=QUIET) == b"hello"
            return False

        assert wait_until(is_answered, PATIENCE)
        assert ask("problem") == "None"


def test_a_name_server_that_is_silent_holds_nothing_up(laptop: Laptop, internet: Machine) -> None:
    need_own_etc()
    resolv = laptop.path("/etc/resolv.conf")
    resolv.unlink(missing_ok=True)
    resolv.write_text(f"nameserver {internet.address}\noptions timeout:30 attempts:5\n")
    silent = internet.socket(socket.AF_INET, socket.SOCK_DGRAM)
    silent.bind((internet.address, 53))
    with relaying(laptop.start, 4711, target="nobody.example") as (_, ask):
        client = laptop.socket(socket.AF_INET, socket.SOCK_STREAM)
        client.settimeout(PATIENCE)
        client.connect((HERE, PORT))
        assert is_reset(client)
        assert "leads to nobody.example:4711, which cannot be reached: no answer within" in ask("problem")
        # It is still being asked when the process ends, long before it would give up.
        assert silent.recv(512)
