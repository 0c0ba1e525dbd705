"""When to run the loop: by events, at every interval without any, and at once when the machine wakes.

Events make it quick, looking makes it right: whatever an event told, and whatever none told, it is the difference
between the records and the kernel that is acted on. A look at a kernel in which nothing has changed decodes nothing.
"""

import fcntl
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vmnet import __version__
from vmnet.engine import Engine
from vmnet.model import Conflict, Lease, VmnetError
from vmnet.ops import Op
from vmnet.platform import EventSource, Glance, Heard, Report
from vmnet.signs import Service, Signs

INTERVAL = 15.0
# So long after an event it is quiet, or it is a storm; while it storms, looks come ever more seldom.
_SETTLE, _LONGEST_GAP, _QUIET = 0.01, 0.6, 1.0
_JUMP = 2.0  # seconds that two clocks may part by between two looks
# What is put right more often than this within a minute is left to whoever undoes it, longer each time.
_FIGHT, _FIGHT_SPAN = 5, 60.0
_LONGEST_TRUCE = 15 * 60.0
# The namespaces of so many guests are looked into at each look, the others in turn: it takes 90 us each.
_INSIDES = 125
_LINES = 20  # of the log, for one look


def _code_stamp() -> tuple[int, ...]:
    """Return what differs when a file of vmnet does."""
    root = Path(__file__).parent
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        if folder.endswith("__pycache__"):
            continue
        for name in sorted(names):
            with suppress(OSError):
                file = os.stat(os.path.join(folder, name))
                found += [file.st_ino, file.st_mtime_ns]
    return tuple(found)


OpenEngine = Callable[[Report, Callable[[Op], bool]], AbstractContextManager[Engine]]
OpenEvents = Callable[[Engine, int], EventSource]


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


class Truces:
    """Who undoes what we do more than five times a minute is not fought for ever: the op is held back for a while."""

    def __init__(self) -> None:
        self._times: dict[str, deque[float]] = {}
        self._levels: Counter[str] = Counter()
        self._until: dict[str, float] = {}

    def note(self, op: str, now: float) -> float | None:
        """Note that `op` was done; return for how many seconds it is left from now on, None for not at all."""
        times = self._times.setdefault(op, deque(maxlen=_FIGHT + 1))
        times.append(now)
        if len(times) <= _FIGHT or now - times[0] > _FIGHT_SPAN:
            return None
        times.clear()
        truce = min(_FIGHT_SPAN * (1 << self._levels[op]), _LONGEST_TRUCE)
        self._levels[op] += 1
        self._until[op] = now + truce
        return truce

    def holds(self, op: str, now: float) -> bool:
        """Say whether `op` is held back."""
        return self._until.get(op, 0.0) > now

    def held(self, now: float) -> list[str]:
        """Return what is held back."""
        return sorted(op for op, until in self._until.items() if until > now)

    def forget(self, now: float) -> None:
        """Forget what has been quiet for long, so that weeks of notes stay few."""
        for op, times in list(self._times.items()):
            if now - max(self._until.get(op, 0.0), times[-1] if times else 0.0) > _LONGEST_TRUCE:
                for notes in (self._times, self._until, self._levels):
                    notes.pop(op, None)


@dataclass
class _Clean:
    """How the kernel showed itself when a look found nothing to do."""

    host: bytes | None = None
    guests: bytes | None = None
    insides: dict[int, bytes] = field(default_factory=dict)

    def forget(self) -> None:
        self.host, self.guests = None, None
        self.insides.clear()


@dataclass
class Watcher:
    """Keeps the kernel as recorded until it is told to stop.

    `wakeup` is a descriptor that becomes readable when there is something for `stopping` to say.
    """

    open_engine: OpenEngine
    service: Service
    run: Path
    wakeup: int
    stopping: Callable[[], bool]
    open_events: OpenEvents = open_events
    interval: float = INTERVAL
    metrics: Path | None = None
    clocks: Callable[[], Clocks] = read_clocks
    _engine: Engine = field(init=False)
    _events: EventSource = field(init=False)
    _open: ExitStack = field(init=False, default_factory=ExitStack)
    _truces: Truces = field(init=False, default_factory=Truces)
    _clean: _Clean = field(init=False, default_factory=_Clean)
    _leases: list[Lease] | None = field(init=False, default=None)
    _stamp: tuple[object, ...] | None = field(init=False, default=None)
    _part: int = field(init=False, default=0)
    _done: list[Op] = field(init=False, default_factory=list)
    _wrong: set[str] = field(init=False, default_factory=set)
    _code: tuple[int, ...] = field(init=False, default_factory=_code_stamp)
    _newer: tuple[int, ...] | None = field(init=False, default=None)

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
        self._complain({text})

    def _holds_back(self, op: Op) -> bool:
        return self._truces.holds(str(op), self._now.steady)

    # The loop

    def watch(self) -> None:
        """Keep watch; raises what keeps it from beginning."""
        with ExitStack() as stack:
            lead = stack.enter_context(_Lead(self.run))
            self._reopen()
            stack.callback(self._close)
            self.service.ready()
            self._wait_to_lead(lead)
            self._loop()
            self._signs.stop()
            self.service.log("stopped")

    def _close(self) -> None:
        self._open.close()

    def _wait_to_lead(self, lead: "_Lead") -> None:
        """Wait while another watcher is at work, to take over from it."""
        if lead.take():
            return
        self.service.log("standing by", reason="another watcher is at work")
        while not self.stopping() and not lead.take():
            self._events.hear(min(self.interval, 1.0))
            self.service.alive()

    def _loop(self) -> None:
        cause, heard, gap, looked = "start", Heard(lost=True), 0.0, -_QUIET
        due = act = self._read_clocks().steady
        self.service.log("watching", version=__version__, interval=f"{self.interval:g}s")
        while not self.stopping():
            if self._has_jumped:
                cause, heard, act = "resume", heard._replace(clock=True), self._now.steady
                self._reopen()
            elif heard.anything and self._now.steady >= act:
                self._look(cause, heard)
                heard, cause = Heard(), "event"
                gap = min(2 * gap + _SETTLE, _LONGEST_GAP) if self._now.steady - looked < _QUIET else 0.0
                looked = self._read_clocks().steady
            elif self._now.steady >= due:
                self._look("look", None)
                due = self._read_clocks().steady + self.interval
            more = self._hear((min(act, due) if heard.anything else due) - self._now.steady)
            now = self._read_clocks().steady
            if more.anything and not heard.anything:
                act = max(now + _SETTLE, looked + gap)
            heard = heard.also(more)
            self.service.alive()

    def _read_clocks(self) -> Clocks:
        before, self._now = self._now, self.clocks()
        self._has_jumped = has_jumped(before, self._now)
        return self._now

    def _hear(self, timeout: float) -> Heard:
        try:
            heard = self._events.hear(timeout)
        except OSError as error:
            self.service.log("events reopened", reason=error.strerror or "a socket is dead", level="warning")
            self._reopen()
            return Heard(lost=True)
        if heard.lost:
            self._signs.count("lost_total")
        return heard

    def _reopen(self) -> None:
        """Open anew whatever reaches the kernel; with other settings from then on, if the file of them changed."""
        self._signs.count("opened_total")
        self._clean.forget()
        self._stamp = None
        with ExitStack() as fresh:
            engine = fresh.enter_context(self.open_engine(self, self._holds_back))
            events = self.open_events(engine, self.wakeup)
            fresh.callback(events.close)
            self._open.close()
            self._engine, self._events, self._open = engine, events, fresh.pop_all()

    # A look

    def _look(self, cause: str, heard: Heard | None) -> None:
        """Look where `heard` says, or everywhere without it, and put right what differs."""
        if self._is_outdated():
            return
        self._done.clear()
        problems: dict[str, VmnetError] = {}
        try:
            changed = self._learn()
            if self._leases is not None:
                if heard and not (heard.lost or heard.clock):
                    names = heard.names | (changed if heard.marks else set())
                    problems = self._engine.keep(names, host=heard.host, orphans=heard.marks)
                else:
                    problems = self._look_all(changed)
                    if cause == "look" and changed:
                        cause = "records"
        except (VmnetError, OSError) as error:
            problems[""] = error if isinstance(error, VmnetError) else VmnetError(error.strerror or str(error))
            self._clean.forget()
            if isinstance(error, OSError):
                self._stamp = None
        self._tell(cause, heard.programs if heard else (), problems)

    def _learn(self) -> set[str]:
        """Read the records where they have changed; return whose have."""
        stamp = self._engine.stamp()
        if stamp == self._stamp:
            return set()
        if self._stamp is not None and stamp[1] != self._stamp[1]:
            self._reopen()  # other settings
        before = {one.name: one for one in self._leases or ()}
        self._leases = self._engine.recorded()
        now = {one.name: one for one in self._leases or ()}
        self._events.expect(self._leases or ())
        self._stamp = stamp
        return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}

    def _look_all(self, changed: Collection[str]) -> dict[str, VmnetError]:
        glance, part, inside = self._glance()
        new_host = glance.host is None or glance.host != self._clean.host
        new_guests = glance.guests != self._clean.guests or bool(changed)
        new_inside = glance.insides != self._clean.insides.get(part)
        if not (new_host or new_guests or new_inside):
            return {}
        names = None if new_guests else [one.name for one in inside] if new_inside else []
        problems = self._engine.keep(names, host=new_host, orphans=new_guests)
        # Some other state may have been there in between: what is taken for clean was so before and after.
        again, _, _ = self._glance()
        held = self._truces.held(self._now.steady)
        if (
            not self._done
            and not held
            and again == glance
            and all(isinstance(one, Conflict) for one in problems.values())
        ):
            self._clean.host, self._clean.guests = glance.host, glance.guests
            self._clean.insides[part] = glance.insides
            self._part += 1
        return problems

    def _glance(self) -> tuple[Glance, int, Sequence[Lease]]:
        """Return what the kernel shows, which part of the namespaces it is about, and whose these are."""
        inside = [one for one in self._leases or () if one.netns]
        parts = max(1, -(-len(inside) // _INSIDES))
        part = self._part % parts
        chosen = inside[part * _INSIDES : (part + 1) * _INSIDES]
        return self._engine.platform.glance(self._leases or (), chosen), part, chosen

    def _is_outdated(self) -> bool:
        """Say whether vmnet itself has changed on disk, and become the new one once it is all there."""
        code = _code_stamp()
        if code == self._code:
            self._newer = None
            return False
        if code == self._newer:
            self.service.log("starting anew", reason="vmnet has changed on disk")
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        self._newer = code
        return True

    # What is told

    def _tell(self, cause: str, programs: Sequence[str], problems: dict[str, VmnetError]) -> None:
        by = {"by": " ".join(programs)} if programs and self._done else {}
        for op in self._done[:_LINES]:
            self.service.log("changed", cause=cause, **by, op=str(op))
        if len(self._done) > _LINES:
            self.service.log("changed", cause=cause, **by, more=str(len(self._done) - _LINES))
        self._signs.count("changes_total", cause, len(self._done))
        self._signs.count("looks_total", cause)
        if self._done and cause == "look":
            self.service.log("drift without event", level="warning", changes=str(len(self._done)))
            self._signs.count("unannounced_total", times=len(self._done))
            self._reopen()
        if cause in ("event", "look"):
            self._call_truces(by)
        self._complain({f"{name}: {error.message}" if name else error.message for name, error in problems.items()})
        self._truces.forget(self._now.steady)
        self._signs.show(len(self._leases or ()), self._truces.held(self._now.steady), sorted(self._wrong))

    def _call_truces(self, by: dict[str, str]) -> None:
        for op in dict.fromkeys(map(str, self._done)):
            truce = self._truces.note(op, self._now.steady)
            if truce:
                self._signs.count("fights_total")
                self._clean.forget()
                self.service.log(
                    "left alone", level="warning", op=op, **by, seconds=f"{truce:.0f}",
                    reason=f"it was undone more than {_FIGHT} times in a minute",
                )  # fmt: skip

    def _complain(self, texts: set[str]) -> None:
        """Log what is wrong once, and again only after it was right."""
        for text in sorted(texts - self._wrong):
            self.service.log("wrong", level="error", problem=text)
        self._wrong = texts


class _Lead:
    """The right to act, of one watcher at a time; the kernel takes it from a dead one."""

    def __init__(self, run: Path) -> None:
        run.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._file = (run / "watch.lock").open("w")

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
        return True
