"""When to run the loop: by events, at every interval without any, and at once when the machine wakes.

Events make it quick, looking makes it right: whatever an event told, and whatever none told, it is the difference
between the records and the kernel that is acted on. A look at a kernel in which nothing has changed decodes nothing.
"""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from vmnet import __version__
from vmnet.engine import Engine, Stamp
from vmnet.freshness import Freshness
from vmnet.model import Conflict, Lease, VmnetError
from vmnet.ops import ForgetFlows, Op, RunAnswers
from vmnet.platform import EventSource, Glance, Heard, Report
from vmnet.signs import Service, Signs
from vmnet.store import Relay
from vmnet.truces import LIMIT, Truces

INTERVAL = 15.0
# So long after an event it is quiet, or it is a storm; while it storms, looks come ever more seldom.
_SETTLE, _LONGEST_GAP, _QUIET = 0.01, 0.6, 1.0
_JUMP = 2.0  # seconds that two clocks may part by between two looks
# The namespaces of so many guests are looked into at each look, the others in turn: each takes 0.1 ms.
_INSIDES = 64
_LINES = 20  # of the log, for one look
_LOCK = "watch.lock"


OpenEngine = Callable[[Report, Callable[[Op], bool]], AbstractContextManager[Engine]]
OpenEvents = Callable[[Engine, int], EventSource]


class Domains(Protocol):
    """Who tells which domains libvirt has; see vmnet.libvirt.listen."""

    def hear(self, *, wanted: bool) -> frozenset[str] | None: ...
    def close(self) -> None: ...


class Serving(Protocol):
    """Who has a server at hand; see vmnet.server.keeping."""

    def start(self, log: Callable[..., None]) -> None: ...
    def close(self) -> None: ...


class Relaying(Protocol):
    """Who relays ports of aliases; see vmnet.relay."""

    def want(self, ports: Collection[tuple[str, Relay]]) -> None: ...
    def problems(self) -> Collection[str]: ...
    def close(self) -> None: ...


def open_events(engine: Engine, wakeup: int) -> EventSource:
    """Return what hears of changes of the kernel and of the hosts file."""
    return engine.platform.listen(engine.paths.hosts, wakeup)


class Clocks(NamedTuple):
    """Seconds of the wall clock, and of one that stands still while the machine sleeps."""

    wall: float
    steady: float


def read_clocks() -> Clocks:
    """Return what the clocks show."""
    return Clocks(time.time(), time.monotonic())


def has_jumped(before: Clocks, now: Clocks) -> bool:
    """Say whether the machine was asleep between two readings, or its clock was set."""
    return abs((now.wall - before.wall) - (now.steady - before.steady)) > _JUMP


@dataclass
class Orders:
    """What a watcher is told to do: to stop, or to look at once. `wakeup` becomes readable with each order."""

    wakeup: int
    stop: bool = False
    look: bool = False

    def is_to_look(self) -> bool:
        """Say, once, whether there was an order to look."""
        with suppress(BlockingIOError):
            os.read(self.wakeup, 4096)
        look, self.look = self.look, False
        return look


@dataclass
class _Clean:
    """How the kernel, and the files of vmnet, were when a look found nothing to do."""

    host: bytes | None = None
    guests: bytes | None = None
    insides: dict[int, bytes] = field(default_factory=dict)
    stamp: Stamp | None = None


@dataclass
class Watcher:
    """Keeps the kernel as recorded until it is told to stop."""

    open_engine: OpenEngine
    service: Service
    run: Path
    orders: Orders
    open_events: OpenEvents = open_events
    interval: float = INTERVAL
    metrics: Path | None = None
    clocks: Callable[[], Clocks] = read_clocks
    truces: Truces = field(default_factory=Truces)
    domains: Domains | None = None
    relaying: Relaying | None = None
    serving: Serving | None = None
    _engine: Engine = field(init=False)
    _events: EventSource = field(init=False)
    _opened: ExitStack = field(init=False, default_factory=ExitStack)
    _hearing: ExitStack = field(init=False, default_factory=ExitStack)
    _clean: _Clean = field(init=False, default_factory=_Clean)
    _leases: list[Lease] | None = field(init=False, default=None)
    _stamp: Stamp | None = field(init=False, default=None)
    _addresses: frozenset[str] = field(init=False, default=frozenset())
    _part: int = field(init=False, default=0)
    _done: list[Op] = field(init=False, default_factory=list)
    _wrong: dict[str, str] = field(init=False, default_factory=dict)
    _warnings: set[str] = field(init=False, default_factory=set)
    _warned: set[str] = field(init=False, default_factory=set)
    _unrelayed: frozenset[str] = field(init=False, default=frozenset())
    _code: Freshness = field(init=False, default_factory=Freshness)
    _has_jumped: bool = field(init=False, default=False)
    _has_domains: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._signs = Signs(self.run, self.metrics, self.interval)
        self._now = self.clocks()

    # What the engine is told (vmnet.platform.Report)

    def begin(self, total: int) -> None:
        """Hear that `total` ops are to come."""

    def did(self, op: Op) -> None:
        """Hear that an op was carried out."""
        self._done.append(op)
        self.service.alive()

    def warn(self, text: str) -> None:
        """Hear what a person should know."""
        self._warnings.add(text)

    def _holds_back(self, op: Op) -> bool:
        return self.truces.holds(str(op), self._now.steady)

    # The loop

    def watch(self) -> None:
        """Keep watch; raises what keeps it from beginning."""
        with ExitStack() as stack:
            self._reopen()
            stack.callback(self._close)
            self._engine.platform.need_rights()
            self._engine.recorded()
            lead = stack.enter_context(_Lead(self.run))
            self.service.ready()
            if self._wait_to_lead(lead):
                self._loop()
                self._signs.stop()
            self.service.log("stopped")

    def _close(self) -> None:
        self._hearing.close()
        self._opened.close()
        self._end_helpers()

    def _end_helpers(self) -> None:
        for helper in (self.domains, self.relaying, self.serving):
            if helper:
                helper.close()

    def _wait_to_lead(self, lead: "_Lead") -> bool:
        """Wait while another watcher is at work, to take over from it; say whether it came to that."""
        if lead.take():
            return True
        self.service.log("standing by", reason="another watcher is at work")
        while not self.orders.stop:
            if lead.take():
                return True
            self._events.hear(min(self.interval, 1.0))
            self.service.alive()
        return False

    def _loop(self) -> None:
        cause, heard, gap, looked = "start", Heard(lost=True), 0.0, -_QUIET
        due = act = self._read_clocks().steady
        self.service.log("watching", version=__version__, interval=f"{self.interval:g}s")
        if self.serving:
            self.serving.start(self.service.log)
        while not self.orders.stop:
            if self._has_jumped or self.orders.is_to_look():
                cause, heard, act = "resume" if self._has_jumped else "order", Heard(clock=True), self._now.steady
                self._has_jumped = False
                self.service.log("looking anew", cause=cause)
                self._reopen()
            elif heard.anything and self._now.steady >= act:
                self._look(cause, heard)
                if heard.lost or heard.clock:
                    due = self._read_clocks().steady + self.interval
                heard, cause = Heard(), "event"
                gap = min(2 * gap + _SETTLE, _LONGEST_GAP) if self._now.steady - looked < _QUIET else 0.0
                looked = self._read_clocks().steady
            elif self._now.steady >= due:
                self._look("look", None)
                due = self._read_clocks().steady + self.interval
            if self._code.due is not None:
                due = min(due, max(self._code.due, self._now.steady + _SETTLE))
            more = self._hear((min(act, due) if heard.anything else due) - self._now.steady)
            now = self._read_clocks().steady
            if more.anything and not heard.anything:
                act = max(now + _SETTLE, looked + gap)
            heard = heard.also(more)
            self._heed_domains()
            self.service.alive()

    def _heed_domains(self) -> None:
        """Take note of which domains libvirt has, and have guests freed whose domains have been gone for long."""
        there = self.domains.hear(wanted=self._has_domains) if self.domains else None
        if there is None:
            return
        try:
            freed = self._engine.heed_domains(there, self.clocks().wall, free=True)
        except (VmnetError, OSError) as error:
            self._warnings.add(str(error))
            return
        for name in freed:
            self.service.log("freed", guest=name, reason="its domain is gone from libvirt")

    def _read_clocks(self) -> Clocks:
        before, self._now = self._now, self.clocks()
        self._has_jumped |= has_jumped(before, self._now)
        return self._now

    def _hear(self, timeout: float) -> Heard:
        try:
            heard = self._events.hear(min(timeout, self.service.patience or timeout))
        except OSError as error:
            self.service.log("events reopened", reason=error.strerror or "a socket is dead", level="warning")
            self._reopen()
            return Heard(lost=True)
        if heard.lost:
            self._signs.count("lost_total")
        return heard

    def _reopen(self) -> None:
        """Open anew whatever reaches the kernel, with the settings of now; with the former where these are wrong."""
        self._clean = _Clean()
        self._stamp = None
        with ExitStack() as fresh:
            try:
                engine = fresh.enter_context(self.open_engine(self, self._holds_back))
            except VmnetError as error:
                if not hasattr(self, "_engine"):
                    raise
                self._warnings.add(error.message)
            else:
                self._opened.close()
                self._engine, self._opened = engine, fresh.pop_all()
        self._signs.count("opened_total")
        events = self.open_events(self._engine, self.orders.wakeup)
        self._hearing.close()
        self._hearing.callback(events.close)
        self._events = events

    # A look

    def _look(self, cause: str, heard: Heard | None) -> None:
        """Look where `heard` says, or everywhere without it, and put right what differs."""
        if self._is_outdated():
            return
        self._done.clear()
        seen: Collection[str] | None = ()
        problems: dict[str, VmnetError] = {}
        try:
            changed, others = self._learn()
            if heard is None or heard.addresses or heard.lost or heard.clock:
                self._forget_flows(heard)
            if self._leases is None:
                seen = None
            elif heard and not (heard.lost or heard.clock):
                names = heard.names | changed
                seen = [*names, ""] if heard.host else names
                problems = self._engine.keep(names, host=heard.host, orphans=heard.marks)
            else:
                seen, problems = self._look_all(changed)
                if cause == "look" and others:
                    cause = "records"
        except (VmnetError, OSError) as error:
            problems = {"": error if isinstance(error, VmnetError) else VmnetError(error.strerror or str(error))}
            self._clean = _Clean()
            self._stamp = None
        if any(isinstance(op, RunAnswers) for op in self._done):
            self._events.attend(self._engine.answerer())
        self._tell(cause, heard.programs if heard else ())
        self._complain(seen, problems)
        self._signs.show(len(self._leases or ()), self.truces.held(self._now.steady), sorted(self._all_wrong()))

    def _learn(self) -> tuple[set[str], bool]:
        """Read the records where they have changed; return whose have, and whether records or settings are others."""
        before, stamp = self._stamp, self._engine.stamp()
        if stamp == before:
            return set(), False
        if before is not None and stamp.settings != before.settings:
            self._reopen()
        known = {one.name: one for one in self._leases or ()}
        self._leases = self._engine.recorded()
        self._has_domains = self.domains is not None and bool(self._engine.domains())
        if self.relaying:
            self.relaying.want(self._engine.relays())
        now = {one.name: one for one in self._leases or ()}
        self._events.expect(self._leases or ())
        self._events.attend(self._engine.answerer())
        self._stamp = stamp
        changed = {name for name in known.keys() | now.keys() if known.get(name) != now.get(name)}
        return changed, before is not None and stamp._replace(hosts=(), answers=()) != before._replace(
            hosts=(), answers=()
        )

    def _forget_flows(self, heard: Heard | None) -> None:
        """Have connections forgotten that go on over an address which the host has lost."""
        if not self._engine.platform.carves:
            return  # nobody's connections go through this host
        now = self._engine.platform.addresses()
        lost = heard.addresses if heard else frozenset()
        if heard is None or heard.lost or heard.clock:
            lost |= self._addresses  # those of the last time that everything was looked at
            self._addresses = now
        if lost - now:
            self._engine.forget_flows(lost - now)

    def _look_all(self, changed: Collection[str]) -> tuple[Collection[str] | None, dict[str, VmnetError]]:
        """Look everywhere; return whom it was about (None: all), and what stays wrong."""
        glance, part, inside = self._glance()
        new_host = glance.host is None or glance.host != self._clean.host
        new_guests = glance.guests != self._clean.guests or bool(changed)
        new_inside = glance.insides != self._clean.insides.get(part)
        new_files = self._stamp != self._clean.stamp
        if not (new_host or new_guests or new_inside or new_files):
            self._part += 1
            return (), {}
        names = None if new_guests else [one.name for one in inside] if new_inside else []
        problems = self._engine.keep(names, host=new_host, orphans=new_guests)
        # What keeps the host part from being made may be anywhere, and a guest's conflict only where the guest is.
        lasting = "" not in problems and all(isinstance(one, Conflict) for one in problems.values())
        settled = lasting and not self._done and not self.truces.held(self._now.steady)
        # Some other state may have been there in between: what is taken for clean was so before and after.
        if settled and self._glance()[0] == glance:
            self._clean.host, self._clean.guests, self._clean.stamp = glance.host, glance.guests, self._stamp
            self._clean.insides[part] = glance.insides
        self._part += 1
        return None if names is None else [*names, ""] if new_host else names, problems

    def _glance(self) -> tuple[Glance, int, Sequence[Lease]]:
        """Return what the kernel shows, which part of the namespaces it is about, and whose these are."""
        inside = [one for one in self._leases or () if one.netns]
        parts = max(1, -(-len(inside) // _INSIDES))
        part = self._part % parts
        chosen = inside[part * _INSIDES : (part + 1) * _INSIDES]
        return self._engine.platform.glance(self._leases or (), chosen), part, chosen

    def _is_outdated(self) -> bool:
        """Say whether vmnet itself has changed on disk, and become the new one once it is all there."""
        if self._code.is_fresh(self._now.steady):
            return False
        if self._code.due is not None and self._now.steady >= self._code.due:
            self.service.log("starting anew", reason="vmnet has changed on disk")
            self._hearing.close()
            self._end_helpers()
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        return True

    # What is told

    def _tell(self, cause: str, programs: Sequence[str]) -> None:
        """Log what was done, and count it."""
        self._signs.count("looks_total", cause)
        self._signs.count("changes_total", cause, len(self._done))
        if not self._done:
            return
        by = {"by": " ".join(programs)} if programs else {}
        for op in self._done[:_LINES]:
            self.service.log("changed", cause=cause, **by, op=str(op))
        if len(self._done) > _LINES:
            self.service.log("changed", cause=cause, **by, more=str(len(self._done) - _LINES))
        if cause == "look":
            self.service.log("drift without event", level="warning", changes=str(len(self._done)))
            self._signs.count("unannounced_total", times=len(self._done))
            self._reopen()
        if cause in ("event", "look"):
            self._call_truces(by)

    def _call_truces(self, by: dict[str, str]) -> None:
        self.truces.forget(self._now.steady)
        for op in dict.fromkeys(str(op) for op in self._done if not isinstance(op, ForgetFlows)):
            truce = self.truces.note(op, self._now.steady)
            if truce:
                self._signs.count("fights_total")
                self._clean = _Clean()
                self.service.log(
                    "left alone", level="warning", op=op, **by, seconds=f"{truce:.0f}",
                    reason=f"it was undone more than {LIMIT} times in a minute",
                )  # fmt: skip

    def _complain(self, seen: Collection[str] | None, problems: Mapping[str, VmnetError]) -> None:
        """Log what is wrong once, and again only after it was right; `seen` (None: all) is who was looked at."""
        before = self._all_wrong()
        kept = {} if seen is None else {name: text for name, text in self._wrong.items() if name not in seen}
        found = {name: f"{name}: {error.message}" if name else error.message for name, error in problems.items()}
        self._wrong = kept | found
        self._warned = set(self._warnings) if seen is None or seen else self._warned | self._warnings
        self._unrelayed = frozenset(self.relaying.problems()) if self.relaying else frozenset()
        for text in sorted(self._all_wrong() - before):
            self.service.log("wrong", level="error", problem=text)
        self._warnings.clear()

    def _all_wrong(self) -> set[str]:
        return {*self._wrong.values(), *self._warned, *self._unrelayed}


class _Lead:
    """The right to act, of one watcher at a time; the kernel takes it from a dead one."""

    def __init__(self, run: Path) -> None:
        run.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._file = (run / _LOCK).open("a+")

    def __enter__(self) -> "_Lead":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self) -> bool:
        """Say whether it could be had."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        return True


def have_looked(run: Path) -> bool:
    """Have the watcher look at once, for what no event tells; say whether there is one."""
    with suppress(OSError, ValueError), (run / _LOCK).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # so it is alive, and the file tells which process it is
            os.kill(int(file.read()), signal.SIGHUP)
            return True
    return False
