"""Keep the names of guests where they are looked up: by this host's programs in the hosts file, by guests in DNS."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vmnet.dnsmasq.answers import Answers
from vmnet.hostsfile import HostsFile, HostsFileUnwritable
from vmnet.locks import Locks
from vmnet.model import Block, Lease
from vmnet.ops import Op, WriteNames
from vmnet.plan import dotted
from vmnet.platform import Report
from vmnet.settings import Paths, Settings
from vmnet.store import Store


@dataclass
class Names:
    """The block of names, and DHCP and DNS; where one of them cannot be had, that is said, and guests work without.

    Only with `answering` are there guests that ask.
    """

    settings: Settings
    paths: Paths
    report: Report
    locks: Locks
    holds_back: Callable[[Op], bool]
    answering: bool = True
    _answers: Answers | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.answering:
            self._answers = Answers(self.settings, self.paths, self.report, self.locks, self.holds_back)

    def _of(self, guests: Iterable[tuple[str, Block]]) -> tuple[tuple[str, str], ...]:
        return tuple((f"{name}.{self.settings.domain}", dotted(block.first + 2)) for name, block in guests)

    def _op(self, guests: Iterable[tuple[str, Block]]) -> WriteNames | None:
        if self.paths.hosts is None:
            return None
        return WriteNames(str(self.paths.hosts), self._of(guests))

    def plan(self, leases: Iterable[Lease]) -> list[Op]:
        """Return the ops that make names those of the leases that are to be up."""
        # As they are written: the hosts file in the order of blocks, what is answered in that of names.
        wanted = sorted((lease for lease in leases if lease.wish == "up"), key=lambda lease: lease.name)
        ops = self._plan_block(sorted(((one.name, one.block) for one in wanted), key=lambda guest: guest[1].number))
        return ops + (self._answers.plan(wanted) if self._answers else [])

    def plan_clear(self) -> list[Op]:
        """Return the ops after which there are no names."""
        return self._plan_block([]) + (self._answers.plan_clear() if self._answers else [])

    def _plan_block(self, guests: Iterable[tuple[str, Block]]) -> list[Op]:
        op = self._op(guests)
        try:
            return [op] if op and not HostsFile(Path(op.path)).is_current(dict(op.names)) else []
        except HostsFileUnwritable as error:
            self.report.warn(error.message)
            return []

    def write(self, store: Store) -> None:
        """Make names those of all guests that are to be up."""
        self._keep(self._op(store.wished_up()), lambda: self._of(store.wished_up()))
        if self._answers:
            self._answers.write(store.leases_up)

    def _keep(self, op: WriteNames | None, ask: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Keep the names in the hosts file; where that cannot be, say so: a guest works without."""
        if op is None or self.holds_back(op):
            return
        file = HostsFile(Path(op.path))
        try:
            if not file.is_current(dict(op.names)):
                file.write(lambda: dict(ask()))
                self.report.did(op)
        except HostsFileUnwritable as error:
            self.report.warn(error.message + (f" ({error.hint})" if error.hint else ""))

    def clear(self) -> None:
        """Take names away, and what answers."""
        self._keep(self._op([]), list)
        if self._answers:
            self._answers.clear()

    def forget(self) -> None:
        """Forget what was given to whom."""
        if self._answers:
            self._answers.forget()

    def answerer(self) -> int | None:
        """Return a pidfd of the process that keeps what answers guests, None without one."""
        return self._answers.keeper() if self._answers else None

    def stamp(self) -> tuple[int, ...]:
        """Return what differs when what answers guests does."""
        return self._answers.stamp() if self._answers else ()
