"""The records: a model of plain dicts says what each call must give; real processes are killed, real disks full."""

import contextlib
import ctypes
import itertools
import os
import pickle
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from netaddr import IPAddress

from vmnet import store as store_module
from vmnet.ipam import Pool
from vmnet.model import (
    POOL_BLOCKS,
    Block,
    Conflict,
    KernelRefused,
    Lease,
    NameTaken,
    Netns,
    NetnsId,
    NoSuchGuest,
    NotPermitted,
    PoolExhausted,
    UsageError,
    VmnetError,
)
from vmnet.store import HostRecord, LeaseRequest, Limits, RecordsUnreadable, Reservation, Store

T = TypeVar("T")
NOBODY = 65534
NOW = "2026-11-21T09:00:00Z"
WHOLE = Pool()
ADDING = """import sys
from pathlib import Path
from vmnet.ipam import Pool
from vmnet.store import LeaseRequest, Store
request = LeaseRequest(sys.argv[2], "tap", "mapped", None, 1500, 0, 1, None, None)
with Store.open(Path(sys.argv[1]), write=True) as store:
    store.allocate([request], pool=Pool(), created="2026-11-21T09:00:00Z")
"""
SMALL = Pool.parse(["127.1.0.0/28"])  # blocks 0 to 3


def ask(name: str, address: str | None = None) -> LeaseRequest:
    return LeaseRequest(name, "tap", "mapped", None, 1500, 0, 1, None, IPAddress(address) if address else None)


def numbers(leases: Sequence[Lease]) -> list[int]:
    return [lease.block.number for lease in leases]


def in_child(action: Callable[[], T], *, uid: int = 0) -> T:
    """Return what `action` returns, or raise what it raises, in a process of its own, as another user if need be."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            if uid:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            outcome: tuple[bool, object] = (True, action())
        except BaseException as error:  # noqa: BLE001 - raised again by the parent
            outcome = (False, error)
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(outcome, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    done, result = pickle.loads(data)
    if not done:
        raise result
    return result  # type: ignore[no-any-return]


def at_once(count: int, action: Callable[[int], T]) -> list[T]:
    """Run `action` in `count` processes at the same time, each with its own number, and return what they return."""
    results: dict[int, T] = {}

    def watch(number: int) -> None:
        results[number] = in_child(lambda: action(number))

    threads = [threading.Thread(target=watch, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(count)]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can get at, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="records-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def state(place: Path) -> Path:
    return place / "state"


def read(state: Path) -> list[Lease]:
    with Store.open(state, write=False) as store:
        return store.leases()


# What the calls mean


def test_a_lease_is_read_back_as_it_was_asked_for(state: Path) -> None:
    netns = Netns("/run/netns/web", True, NetnsId(4, 4026532001, "boot"))
    requests = [
        LeaseRequest("web", "veth", "native", "02:00:00:00:00:01", 9000, 1000, 1, netns, None),
        LeaseRequest("vm", "tap", "mapped", None, 1500, 0, 4, None, None),
        LeaseRequest("tunnel", "tun", "native", None, 1400, 0, 1, Netns("/run/netns/t", False, None), None),
    ]
    with Store.open(state, write=True) as store:
        given = store.allocate(requests, pool=WHOLE, created=NOW)
        assert given == [
            Lease("web", Block(0), "veth", "native", "02:00:00:00:00:01", 9000, 1000, 1, netns, "up", NOW),
            Lease("vm", Block(1), "tap", "mapped", "02:76:7f:01:00:06", 1500, 0, 4, None, "up", NOW),
            Lease("tunnel", Block(2), "tun", "native", None, 1400, 0, 1, requests[2].netns, "up", NOW),
        ]
        assert store.leases(["vm", "tunnel", "web"]) == [given[1], given[2], given[0]]
        assert store.lease("vm") == given[1]
        assert store.lease("nobody") is None
        assert store.count() == 3
    assert read(state) == sorted(given, key=lambda lease: lease.name)


def test_an_unknown_name_is_named(state: Path) -> None:
    with Store.open(state, write=True) as store:
        store.allocate([ask("a")], pool=WHOLE, created=NOW)
        for call in (
            lambda: store.leases(["a", "b", "c"]),
            lambda: store.set_wish(["a", "b", "c"], "down"),
            lambda: store.set_netns({"a": Netns("/x", True, None), "b": Netns("/y", True, None)}),
        ):
            with pytest.raises(NoSuchGuest, match="no guest b"):
                call()
        lease = store.lease("a")
        assert lease is not None
        assert (lease.wish, lease.netns) == ("up", None), "all or nothing"


def test_wishes_and_namespaces_are_recorded(state: Path) -> None:
    netns = Netns("/run/netns/a", False, NetnsId(4, 7, "boot"))
    with Store.open(state, write=True) as store:
        store.allocate([ask("a"), ask("b")], pool=WHOLE, created=NOW)
        store.set_wish(["a", "b"], "deleting")
        store.set_netns({"a": netns})
        assert [(lease.wish, lease.netns) for lease in store.leases()] == [("deleting", netns), ("deleting", None)]
        assert store.wished_up() == []
        assert store.leases_up() == []
        store.set_wish(["b"], "up")
        assert store.wished_up() == [("b", Block(1))]
        assert store.leases_up() == store.leases(["b"])


def test_on_behalf_of_a_user_nothing_is_recorded_of_anybody_else(state: Path) -> None:
    with Store.open(state, write=True) as store:
        store.allocate([ask("mine")._replace(owner=7), ask("theirs")._replace(owner=8)], pool=Pool(), created="now")
        before = read(state)
        with pytest.raises(NotPermitted, match="theirs is a guest of uid 8"):
            store.set_wish(["mine", "theirs"], "deleting", owner=7)
        with pytest.raises(NotPermitted, match="theirs is a guest of uid 8"):
            store.set_netns({"mine": OTHER, "theirs": OTHER}, owner=7)
        assert read(state) == before
        store.set_wish(["mine"], "down", owner=7)
        store.set_netns({"mine": OTHER}, owner=7)
        assert store.lease("mine") == before[0]._replace(wish="down", netns=OTHER)


OTHER = Netns("/proc/7/ns/net", False, None)


@pytest.mark.parametrize(
    ("ask", "index"), [("wished_up", "lease_up"), ("leases_up", "lease_up"), ("unusual_mtus_up", "lease_mtu")]
)
def test_who_is_down_is_not_looked_at_for_who_is_up(state: Path, ask: str, index: str) -> None:
    with Store.open(state, write=True) as store:
        asked: list[str] = []
        assert store._db is not None
        store._db.set_trace_callback(asked.append)
        getattr(store, ask)()
        store._db.set_trace_callback(None)
        [query] = [one for one in asked if "FROM lease" in one]
        plan = " ".join(row[3] for row in store._db.execute(f"EXPLAIN QUERY PLAN {query}"))
    assert index in plan


def test_the_unusual_mtus_are_those_of_guests_that_are_to_be_up(state: Path) -> None:
    with Store.open(state, write=True) as store:
        mtus = {"a": 1500, "b": 9000, "c": 1400, "d": 9000, "e": 1300}
        store.allocate([ask(name)._replace(mtu=mtu) for name, mtu in mtus.items()], pool=WHOLE, created=NOW)
        store.set_wish(["e"], "down")
        assert store.unusual_mtus_up() == [1400, 9000]
        store.set_wish(["b", "e"], "up")
        store.release(["c", "d"], freed=0)
        assert store.unusual_mtus_up() == [1300, 9000]


def test_the_host_is_recorded_once(state: Path) -> None:
    with Store.open(state, write=True) as store:
        assert store.host() is None
        store.set_host(HostRecord("up", "boot-1", 4, 4026531840))
        store.set_host(HostRecord("down", "boot-2", 4, 4026531841))
        assert store.host() == HostRecord("down", "boot-2", 4, 4026531841)


def test_an_existing_name_is_a_conflict_and_nothing_is_written(state: Path) -> None:
    with Store.open(state, write=True) as store:
        store.allocate([ask("a")], pool=WHOLE, created=NOW)
        with pytest.raises(Conflict, match="a exists already"):
            store.allocate([ask("b"), ask("a")], pool=WHOLE, created=NOW)
        assert [lease.name for lease in store.leases()] == ["a"]
        assert numbers(store.allocate([ask("c")], pool=WHOLE, created=NOW)) == [1]


def test_what_there_is_of_a_name_comes_before_what_it_lacks(state: Path) -> None:
    only = Pool.parse(["127.1.0.0/30"])
    with Store.open(state, write=True) as store:
        store.allocate([ask("a", "127.1.0.2")], pool=only, created=NOW)
        for request in (ask("a"), ask("a", "127.1.0.2")):
            with pytest.raises(NameTaken, match="a exists already"):
                store.allocate([request], pool=only, created=NOW, limits=Limits(owned=1))
        with pytest.raises(PoolExhausted):
            store.allocate([ask("b")], pool=only, created=NOW)
        with pytest.raises(Conflict, match="is held by a"):
            store.allocate([ask("b", "127.1.0.2")], pool=only, created=NOW)
        assert [lease.name for lease in store.leases()] == ["a"]


def test_releasing_twice_is_harmless(state: Path) -> None:
    with Store.open(state, write=True) as store:
        store.allocate([ask("a"), ask("b")], pool=SMALL, created=NOW)
        store.release(["a", "a", "nobody"], freed=1.0)
        store.release(["a"], freed=2.0)
        assert numbers(store.allocate([ask("c"), ask("d"), ask("e")], pool=SMALL, created=NOW)) == [2, 3, 0]


def test_ten_thousand_names_get_blocks_in_a_row(state: Path) -> None:
    with Store.open(state, write=True) as store:
        store.allocate([ask("first")], pool=WHOLE, created=NOW)
        names = [f"n{number}" for number in range(10_000)]
        leases = store.allocate([ask(name) for name in names], pool=WHOLE, created=NOW)
        assert [lease.name for lease in leases] == names
        assert numbers(leases) == list(range(1, 10_001))


def test_a_holder_is_named(state: Path) -> None:
    with Store.open(state, write=True) as store:
        store.allocate([ask("a", "127.1.0.6")], pool=WHOLE, created=NOW)
        with pytest.raises(Conflict, match=r"127\.1\.0\.6 is held by a"):
            store.allocate([ask("b", "127.1.0.6")], pool=WHOLE, created=NOW)
        with pytest.raises(Conflict, match=r"127\.1\.0\.10 is asked for twice"):
            store.allocate([ask("b", "127.1.0.10"), ask("c", "127.1.0.10")], pool=WHOLE, created=NOW)


def test_what_others_use_is_not_given_out_and_says_whose_it_is(state: Path) -> None:
    docker = Reservation(IPAddress("127.1.0.1"), IPAddress("127.1.0.4"), "docker's dns")
    with Store.open(state, write=True) as store:
        store.replace_reservations([docker])
        with pytest.raises(Conflict, match="docker's dns"):
            store.allocate([ask("a", "127.1.0.6")], pool=SMALL, created=NOW)
        assert numbers(store.allocate([ask("a"), ask("b")], pool=SMALL, created=NOW)) == [2, 3]
        with pytest.raises(PoolExhausted, match="0 free blocks, 1 "):
            store.allocate([ask("c")], pool=SMALL, created=NOW)
        store.replace_reservations([])
        assert numbers(store.allocate([ask("c")], pool=SMALL, created=NOW)) == [0]
        store.replace_reservations([docker])
        assert [lease.name for lease in store.leases()] == ["a", "b", "c"], "a lease that is there stays"
        assert store.reservations() == [docker]


def test_a_purge_forgets_everything_and_keeps_the_file(state: Path) -> None:
    with Store.open(state, write=True) as store:
        store.allocate([ask("a"), ask("b")], pool=SMALL, created=NOW)
        store.release(["a"], freed=1.0)
        store.replace_reservations([Reservation(IPAddress("127.1.0.9"), IPAddress("127.1.0.9"), "x")])
        store.set_host(HostRecord("up", "boot", 1, 2))
        store.purge()
        assert (store.leases(), store.reservations(), store.host()) == ([], [], None)
        assert numbers(store.allocate([ask("c"), ask("d"), ask("e")], pool=SMALL, created=NOW)) == [0, 1, 2]
    assert (state / "vmnet.db").exists()


def test_a_preview_shows_the_same_and_writes_nothing(state: Path) -> None:
    with Store.open(state, write=False) as store:
        assert numbers(store.preview([ask("a")], pool=WHOLE, created=NOW)) == [0]
    assert not state.exists()
    with Store.open(state, write=True) as store:
        store.allocate([ask("a")], pool=WHOLE, created=NOW)
    before = (state / "vmnet.db").read_bytes()
    with Store.open(state, write=False) as store:
        assert numbers(store.preview([ask("b"), ask("c")], pool=Pool.parse(["127.9.0.0/16"]), created=NOW)) == [
            Block(8 << 14).number,
            (8 << 14) + 1,
        ]
        with pytest.raises(Conflict):
            store.preview([ask("a")], pool=WHOLE, created=NOW)
    assert (state / "vmnet.db").read_bytes() == before


def test_text_that_is_no_text_is_refused_and_nothing_is_written(state: Path) -> None:
    with Store.open(state, write=True) as store:
        odd = LeaseRequest("b", "veth", "mapped", None, 1500, 0, 1, Netns("/run/netns/\udcff", False, None), None)
        with pytest.raises(UsageError, match="udcff"):
            store.allocate([ask("a"), odd], pool=WHOLE, created=NOW)
        assert store.leases() == []


# The policy, against a model

POOLS = [
    Pool.parse(["127.1.0.0/27"]),
    Pool.parse(["127.1.0.0/28"]),
    Pool.parse(["127.1.0.0/27"], ["127.1.0.8/29"]),
    Pool.parse(["127.1.0.16/28", "127.1.0.64/29"]),
]
OTHERS = [
    [],
    [Reservation(IPAddress("127.1.0.5"), IPAddress("127.1.0.5"), "one address")],
    [
        Reservation(IPAddress("127.1.0.12"), IPAddress("127.1.0.21"), "a range"),
        Reservation(IPAddress("127.1.0.15"), IPAddress("127.1.0.64"), "one that overlaps it"),
    ],
]
NAMES = list("abcdefghij")


class Model:
    """What the records must hold, worked out block by block."""

    def __init__(self) -> None:
        self.leases: dict[str, int] = {}
        self.freed: list[tuple[int, str]] = []
        self.others: list[Reservation] = []

    def is_others(self, block: int) -> bool:
        first = Block(block).first
        return any(int(one.first) <= first + 3 and int(one.last) >= first for one in self.others)

    def allocate(self, requests: Sequence[LeaseRequest], pool: Pool) -> dict[str, int]:
        """Return who gets which block, or raise the error; changes nothing."""
        is_taken = bool({request.name for request in requests} & set(self.leases))
        try:
            given = self._give(requests, pool)
        except (Conflict, PoolExhausted):
            if is_taken:
                raise NameTaken("") from None
            raise
        if is_taken:
            raise NameTaken("")
        return given

    def _give(self, requests: Sequence[LeaseRequest], pool: Pool) -> dict[str, int]:
        pool_blocks = [n for n in range(20) if any(Block(n).network in network for network in pool.networks)]
        reserved = [n for n in pool_blocks if any(Block(n).network in network for network in pool.reserved)]
        free = [n for n in pool_blocks if n not in reserved and not self.is_others(n) and n not in self.leases.values()]
        given: dict[str, int] = {}
        for request in requests:
            if request.address is not None:
                block = (int(request.address) - Block(0).first) // 4
                if block not in pool_blocks:
                    raise UsageError("")
                if block not in free:
                    raise Conflict("")
                free.remove(block)
                given[request.name] = block
        queue = [block for block, _ in self.freed]
        for request in requests:
            own = [block for block, name in self.freed if name == request.name and block in free]
            if request.name not in given and own:
                free.remove(own[-1])
                given[request.name] = own[-1]
        order = [n for n in free if n not in queue] + [n for n in queue if n in free]
        for request in requests:
            if request.name not in given:
                if not order:
                    raise PoolExhausted("")
                given[request.name] = order.pop(0)
        return given


class Records(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="records-"))
        self.store = Store.open(self.state, write=True)
        self.model = Model()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.state)

    @rule(
        wanted=st.lists(
            st.tuples(st.sampled_from(NAMES), st.one_of(st.none(), st.integers(0, 18))),
            min_size=1,
            max_size=5,
            unique_by=lambda one: one[0],
        ),
        pool=st.sampled_from(POOLS),
    )
    def allocate(self, wanted: list[tuple[str, int | None]], pool: Pool) -> None:
        requests = [ask(name, None if block is None else str(Block(block).address)) for name, block in wanted]
        try:
            given = self.model.allocate(requests, pool)
        except VmnetError as error:
            wanted_error = type(error)
            for call in (self.store.preview, self.store.allocate):
                with pytest.raises(wanted_error) as caught:
                    call(requests, pool=pool, created=NOW)
                assert caught.type is wanted_error
            return
        preview = self.store.preview(requests, pool=pool, created=NOW)
        leases = self.store.allocate(requests, pool=pool, created=NOW)
        assert preview == leases
        assert [(lease.name, lease.block.number) for lease in leases] == [(name, given[name]) for name, _ in wanted]
        self.model.leases |= given
        self.model.freed = [one for one in self.model.freed if one[0] not in given.values()]

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=5))
    def release(self, names: list[str]) -> None:
        self.store.release(names, freed=1.0)
        for name in names:
            if name in self.model.leases:
                self.model.freed.append((self.model.leases.pop(name), name))

    @rule(others=st.sampled_from(OTHERS))
    def replace_reservations(self, others: list[Reservation]) -> None:
        self.store.replace_reservations(others)
        self.model.others = others

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.state, write=True)

    @invariant()
    def the_records_are_the_models(self) -> None:
        if hasattr(self, "model"):
            leases = {lease.name: lease.block.number for lease in read(self.state)}
            assert leases == self.model.leases
            assert len(set(leases.values())) == len(leases)


TestRecords = Records.TestCase
TestRecords.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_an_exhausted_pool_writes_nothing(state: Path) -> None:
    with Store.open(state, write=True) as store:
        store.allocate([ask("a")], pool=SMALL, created=NOW)
        with pytest.raises(PoolExhausted, match="3 free blocks, 4 "):
            store.allocate([ask(name) for name in "bcde"], pool=SMALL, created=NOW)
        assert [lease.name for lease in store.leases()] == ["a"]
        assert numbers(store.allocate([ask(name) for name in "bcd"], pool=SMALL, created=NOW)) == [1, 2, 3]


def test_the_last_block_of_the_whole_pool_can_be_had(state: Path) -> None:
    with Store.open(state, write=True) as store:
        assert numbers(store.allocate([ask("a", "127.63.255.254")], pool=WHOLE, created=NOW)) == [POOL_BLOCKS - 1]


# Many at once


def test_sixteen_processes_never_get_a_block_twice(state: Path) -> None:
    def work(worker: int) -> list[int]:
        with Store.open(state, write=True) as store:
            return [numbers(store.allocate([ask(f"{worker}-{n}")], pool=WHOLE, created=NOW))[0] for n in range(25)]

    given = at_once(16, work)
    assert sorted(itertools.chain(*given)) == list(range(400))
    assert {lease.name: lease.block.number for lease in read(state)} == {
        f"{worker}-{n}": block for worker, blocks in enumerate(given) for n, block in enumerate(blocks)
    }


def test_sixteen_processes_get_the_last_blocks_once(state: Path) -> None:
    def work(worker: int) -> list[int]:
        got = []
        with Store.open(state, write=True) as store:
            for n in range(3):
                with contextlib.suppress(PoolExhausted):
                    got += numbers(store.allocate([ask(f"{worker}-{n}")], pool=POOLS[0], created=NOW))
        return got

    assert sorted(itertools.chain(*at_once(16, work))) == list(range(8))


def test_readers_and_writers_at_once_see_whole_transactions(state: Path) -> None:
    with Store.open(state, write=True) as store:
        store.set_host(HostRecord("up", "boot", 1, 2))

    def work(worker: int) -> bool:
        for n in range(15):
            with Store.open(state, write=worker < 4) as store:
                if worker < 4:
                    store.allocate([ask(f"{worker}-{n}-a"), ask(f"{worker}-{n}-b")], pool=WHOLE, created=NOW)
                elif len(store.leases()) % 2:
                    return False
        return True

    assert all(at_once(8, work))


def hold_a_read_lock(path: Path, held: int, release: int) -> None:
    db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
    db.execute("BEGIN")
    db.execute("SELECT * FROM lease").fetchall()
    os.write(held, b"x")
    os.read(release, 1)
    db.close()


@contextlib.contextmanager
def a_reader_that_hangs(path: Path) -> Iterator[Callable[[], int]]:
    held, release = os.pipe(), os.pipe()
    thread = threading.Thread(target=in_child, args=(lambda: hold_a_read_lock(path, held[1], release[0]),))
    thread.start()
    os.read(held[0], 1)
    try:
        yield lambda: os.write(release[1], b"x")
    finally:
        os.write(release[1], b"x")
        thread.join()
        for descriptor in (*held, *release):
            os.close(descriptor)


def test_a_writer_waits_for_a_reader(state: Path) -> None:
    with Store.open(state, write=True) as store:
        store.allocate([ask("a")], pool=WHOLE, created=NOW)
        with a_reader_that_hangs(state / "vmnet.db") as let_go:
            timer = threading.Timer(0.3, let_go)
            timer.start()
            store.allocate([ask("b")], pool=WHOLE, created=NOW)
            timer.join()
        assert store.count() == 2


def test_a_file_that_stays_locked_is_a_conflict_with_the_way_to_the_culprit(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(state, write=True) as store:
        store.allocate([ask("a")], pool=WHOLE, created=NOW)
        monkeypatch.setattr(store_module, "LOCK_WAIT", 0.1)
        with a_reader_that_hangs(state / "vmnet.db"):
            with pytest.raises(Conflict, match="stayed locked") as refused:
                store.allocate([ask("b")], pool=WHOLE, created=NOW)
            assert "lsof" in refused.value.hint
            assert [lease.name for lease in read(state)] == ["a"]
        assert numbers(store.allocate([ask("c")], pool=WHOLE, created=NOW)) == [1]


# Killed


def leave_a_hot_journal(state: Path) -> None:
    """Be killed in the midst of a commit: part of the file is overwritten, the rest is not."""
    pid = os.fork()
    if pid == 0:
        db = sqlite3.connect(state / "vmnet.db", isolation_level=None)
        db.execute("PRAGMA journal_mode = PERSIST")
        db.execute("PRAGMA cache_size = 1")  # so pages go to the file before COMMIT
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE lease SET mtu = 9000")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def filled(state: Path) -> list[Lease]:
    with Store.open(state, write=True) as store:
        return store.allocate([ask(f"n{number:04}") for number in range(2000)], pool=WHOLE, created=NOW)


def test_after_a_kill_the_next_writer_rolls_back(state: Path) -> None:
    leases = filled(state)
    before = (state / "vmnet.db").read_bytes()
    leave_a_hot_journal(state)
    assert (state / "vmnet.db").read_bytes() != before
    with Store.open(state, write=True) as store:
        assert store.leases() == leases
        assert numbers(store.allocate([ask("next")], pool=WHOLE, created=NOW)) == [2000]


@pytest.mark.root
def test_after_a_kill_a_reader_without_rights_sees_the_last_commit(place: Path, state: Path) -> None:
    leases = filled(state)
    temporary = place / "tmp"
    temporary.mkdir()
    temporary.chmod(0o777)
    tempdir, tempfile.tempdir = tempfile.tempdir, str(temporary)
    try:
        with Store.open(state, write=False) as early:
            assert early.count() == 2000
            leave_a_hot_journal(state)
            broken = {path.name: path.read_bytes() for path in state.iterdir()}

            def plainly() -> None:
                db = sqlite3.connect(f"{(state / 'vmnet.db').as_uri()}?mode=ro", uri=True)
                db.execute("SELECT * FROM lease")

            with pytest.raises(sqlite3.OperationalError):
                in_child(plainly, uid=NOBODY)
            assert in_child(lambda: read(state), uid=NOBODY) == leases
            assert early.leases() == leases, "also one that was open before"
        assert {path.name: path.read_bytes() for path in state.iterdir()} == broken
        assert list(temporary.iterdir()) == []
    finally:
        tempfile.tempdir = tempdir


def work_until_killed(state: Path, said: int) -> None:
    with Store.open(state, write=True) as store:
        for number in range(10**9):
            os.write(said, b"+")
            store.allocate([ask(f"n{number}")], pool=WHOLE, created=NOW)
            os.write(said, b"-")
            if number % 2:
                store.release([f"n{number - 1}"], freed=1.0)


@pytest.mark.root
def test_killed_at_any_moment_the_records_are_whole_for_everybody(state: Path, request: pytest.FixtureRequest) -> None:
    for _ in range(300 if request.config.getoption("--long") else 30):
        shutil.rmtree(state, ignore_errors=True)
        hearing, saying = os.pipe()
        pid = os.fork()
        if pid == 0:
            work_until_killed(state, saying)
        os.close(saying)
        os.read(hearing, 1)
        time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(hearing, "rb") as pipe:
            words = b"+" + pipe.read()
        allocated = words.count(b"-")
        possible = [expected_after(allocated, 0), expected_after(allocated, 1), expected_after(allocated + 1, 0)]
        assert in_child(lambda: {lease.name: lease.block.number for lease in read(state)}, uid=NOBODY) in possible
        with Store.open(state, write=True) as store:
            assert {lease.name: lease.block.number for lease in store.leases()} in possible


def expected_after(allocated: int, released: int) -> dict[str, int]:
    """Return the leases after so many allocations, the release that follows the last one done or not."""
    leases = {f"n{number}": number for number in range(allocated)}
    for number in range(1, allocated - 1 + released, 2):
        leases.pop(f"n{number - 1}", None)
    return leases


# Who may do what


@pytest.mark.root
def test_the_umask_does_not_matter(place: Path) -> None:
    state = place / "deep" / "state"

    def write() -> None:
        os.umask(0o077)
        with Store.open(state, write=True) as store:
            store.allocate([ask("a")], pool=WHOLE, created=NOW)

    in_child(write)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (state.parent, state, *state.iterdir())}
    assert modes == {"deep": 0o755, "state": 0o755, "vmnet.db": 0o644, "vmnet.db-journal": 0o644}
    assert [lease.name for lease in in_child(lambda: read(state), uid=NOBODY)] == ["a"]


@pytest.mark.root
def test_writing_without_the_right_says_so(place: Path, state: Path) -> None:
    def write(path: Path) -> None:
        Store.open(path, write=True)

    with pytest.raises(NotPermitted, match="may not write"):
        in_child(lambda: write(place / "new"), uid=NOBODY)
    filled(state)
    with pytest.raises(NotPermitted, match="may not write") as refused:
        in_child(lambda: write(state), uid=NOBODY)
    assert "root" in refused.value.hint


@pytest.mark.root
def test_a_file_that_may_not_be_read_is_not_an_empty_one(place: Path, state: Path) -> None:
    filled(state)
    for path, mode in ((state / "vmnet.db", 0o600), (state, 0o700), (place, 0o700)):
        path.chmod(mode)
        with pytest.raises(NotPermitted, match="may not read"):
            in_child(lambda: read(state), uid=NOBODY)
        path.chmod(0o755)


def in_own_mounts(*mount: str) -> None:
    """Leave this process's mounts to itself and add one; for a child only."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", *mount], check=True)


@pytest.mark.root
@pytest.mark.parametrize("hot", [False, True], ids=["after a clean stop", "after a kill"])
def test_a_read_only_disk_can_be_read(state: Path, hot: bool) -> None:
    leases = filled(state)
    if hot:
        leave_a_hot_journal(state)

    def look() -> tuple[list[Lease], str]:
        in_own_mounts("--bind", str(state), str(state))
        subprocess.run(["mount", "-o", "remount,bind,ro", str(state)], check=True)
        try:
            with Store.open(state, write=True) as store:
                store.allocate([ask("a")], pool=WHOLE, created=NOW)
        except KernelRefused as error:
            return read(state), error.message
        return read(state), ""

    seen, refused = in_child(look)
    assert seen == leases
    assert str(state) in refused


@pytest.mark.root
def test_a_full_disk_says_so_and_loses_nothing(place: Path) -> None:
    def fill() -> tuple[int, int, str]:
        in_own_mounts("-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place))
        done = 0
        with Store.open(place / "state", write=True) as store:
            try:
                while True:
                    store.allocate([ask(f"n{done + n}") for n in range(100)], pool=WHOLE, created=NOW)
                    done += 100
            except KernelRefused as error:
                assert store.count() == done
                return done, len(read(place / "state")), error.message

    done, seen, refused = in_child(fill)
    assert done > 0
    assert seen == done
    assert "full" in refused


# Other files, other schemas


def test_missing_records_read_as_none_and_stay_missing(state: Path) -> None:
    with Store.open(state, write=False) as store:
        assert (store.leases(), store.lease("a"), store.count(), store.host(), store.reservations()) == (
            [],
            None,
            0,
            None,
            [],
        )
        assert not state.exists()
        with Store.open(state, write=True) as writer:
            writer.allocate([ask("a")], pool=WHOLE, created=NOW)
        assert store.count() == 1, "records that appear later are seen"


def test_an_empty_file_reads_as_none(state: Path) -> None:
    state.mkdir()
    (state / "vmnet.db").touch()
    assert read(state) == []
    assert (state / "vmnet.db").stat().st_size == 0
    filled(state)
    assert len(read(state)) == 2000


NEXT_STEP = ("ALTER TABLE lease ADD COLUMN note TEXT NOT NULL DEFAULT ''", "UPDATE lease SET mtu = 1400")


def test_an_older_schema_is_brought_up_to_date(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = filled(state)
    monkeypatch.setattr(store_module, "MIGRATIONS", (*store_module.MIGRATIONS, NEXT_STEP))
    before = (state / "vmnet.db").read_bytes()
    assert [(lease.name, lease.mtu) for lease in read(state)] == [(lease.name, 1400) for lease in leases]
    assert (state / "vmnet.db").read_bytes() == before, "a reader migrates a copy"

    def work(worker: int) -> int:
        with Store.open(state, write=True) as store:
            return numbers(store.allocate([ask(f"w{worker}")], pool=WHOLE, created=NOW))[0]

    assert sorted(at_once(4, work)) == [2000, 2001, 2002, 2003]
    with contextlib.closing(sqlite3.connect(state / "vmnet.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(store_module.MIGRATIONS),)
        assert db.execute("SELECT mtu, note, count(*) FROM lease GROUP BY 1, 2 ORDER BY 1").fetchall() == [
            (1400, "", 2000),
            (1500, "", 4),
        ]


def test_guests_of_the_first_schema_were_not_made_from_a_file(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = "block, name, kind, mode, mtu, owner, queues, wish, created, maker"
    values = f"0, 'a', 'tap', 'mapped', 1500, 0, 1, 'up', '{NOW}', 'vmnet'"
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "MIGRATIONS", store_module.MIGRATIONS[:1])
        Store.open(state, write=True).close()
    with contextlib.closing(sqlite3.connect(state / "vmnet.db")) as db:
        db.execute(f"INSERT INTO lease ({columns}) VALUES ({values})")
        db.commit()
    [old] = read(state)
    assert not old.applied
    with Store.open(state, write=True) as store:
        assert store.prune([]) == []
        [new] = store.allocate([ask("b")._replace(applied=True)], pool=WHOLE, created=NOW)
        assert store.leases() == [old, new]


def test_a_prune_is_of_what_was_made_from_a_file(state: Path) -> None:
    with Store.open(state, write=True) as store:
        asked = [ask("a"), *(ask(name)._replace(applied=True) for name in "bcd")]
        a, b, c, d = store.allocate(asked, pool=WHOLE, created=NOW)
        assert [one.applied for one in store.leases()] == [False, True, True, True]
        assert store.prune(["c", "x"]) == [b, d]
        assert [(one.name, one.wish) for one in store.leases()] == [
            ("a", "up"), ("b", "deleting"), ("c", "up"), ("d", "deleting"),
        ]  # fmt: skip
        store.release(["b", "d"], freed=0)
        # What it was goes with the guest.
        [again] = store.allocate([ask("b")], pool=WHOLE, created=NOW)
        assert store.prune([]) == [c]
        assert store.leases(["a", "b"]) == [a, again]


def test_a_migration_that_fails_changes_nothing(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = filled(state)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "MIGRATIONS", (*store_module.MIGRATIONS, (*NEXT_STEP, "UPDATE nothing SET x = 1")))
        with pytest.raises(RecordsUnreadable, match="nothing"):
            Store.open(state, write=True)
    assert read(state) == leases


def test_a_newer_schema_is_refused_and_left_alone(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(state, write=True) as store, Store.open(state, write=False) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "MIGRATIONS", (*store_module.MIGRATIONS, NEXT_STEP))
            Store.open(state, write=True).close()
        before = (state / "vmnet.db").read_bytes()
        calls: list[Callable[[], object]] = [
            lambda: Store.open(state, write=True),
            lambda: read(state),
            lambda: store.allocate([ask("a")], pool=WHOLE, created=NOW),
            reader.count,
        ]
        for call in calls:
            with pytest.raises(Conflict, match="newer vmnet") as refused:
                call()
            assert refused.value.exit_code == 4
            assert refused.value.hint
        assert (state / "vmnet.db").read_bytes() == before


def make_garbage(path: Path) -> None:
    path.write_bytes(b"not a database at all\n" * 500)


def make_a_foreign_database(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE cookies (name)")
        db.commit()


def cut_it_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def drop_a_table(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("DROP TABLE lease")


@pytest.mark.parametrize("damage", [make_garbage, make_a_foreign_database, cut_it_in_half, drop_a_table])
def test_damaged_records_are_refused_with_the_way_out(state: Path, damage: Callable[[Path], None]) -> None:
    filled(state)
    damage(state / "vmnet.db")
    before = (state / "vmnet.db").read_bytes()
    for write in (False, True):
        with pytest.raises(RecordsUnreadable) as refused, Store.open(state, write=write) as store:
            store.leases()
        assert str(state / "vmnet.db") in refused.value.message
        assert "vmnet restore" in refused.value.hint
        assert f"mv {state}/vmnet.db" in refused.value.hint
    assert (state / "vmnet.db").read_bytes() == before


def test_a_folder_in_the_place_of_the_file_is_refused(state: Path) -> None:
    (state / "vmnet.db").mkdir(parents=True)
    for write in (False, True):
        with pytest.raises(VmnetError, match=r"vmnet\.db"), Store.open(state, write=write) as store:
            store.leases()


def test_any_damage_ends_in_an_error_for_people(state: Path, request: pytest.FixtureRequest) -> None:
    filled(state)
    with Store.open(state, write=True) as store:
        store.release([f"n{number:04}" for number in range(0, 2000, 7)], freed=1.0)
        store.replace_reservations(OTHERS[2])
        store.set_host(HostRecord("up", "boot", 1, 2))
    path = state / "vmnet.db"
    whole = path.read_bytes()
    for seed in range(3000 if request.config.getoption("--long") else 150):
        dice = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 8, 200])):
            # The first pages hold the schema and the small tables: damage there does most.
            span = dice.choice([100, 4096, 11 * 4096, len(damaged)])
            damaged[dice.randrange(min(span, len(damaged)))] = dice.randrange(256)
        path.write_bytes(damaged[: dice.choice([len(damaged), dice.randrange(len(damaged))])])
        (state / "vmnet.db-journal").unlink(missing_ok=True)
        with contextlib.suppress(VmnetError), Store.open(state, write=False) as store:
            for look in (store.leases, store.host, store.reservations, store.count, lambda: store.leases(["n0001"])):
                with contextlib.suppress(VmnetError):
                    look()
        with contextlib.suppress(VmnetError), Store.open(state, write=True) as store:
            for change in (
                lambda: store.allocate([ask("x"), ask("n0007"), ask("y", "127.1.0.14")], pool=SMALL, created=NOW),
                lambda: store.release(["n0001", "n0002"], freed=1.0),
                lambda: store.replace_reservations([]),
                store.purge,
            ):
                with contextlib.suppress(VmnetError):
                    change()


def test_what_is_kept_is_used_by_one_at_a_time_and_sees_what_others_wrote(state: Path) -> None:
    kept = Store.open(state, write=True)
    connection = kept._db
    kept.keep()
    kept.close()
    subprocess.run([sys.executable, "-c", ADDING, state, "other"], check=True)
    with Store.open(state, write=True) as store, Store.open(state, write=True) as another:
        assert store._db is connection
        assert another._db is not connection
        [lease] = store.allocate([ask("web")], pool=WHOLE, created=NOW)
        assert lease.block == Block(1)
        assert [one.name for one in another.leases()] == ["other", "web"]
    with Store.open(state, write=True) as store:
        assert store._db is connection
        assert [one.name for one in store.leases()] == ["other", "web"]


@pytest.mark.parametrize("fate", ["replaced", "gone", "emptied", "elsewhere"])
def test_what_is_kept_is_not_used_for_another_file(state: Path, tmp_path: Path, fate: str) -> None:
    with Store.open(state, write=True) as store:
        store.allocate([ask("before")], pool=WHOLE, created=NOW)
        backup = shutil.copy(state / "vmnet.db", tmp_path / "backup")
        store.allocate([ask("web")], pool=WHOLE, created=NOW)
        store.keep()
    if fate == "replaced":
        os.replace(backup, state / "vmnet.db")
    elif fate == "gone":
        (state / "vmnet.db").unlink()
    elif fate == "emptied":
        (state / "vmnet.db").write_bytes(b"")
    place = tmp_path / "other" if fate == "elsewhere" else state
    with Store.open(place, write=True) as store:
        store.allocate([ask("new")], pool=WHOLE, created=NOW)
    with Store.open(place, write=False) as store:
        assert [one.name for one in store.leases()] == (["before", "new"] if fate == "replaced" else ["new"])


def test_a_state_folder_may_have_any_name(place: Path) -> None:
    state = place / "50% of? #1 ü"
    filled(state)
    assert len(read(state)) == 2000


def test_a_reader_cannot_write(state: Path) -> None:
    filled(state)
    with Store.open(state, write=False) as store, pytest.raises(RuntimeError):
        store.purge()
    assert len(read(state)) == 2000
