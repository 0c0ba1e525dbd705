"""Compare what libvirt has with the records and the kernel: domains, their interfaces of vmnet's, and drift. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vmnet.engine import Seen
from vmnet.libvirt.interfaces import Domain, Interface
from vmnet.store import DomainRecord


class Drift(NamedTuple):
    """What is not as it should be with an interface, and what to do about it."""

    what: str
    hint: str


class Found(NamedTuple):
    """An interface of vmnet's, how its guest is, whether it is in what runs and in what will start, and its drift."""

    interface: Interface
    seen: Seen | None
    live: bool
    config: bool
    drift: tuple[Drift, ...]


class Gone(NamedTuple):
    """A guest whose domain libvirt has no more; it is freed at the time `until`, None for never."""

    record: DomainRecord
    seen: Seen | None
    until: float | None


def survey(
    domains: Sequence[Domain],
    records: Mapping[str, DomainRecord],
    guests: Mapping[str, Seen],
    is_open: Callable[[str], bool],
) -> list[tuple[Domain, list[Found]]]:
    """Return each domain with its interfaces of vmnet's; `is_open` tells whether a program has a device open."""
    found = []
    for domain in domains:
        interfaces = []
        for one, live, config in domain.ours:
            seen = guests.get(one.guest)
            is_lost = live and seen is not None and seen.state != "degraded" and not is_open(seen.lease.device)
            drift = tuple(_drift(domain, one, seen, records.get(one.guest), live=live, is_lost=is_lost))
            interfaces.append(Found(one, seen, live, config, drift))
        found.append((domain, interfaces))
    return found


def _drift(
    domain: Domain, one: Interface, seen: Seen | None, holder: DomainRecord | None, *, live: bool, is_lost: bool
) -> list[Drift]:
    drift = []
    if one.type == "ethernet":
        if not one.guest:
            return [Drift(f"no guest has the device {one.device}", "vmnet show NAME --libvirt prints that of NAME")]
        if one.managed:
            drift.append(Drift("managed is not 'no'", f"<target dev='{one.device}' managed='no'/>"))
    if seen is None:
        drift.append(Drift("no record", "libvirt's hook makes it when the domain starts"))
        return drift
    if seen.lease.kind != "tap":
        return [Drift(f"its guest is of kind {seen.lease.kind}", "no VM has that: name another device, vmn-NAME")]
    if holder and holder.uuid != domain.uuid:
        drift.append(Drift(f"its record is of another domain, of UUID {holder.uuid}", "give it a guest of its own"))
    elif seen.lease.mac != one.mac:
        drift.append(Drift(f"its record has the MAC {seen.lease.mac}", f"<mac address='{seen.lease.mac}'/>"))
    if is_lost:
        drift.append(Drift("it has lost its device", "shut the domain down and start it: only then is a device opened"))
    elif live and seen.state != "up":
        drift.append(Drift("its device is not as recorded", f"vmnet up {one.guest}"))
    return drift


def find_gone(
    domains: Sequence[Domain], records: Mapping[str, DomainRecord], guests: Mapping[str, Seen], grace: float, now: float
) -> list[Gone]:
    """Return the guests of domains that are not among `domains`, with the time at which they are freed."""
    there = {one.uuid for one in domains}
    gone = [one for one in records.values() if one.uuid not in there]
    return [
        Gone(one, guests.get(one.name), (now if one.gone is None else one.gone) + grace if one.made else None)
        for one in gone
    ]
