"""The host part of a system that is not carved: nothing but the wish, in the records."""

from collections.abc import Callable
from dataclasses import dataclass

from vmnet.locks import Locks
from vmnet.model import NetnsId, Wish
from vmnet.ops import Op
from vmnet.store import HostRecord, Store


@dataclass(frozen=True, slots=True)
class Uncarved:
    """What `vmnet.hostpart.HostPart` is, where guests are addresses of the host and no more."""

    here: NetnsId
    locks: Locks

    def is_right(self, store: Store) -> bool:
        """Say that there is nothing to be wrong."""
        del store
        return True

    def is_wished_up(self, store: Store) -> bool:
        """Say whether the records want guests to be there at all."""
        record = store.host()
        return record is not None and record.wish == "up"

    def record(self, wish: Wish) -> HostRecord:
        """Return the record of that wish."""
        return HostRecord(wish, self.here.boot_id, self.here.device, self.here.inode)

    def ensure(self, store: Store, first: Callable[[], None] = lambda: None, *, if_wished: bool = False) -> bool:
        """Record the wish; say whether it was another one. Nothing needs to be done `first`."""
        del first
        if if_wished or store.host() == self.record("up"):
            return False
        with self.locks.host(shared=False):
            store.set_host(self.record("up"))
        return True

    def undo(self, store: Store) -> None:
        """Take the wish back."""
        store.set_host(self.record("down"))

    def remove(self) -> None:
        """Put nothing back."""

    def plan_up(self, store: Store) -> list[Op]:
        """Return that there is nothing to do."""
        del store
        return []

    def plan_down(self) -> list[Op]:
        """Return that there is nothing to do."""
        return []
