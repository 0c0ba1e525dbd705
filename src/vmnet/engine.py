"""The one loop behind every command: record the wish, observe, plan, apply, and observe again.

The record comes first on the way in and goes last on the way out, so whatever a crash leaves, the next run can
finish. Commands differ in what they desire and in how far they walk: a dry run stops after the plan.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from itertools import count
from typing import NamedTuple, NoReturn

from vmnet import absence
from vmnet.guests import Guests, apply_all, chunks
from vmnet.hostpart import HostPart
from vmnet.locks import Locks
from vmnet.model import (
    NAME_MAX,
    POOL_BLOCKS,
    Block,
    Conflict,
    KernelRefused,
    Lease,
    NameTaken,
    Netns,
    NetnsGone,
    NetnsId,
    NoSuchGuest,
    NoSuchRelay,
    NotPermitted,
    State,
    UsageError,
    VmnetError,
    check_name,
)
from vmnet.names import Names
from vmnet.ondisk import stamp
from vmnet.ops import ForgetFlows, Op
from vmnet.plan import GuestView, dotted, plan_bridge, plan_bridge_removal, shadow_of
from vmnet.platform import Platform, Report, Resolver
from vmnet.settings import Paths, Settings
from vmnet.specs import Asking, GuestSpec
from vmnet.store import DomainKey, DomainRecord, Limits, RecordsUnreadable, Relay, Store, need_own
from vmnet.uncarved import Uncarved

# Each time somebody else got further: this many in a row are no coincidence.
_RUNS = 64
_DAY = 86400  # seconds


class Seen(NamedTuple):
    """A guest as recorded, and how it is in the kernel; `loopback` is the device of aliases."""

    lease: Lease
    state: State
    loopback: str = "lo"
    relays: tuple[Relay, ...] = ()

    @property
    def device(self) -> str:
        """The device on the host on which its address is."""
        return self.loopback if self.lease.kind == "alias" else self.lease.device


class Stamp(NamedTuple):
    """What tells one state of the records, the settings, the hosts file, and what answers guests from another."""

    records: bytes
    settings: tuple[int, ...]
    hosts: tuple[int, ...]
    answers: tuple[int, ...]


class Applied(NamedTuple):
    """What came of a file of guests: those it names, the names of those deleted, and the ops of a dry run."""

    guests: list[Seen]
    deleted: list[str]
    ops: list[Op]


class _Overtaken(Exception):
    """Another process made one of the guests, or restored the host, before this one came to it."""


@dataclass
class Engine:
    """The loop. `caller` is the uid that owns new guests by default.

    `on_behalf` is the uid of a user without root, who gets at no guest of anybody else's and not at the host part: that
    raises NotPermitted.
    """

    platform: Platform
    settings: Settings
    paths: Paths
    report: Report
    caller: int = 0
    holds_back: Callable[[Op], bool] = lambda _: False
    on_behalf: int | None = None
    _here: NetnsId = field(init=False)
    _locks: Locks = field(init=False)
    _asking: Asking = field(init=False)
    _host: HostPart | Uncarved = field(init=False)
    _guests: Guests = field(init=False)
    _names: Names = field(init=False)

    def __post_init__(self) -> None:
        self._here = self.platform.here()
        self._locks = Locks(self.paths.run)
        self._asking = Asking(self.platform, self.settings, self._here, self.caller)
        self._host = (
            HostPart(self.platform, self.settings, self.paths, self.report, self._here, self._locks, self.holds_back)
            if self.platform.carves
            else Uncarved(self._here, self._locks)
        )
        self._guests = Guests(self.platform, self.settings, self.report, self.holds_back)
        self._names = Names(
            self.settings, self.paths, self.report, self._locks, self.holds_back, answering=self.platform.carves
        )

    # Looking

    def look(self, names: Sequence[str] | None = None) -> list[Seen]:
        """Return guests, all or those named, in the order asked for; raises NoSuchGuest."""
        with self._reading() as store:
            leases, relays = store.leases(names), store.relays()
            host_right = self._host.is_wished_up(store) and self._host.is_right(store)
        seen = []
        for chunk in chunks(leases):
            views = self.platform.observe_guests(chunk)
            for lease in chunk:
                state = self._state(lease, views[lease.name], host_right)
                seen.append(self._seen(lease, state, relays.get(lease.name, ())))
            self.platform.close_places()
        return seen

    def lease(self, name: str) -> Lease:
        """Return one record; raises NoSuchGuest."""
        with self._reading() as store:
            return store.leases([name])[0]

    def _state(self, lease: Lease, view: GuestView, host_right: bool) -> State:
        state = self._guests.state(lease, view)
        return "degraded" if state == "up" and not host_right else state

    # Guests

    def create(self, specs: Sequence[GuestSpec], *, dry_run: bool = False) -> tuple[list[Lease], list[Op]]:
        """Make guests, carving the host if need be; what is there already stays. All of them, or none.

        Returns their leases in the order asked for and, for a dry run, the ops. Raises Conflict where a guest is
        there with another value of an option that is given.
        """
        names = self._check(specs)
        with self._writing(dry_run) as store:
            if dry_run:
                return self._preview_create(store, specs, names)
            for _ in range(_RUNS):
                with suppress(_Overtaken, NameTaken, NoSuchGuest):
                    return self._create(store, specs, names), []
        raise Conflict(f"others make and delete {', '.join(names)} all the time", hint="try again")

    def _check(self, specs: Sequence[GuestSpec]) -> list[str]:
        """Return the names of guests that are asked for; raises what can be refused without the records."""
        for spec in specs:
            self._asking.refuse_what_is_lacking(spec)
        self.platform.need_rights()
        names = [check_name(spec.name) for spec in specs]
        for name, times in Counter(names).items():
            if times > 1:
                raise UsageError(f"{name} is named twice")
        return names

    def _preview_create(
        self, store: Store, specs: Sequence[GuestSpec], names: Sequence[str], surplus: Sequence[Lease] = ()
    ) -> tuple[list[Lease], list[Op]]:
        """Return the leases of these guests, and the ops that make them and then take those of `surplus` away."""
        new, _ = self._sort(store, specs, dry_run=True)
        requests = [self._asking.request(spec) for spec in new]
        preview = store.preview(requests, pool=self.settings.pool, created=_now(), limits=self._limits)
        old = [lease for lease in store.leases() if lease.name in set(names)]
        problems: dict[str, VmnetError] = {}
        wanted = [lease for lease in [*old, *preview] if lease.wish == "up"]
        ops = self._host.plan_up(store) + self._guests.plan_up(wanted, problems) if specs else []
        self._raise_first(problems)
        ops += self._guests.plan_down(surplus, keep_netns=False)
        gone = {lease.name for lease in surplus}
        rest = [lease for lease in store.leases() if lease.name not in gone]
        return [*old, *preview], ops + self._names.plan([*rest, *preview])

    def _create(self, store: Store, specs: Sequence[GuestSpec], names: Sequence[str]) -> list[Lease]:
        """Make guests; raises _Overtaken where it is to be begun anew.

        Then it also raises NameTaken for one that was made meanwhile, NoSuchGuest for one that was deleted.
        """
        new, rebound = self._sort(store, specs, dry_run=False)
        requests = [self._asking.request(spec) for spec in new]
        now = _now()

        def refuse_what_cannot_be() -> None:
            store.preview(requests, pool=self.settings.pool, created=now, limits=self._limits)

        carved = self._ensure_host(store, refuse_what_cannot_be)
        try:
            for name, netns in rebound.items():
                store.set_netns({name: netns}, owner=self.on_behalf)
            with self._locks.host(shared=True):
                if not self._host.is_wished_up(store):
                    raise _Overtaken
                made = store.allocate(requests, pool=self.settings.pool, created=now, limits=self._limits)
                blocks = {lease.block for lease in made}
                try:
                    recorded = store.leases(names)
                    blocks |= {lease.block for lease in recorded}
                    self._create_or_undo(store, recorded, new)
                finally:
                    self._names.write(store, blocks)  # those undone too: another process may have written them
        except (VmnetError, OSError):
            if carved:
                with self._locks.host(shared=False):
                    if not store.count():
                        self._host.undo(store)
            raise
        return store.leases(names)

    @property
    def _limits(self) -> Limits:
        """How many guests there may be: of aliases any number where the system has other kinds, too."""
        return Limits(
            aliases=None if self.platform.carves else self.settings.alias_budget,
            owned=None if self.on_behalf is None else self.settings.user_guests,
        )

    def _ensure_host(self, store: Store, first: Callable[[], None] = lambda: None) -> bool:
        """Make the host part, and say whether it was not there at all; for a user only where root wants it there.

        `first` is called where the host is to be carved, before it is.
        """
        if self.on_behalf is None:
            return self._host.ensure(store, first)
        if not self._host.is_wished_up(store):
            raise NotPermitted("the host is not carved, and only root may carve it", hint="sudo vmnet carve")
        if not self._host.is_right(store):
            self._host.ensure(store, first, if_wished=True)
        return False

    def create_and_look(self, specs: Sequence[GuestSpec]) -> list[Seen]:
        """Make guests as `create` does and say how they are: those to be up were seen to be, or it raises."""
        leases, _ = self.create(specs)
        return [self._look_at(lease) for lease in leases]

    def _look_at(self, lease: Lease) -> Seen:
        """Return how a guest is that `create` has returned."""
        if lease.wish == "up" and lease.maker == "vmnet":
            return self._seen(lease, "up")
        try:
            return self.look([lease.name])[0]
        except NoSuchGuest:  # deleted meanwhile
            return self._seen(lease, "down")

    def _seen(self, lease: Lease, state: State, relays: Collection[Relay] = ()) -> Seen:
        return Seen(lease, state, self.platform.loopback, tuple(relays))

    def _create_or_undo(self, store: Store, recorded: Sequence[Lease], specs: Sequence[GuestSpec]) -> None:
        new, names = [spec.name for spec in specs], [lease.name for lease in recorded]
        with ExitStack() as stack:
            try:
                stack.enter_context(self._locks.guests(lease.block.number for lease in recorded))
            except VmnetError:  # of a caller whose time was up while this waited
                made = [lease.name for lease in recorded if lease.name in new and store.lease(lease.name) == lease]
                store.set_wish(made, "deleting", gone_ok=True)
                raise
            problems: list[Exception] = []
            try:
                leases = [lease for lease in store.leases(names) if lease.wish == "up"]
                problems += self._guests.bring_up(store, leases).values()
            except (VmnetError, OSError) as error:
                problems.append(error)
            if not problems:
                return
            # Not one that somebody has deleted and made anew meanwhile.
            ours = {(lease.name, lease.block, lease.owner, lease.created) for lease in recorded}
            undone = [
                one
                for one in store.leases(new)
                if one.wish != "deleting" and (one.name, one.block, one.owner, one.created) in ours
            ]
            store.set_wish([lease.name for lease in undone], "deleting")
            self._guests.take_down(undone, keep_netns=False)
            store.release([lease.name for lease in undone], freed=time.time())
        if isinstance(problems[0], NetnsGone) and any(spec.netns is None for spec in specs):
            raise _Overtaken from problems[0]  # it was that of a guest of the same name, whom somebody was deleting
        raise problems[0]

    def _sort(
        self, store: Store, specs: Sequence[GuestSpec], *, dry_run: bool
    ) -> tuple[list[GuestSpec], dict[str, Netns]]:
        """Return the specs of guests that are new, and the namespaces that known guests move to."""
        new, rebound = [], {}
        for spec in specs:
            lease = store.lease(spec.name)
            if lease:
                need_own(lease, self.on_behalf)
            if lease and lease.wish == "deleting":
                if dry_run:
                    raise Conflict(f"the deletion of {lease.name} is not finished", hint="vmnet up finishes it")
                self._finish_deletion(store, [lease])
                lease = None
            if lease is None:
                new.append(spec)
                continue
            netns = self._asking.compare(spec, lease)
            if netns:
                rebound[lease.name] = netns
        return new, rebound

    def delete(
        self, names: Sequence[str] | None, *, if_exists: bool = False, dry_run: bool = False
    ) -> tuple[list[str], list[Op]]:
        """Take guests away, all or those named, records included; returns their names.

        Raises NoSuchGuest for a name that is not there, unless `if_exists`.
        """
        self.platform.need_rights()
        with self._writing(dry_run) as store:
            if names is not None and if_exists:
                names = [name for name in names if store.lease(name)]
            leases = self._own(store, list(dict.fromkeys(names)) if names is not None else None)
            if dry_run:
                gone = {lease.name for lease in leases}
                ops = self._guests.plan_down(leases, keep_netns=False)
                return sorted(gone), ops + self._names.plan([one for one in store.leases() if one.name not in gone])
            store.set_wish([lease.name for lease in leases], "deleting", gone_ok=True, owner=self.on_behalf)
            with self._locks.host(shared=True):
                self._finish_deletion(store, leases)
            return [lease.name for lease in leases], []

    def _own(self, store: Store, names: Sequence[str] | None) -> list[Lease]:
        """Return the leases of `names`, or all that the caller may touch; raises NotPermitted for one of others."""
        leases = store.leases(names)
        if names is None and self.on_behalf is not None:
            return [lease for lease in leases if lease.owner == self.on_behalf]
        for lease in leases:
            need_own(lease, self.on_behalf)
        return leases

    def _finish_deletion(self, store: Store, leases: Sequence[Lease]) -> None:
        blocks = {lease.block for lease in leases}
        with self._locks.guests(block.number for block in blocks):
            recorded = [store.lease(lease.name) for lease in leases]
            leases = [lease for lease in recorded if lease and lease.wish == "deleting"]
            # What is wished deleted has no name any more; it is taken away while the kernel takes away the devices.
            take_names_away = cache(partial(self._names.write, store, blocks))
            problems = self._guests.take_down(leases, keep_netns=False, meanwhile=take_names_away)
            take_names_away()
            store.release([lease.name for lease in leases if lease.name not in problems], freed=time.time())
        if problems:
            raise next(iter(problems.values()))

    def apply(self, specs: Sequence[GuestSpec], *, prune: bool, dry_run: bool = False) -> Applied:
        """Make guests as `create` does; then, if `prune`, delete those that an earlier call made and `specs` lacks.

        Nothing is deleted where one of those to be made cannot be. A guest that `create` made is not this one's.
        """
        names = self._check(specs)
        specs = [spec._replace(applied=True) for spec in specs]
        if dry_run:
            with self._writing(dry_run) as store:
                surplus = [one for one in store.leases() if one.applied and one.name not in names] if prune else []
                return Applied([], [], self._preview_create(store, specs, names, surplus)[1])
        guests = self.create_and_look(specs) if specs else []
        return Applied(guests, self._prune(names) if prune else [], [])

    def _prune(self, kept: Collection[str]) -> list[str]:
        with self._writing(dry_run=False) as store:
            surplus = store.prune(kept)
            if surplus:
                with self._locks.host(shared=True):
                    self._finish_deletion(store, surplus)
            return [lease.name for lease in surplus]

    def up(self, names: Sequence[str] | None = None, *, dry_run: bool = False) -> list[Op]:
        """Make the kernel match the records: the guests named, or all of vmnet. Returns the ops of a dry run."""
        self.platform.need_rights()
        with self._writing(dry_run) as store:
            leases = self._own(store, names)
            if dry_run:
                problems: dict[str, VmnetError] = {}
                wanted = [one._replace(wish="up") if one.wish == "down" else one for one in leases]
                ops = self._preview(store, wanted, problems, orphans=names is None)
                if not ops:
                    self._raise_first(problems)
                for name, problem in problems.items():
                    self.report.warn(f"{name}: {problem.message}")
                return ops
            down = [lease.name for lease in leases if lease.wish == "down"]
            store.set_wish(down, "up", gone_ok=True, owner=self.on_behalf)
            self._ensure_host(store)
            self.converge(store, names)
            return []

    def _preview(
        self, store: Store, leases: Sequence[Lease], problems: dict[str, VmnetError], *, orphans: bool
    ) -> list[Op]:
        """Return the ops that bring the host part, and guests, to what these leases wish, and with them names.

        What bears our marks without a record goes too if `orphans`; what is in the way of guests is in `problems`.
        """
        by = {wish: [one for one in leases if one.wish == wish] for wish in ("up", "down", "deleting")}
        ops = self._host.plan_up(store) + self._guests.plan_up(by["up"], problems)
        ops += self._guests.plan_down(by["down"], keep_netns=True)
        ops += self._guests.plan_down(by["deleting"], keep_netns=False)
        if orphans:
            ops += self.platform.orphans([one.name for one in leases])
        wished = {one.name: one for one in leases}
        return ops + self._names.plan([wished.get(one.name, one) for one in store.leases()])

    def keep(
        self, names: Collection[str] | None = None, *, host: bool = True, orphans: bool = True
    ) -> dict[str, VmnetError]:
        """Make the kernel match the records as they are: what is to be down stays so.

        All guests, or those of `names` that have a record; the host part if `host`, what bears our marks without a
        record if `orphans`; and names. Returns what stays wrong, by name of the guest, "" for all else.
        """
        self.platform.need_rights()
        with self._reading() as store:
            if not self._host.is_wished_up(store):
                return {}
            every = store.leases()
            wrong = host and not self._host.is_right(store)
            drifted = self._guests.drifted([one for one in every if names is None or one.name in names])
            strange = orphans and bool(self.platform.orphans([one.name for one in every]))
            if not (wrong or drifted or strange or self._names.plan(every)):
                return {}
        problems: dict[str, VmnetError] = {}
        with self._writing(dry_run=False) as store:
            try:
                if wrong:
                    self._host.ensure(store, if_wished=True)
                problems = self._converge(store, None if strange else drifted, every_name=True)
            except NoSuchGuest:
                pass  # deleted meanwhile, so others are at work: the next look sees what they leave
            except VmnetError as error:
                problems[""] = error
        return problems

    def drift(self) -> tuple[list[Op], dict[str, VmnetError]]:
        """Return the ops of `keep`, as far as the caller may see, and what is in the way of guests, by their names."""
        with self._reading() as store:
            if not self._host.is_wished_up(store):
                return [], {}
            problems: dict[str, VmnetError] = {}
            return self._preview(store, store.leases(), problems, orphans=True), problems

    def keep_or_raise(self) -> None:
        """Make the kernel match the records as they are; raises the first of what stays wrong."""
        self._raise_first(self.keep())

    def forget_flows(self, lost: Collection[str]) -> None:
        """Have the kernel forget guests' connections over addresses that the host had until now."""
        ours = ("127.", f"{self.settings.plane.shadow}.")
        others = sorted(address for address in lost if not address.startswith(ours))
        if others and self.recorded():
            apply_all(self.platform, self.report, [ForgetFlows(self.settings.plane.shadow, tuple(others))])

    def recorded(self) -> list[Lease] | None:
        """Return all leases, or None where nothing of vmnet is to be in the kernel."""
        with self._reading() as store:
            return store.leases() if self._host.is_wished_up(store) else None

    def stamp(self) -> Stamp:
        """Return what differs when the records, the settings, the hosts file or what answers guests do."""
        return Stamp(
            Store.stamp(self.paths.state),
            stamp(self.paths.config),
            stamp(self.paths.hosts),
            self._names.stamp(),
        )

    def answerer(self) -> int | None:
        """Return a pidfd of the process that has guests answered, for the caller to close; None without one."""
        return self._names.answerer()

    def converge(self, store: Store, names: Sequence[str] | None = None) -> None:
        """Bring guests to where the records want them, and with all of them what is ours without a record."""
        self._raise_first(self._converge(store, names))

    def _converge(
        self, store: Store, names: Sequence[str] | None, *, every_name: bool = False
    ) -> dict[str, VmnetError]:
        with self._locks.host(shared=True):
            blocks = None if names is None else {lease.block for lease in store.leases(names)}
            with self._locks.guests(None if blocks is None else [block.number for block in blocks]):
                leases = store.leases(names)
                if blocks is not None:
                    blocks |= {lease.block for lease in leases}  # of one deleted and made anew meanwhile it is another
                problems = self._guests.bring_up(store, [lease for lease in leases if lease.wish == "up"])
                problems |= self._guests.take_down([lease for lease in leases if lease.wish == "down"], keep_netns=True)
                deleting = [lease for lease in leases if lease.wish == "deleting"]
                problems |= self._guests.take_down(deleting, keep_netns=False)
                gone = [lease.name for lease in deleting if lease.name not in problems]
                store.release(gone, freed=time.time())
                if names is None:
                    apply_all(self.platform, self.report, self.platform.orphans([lease.name for lease in leases]))
            self._names.write(store, None if every_name else blocks)
        return problems

    def _raise_first(self, problems: Mapping[str, VmnetError]) -> None:
        """Raise the first problem; say the others."""
        for name, problem in list(problems.items())[1:]:
            self.report.warn(f"{name}: {problem.message}")
        for problem in problems.values():
            raise problem

    def down(self, names: Sequence[str] | None = None, *, dry_run: bool = False) -> list[Op]:
        """Take devices away and keep the records: of the guests named, or of all of vmnet with the host part."""
        if names is None:
            return self.restore(dry_run=dry_run)
        self.platform.need_rights()
        with self._writing(dry_run) as store:
            leases = self._own(store, names)
            if dry_run:
                rest = [lease._replace(wish="down") if lease in leases else lease for lease in store.leases()]
                return self._guests.plan_down(leases, keep_netns=True) + self._names.plan(rest)
            up = [lease.name for lease in leases if lease.wish == "up"]
            store.set_wish(up, "down", gone_ok=True, owner=self.on_behalf)
            self.converge(store, names)
            return []

    def execute(self, name: str, argv: Sequence[str]) -> NoReturn:
        """Become `argv` inside a guest's namespace; raises Conflict for a guest that has none or is down."""
        self.platform.need_rights()
        lease = self.lease(name)
        if lease.netns is None:
            raise Conflict(
                f"{name} is {'an' if lease.kind == 'alias' else 'a'} {lease.kind}: "
                "it is in no network namespace of this host",
                hint="exec is for veth guests; reach this one by its address",
            )
        if lease.netns.identity is None or self._asking.identify(lease.netns.path) != lease.netns.identity:
            raise Conflict(f"{name} is down", hint=f"vmnet up {name}")
        gateway = lease.block.first + 1
        address = shadow_of(gateway, self.settings.plane) if lease.mode == "mapped" else gateway
        resolver = Resolver(dotted(address), self.settings.domain, lease.mode)
        self.platform.execute(lease.netns.path, lease.netns.identity, argv, resolver)

    # Ports of aliases

    def relays(self) -> list[tuple[str, Relay]]:
        """Return what is to be relayed: an address of the host, and which of its ports leads where."""
        with self._reading() as store:
            if not self._host.is_wished_up(store):
                return []
            relays = store.relays()
            up = [one for one in store.leases(list(relays)) if one.kind == "alias" and one.wish == "up"]
            return [(dotted(lease.block.first + 2), one) for lease in up for one in relays[lease.name]]

    def change_relays(
        self, name: str, add: Collection[Relay] = (), drop: Collection[tuple[int, str]] = (), *, dry_run: bool = False
    ) -> tuple[list[Relay], list[Relay]]:
        """Have ports of an alias lead elsewhere, and others, by port and protocol, no more; return who is new and gone.

        Raises Conflict for a guest of another kind, and for a port that leads elsewhere already.
        """
        self.platform.need_rights()
        with self._writing(dry_run) as store:
            lease = store.leases([name])[0]
            if lease.kind != "alias":
                raise Conflict(
                    f"{name} is a {lease.kind}: it has ports of its own", hint="relays are for guests of kind alias"
                )
            there = store.relays().get(name, [])
            held = {(one.port, one.protocol): one for one in there}
            for one in add:
                other = held.get((one.port, one.protocol))
                if other and other != one:
                    raise Conflict(
                        f"port {one.port}/{one.protocol} of {name} leads to {other.target}:{other.target_port} already",
                        hint=f"vmnet unrelay {name} {one.port}/{one.protocol} first",
                    )
            for port, protocol in drop:
                if (port, protocol) not in held:
                    raise NoSuchRelay(f"port {port}/{protocol} of {name} leads nowhere", hint=f"vmnet show {name}")
            new = [one for one in dict.fromkeys(add) if one not in there]
            gone = [held[one] for one in dict.fromkeys(drop)]
            if not dry_run and (new or gone):
                store.set_relays(name, sorted([one for one in there if one not in gone] + new))
            return new, gone

    def rehearse(self, *, will_fork: bool) -> bool:
        """Go the ways that making and deleting a guest go, for one that there is not, and change nothing.

        A process that has done so has all that these need in memory, and keeps more unless it `will_fork`: the records
        open, and what `Platform.keep` does.
        Returns whether there may be guests.
        """
        name = "rehearsal"
        lease = Lease(name, Block(POOL_BLOCKS - 1), "veth", "native", "02:00:00:00:00:01", 1500, 0, 1, None, "up", "")
        with self._reading() as store:
            if not self._host.is_wished_up(store):
                return False
        with self._writing(dry_run=False) as store:
            self._sort(store, [GuestSpec(name)], dry_run=True)
            self._host.is_right(store)
            problems: dict[str, VmnetError] = {}
            self._guests.plan_up([lease], problems)
            self._guests.plan_down([lease], keep_netns=False)
            self._names.rehearse(store, [lease.block])
            if not will_fork:
                store.keep()
                self.platform.keep()
        request = self._asking.request(GuestSpec(name, kind="veth"))
        with Store.open(self.paths.state / name, write=False) as nothing:  # there are none: all is in memory
            nothing.preview([request], pool=self.settings.pool, created=_now(), limits=self._limits)
        return True

    # Guests of libvirt's domains

    def guest_of(self, uuid: str, mac: str) -> Lease | None:
        """Return the guest that is an interface of a domain, None without one."""
        with self._reading() as store:
            name = store.guest_of(uuid, mac)
            return store.lease(name) if name else None

    def guest_on(self, device: str) -> str | None:
        """Return the name of the guest whose device is called so, None without one."""
        with self._reading() as store:
            return store.guest_on(device)

    def guest_for(self, key: DomainKey, name: str, macs: Collection[str] | None) -> str:
        """Return which guest a domain's interface is to be: the one it was, else the first of NAME, NAME-2, ... it can.

        It cannot be one of another domain, unless that had this one's name, nor one of another interface of its own,
        unless it has none of that MAC any more; `macs` are those it has, None where they are not known.
        """
        with self._reading() as store:
            known = store.guest_of(key.uuid, key.mac)
            if known:
                return known
            for number in count(1):
                tail = f"-{number}" if number > 1 else ""
                candidate = name[: NAME_MAX - len(tail)].rstrip("-") + tail
                holder = store.domain(candidate)
                if holder is None:
                    return candidate
                if holder.uuid != key.uuid:
                    if holder.domain == key.domain:
                        return candidate
                elif macs is not None and holder.mac not in macs:
                    return candidate
        raise AssertionError("count() has no end")

    def claim(self, spec: GuestSpec, key: DomainKey, *, made: bool = True) -> Lease:
        """Record whose a domain's interface is, and have its tap there, made now or before, where vmnet makes it.

        A guest that is new goes with its domain if it is `made` for it, else it is the user's. Returns its lease.
        Raises Conflict where it, or for a tap that libvirt makes its MAC, is in use by others.
        """
        with self._reading() as store:
            lease, holder = store.lease(spec.name), store.domain(spec.name)
            others = store.domains() if spec.maker == "libvirt" else {}
            twins = store.leases([name for name, one in others.items() if one.mac == key.mac])
        for one in twins:
            if one.name != spec.name and self.platform.is_open(one.device):
                raise Conflict(
                    f"{one.name}, which runs, has the MAC {key.mac}, too", hint="give each domain a MAC of its own"
                )
        if lease and self.platform.is_open(lease.device):
            user = "a program outside libvirt"
            if holder and holder.uuid != key.uuid:
                user = f"another domain, of UUID {holder.uuid}"
            raise Conflict(
                f"{lease.device} is in use by {user}",
                hint="give this one a guest of its own: another NAME in <target dev='vmn-NAME' managed='no'/>",
            )
        if lease:
            with self._writing(dry_run=False) as store:
                store.set_domain(spec.name, key, spec.maker)
        [found] = self.create([spec])[0]
        if found.wish != "up":
            self.up([found.name])
        with self._writing(dry_run=False) as store:
            whose = key._replace(mac=key.mac or found.mac or "")
            store.set_domain(spec.name, whose, spec.maker, made=made and (not lease or lease.wish == "deleting"))
            if spec.maker == "libvirt":
                self._host.ensure(store)  # its bridge is part of it from now on
        return found

    def assign(self, name: str, key: DomainKey | None) -> None:
        """Record that a guest, whose tap vmnet makes, belongs to a domain of libvirt's, or to none."""
        with self._writing(dry_run=False) as store:
            store.set_domain(name, key, "vmnet")

    def keep_bridge(self, *, wanted: bool) -> None:
        """Have the bridge of libvirt's network there, or no more where no guest's tap comes from it."""
        with self._reading() as store:
            wanted = wanted or store.has_libvirts()
        link = self.platform.observe_host().libvirt
        apply_all(self.platform, self.report, plan_bridge(link, wanted=True) if wanted else plan_bridge_removal(link))

    def unclaim(self, name: str, uuid: str) -> None:
        """Take the device of a guest away whose domain has ended, unless others use it, and keep the record."""
        with self._reading() as store:
            lease, holder = store.lease(name), store.domain(name)
        # A domain that could not start because its device is in use is released, too.
        if lease and holder and holder.uuid == uuid and not self.platform.is_open(lease.device):
            self.down([name])

    def domains(self) -> dict[str, DomainRecord]:
        """Return which guests belong to domains of libvirt's, by the guests' names."""
        with self._reading() as store:
            return store.domains()

    def heed_domains(self, there: Collection[str], now: float, *, free: bool) -> list[str]:
        """Take note of the domains that libvirt has at the time `now`, by UUID; return the guests that were freed.

        These are, if `free`, those that were made for a domain which has been seen gone before, for longer than the
        grace time. `there` must be all that libvirt has: a libvirt that did not answer tells nothing.
        """
        self.platform.need_rights()
        due = now - self.settings.libvirt_grace * _DAY
        with self._reading() as store:
            known = store.domains().values()
            devices = {one.name: one.device for one in store.leases()}
        times = absence.notes(known, there, now)
        overdue = [
            name
            for name in (absence.overdue(known, there, due) if free else [])
            if name in devices and not self.platform.is_open(devices[name])
        ]
        if not times and not overdue:
            return []
        with self._writing(dry_run=False) as store:
            if times:
                store.set_gone(times)
            freed = store.give_up(overdue, before=due) if overdue else []
            if freed:
                with self._locks.host(shared=True):
                    self._finish_deletion(store, store.leases(freed))
            return freed

    def finish_removals(self) -> None:
        """Take away what is to be gone and is not, because somebody was cut off; what cannot be is left again."""
        with self._reading() as store:
            left = self._guests.drifted([lease for lease in store.leases() if lease.wish != "up"])
        if left:
            with self._writing(dry_run=False) as store, suppress(NoSuchGuest):
                self._converge(store, left)

    # The host part

    def carve(self, *, dry_run: bool = False) -> list[Op]:
        """Carve and fence the host, where there is anything to carve; returns the ops of a dry run."""
        self.platform.need_rights()
        if not self.platform.carves:
            return []
        with self._writing(dry_run) as store:
            if dry_run:
                return self._host.plan_up(store)
            self._host.ensure(store)
            with self._locks.host(shared=True):
                self._names.write(store)
            return []

    def restore(self, *, purge: bool = False, dry_run: bool = False) -> list[Op]:
        """Take all guests down and put the host back as it was found; needs no records that can be read or written.

        Raises what kept the records from being written only where they were to be purged.
        """
        self.platform.need_rights()
        with ExitStack() as stack:
            store, leases, unwritten = self._open_for_restore(stack, dry_run)
            known = not isinstance(unwritten, RecordsUnreadable)
            if dry_run:
                ops = self._guests.plan_down(leases, keep_netns=False) + self._left(leases, known=known)
                return ops + self._names.plan_clear() + self._host.plan_down()
            with self._locks.host(shared=False), self._locks.guests(None):
                if store:
                    try:
                        store.set_wish([one.name for one in leases if one.wish == "up"], "down", gone_ok=True)
                        store.set_host(self._host.record("down"))
                    except KernelRefused as error:
                        store, unwritten = None, self._go_on_without(error)
                problems = self._guests.take_down(leases, keep_netns=False)
                apply_all(self.platform, self.report, self._left(leases, known=known))
                self._names.clear()
                self._host.remove()
                if store:
                    gone = [lease.name for lease in leases if lease.wish == "deleting" and lease.name not in problems]
                    store.release(gone, freed=time.time())
                    if purge:
                        store.purge()
                        self._names.forget()
            self._raise_first(problems)
            if purge and unwritten:
                raise unwritten
            return []

    def _left(self, leases: Sequence[Lease], *, known: bool) -> list[Op]:
        """Return the ops that take away what is ours beside these; where no guest is `known`, what looks like one."""
        ops = self.platform.orphans([lease.name for lease in leases])
        return ops if known else ops + self.platform.lookalikes()

    def _open_for_restore(self, stack: ExitStack, dry_run: bool) -> tuple[Store | None, list[Lease], VmnetError | None]:
        """Return the records if they can be written, the leases as far as they can be read, and what went wrong."""
        try:
            store = stack.enter_context(self._writing(dry_run))
            return store, store.leases(), None
        except (RecordsUnreadable, KernelRefused) as error:
            unreadable = error
        if isinstance(unreadable, KernelRefused):
            with suppress(RecordsUnreadable, KernelRefused), self._reading() as store:
                return None, store.leases(), self._go_on_without(unreadable)
        self.report.warn(f"{unreadable.message}; all that bears the marks of vmnet is taken away")
        return None, [], unreadable

    def _go_on_without(self, error: VmnetError) -> VmnetError:
        self.report.warn(f"{error.message}; the host is put back, and the records stay as they are")
        return error

    # Records

    def _reading(self) -> Store:
        return self._checked(Store.open(self.paths.state, write=False))

    def _writing(self, dry_run: bool) -> Store:
        return self._checked(Store.open(self.paths.state, write=not dry_run))

    def _checked(self, store: Store) -> Store:
        """Raise Conflict where the records belong to another network namespace of this boot."""
        record = store.host()
        if record and record.boot_id == self._here.boot_id:
            theirs = (record.netns_device, record.netns_inode)
            if theirs != (self._here.device, self._here.inode):
                store.close()
                raise Conflict(
                    f"the records in {self.paths.state} belong to another network namespace",
                    hint="run vmnet there, or set VMNET_STATE_DIR and VMNET_RUN_DIR to folders for this one",
                )
        return store


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
