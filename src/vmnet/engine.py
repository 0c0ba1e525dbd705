"""The one loop behind every command: record the wish, observe, plan, apply, and observe again.

The record comes first on the way in and goes last on the way out, so whatever a crash leaves, the next run can
finish. Commands differ in what they desire and in how far they walk: a dry run stops after the plan.
"""

import errno
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any, NoReturn, Protocol

from netaddr import IPAddress, IPNetwork

from vmnet import rules
from vmnet.found import forget_found, load_found, save_found
from vmnet.hostsfile import HostsFile, HostsFileUnwritable
from vmnet.ipam import Pool, blocks_touching, holds
from vmnet.locks import Locks
from vmnet.model import (
    LOOPBACK,
    POOL_SPAN,
    Block,
    Conflict,
    HostLacks,
    KernelRefused,
    Kind,
    Lease,
    Mode,
    Netns,
    NetnsId,
    NoSuchGuest,
    PoolExhausted,
    State,
    UsageError,
    VmnetError,
    check_name,
)
from vmnet.ops import AddTun, AddVeth, Op, WriteNames
from vmnet.plan import (
    Found,
    Guest,
    GuestView,
    HostView,
    HostWish,
    Use,
    desire,
    dotted,
    guess_found,
    kept_local,
    plan_guest,
    plan_host,
    plan_host_removal,
    plan_removal,
    without,
)
from vmnet.settings import Paths, Settings
from vmnet.store import HostRecord, LeaseRequest, RecordsUnreadable, Reservation, Store

_CHUNK = 100
# A guest takes two descriptors, of which a process may have 1024 without asking; a deletion by group takes 20 ms.
_REMOVAL_CHUNK = 400
_NAME_MAX, _PATH_MAX = 255, 4095  # bytes (linux/limits.h)
_ATTEMPTS = 4
# Each time somebody else got further: this many in a row are no coincidence.
_RUNS = 64
_SHOWN = 20  # lines of a list that a person is to read
_INDEX_STEP = 3_000_017
_DEFAULT_MODES: dict[Kind, Mode] = {"tap": "mapped", "veth": "native", "tun": "native"}


class Refusal(Protocol):
    """An op that a platform could not carry out."""

    @property
    def number(self) -> int: ...
    @property
    def op(self) -> Op: ...
    @property
    def errno(self) -> int: ...
    @property
    def error(self) -> VmnetError: ...


class Platform(Protocol):
    """What the engine needs of a system; see vmnet.linux.platform for what each method does."""

    privileged: bool

    def need_rights(self) -> None: ...
    def here(self) -> NetnsId: ...
    def identify(self, path: str) -> NetnsId | None: ...
    def netns_path(self, name: str) -> str: ...
    def observe_guests(self, leases: Sequence[Lease], *, for_removal: bool = False) -> dict[str, GuestView]: ...
    def observe_host(self) -> HostView: ...
    def expected_listing(self, text: str, cache: Path) -> str | None: ...
    def look_around(self) -> Found: ...
    def find_uses(self, shadow: IPNetwork, hosts: Path | None) -> list[Use]: ...
    def forwards_for_others(self) -> bool: ...
    def orphans(self, names: Sequence[str]) -> list[Op]: ...
    def apply(
        self, lists: Sequence[Sequence[Op]], write_names: Callable[[WriteNames], None], done: Callable[[Op], None]
    ) -> Sequence[Refusal]: ...
    def close_places(self) -> None: ...
    def execute(self, path: str, expected: NetnsId | None, argv: Sequence[str]) -> NoReturn: ...


class Report(Protocol):
    """Who is told what happens."""

    def begin(self, total: int) -> None: ...
    def did(self, op: Op) -> None: ...
    def warn(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """What the caller asks a guest to be; None leaves a property to its default, or as it is."""

    name: str
    kind: Kind | None = None
    mode: Mode | None = None
    netns: str | None = None
    address: IPAddress | None = None
    mac: str | None = None
    mtu: int | None = None
    owner: int | None = None
    queues: int | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A guest as recorded, and how it is in the kernel."""

    lease: Lease
    state: State


class _Overtaken(Exception):
    """Another process made one of the guests, or restored the host, before this one came to it."""


@dataclass
class Engine:
    """The loop. `caller` is the uid that owns new guests by default."""

    platform: Platform
    settings: Settings
    paths: Paths
    report: Report
    caller: int = 0
    _here: NetnsId = field(init=False)
    _locks: Locks = field(init=False)
    _listing: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._here = self.platform.here()
        self._locks = Locks(self.paths.run)

    # Looking

    def look(self, names: Sequence[str] | None = None) -> list[Seen]:
        """Return guests, all or those named, in the order asked for; raises NoSuchGuest."""
        with self._reading() as store:
            leases = store.leases(names)
            host_right = self._is_host_wished_up(store) and self._is_host_right(store)
        seen = []
        for chunk in _chunks(leases):
            views = self.platform.observe_guests(chunk)
            seen += [Seen(lease, self._state(lease, views[lease.name], host_right)) for lease in chunk]
            self.platform.close_places()
        return seen

    def lease(self, name: str) -> Lease:
        """Return one record; raises NoSuchGuest."""
        with self._reading() as store:
            return store.leases([name])[0]

    def _is_host_right(self, store: Store) -> bool:
        try:
            return not plan_host(self._host_wish(store, store.reservations(), None), self.platform.observe_host())
        except (HostLacks, KernelRefused) as error:
            self.report.warn(f"{error.message}: the host part cannot be seen whole")
            return False

    def _state(self, lease: Lease, view: GuestView, host_right: bool) -> State:
        if view.host.link is None:
            return "down"
        if lease.wish != "up" or not host_right:
            return "degraded"
        try:
            return "degraded" if plan_guest(self._desire(lease), view) else "up"
        except Conflict:
            return "degraded"

    # Guests

    def create(self, specs: Sequence[GuestSpec], *, dry_run: bool = False) -> tuple[list[Lease], list[Op]]:
        """Make guests, carving the host if need be; what is there already stays. All of them, or none.

        Returns their leases in the order asked for and, for a dry run, the ops. Raises Conflict where a guest is
        there with another value of an option that is given.
        """
        self.platform.need_rights()
        names = [check_name(spec.name) for spec in specs]
        for name, times in Counter(names).items():
            if times > 1:
                raise UsageError(f"{name} is named twice")
        with self._writing(dry_run) as store:
            if dry_run:
                return self._preview_create(store, specs, names)
            for _ in range(_RUNS):
                with suppress(_Overtaken, NoSuchGuest):
                    return self._create(store, specs, names), []
        raise Conflict(f"others make and delete {', '.join(names)} all the time", hint="try again")

    def _preview_create(
        self, store: Store, specs: Sequence[GuestSpec], names: Sequence[str]
    ) -> tuple[list[Lease], list[Op]]:
        new, _ = self._sort(store, specs, dry_run=True)
        preview = store.preview([self._request(spec) for spec in new], pool=self.settings.pool, created=_now())
        old = [lease for lease in store.leases() if lease.name in set(names)]
        problems: dict[str, VmnetError] = {}
        ops = self._plan_host_up(store) + self._plan_up([*old, *preview], problems)
        self._raise_first(problems)
        return [*old, *preview], ops + self._plan_names([*store.leases(), *preview])

    def _create(self, store: Store, specs: Sequence[GuestSpec], names: Sequence[str]) -> list[Lease]:
        """Make guests; raises _Overtaken, or NoSuchGuest for one deleted meanwhile, where it is to be begun anew."""
        new, rebound = self._sort(store, specs, dry_run=False)
        requests = [self._request(spec) for spec in new]
        now = _now()
        if load_found(self.paths.run, self._here) is None:
            # What cannot be recorded is refused before the host is carved.
            with _unless_overtaken(store, new):
                store.preview(requests, pool=self.settings.pool, created=now)
        for name, netns in rebound.items():
            store.set_netns({name: netns})
        carved = self._ensure_host(store)
        try:
            with self._locks.host(shared=True):
                if not self._is_host_wished_up(store):
                    raise _Overtaken
                with _unless_overtaken(store, new):
                    store.allocate(requests, pool=self.settings.pool, created=now)
                self._create_or_undo(store, names, [spec.name for spec in new])
                self._write_names(store)
        except (VmnetError, OSError):
            if carved:
                with self._locks.host(shared=False):
                    if not store.count():
                        self._undo_carve(store)
            raise
        return store.leases(names)

    def create_and_look(self, specs: Sequence[GuestSpec]) -> list[Seen]:
        """Make guests as `create` does and say how they are: those to be up were seen to be, or it raises."""
        leases, _ = self.create(specs)
        others = [lease.name for lease in leases if lease.wish != "up"]
        seen = {one.lease.name: one for one in self.look(others)} if others else {}
        return [seen.get(lease.name) or Seen(lease, "up") for lease in leases]

    def _create_or_undo(self, store: Store, names: Sequence[str], new: Sequence[str]) -> None:
        with self._locks.guests(lease.block.number for lease in store.leases(names)):
            problems: list[Exception] = []
            try:
                leases = [lease for lease in store.leases(names) if lease.wish == "up"]
                problems += self._bring_up(store, leases).values()
            except (VmnetError, OSError) as error:
                problems.append(error)
            if not problems:
                return
            undone = [lease for lease in store.leases(new) if lease.wish != "deleting"]
            store.set_wish([lease.name for lease in undone], "deleting")
            self._take_down(undone, keep_netns=False)
            store.release([lease.name for lease in undone], freed=time.time())
        raise problems[0]

    def _sort(
        self, store: Store, specs: Sequence[GuestSpec], *, dry_run: bool
    ) -> tuple[list[GuestSpec], dict[str, Netns]]:
        """Return the specs of guests that are new, and the namespaces that known guests move to."""
        new, rebound = [], {}
        for spec in specs:
            lease = store.lease(spec.name)
            if lease and lease.wish == "deleting":
                if dry_run:
                    raise Conflict(f"the deletion of {lease.name} is not finished", hint="vmnet up finishes it")
                self._finish_deletion(store, [lease])
                lease = None
            if lease is None:
                new.append(spec)
                continue
            netns = self._compare(spec, lease)
            if netns:
                rebound[lease.name] = netns
        return new, rebound

    def _compare(self, spec: GuestSpec, lease: Lease) -> Netns | None:
        """Raise Conflict where `spec` asks for something else than the lease has; return a namespace made anew."""
        path = None if spec.netns is None else self._netns_path(spec.netns)
        asked: dict[str, tuple[object, object]] = {
            "kind": (spec.kind, lease.kind),
            "mode": (spec.mode, lease.mode),
            "netns": (path, lease.netns.path if lease.netns else None),
            "address": (spec.address, lease.block.address),
            "mac": (spec.mac, lease.mac),
            "mtu": (spec.mtu, lease.mtu),
            "owner": (spec.owner, lease.owner),
            "queues": (spec.queues, lease.queues),
        }
        for option, (wanted, held) in asked.items():
            if wanted is not None and wanted != held:
                raise Conflict(
                    f"{lease.name} exists with {option} {held}, not {wanted}",
                    hint=f"vmnet delete {lease.name} first, or leave the option out",
                )
        if path is None or lease.netns is None or lease.netns.owned:
            return None
        found = self._identify(path)
        if found is None:
            raise Conflict(f"there is no network namespace at {path}", hint="start what makes it first")
        if found == lease.netns.identity:
            return None
        if self.platform.observe_guests([lease])[lease.name].host.link:
            raise Conflict(
                f"{path} is another network namespace than the one in which {lease.name} is",
                hint=f"vmnet delete {lease.name} first",
            )
        return replace(lease.netns, identity=found)

    def _request(self, spec: GuestSpec) -> LeaseRequest:
        kind: Kind = spec.kind or ("tap" if spec.netns is None else "veth")
        mode: Mode = spec.mode or _DEFAULT_MODES[kind]
        if spec.netns is not None and kind != "veth":
            raise UsageError(f"a {kind} is in no network namespace", hint="leave --netns out, or --kind veth")
        if kind == "tap" and mode != "mapped":
            raise UsageError("a tap is always mapped", hint="leave --native out, or take a veth or a tun")
        if kind == "tun" and spec.mac:
            raise UsageError("a tun has no MAC", hint="leave --mac out, or take a tap")
        if kind != "tap" and (spec.queues or 1) > 1:
            raise UsageError(f"a {kind} has one queue", hint="leave --queues out, or take a tap")
        netns = None
        if kind == "veth":
            path = self._netns_path(spec.name if spec.netns is None else spec.netns)
            found = self._identify(path)
            if found is None and not self._is_named(path):
                raise Conflict(
                    f"there is no network namespace at {path}",
                    hint="give the name of one under /run/netns (made if need be), or a path such as /proc/PID/ns/net",
                )
            if found == self._here:
                raise Conflict(f"{path} is the host's own network namespace", hint="give the guest one of its own")
            netns = Netns(path, found is None, found)
        return LeaseRequest(
            name=spec.name,
            kind=kind,
            mode=mode,
            mac=spec.mac,
            mtu=spec.mtu or self.settings.mtu,
            owner=self.caller if spec.owner is None else spec.owner,
            queues=spec.queues or 1,
            netns=netns,
            address=spec.address,
        )

    def _netns_path(self, netns: str) -> str:
        """Return where a namespace is that was given as a name or as a path; raises UsageError."""
        name = PurePath(netns).name if self._is_named(netns) else netns
        right = name.isprintable() and len(name.encode()) <= _PATH_MAX
        if right and name.startswith("/"):
            return name
        if not right or not name or "/" in name or name in (".", "..") or len(name.encode()) > _NAME_MAX:
            shown = repr(netns if len(netns) < 80 else netns[:77] + "...")
            raise UsageError(
                f"{shown} names no network namespace", hint="give a name under /run/netns, or an absolute path"
            )
        return self.platform.netns_path(name)

    def _is_named(self, path: str) -> bool:
        """Say whether `path` is that of a named namespace, there or not: only those are ever made."""
        return PurePath(path).parent == PurePath(self.platform.netns_path(""))

    def _identify(self, path: str) -> NetnsId | None:
        try:
            return self.platform.identify(path)
        except OSError as error:
            raise Conflict(f"{path} cannot be looked at: {error.strerror}") from None

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
            leases = store.leases(list(dict.fromkeys(names)) if names is not None else None)
            if dry_run:
                gone = {lease.name for lease in leases}
                ops = self._plan_down(leases, keep_netns=False)
                return sorted(gone), ops + self._plan_names([one for one in store.leases() if one.name not in gone])
            store.set_wish([lease.name for lease in leases], "deleting", gone_ok=True)
            with self._locks.host(shared=True):
                self._finish_deletion(store, leases)
                self._write_names(store)
            return [lease.name for lease in leases], []

    def _finish_deletion(self, store: Store, leases: Sequence[Lease]) -> None:
        with self._locks.guests(lease.block.number for lease in leases):
            recorded = [store.lease(lease.name) for lease in leases]
            leases = [lease for lease in recorded if lease and lease.wish == "deleting"]
            problems = self._take_down(leases, keep_netns=False)
            store.release([lease.name for lease in leases if lease.name not in problems], freed=time.time())
        if problems:
            raise next(iter(problems.values()))

    def up(self, names: Sequence[str] | None = None, *, dry_run: bool = False) -> list[Op]:
        """Make the kernel match the records: the guests named, or all of vmnet. Returns the ops of a dry run."""
        self.platform.need_rights()
        with self._writing(dry_run) as store:
            leases = store.leases(names)
            if dry_run:
                wanted = [lease for lease in leases if lease.wish != "deleting"]
                deleting = [lease for lease in leases if lease.wish == "deleting"]
                problems: dict[str, VmnetError] = {}
                ops = self._plan_host_up(store) + self._plan_up(wanted, problems)
                ops += self._plan_down(deleting, keep_netns=False)
                if names is None:
                    ops += self.platform.orphans([lease.name for lease in leases])
                named = {lease.name for lease in wanted}
                ops += self._plan_names(
                    [replace(one, wish="up") if one.name in named else one for one in store.leases()]
                )
                if not ops:
                    self._raise_first(problems)
                for name, problem in problems.items():
                    self.report.warn(f"{name}: {problem.message}")
                return ops
            store.set_wish([lease.name for lease in leases if lease.wish == "down"], "up", gone_ok=True)
            self._ensure_host(store)
            self.converge(store, names)
            return []

    def converge(self, store: Store, names: Sequence[str] | None = None) -> None:
        """Bring guests to where the records want them, and with all of them what is ours without a record."""
        with self._locks.host(shared=True):
            blocks = None if names is None else [lease.block.number for lease in store.leases(names)]
            with self._locks.guests(blocks):
                leases = store.leases(names)
                problems = self._bring_up(store, [lease for lease in leases if lease.wish == "up"])
                problems |= self._take_down([lease for lease in leases if lease.wish == "down"], keep_netns=True)
                deleting = [lease for lease in leases if lease.wish == "deleting"]
                problems |= self._take_down(deleting, keep_netns=False)
                gone = [lease.name for lease in deleting if lease.name not in problems]
                store.release(gone, freed=time.time())
                if names is None:
                    self._apply_host(self.platform.orphans([lease.name for lease in leases]))
            self._write_names(store)
        self._raise_first(problems)

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
            leases = store.leases(names)
            if dry_run:
                rest = [replace(lease, wish="down") if lease in leases else lease for lease in store.leases()]
                return self._plan_down(leases, keep_netns=True) + self._plan_names(rest)
            store.set_wish([lease.name for lease in leases if lease.wish == "up"], "down", gone_ok=True)
            self.converge(store, names)
            return []

    def execute(self, name: str, argv: Sequence[str]) -> NoReturn:
        """Become `argv` inside a guest's namespace; raises Conflict for a guest that has none or is down."""
        self.platform.need_rights()
        lease = self.lease(name)
        if lease.netns is None:
            raise Conflict(
                f"{name} is a {lease.kind}: it is in no network namespace of this host",
                hint="exec is for veth guests; reach this one by its address",
            )
        if lease.netns.identity is None or self._identify(lease.netns.path) != lease.netns.identity:
            raise Conflict(f"{name} is down", hint=f"vmnet up {name}")
        self.platform.execute(lease.netns.path, lease.netns.identity, argv)

    # The host part

    def carve(self, *, dry_run: bool = False) -> list[Op]:
        """Carve and fence the host; returns the ops of a dry run."""
        self.platform.need_rights()
        with self._writing(dry_run) as store:
            if dry_run:
                return self._plan_host_up(store)
            self._ensure_host(store)
            with self._locks.host(shared=True):
                self._write_names(store)
            return []

    def restore(self, *, purge: bool = False, dry_run: bool = False) -> list[Op]:
        """Take all guests down and put the host back as it was found; needs no records that can be read or written.

        Raises what kept the records from being written only where they were to be purged.
        """
        self.platform.need_rights()
        with ExitStack() as stack:
            store, leases, unwritten = self._open_for_restore(stack, dry_run)
            if dry_run:
                ops = self._plan_down(leases, keep_netns=False) + self.platform.orphans([one.name for one in leases])
                return ops + self._plan_names([]) + self._plan_host_down()
            with self._locks.host(shared=False), self._locks.guests(None):
                if store:
                    try:
                        store.set_wish([one.name for one in leases if one.wish == "up"], "down", gone_ok=True)
                        store.set_host(HostRecord("down", self._here.boot_id, self._here.device, self._here.inode))
                    except KernelRefused as error:
                        store, unwritten = None, self._go_on_without(error)
                problems = self._take_down(leases, keep_netns=False)
                self._apply_host(self.platform.orphans([lease.name for lease in leases]))
                self._keep_names(self._names_op([]), list)
                self._remove_host_part()
                if store:
                    gone = [lease.name for lease in leases if lease.wish == "deleting" and lease.name not in problems]
                    store.release(gone, freed=time.time())
                    if purge:
                        store.purge()
            self._raise_first(problems)
            if purge and unwritten:
                raise unwritten
            return []

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

    def _undo_carve(self, store: Store, before: HostRecord | None = None) -> None:
        """Undo a first carve, which came to nothing; the caller holds the host part, and raises the cause."""
        try:
            self._remove_host_part()
            store.set_host(before or HostRecord("down", self._here.boot_id, self._here.device, self._here.inode))
        except VmnetError as error:
            self.report.warn(error.message)

    def _remove_host_part(self) -> None:
        found, noted = self._find_found()
        if found and not noted:
            self._say_guessed(found)
            save_found(self.paths.run, self._here, found)
        self._apply_host(self._plan_host_down())
        left = self._plan_host_down()
        if left:
            raise KernelRefused(f"this stays of the host part: {'; '.join(map(str, left))}")
        view = self.platform.observe_host()
        if found and not found.ip_forward and view.ip_forward:
            self.report.warn(
                "net.ipv4.ip_forward stays 1, though it was 0 before: somebody else's rules translate addresses"
            )
        forget_found(self.paths.run)

    def _plan_host_down(self) -> list[Op]:
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
        found = load_found(self.paths.run, self._here)
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

    def _ensure_host(self, store: Store) -> bool:
        """Make the host part as it is to be; say whether it was not there at all. Others wait meanwhile."""
        with self._locks.host(shared=True):
            if self._is_host_wished_up(store) and load_found(self.paths.run, self._here):
                found = load_found(self.paths.run, self._here)
                if not plan_host(self._host_wish(store, store.reservations(), found), self.platform.observe_host()):
                    return False
        with self._locks.host(shared=False):
            found = load_found(self.paths.run, self._here)
            fresh = found is None
            before, reservations = store.host(), store.reservations()
            if found is None:
                found, reservations = self._look_around(store)
            wish = self._host_wish(store, reservations, found)
            bare = not self.platform.observe_host().routes
            if fresh:
                store.replace_reservations(reservations)
                save_found(self.paths.run, self._here, found)
            store.set_host(HostRecord("up", self._here.boot_id, self._here.device, self._here.inode))
            try:
                self._make_host_part(wish)
            except (VmnetError, OSError):
                if fresh and bare:
                    self._undo_carve(store, before)
                raise
            return fresh

    def _make_host_part(self, wish: HostWish) -> None:
        for _ in range(_ATTEMPTS):
            ops = plan_host(wish, self.platform.observe_host())
            if not ops:
                return
            self._apply_host(ops)
        left = plan_host(wish, self.platform.observe_host())
        if left:
            raise KernelRefused(f"the host part does not stay as it is set: {'; '.join(map(str, left))}")

    def _plan_host_up(self, store: Store) -> list[Op]:
        found = load_found(self.paths.run, self._here)
        reservations = store.reservations()
        if found is None:
            found, reservations = self._look_around(store)
        return plan_host(self._host_wish(store, reservations, found), self.platform.observe_host())

    def _look_around(self, store: Store) -> tuple[Found, list[Reservation]]:
        """Return how the host was found, and what of the pool others use; raises Conflict where that cannot be."""
        shadow = IPNetwork(f"{self.settings.plane.shadow}.0.0.0/8")
        uses = self.platform.find_uses(shadow, self.paths.hosts)
        clashes = [str(use) for use in uses if use.network not in LOOPBACK or POOL_SPAN in use.network]
        holders = {lease.block.number: lease.name for lease in store.leases()} if uses else {}
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
        guessed, _ = self._find_found()
        if guessed:
            self._say_guessed(guessed)
        return guessed or self.platform.look_around(), reservations

    def _host_wish(self, store: Store, reservations: Sequence[Reservation], found: Found | None) -> HostWish:
        found = found or load_found(self.paths.run, self._here)
        guard = bool(self.settings.guard_forwarding and found and not found.ip_forward)
        text = rules.render(self.settings.plane, guard=guard)
        if self._listing is None:
            self._listing = self.platform.expected_listing(text, self.paths.run)
        spans = {"local": [], "foreign": []}  # type: dict[str, list[IPNetwork]]
        for one in reservations:
            kind = one.reason.partition(":")[0]
            spans[kind if kind in spans else "local"] += _cidrs(one.first, one.last)
        pool = self.settings.pool
        kept = kept_local(pool.networks, pool.reserved, spans["local"])
        # A guest keeps its address, also where the settings have taken it out of the pool since.
        guests = store.wished_up() if pool != Pool() else []
        displaced = [block.network for _, block in guests if not holds(pool.extents, block.number)]
        return HostWish(
            plane=self.settings.plane,
            kept=tuple(without(kept, [*spans["foreign"], *displaced])),
            holes=tuple(spans["foreign"]),
            text=text,
            listing=self._listing,
        )

    # Steps

    def _desire(self, lease: Lease, shift: int = 0) -> Guest:
        return desire(lease, self.settings.plane, index_shift=shift)

    def _plan_up(self, leases: Sequence[Lease], problems: dict[str, VmnetError]) -> list[Op]:
        """Return the ops for guests that are to be up; put into `problems`, by name, what is in the way of others."""
        views = self.platform.observe_guests(leases)
        ops: list[Op] = []
        for lease in leases:
            try:
                ops += plan_guest(self._desire(lease), views[lease.name])
            except Conflict as error:
                problems[lease.name] = error
        return ops

    def _plan_down(self, leases: Sequence[Lease], *, keep_netns: bool) -> list[Op]:
        views = self.platform.observe_guests(leases, for_removal=True)
        return [
            op for lease in leases for op in plan_removal(self._desire(lease), views[lease.name], keep_netns=keep_netns)
        ]

    def _bring_up(self, store: Store, leases: Sequence[Lease]) -> dict[str, VmnetError]:
        """Reconcile guests that are to be up; return what went wrong, by name."""
        problems: dict[str, VmnetError] = {}
        for chunk in _chunks(leases):
            problems |= self._bring_up_chunk(store, chunk)
            self.platform.close_places()
        return problems

    def _bring_up_chunk(self, store: Store, leases: Sequence[Lease]) -> dict[str, VmnetError]:
        problems: dict[str, VmnetError] = {}
        shift = 0
        left: list[Lease] = list(leases)
        for attempt in range(_ATTEMPTS):
            views = self.platform.observe_guests(left)
            plans: list[tuple[Lease, list[Op]]] = []
            for lease in left:
                try:
                    ops = plan_guest(self._desire(lease, shift), views[lease.name])
                except Conflict as error:
                    problems[lease.name] = error
                    continue
                if ops:
                    plans.append((lease, ops))
            self._learn_netns(store, left, problems)
            if not plans:
                return problems
            if attempt == _ATTEMPTS - 1:
                for lease, ops in plans:
                    problems[lease.name] = KernelRefused(
                        f"{lease.name} does not stay as it is set: {'; '.join(map(str, ops))}"
                    )
                return problems
            refusals = self._apply([ops for _, ops in plans])
            for refusal in refusals:
                if isinstance(refusal.op, AddVeth | AddTun) and refusal.errno in (errno.EEXIST, errno.EBUSY):
                    shift += _INDEX_STEP  # somebody has a device of that index
                    continue
                problems[plans[refusal.number][0].name] = refusal.error
            left = [lease for lease, _ in plans if lease.name not in problems]
        return problems

    def _learn_netns(self, store: Store, leases: Sequence[Lease], problems: Mapping[str, VmnetError]) -> None:
        """Record which namespaces the owned ones are, now that they are there."""
        learnt = {}
        for lease in leases:
            if lease.name in problems or not (lease.netns and lease.netns.owned):
                continue
            found = self.platform.identify(lease.netns.path)
            if found and found != lease.netns.identity:
                learnt[lease.name] = replace(lease.netns, identity=found)
        if learnt:
            store.set_netns(learnt)

    def _take_down(self, leases: Sequence[Lease], *, keep_netns: bool) -> dict[str, VmnetError]:
        problems: dict[str, VmnetError] = {}
        for chunk in _chunks(leases, size=_REMOVAL_CHUNK):
            left = list(chunk)
            desired = {lease.name: self._desire(lease) for lease in chunk}
            for _ in range(_ATTEMPTS):
                views = self.platform.observe_guests(left, for_removal=True)
                plans = [
                    (lease, ops)
                    for lease in left
                    if (ops := plan_removal(desired[lease.name], views[lease.name], keep_netns=keep_netns))
                ]
                if not plans:
                    break
                for refusal in self._apply([ops for _, ops in plans]):
                    problems[plans[refusal.number][0].name] = refusal.error
                left = [lease for lease, _ in plans if lease.name not in problems]
            else:
                for lease in left:
                    problems[lease.name] = KernelRefused(f"{lease.name} does not go away")
            self.platform.close_places()
        return problems

    def _apply(self, lists: Sequence[Sequence[Op]]) -> Sequence[Refusal]:
        self.report.begin(sum(len(ops) for ops in lists))
        return self.platform.apply(lists, self._refuse_names, self.report.did)

    def _refuse_names(self, op: WriteNames) -> None:
        raise TypeError(f"{op} belongs to the host part")

    def _apply_host(self, ops: Sequence[Op]) -> None:
        for refusal in self._apply([ops] if ops else []):
            raise refusal.error

    # Names

    def _names_of(self, guests: Iterable[tuple[str, Block]]) -> tuple[tuple[str, str], ...]:
        return tuple((f"{name}.{self.settings.domain}", dotted(block.first + 2)) for name, block in guests)

    def _names_op(self, guests: Iterable[tuple[str, Block]]) -> WriteNames | None:
        if self.paths.hosts is None:
            return None
        return WriteNames(str(self.paths.hosts), self._names_of(guests))

    def _plan_names(self, leases: Iterable[Lease]) -> list[Op]:
        op = self._names_op([(lease.name, lease.block) for lease in leases if lease.wish == "up"])
        try:
            return [op] if op and not HostsFile(Path(op.path)).is_current(dict(op.names)) else []
        except HostsFileUnwritable as error:
            self.report.warn(error.message)
            return []

    def _write_names(self, store: Store) -> None:
        self._keep_names(self._names_op(store.wished_up()), lambda: self._names_of(store.wished_up()))

    def _keep_names(self, op: WriteNames | None, ask: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Keep the names in the hosts file; where that cannot be, say so: a guest works without."""
        if op is None:
            return
        file = HostsFile(Path(op.path))
        try:
            if not file.is_current(dict(op.names)):
                file.update(lambda: dict(ask()))
                self.report.did(op)
        except HostsFileUnwritable as error:
            self.report.warn(error.message + (f" ({error.hint})" if error.hint else ""))

    # Records

    def _is_host_wished_up(self, store: Store) -> bool:
        record = store.host()
        return record is not None and record.wish == "up"

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


@contextmanager
def _unless_overtaken(store: Store, new: Sequence[GuestSpec]) -> Iterator[None]:
    """Raise _Overtaken in place of a refusal where another process has made one of `new` meanwhile."""
    try:
        yield
    except (Conflict, PoolExhausted) as error:
        if any(store.lease(spec.name) for spec in new):
            raise _Overtaken from error
        raise


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _chunks(leases: Sequence[Lease], size: int = _CHUNK) -> Iterable[Sequence[Lease]]:
    return (leases[start : start + size] for start in range(0, len(leases), size))


def _shortened(lines: Sequence[str]) -> list[str]:
    """Return the lines that a person can still read, and how many more there are."""
    return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else list(lines)


def _cidrs(first: IPAddress, last: IPAddress) -> list[Any]:
    from netaddr import iprange_to_cidrs

    return list(iprange_to_cidrs(first, last))
