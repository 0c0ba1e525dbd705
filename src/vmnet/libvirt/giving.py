"""Give domains interfaces of vmnet's: first the guest's record and tap, then the domain's XML; or neither."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from vmnet.engine import Engine
from vmnet.libvirt.ask import NoAnswer, ask
from vmnet.libvirt.domain import label
from vmnet.libvirt.element import libvirt_interface, need_tap
from vmnet.libvirt.interfaces import Domain, Gift, replacement
from vmnet.model import Conflict, Lease, NoSuchGuest, UsageError, VmnetError
from vmnet.ops import Op
from vmnet.specs import GuestSpec
from vmnet.store import DomainKey, DomainRecord


class GiveInterface(NamedTuple):
    """Put an interface into a domain of libvirt's, as virsh does."""

    uri: str
    domain: str
    device: str
    xml: str
    live: bool
    config: bool
    instead: str

    def __str__(self) -> str:
        where = " and ".join(word for word, is_in in (("live", self.live), ("config", self.config)) if is_in)
        instead = f", instead of that on network {self.instead}" if self.instead else ""
        return f"+ interface {self.device} of domain {self.domain} ({where}){instead}"

    def command(self) -> str:
        verb = "update-device" if self.instead else "attach-device"
        flags = [word for word, is_in in (("--live", self.live), ("--config", self.config)) if is_in]
        words = ["virsh", "--connect", self.uri, verb, self.domain, "/dev/stdin", *flags]
        return f"{shlex.join(words)} <<'END'\n{self.xml}\nEND"


@dataclass(frozen=True, slots=True)
class Given:
    """What a domain has now: a guest's interface, and whether that is in what runs, and in what will start.

    `lease` is None where libvirt's hook makes it when the domain starts.
    """

    domain: Domain
    lease: Lease | None
    live: bool
    config: bool
    changed: bool

    @property
    def waits(self) -> bool:
        """Whether it takes effect at the domain's next start."""
        return not self.live and self.domain.live_xml is not None


def name_for(engine: Engine, domain: Domain) -> str:
    """Return what a domain's new guest is called: as the domain, or NAME-2, ... where others are; raises UsageError."""
    found = label(domain.name)
    if not found:
        raise UsageError(
            f"no guest can be called like the domain {domain.name!r}",
            hint="vmnet libvirt attach DOMAIN --name NAME gives it another name",
        )
    macs = {one.mac for one in (*domain.live, *domain.config)}
    return engine.guest_for(DomainKey(domain.uuid, "", domain.name), found, macs)


def preview(engine: Engine, uri: str, gifts: Sequence[Gift]) -> list[Op | GiveInterface]:
    """Return the steps that make these gifts; raises what is in the way of one."""
    for gift in gifts:
        _check(engine, gift)
    wanted = [gift for gift in gifts if not _has_open(gift)]
    leases, made = engine.create([_spec(engine, gift) for gift in wanted], dry_run=True)
    by_name = {lease.name: lease for lease in leases}
    steps: list[Op | GiveInterface] = list(made)
    needed = [gift for gift in gifts if gift.live or gift.config]
    return steps + [_step(uri, gift, by_name.get(gift.guest) or engine.lease(gift.guest)) for gift in needed]


def give(engine: Engine, uri: str, gift: Gift) -> Given:
    """Make one gift; where libvirt refuses it, the guest that was made for it goes again."""
    _check(engine, gift)
    before, holder = _lease(engine, gift.guest), engine.domains().get(gift.guest)
    if before and (_has_open(gift) or not (gift.live or gift.config)):
        lease = before
    else:
        key = DomainKey(gift.domain.uuid, gift.like.mac if gift.like else "", gift.domain.name)
        lease = engine.claim(_spec(engine, gift), key, made=False)
    if gift.live or gift.config:
        step = _step(uri, gift, lease)
        try:
            verb = "update" if gift.instead else "attach"
            ask(uri, verb, uuid=gift.domain.uuid, xml=step.xml, live=gift.live, config=gift.config)
        except NoAnswer:
            raise  # it may have done it: the same call again finds out
        except VmnetError:
            _take_back(engine, gift.guest, before, holder)
            raise
    live = gift.live or any(one.guest == gift.guest for one in gift.domain.live)
    config = gift.config or any(one.guest == gift.guest for one in gift.domain.config)
    return Given(gift.domain, lease, live, config, changed=before is None or gift.live or gift.config)


def _take_back(engine: Engine, name: str, before: Lease | None, holder: DomainRecord | None) -> None:
    """Leave a guest as it was before a gift that libvirt refused."""
    if before is None:
        engine.delete([name], if_exists=True)
        return
    engine.assign(name, holder.key if holder else None)
    if before.wish == "down":
        engine.down([name])


def _has_open(gift: Gift) -> bool:
    """Say whether the domain that runs has the guest's tap open already."""
    return gift.domain.live_xml is not None and not gift.live and not gift.instead


def _check(engine: Engine, gift: Gift) -> None:
    """Raise Conflict where the guest is no VM's, or belongs to another domain."""
    if there := _lease(engine, gift.guest):
        need_tap(there)
    holder = engine.domains().get(gift.guest)
    if holder and holder.uuid != gift.domain.uuid and holder.domain != gift.domain.name and holder.gone is None:
        raise Conflict(
            f"the guest {gift.guest} belongs to the domain {holder.domain!r}",
            hint=f"vmnet libvirt attach {shlex.quote(gift.domain.name)} --name NAME gives this one another",
        )


def _spec(engine: Engine, gift: Gift) -> GuestSpec:
    """Return what to create; what is there is taken as it is, but for what takes another interface's place."""
    like = gift.like
    if like is None or (not gift.instead and _lease(engine, gift.guest)):
        return GuestSpec(gift.guest, kind="tap")
    return GuestSpec(gift.guest, kind="tap", mac=like.mac, mtu=like.mtu, queues=like.queues)


def _lease(engine: Engine, name: str) -> Lease | None:
    with suppress(NoSuchGuest):
        return engine.lease(name)
    return None


def _step(uri: str, gift: Gift, lease: Lease) -> GiveInterface:
    if gift.instead and gift.like:
        xml = replacement(gift.domain.config_xml or "", gift.like.mac, lease.device)
        network = gift.like.network
    else:
        xml = libvirt_interface(lease._replace(mac=gift.like.mac) if gift.like else lease)
        network = ""
    return GiveInterface(uri, gift.domain.name, lease.device, xml, gift.live, gift.config, network)
