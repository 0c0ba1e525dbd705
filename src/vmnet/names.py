"""Keep the names of guests where this host's programs look them up: in the hosts file."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vmnet.hostsfile import HostsFile, HostsFileUnwritable
from vmnet.model import Block, Lease
from vmnet.ops import Op, WriteNames
from vmnet.plan import dotted
from vmnet.platform import Report
from vmnet.settings import Paths, Settings
from vmnet.store import Store


@dataclass(frozen=True, slots=True)
class Names:
    """The block of names; where the hosts file cannot be written, that is said, and guests work without."""

    settings: Settings
    paths: Paths
    report: Report
    holds_back: Callable[[Op], bool]

    def _of(self, guests: Iterable[tuple[str, Block]]) -> tuple[tuple[str, str], ...]:
        return tuple((f"{name}.{self.settings.domain}", dotted(block.first + 2)) for name, block in guests)

    def _op(self, guests: Iterable[tuple[str, Block]]) -> WriteNames | None:
        if self.paths.hosts is None:
            return None
        return WriteNames(str(self.paths.hosts), self._of(guests))

    def plan(self, leases: Iterable[Lease]) -> list[Op]:
        """Return the op that makes the block hold the names of those leases that are to be up."""
        op = self._op([(lease.name, lease.block) for lease in leases if lease.wish == "up"])
        try:
            return [op] if op and not HostsFile(Path(op.path)).is_current(dict(op.names)) else []
        except HostsFileUnwritable as error:
            self.report.warn(error.message)
            return []

    def write(self, store: Store) -> None:
        """Make the block hold the names of all guests that are to be up."""
        self._keep(self._op(store.wished_up()), lambda: self._of(store.wished_up()))

    def _keep(self, op: WriteNames | None, ask: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Keep the names in the hosts file; where that cannot be, say so: a guest works without."""
        if op is None or self.holds_back(op):
            return
        file = HostsFile(Path(op.path))
        try:
            if not file.is_current(dict(op.names)):
                file.update(lambda: dict(ask()))
                self.report.did(op)
        except HostsFileUnwritable as error:
            self.report.warn(error.message + (f" ({error.hint})" if error.hint else ""))

    def clear(self) -> None:
        """Take the block away."""
        self._keep(self._op([]), list)
