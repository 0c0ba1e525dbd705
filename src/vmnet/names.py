"""Keep the names of guests where they are looked up: by this host's programs in the hosts file, by guests in DNS."""

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vmnet.dnsmasq.answers import Answers
from vmnet.hostsfile import Change, Changes, HostsFile, HostsFileUnwritable
from vmnet.hostsfile import Names as Hostnames
from vmnet.locks import Locks
from vmnet.model import Block, Lease
from vmnet.ops import Op, WriteNames
from vmnet.plan import dotted
from vmnet.platform import Report
from vmnet.settings import Paths, Settings
from vmnet.store import Store

_FEW = 32  # blocks; the names of more are written anew, with all the others'


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

    def plan(self, leases: Iterable[Lease]) -> list[Op]:
        """Return the ops that make names those of the leases that are to be up."""
        wanted = sorted((lease for lease in leases if lease.wish == "up"), key=lambda lease: lease.block.number)
        ops = self._plan_block(self._hostnames((lease.name, lease.block) for lease in wanted))
        return ops + (self._answers.plan(wanted) if self._answers else [])

    def plan_clear(self) -> list[Op]:
        """Return the ops after which there are no names."""
        return self._plan_block({}) + (self._answers.plan_clear() if self._answers else [])

    def _plan_block(self, names: Hostnames) -> list[Op]:
        if self.paths.hosts is None:
            return []
        try:
            change = HostsFile(self.paths.hosts).difference(names)
        except HostsFileUnwritable as error:
            self.report.warn(error.message)
            return []
        return [] if change is None else [_op(self.paths.hosts, change)]

    def write(self, store: Store, blocks: Collection[Block] | None = None) -> None:
        """Make names those of all guests that are to be up, or of those alone that hold one of `blocks`, or held it.

        The latter takes as long with thousands of other guests as with none.
        """
        if blocks is not None and not blocks:
            return
        if blocks is not None and len(blocks) > _FEW:
            blocks = None
        self._keep(lambda: self._wanted(store, blocks), likely=blocks is not None)
        if self._answers:
            self._answers.write(store, blocks)

    def rehearse(self, store: Store, blocks: Collection[Block]) -> None:
        """Do what `write` does, without writing."""
        if self.paths.hosts is not None:
            with suppress(HostsFileUnwritable):
                HostsFile(self.paths.hosts).difference(self._wanted(store, blocks))
        if self._answers:
            self._answers.rehearse(store, blocks)

    def _hostnames(self, guests: Iterable[tuple[str, Block]]) -> dict[str, str]:
        return {f"{name}.{self.settings.domain}": dotted(block.first + 2) for name, block in guests}

    def _wanted(self, store: Store, blocks: Collection[Block] | None) -> Hostnames | Changes:
        if blocks is None:
            return self._hostnames(store.wished_up())
        names = self._hostnames((lease.name, lease.block) for lease in store.leases_up(blocks))
        nobody = dict.fromkeys(dotted(block.first + 2) for block in blocks)
        change = nobody | {address: name for name, address in names.items()}
        return Changes(change, lambda: self._hostnames(store.wished_up()))

    def _keep(self, ask: Callable[[], Hostnames | Changes], *, likely: bool = False) -> None:
        """Keep the names in the hosts file; where that cannot be, say so: a guest works without."""
        path = self.paths.hosts
        if path is None:
            return
        try:
            change = HostsFile(path).update(ask, lambda change: not self.holds_back(_op(path, change)), likely=likely)
            if change is not None:
                self.report.did(_op(path, change))
        except HostsFileUnwritable as error:
            self.report.warn(error.message + (f" ({error.hint})" if error.hint else ""))

    def clear(self) -> None:
        """Take names away, and what answers."""
        self._keep(dict)
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


def _op(path: Path, change: Change) -> WriteNames:
    return WriteNames(str(path), tuple((name or "", address) for address, name in change.items()))
