"""Reconcile guests: observe, plan, apply, and observe again until the plan is empty, or say what stays."""

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vmnet.aliases import plan_alias, plan_alias_removal
from vmnet.model import Conflict, KernelRefused, Lease, State, VmnetError
from vmnet.ops import AddTun, AddVeth, Op
from vmnet.plan import Guest, GuestView, desire, plan_guest, plan_removal
from vmnet.platform import Platform, Refusal, Report
from vmnet.settings import Settings
from vmnet.store import Store

CHUNK = 100
ATTEMPTS = 4
# A guest takes two descriptors, of which a process may have 1024 without asking; a deletion by group takes 20 ms.
_REMOVAL_CHUNK = 400
_INDEX_STEP = 3_000_017


@dataclass(frozen=True, slots=True)
class Guests:
    """The loop for guests; the caller holds their locks."""

    platform: Platform
    settings: Settings
    report: Report
    holds_back: Callable[[Op], bool]

    def desire(self, lease: Lease, shift: int = 0) -> Guest:
        """Return what the kernel must show; `shift` moves the indexes of new devices."""
        return desire(lease, self.settings.plane, index_shift=shift)

    def plan_up(self, leases: Sequence[Lease], problems: dict[str, VmnetError]) -> list[Op]:
        """Return the ops for guests that are to be up; put into `problems`, by name, what is in the way of others."""
        ops: list[Op] = []
        for chunk in chunks(leases):
            views = self.platform.observe_guests(chunk)
            for lease in chunk:
                try:
                    ops += self._plan(lease, views[lease.name])
                except Conflict as error:
                    problems[lease.name] = error
            self.platform.close_places()
        return ops

    def plan_down(self, leases: Sequence[Lease], *, keep_netns: bool) -> list[Op]:
        """Return the ops for guests that are to be gone from the kernel."""
        ops: list[Op] = []
        for chunk in chunks(leases):
            views = self.platform.observe_guests(chunk, for_removal=True)
            for lease in chunk:
                ops += self._plan_removal(lease, views[lease.name], keep_netns=keep_netns)
            self.platform.close_places()
        return ops

    def _plan(self, lease: Lease, view: GuestView, shift: int = 0) -> list[Op]:
        return [op for op in self._plan_all(lease, view, shift) if not self.holds_back(op)]

    def _plan_all(self, lease: Lease, view: GuestView, shift: int = 0) -> list[Op]:
        if lease.kind == "alias":
            return plan_alias(lease, self.platform.loopback, view.alias)
        return plan_guest(self.desire(lease, shift), view)

    def _plan_removal(self, lease: Lease, view: GuestView, *, keep_netns: bool) -> list[Op]:
        if lease.kind == "alias":
            return plan_alias_removal(self.platform.loopback, view.alias)
        return plan_removal(self.desire(lease), view, keep_netns=keep_netns)

    def state(self, lease: Lease, view: GuestView) -> State:
        """Return how a guest is, going by its record alone."""
        if not (view.alias if lease.kind == "alias" else view.host.link):
            return "down"
        try:
            return "degraded" if lease.wish != "up" or self._plan_all(lease, view) else "up"
        except Conflict:
            return "degraded"

    def drifted(self, leases: Sequence[Lease]) -> list[str]:
        """Return the names of guests that are not as recorded; it takes no locks, so some may be in the making."""
        found = []
        for chunk in chunks(leases):
            views = self.platform.observe_guests(chunk)
            found += [lease.name for lease in chunk if self._is_drifted(lease, views[lease.name])]
            self.platform.close_places()
        return found

    def _is_drifted(self, lease: Lease, view: GuestView) -> bool:
        if lease.wish != "up":
            return lease.wish == "deleting" or bool(self._plan_removal(lease, view, keep_netns=True))
        try:
            return bool(self._plan(lease, view))
        except Conflict:
            return True

    def bring_up(self, store: Store, leases: Sequence[Lease]) -> dict[str, VmnetError]:
        """Reconcile guests that are to be up; return what went wrong, by name."""
        problems: dict[str, VmnetError] = {}
        for chunk in chunks(leases):
            problems |= self._bring_up_chunk(store, chunk)
            self.platform.close_places()
        return problems

    def _bring_up_chunk(self, store: Store, leases: Sequence[Lease]) -> dict[str, VmnetError]:
        problems: dict[str, VmnetError] = {}
        shift = 0
        left: list[Lease] = list(leases)
        made: list[str] = []
        for attempt in range(ATTEMPTS):
            views = self.platform.observe_guests(left, made=made)
            plans: list[tuple[Lease, list[Op]]] = []
            for lease in left:
                try:
                    ops = self._plan(lease, views[lease.name], shift)
                except Conflict as error:
                    problems[lease.name] = error
                    continue
                if ops:
                    plans.append((lease, ops))
            self._learn_netns(store, [lease for lease in left if lease.name not in problems], views)
            if not plans:
                return problems
            if attempt == ATTEMPTS - 1:
                for lease, ops in plans:
                    problems[lease.name] = KernelRefused(
                        f"{lease.name} does not stay as it is set: {'; '.join(map(str, ops))}"
                    )
                return problems
            made = [lease.name for lease, ops in plans if any(isinstance(op, AddVeth | AddTun) for op in ops)]
            refusals = apply(self.platform, self.report, [ops for _, ops in plans])
            for refusal in refusals:
                if isinstance(refusal.op, AddVeth | AddTun) and refusal.errno in (errno.EEXIST, errno.EBUSY):
                    shift += _INDEX_STEP  # somebody has a device of that index
                    continue
                problems[plans[refusal.number][0].name] = refusal.error
            left = [lease for lease, _ in plans if lease.name not in problems]
        return problems

    def _learn_netns(self, store: Store, leases: Sequence[Lease], views: Mapping[str, GuestView]) -> None:
        """Record which namespaces the owned ones are, now that they were seen to be the guests'."""
        learnt = {}
        for lease in leases:
            found = views[lease.name].netns_id
            if found and lease.netns and lease.netns.owned and found != lease.netns.identity:
                learnt[lease.name] = lease.netns._replace(identity=found)
        if learnt:
            store.set_netns(learnt)

    def take_down(
        self, leases: Sequence[Lease], *, keep_netns: bool, meanwhile: Callable[[], None] = lambda: None
    ) -> dict[str, VmnetError]:
        """Take guests out of the kernel; return what went wrong, by name.

        `meanwhile` is called where the kernel is waited for, if it is, as often as that is so.
        """
        problems: dict[str, VmnetError] = {}
        for chunk in chunks(leases, size=_REMOVAL_CHUNK):
            left = list(chunk)
            for _ in range(ATTEMPTS):
                views = self.platform.observe_guests(left, for_removal=True)
                plans = [
                    (lease, ops)
                    for lease in left
                    if (ops := self._plan_removal(lease, views[lease.name], keep_netns=keep_netns))
                ]
                if not plans:
                    break
                for refusal in apply(self.platform, self.report, [ops for _, ops in plans], meanwhile):
                    problems[plans[refusal.number][0].name] = refusal.error
                left = [lease for lease, _ in plans if lease.name not in problems]
            else:
                for lease in left:
                    problems[lease.name] = KernelRefused(f"{lease.name} does not go away")
            self.platform.close_places()
        return problems


def apply(
    platform: Platform,
    report: Report,
    lists: Sequence[Sequence[Op]],
    meanwhile: Callable[[], None] = lambda: None,
) -> Sequence[Refusal]:
    """Carry out lists of ops that do not depend on each other, and tell of it; return what was refused."""
    report.begin(sum(len(ops) for ops in lists))
    return platform.apply(lists, report.did, meanwhile)


def apply_all(platform: Platform, report: Report, ops: Sequence[Op]) -> None:
    """Carry out ops in their order; raises what the first refusal says."""
    for refusal in apply(platform, report, [ops] if ops else []):
        raise refusal.error


def chunks(leases: Sequence[Lease], size: int = CHUNK) -> Iterable[Sequence[Lease]]:
    """Return leases in pieces that are worked on at once."""
    return (leases[start : start + size] for start in range(0, len(leases), size))
