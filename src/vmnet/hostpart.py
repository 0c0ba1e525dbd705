"""The host part: what the carve takes, keeps and fences, and how the host was before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from netaddr import IPAddress, IPNetwork

from vmnet import rules
from vmnet.found import forget_found, load_found, save_found
from vmnet.guests import ATTEMPTS, apply_all
from vmnet.ipam import Pool, blocks_touching, holds
from vmnet.locks import Locks
from vmnet.model import LOOPBACK, POOL_SPAN, Conflict, HostLacks, KernelRefused, NetnsId, VmnetError, Wish
from vmnet.ops import Op
from vmnet.plan import Found, HostWish, guess_found, kept_local, plan_host, plan_host_removal, without
from vmnet.platform import Platform, Report
from vmnet.settings import Paths, Settings
from vmnet.store import HostRecord, Reservation, Store

_SHOWN = 20  # lines of a list that a person is to read


@dataclass
class HostPart:
    """The loop for the host part of the namespace `here`."""

    platform: Platform
    settings: Settings
    paths: Paths
    report: Report
    here: NetnsId
    locks: Locks
    holds_back: Callable[[Op], bool]
    _listings: dict[str, str | None] = field(init=False, default_factory=dict)

    def is_right(self, store: Store) -> bool:
        """Say whether the host part is as it is to be, as far as the caller may see."""
        try:
            return not self._plan(self._wish(store, store.reservations(), None))
        except (HostLacks, KernelRefused) as error:
            self.report.warn(f"{error.message}: the host part cannot be seen whole")
            return False

    def is_wished_up(self, store: Store) -> bool:
        """Say whether the records want the host part."""
        record = store.host()
        return record is not None and record.wish == "up"

    def record(self, wish: Wish) -> HostRecord:
        """Return the record that this host is to be so."""
        return HostRecord(wish, self.here.boot_id, self.here.device, self.here.inode)

    def undo(self, store: Store, before: HostRecord | None = None) -> None:
        """Undo a first carve, which came to nothing; the caller holds the host part, and raises the cause."""
        try:
            self.remove()
            store.set_host(before or self.record("down"))
        except VmnetError as error:
            self.report.warn(error.message)

    def remove(self) -> None:
        """Put the host back as it was found; the caller holds it."""
        found, noted = self._find_found()
        if found and not noted:
            self._say_guessed(found)
            save_found(self.paths.run, self.here, found)
        apply_all(self.platform, self.report, self.plan_down())
        left = self.plan_down()
        if left:
            raise KernelRefused(f"this stays of the host part: {'; '.join(map(str, left))}")
        view = self.platform.observe_host()
        if found and not found.ip_forward and view.ip_forward:
            self.report.warn(
                "net.ipv4.ip_forward stays 1, though it was 0 before: somebody else's rules translate addresses. "
                "Unless rules keep them out, neighbours on the LAN can use this host as a router"
            )
        forget_found(self.paths.run)

    def plan_down(self) -> list[Op]:
        """Return the ops that put the host back."""
        found, _ = self._find_found()
        view = self.platform.observe_host()
        asks = bool(found and not found.ip_forward)
        return plan_host_removal(
            view,
            found,
            others_forward=asks and bool(view.ip_forward) and self.platform.forwards_for_others(),
            now=self.platform.look_around() if asks else None,
        )

    def _find_found(self) -> tuple[Found | None, bool]:
        """Return how the host was at the first carve, guessed where the note of it is lost, and whether it is noted."""
        found = load_found(self.paths.run, self.here)
        if found:
            return found, True
        view = self.platform.observe_host()
        return guess_found(view, guarded=bool(view.listing and rules.GUARDED in view.listing)), False

    def _say_guessed(self, found: Found) -> None:
        forwarding = "goes back to 0" if not found.ip_forward else "stays as it is"
        self.report.warn(
            f"the note of how the host was at the first carve is lost: with restore lo has 127.0.0.1/8 again, "
            f"net.ipv4.ip_forward {forwarding}, and the order of lo's addresses and other sysctls may differ"
        )

    def _plan(self, wish: HostWish) -> list[Op]:
        return [op for op in plan_host(wish, self.platform.observe_host()) if not self.holds_back(op)]

    def ensure(self, store: Store, first: Callable[[], None] = lambda: None, *, if_wished: bool = False) -> bool:
        """Make the host part as it is to be; say whether it was not there at all. Others wait meanwhile.

        `if_wished`: it was seen not to be so; but only where the records still want it when others are done.
        `first` is called where nothing was found yet: what it raises leaves the host uncarved.
        """
        if not if_wished and self._is_made(store):
            return False
        if load_found(self.paths.run, self.here) is None:
            first()
        with self.locks.host(shared=False):
            if if_wished and not self.is_wished_up(store):
                return False
            found = load_found(self.paths.run, self.here)
            fresh = found is None
            before, reservations = store.host(), store.reservations()
            if found is None:
                found, reservations = self._look_around(store)
            wish = self._wish(store, reservations, found)
            bare = fresh and not self.platform.observe_host().routes
            if fresh:
                store.replace_reservations(reservations)
                save_found(self.paths.run, self.here, found)
            if before != self.record("up"):
                store.set_host(self.record("up"))
            try:
                self._make(wish)
            except (VmnetError, OSError):
                if bare:
                    self.undo(store, before)
                raise
            return fresh

    def _is_made(self, store: Store) -> bool:
        """Say whether there is nothing to do; others that rely on the host part need not wait for that."""
        with self.locks.host(shared=True):
            found = load_found(self.paths.run, self.here)
            return bool(
                found and self.is_wished_up(store) and not self._plan(self._wish(store, store.reservations(), found))
            )

    def _make(self, wish: HostWish) -> None:
        for _ in range(ATTEMPTS):
            ops = self._plan(wish)
            if not ops:
                return
            apply_all(self.platform, self.report, ops)
        left = self._plan(wish)
        if left:
            raise KernelRefused(f"the host part does not stay as it is set: {'; '.join(map(str, left))}")

    def plan_up(self, store: Store) -> list[Op]:
        """Return the ops that carve and fence the host."""
        found = load_found(self.paths.run, self.here)
        reservations = store.reservations()
        if found is None:
            found, reservations = self._look_around(store)
        return plan_host(self._wish(store, reservations, found), self.platform.observe_host())

    def _look_around(self, store: Store) -> tuple[Found, list[Reservation]]:
        """Return how the host was found, and what of the pool others use; raises Conflict where that cannot be."""
        shadow = IPNetwork(f"{self.settings.plane.shadow}.0.0.0/8")
        uses = self.platform.find_uses(shadow, self.paths.hosts)
        leases = store.leases() if uses else []
        aliases = {IPNetwork(lease.block.address) for lease in leases if lease.kind == "alias"}
        uses = [use for use in uses if use.kind != "local" or use.network not in aliases]
        clashes = [str(use) for use in uses if use.network not in LOOPBACK or POOL_SPAN in use.network]
        holders = {lease.block.number: lease.name for lease in leases}
        for use in uses:
            lo, hi = blocks_touching(use.network.first, use.network.last)
            clashes += [f"{use} (it belongs to {name})" for block, name in holders.items() if lo <= block < hi]
        if clashes:
            raise Conflict(
                f"addresses that vmnet needs are in use: {'; '.join(_shortened(clashes))}",
                hint="end that use, delete the guest, or set another `shadow` in the settings",
            )
        reservations = [
            Reservation(IPAddress(use.network.first), IPAddress(use.network.last), f"{use.kind}: {use.what}")
            for use in uses
        ]
        for line in _shortened([f"{use}; it stays so, and out of the pool" for use in uses]):
            self.report.warn(line)
        reservations += self._still_to_come(store, reservations)
        guessed, _ = self._find_found()
        if guessed:
            self._say_guessed(guessed)
        return guessed or self.platform.look_around(), reservations

    def _still_to_come(self, store: Store, now: Sequence[Reservation]) -> list[Reservation]:
        """Return what was in use before this boot: whose program it is may start only after this carve."""
        before = store.host()
        if before is None or before.boot_id == self.here.boot_id:
            return []
        spans = {(one.first, one.last) for one in now}
        earlier = [one for one in store.reservations() if one.reason.startswith("local:")]
        return [one for one in earlier if (one.first, one.last) not in spans]

    def _wish(self, store: Store, reservations: Sequence[Reservation], found: Found | None) -> HostWish:
        found = found or load_found(self.paths.run, self.here)
        guard = bool(self.settings.guard_forwarding and found and not found.ip_forward)
        text = rules.render(self.settings.plane, guard=guard)
        if self._listings.get(text) is None:
            # Of the last ruleset only: a watcher would keep one for each setting that it has ever seen.
            self._listings = {text: self.platform.expected_listing(text, self.paths.run)}
        spans = {"local": [], "foreign": []}  # type: dict[str, list[IPNetwork]]
        for one in reservations:
            kind = one.reason.partition(":")[0]
            spans[kind if kind in spans else "local"] += _cidrs(one.first, one.last)
        pool = self.settings.pool
        kept = kept_local(pool.networks, pool.reserved, tuple(spans["local"]))
        # A guest keeps its address, also where the settings have taken it out of the pool since.
        guests = store.wished_up() if pool != Pool() else []
        displaced = [block.network for _, block in guests if not holds(pool.extents, block.number)]
        return HostWish(
            plane=self.settings.plane,
            kept=tuple(without(kept, [*spans["foreign"], *displaced])),
            holes=tuple(spans["foreign"]),
            text=text,
            listing=self._listings[text],
            libvirt=store.has_libvirts(),
        )


def _shortened(lines: Sequence[str]) -> list[str]:
    """Return the lines that a person can still read, and how many more there are."""
    return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else list(lines)


def _cidrs(first: IPAddress, last: IPAddress) -> list[Any]:
    from netaddr import iprange_to_cidrs

    return list(iprange_to_cidrs(first, last))
