"""What the engine needs of others: a system that it observes and changes, and somebody who is told."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from netaddr import IPNetwork

from vmnet.model import Lease, Mode, NetnsId, VmnetError
from vmnet.ops import Op
from vmnet.plan import Found, GuestView, HostView, Use


class Glance(NamedTuple):
    """Digests of what the kernel shows: of the host part (None: only a look can tell), of guests, inside of guests."""

    host: bytes | None
    guests: bytes
    insides: bytes


class Heard(NamedTuple):
    """Where events say that something has changed: nowhere, unless it says so.

    `host` is the host part, `names` are guests, `marks` something that bears our marks without being known, or a
    namespace that came or went, `addresses` those that the host lost, `names_file` the hosts file, `answers` what
    answers guests. `lost`: events were lost, so anything may have changed. `clock`: the wall clock was set, or the
    machine was asleep. `programs` is who did it, as far as the kernel tells.
    """

    host: bool = False
    names: frozenset[str] = frozenset()
    marks: bool = False
    addresses: frozenset[str] = frozenset()
    names_file: bool = False
    answers: bool = False
    lost: bool = False
    clock: bool = False
    programs: tuple[str, ...] = ()

    @property
    def anything(self) -> bool:
        """Whether there is anything to look at."""
        return any(self[:-1])

    def also(self, other: "Heard") -> "Heard":
        """Return what both tell."""
        return Heard(
            self.host or other.host,
            self.names | other.names,
            self.marks or other.marks,
            self.addresses | other.addresses,
            self.names_file or other.names_file,
            self.answers or other.answers,
            self.lost or other.lost,
            self.clock or other.clock,
            tuple(dict.fromkeys([*self.programs, *other.programs]))[:8],
        )


class Resolver(NamedTuple):
    """Whom a guest's programs ask for names, where they are to look for short ones, and how they spell addresses."""

    address: str
    domain: str
    mode: Mode


class Loopback(NamedTuple):
    """The addresses, such as 127.1.0.2/32, that others than the system gave to its loopback device, and its version."""

    addresses: tuple[str, ...]
    version: str


class EventSource(Protocol):
    """Somebody who tells of changes; see vmnet.linux.events."""

    def expect(self, leases: Sequence[Lease]) -> None: ...
    def attend(self, process: int | None) -> None: ...
    def hear(self, timeout: float) -> Heard: ...
    def close(self) -> None: ...


class Refusal(NamedTuple):
    """An op that could not be carried out: the number of its list, the op, and why."""

    number: int
    op: Op
    errno: int
    error: VmnetError


class Platform(Protocol):
    """What the engine needs of a system; see vmnet.linux.platform for what each method does.

    `loopback` is its device for aliases. `carves`: it has a host part, and guests with networks of their own.
    """

    loopback: str
    carves: bool

    @property
    def privileged(self) -> bool: ...
    def need_rights(self) -> None: ...
    def here(self) -> NetnsId: ...
    def identify(self, path: str) -> NetnsId | None: ...
    def netns_path(self, name: str) -> str: ...
    def observe_guests(
        self, leases: Sequence[Lease], *, for_removal: bool = False, made: Collection[str] = ()
    ) -> dict[str, GuestView]: ...
    def observe_host(self) -> HostView: ...
    def glance(self, leases: Sequence[Lease], insides: Sequence[Lease]) -> Glance: ...
    def expected_listing(self, text: str, cache: Path) -> str | None: ...
    def addresses(self) -> frozenset[str]: ...
    def look_at_loopback(self) -> Loopback: ...
    def look_around(self) -> Found: ...
    def find_uses(self, shadow: IPNetwork, hosts: Path | None) -> list[Use]: ...
    def forwards_for_others(self) -> bool: ...
    def is_open(self, device: str) -> bool: ...
    def orphans(self, names: Sequence[str]) -> list[Op]: ...
    def lookalikes(self) -> list[Op]: ...
    def apply(
        self, lists: Sequence[Sequence[Op]], done: Callable[[Op], None], meanwhile: Callable[[], None]
    ) -> Sequence[Refusal]: ...
    def listen(self, file: Path | None, wakeup: int) -> EventSource: ...
    def keep(self) -> None: ...
    def close_places(self) -> None: ...
    def execute(self, path: str, expected: NetnsId | None, argv: Sequence[str], resolver: Resolver) -> NoReturn: ...


class Report(Protocol):
    """Who is told what happens."""

    def begin(self, total: int) -> None: ...
    def did(self, op: Op) -> None: ...
    def warn(self, text: str) -> None: ...


class Listener:
    """A Report that says nothing, and keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def begin(self, total: int) -> None:
        """Hear that `total` ops are to come."""

    def did(self, op: Op) -> None:
        """Hear that an op was carried out."""

    def warn(self, text: str) -> None:
        """Keep what a person should know."""
        self.warnings.append(text)
