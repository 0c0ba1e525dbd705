"""What the engine sees of macOS, and of FreeBSD: the addresses of lo0, by ifconfig(8).

There is one network for all, so no guest has one of its own, and nothing is carved: the pool's addresses lead nowhere
until they are given to lo0.
"""

import errno
import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from netaddr import IPAddress, IPNetwork

from vmnet.aliases import address_of
from vmnet.darwin.events import Monitor
from vmnet.darwin.parse import LinkAddress, parse_ifconfig
from vmnet.darwin.programs import call
from vmnet.model import HostLacks, KernelRefused, Lease, NetnsId, NotPermitted, UsageError, VmnetError, block_of
from vmnet.ops import AddAlias, Address, DelAlias, Op
from vmnet.plan import Found, GuestView, HostView, Use
from vmnet.platform import EventSource, Glance, Loopback, Refusal, Resolver

_LO = "lo0"
_ALL_ONES = 0xFFFFFFFF
_NOT_PERMITTED = ("permission denied", "not permitted")  # macOS, in these letters; FreeBSD


class DarwinPlatform:
    """macOS by ifconfig, route and id, which are looked for in PATH."""

    loopback = _LO
    carves = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    @cached_property
    def privileged(self) -> bool:
        """Whether the caller is root."""
        return call("id", "-u").out.strip() == "0"

    def need_rights(self) -> None:
        """Raise NotPermitted unless the caller may change addresses."""
        if not self.privileged:
            raise NotPermitted("this needs root, which alone may change the addresses of lo0", hint="run it with sudo")

    def here(self) -> NetnsId:
        """Return what stands for the one network that there is."""
        return NetnsId(0, 0, "")

    def observe_guests(
        self, leases: Sequence[Lease], *, for_removal: bool = False, made: Collection[str] = ()
    ) -> dict[str, GuestView]:
        """Return how the address of each lease is there."""
        del for_removal, made
        there: dict[str, set[Address]] = {}
        for one in _addresses() if leases else ():
            there.setdefault(str(one.address), set()).add(_as_held(one))
        return {one.name: GuestView(alias=frozenset(there.get(address_of(one), ()))) for one in leases}

    def glance(self, leases: Sequence[Lease], insides: Sequence[Lease]) -> Glance:
        """Return a digest of lo0."""
        del insides
        return Glance(b"", hashlib.sha256(_lo().encode()).digest() if leases else b"", b"")

    def look_at_loopback(self) -> Loopback:
        """Return all addresses of lo0 but the system's own, and the version of macOS, "" for another system."""
        try:
            version = call("sw_vers", "-productVersion").out.strip()
        except HostLacks:
            version = ""
        others = [one for one in _addresses() if str(one.address) != "127.0.0.1"]
        return Loopback(tuple(_as_held(one).value for one in others), version)

    def addresses(self) -> frozenset[str]:
        """Return all IPv4 addresses of the host."""
        return frozenset(str(one.address) for link in parse_ifconfig(_shown("-a")).values() for one in link)

    def lookalikes(self) -> list[Op]:
        """Return the ops that take away every alias that could be a guest's: alone in its subnet, third of a block."""
        return [DelAlias(_LO, _as_held(one).value) for one in _addresses() if _could_be_a_guests(one)]

    def apply(
        self, lists: Sequence[Sequence[Op]], done: Callable[[Op], None], meanwhile: Callable[[], None]
    ) -> list[Refusal]:
        """Carry out lists of ops and return what was refused; the rest of such a list is left undone.

        Nothing is waited for, so nothing is done `meanwhile`.
        """
        del meanwhile
        refusals = []
        for number, ops in enumerate(lists):
            for op in ops:
                try:
                    _carry_out(op)
                except VmnetError as error:
                    code = errno.EPERM if isinstance(error, NotPermitted) else errno.EIO
                    refusals.append(Refusal(number, op, code, error))
                    break
                done(op)
        return refusals

    def listen(self, file: Path | None, wakeup: int) -> EventSource:
        """Return what hears of changes; `file` is looked at with all else, at each interval."""
        del file
        return Monitor(wakeup)

    # What only a system that carves has

    def identify(self, path: str) -> NetnsId | None:
        """Return that `path` leads to no network namespace."""
        del path
        return None

    def netns_path(self, name: str) -> str:
        """Return where a named network namespace would be: nowhere."""
        return f"/var/run/netns/{name}"

    def expected_listing(self, text: str, cache: Path) -> str | None:
        """Return that there are no rules to be seen."""
        del text, cache
        return None

    def find_uses(self, shadow: IPNetwork, hosts: Path | None) -> list[Use]:
        """Return that nobody's use is in the way: there is no shadow."""
        del shadow, hosts
        return []

    def forwards_for_others(self) -> bool:
        """Say that forwarding is nothing to vmnet."""
        return False

    def is_open(self, device: str) -> bool:
        """Say that no guest's device is open: there are none."""
        del device
        return False

    def orphans(self, names: Sequence[str]) -> list[Op]:
        """Return nothing: an alias bears no mark, so one without a record is somebody else's."""
        del names
        return []

    def keep(self) -> None:
        """Keep nothing: all of it is seen at once."""

    def close_places(self) -> None:
        """Close nothing."""

    def observe_host(self) -> HostView:
        """Raise HostLacks."""
        raise _lacking("a host part")

    def look_around(self) -> Found:
        """Raise HostLacks."""
        raise _lacking("a host part")

    def execute(self, path: str, expected: NetnsId | None, argv: Sequence[str], resolver: Resolver) -> NoReturn:
        """Raise HostLacks."""
        del path, expected, argv, resolver
        raise _lacking("network namespaces")


def _lacking(what: str) -> HostLacks:
    return HostLacks(f"this system has no {what}", hint="Linux has")


def _shown(*argv: str) -> str:
    done = call("ifconfig", *argv)
    if done.code != 0:
        raise KernelRefused(f"ifconfig {' '.join(argv)}: {done.err or f'exit code {done.code}'}")
    return done.out


def _lo() -> str:
    return _shown(_LO)


def _addresses() -> list[LinkAddress]:
    return parse_ifconfig(_lo()).get(_LO, [])


def _could_be_a_guests(one: LinkAddress) -> bool:
    try:
        return one.mask == _ALL_ONES and block_of(one.address).address == one.address
    except UsageError:
        return False


def _as_held(one: LinkAddress) -> Address:
    """Return an address with its prefix, or with its mask where that is no prefix."""
    length = one.mask.bit_count()
    is_prefix = one.mask == _ALL_ONES << (32 - length) & _ALL_ONES
    return Address(f"{one.address}/{length if is_prefix else IPAddress(one.mask)}")


def _carry_out(op: Op) -> None:
    """Carry out an op; raises what ifconfig says."""
    if not isinstance(op, AddAlias | DelAlias):
        raise _lacking(f"way to do this: {op}")
    address = op.address if isinstance(op, AddAlias) else op.value.partition("/")[0]
    # Without an address ifconfig would take the first one of lo0, which is 127.0.0.1.
    if op.device != _LO or block_of(IPAddress(address)).address != IPAddress(address):
        raise KernelRefused(f"{op}: that is no guest's address on {_LO}")
    word = "alias" if isinstance(op, AddAlias) else "-alias"
    done = call("ifconfig", _LO, word, address, "netmask", "255.255.255.255")
    if done.code == 0:
        return
    if isinstance(op, DelAlias) and "SIOCDIFADDR" in done.err and "Can't assign requested address" in done.err:
        return  # it is gone already
    said = f"{op.command()}: {done.err or f'exit code {done.code}'}"
    if any(words in done.err.lower() for words in _NOT_PERMITTED):
        raise NotPermitted(said, hint="run it with sudo: root by setuid alone is not enough for ifconfig")
    raise KernelRefused(said)
