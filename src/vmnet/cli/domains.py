"""What the command `libvirt` does: it asks libvirt, gives its domains interfaces, and prints what there is."""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmnet.cli.show import print_table, say
from vmnet.engine import Engine, Seen
from vmnet.hooks.call import Call
from vmnet.hooks.install import look as look_at_files
from vmnet.hooks.parts import PARTS
from vmnet.libvirt.ask import SYSTEM, look, networks
from vmnet.libvirt.domain import NETWORK
from vmnet.libvirt.giving import GiveInterface, Given, give, name_for, preview
from vmnet.libvirt.interfaces import Domain, Gift, plan_adopt, plan_attach
from vmnet.libvirt.survey import Found, Gone, find_gone, survey
from vmnet.model import Conflict, UsageError, VmnetError
from vmnet.ops import Op
from vmnet.plan import dotted

_DAY = 86400  # seconds
_NO_HOOK = {"what": "libvirt's hook is not installed", "hint": "vmnet hooks install libvirt"}


# status


def show_status(engine: Engine, uri: str, *, as_json: bool) -> None:
    """Print what libvirt has of vmnet's; root takes note of domains that are gone."""
    domains = [one.known(engine.domains(), engine.guest_on) for one in look(uri)]
    now = time.time()
    # Another libvirt's domains say nothing about those that the hook was called for.
    is_own = uri == SYSTEM
    if is_own and engine.platform.privileged:
        engine.heed_domains({one.uuid for one in domains}, now, free=False)
    records = engine.domains()
    guests = {one.lease.name: one for one in engine.look()}
    found = survey(domains, records, guests, engine.platform.is_open)
    gone = find_gone(domains, records, guests, engine.settings.libvirt_grace * _DAY, now) if is_own else []
    drift = [] if _is_hook_installed() else [_NO_HOOK]
    if as_json:
        told = [_domain_json(engine, domain, interfaces) for domain, interfaces in found]
        left = [_gone_json(one, now) for one in gone]
        say(json.dumps({"connect": uri, "domains": told, "gone": left, "drift": drift}))
        return
    rows = [row for domain, interfaces in found for row in _rows(domain, interfaces)]
    print_table([("DOMAIN", "STATE", "GUEST", "ADDRESS", "DEVICE", "IN"), *rows])
    for domain, interfaces in found:
        for one in interfaces:
            for what, hint in one.drift:
                say(f"{_shown(domain.name)}: {one.interface.device or one.interface.mac}: {what}; {hint}")
    for left_one in gone:
        until = "by vmnet delete alone" if left_one.until is None else f"after {_when(left_one.until)}"
        say(f"{left_one.record.name}: its domain, of UUID {left_one.record.uuid}, is gone; it is freed {until}")
    for one_drift in drift:
        say(f"{one_drift['what']}; {one_drift['hint']}")


def _is_hook_installed() -> bool:
    parts = [part for part in PARTS if part.name == "libvirt"]
    return all(one.state not in ("missing", "foreign") for one in look_at_files(parts, Call.from_here(), Path("/")))


def _rows(domain: Domain, interfaces: Sequence[Found]) -> list[tuple[str, ...]]:
    name = _shown(domain.name)
    if not interfaces:
        return [(name, domain.state, "-", "-", "-", "-")]
    return [
        (
            name, domain.state, one.interface.guest or "-", _address(one.seen) or "-", one.interface.device or "-",
            _where(live=one.live, config=one.config),
        )
        for one in interfaces
    ]  # fmt: skip


def _where(*, live: bool, config: bool) -> str:
    return " and ".join(word for word, is_in in (("live", live), ("config", config)) if is_in)


def _address(seen: Seen | None) -> str | None:
    return dotted(seen.lease.block.first + 2) if seen else None


def _domain_json(engine: Engine, domain: Domain, interfaces: Sequence[Found]) -> dict[str, Any]:
    return {
        "name": domain.name,
        "uuid": domain.uuid,
        "state": domain.state,
        "interfaces": [
            {
                "guest": one.interface.guest or None,
                "type": one.interface.type,
                "device": one.interface.device or None,
                "mac": one.interface.mac,
                "address": _address(one.seen),
                "hostname": f"{one.interface.guest}.{engine.settings.domain}" if one.interface.guest else None,
                "state": one.seen.state if one.seen else None,
                "live": one.live,
                "config": one.config,
                "drift": [drift._asdict() for drift in one.drift],
            }
            for one in interfaces
        ],
    }


def _gone_json(one: Gone, now: float) -> dict[str, Any]:
    return {
        "guest": one.record.name,
        "uuid": one.record.uuid,
        "mac": one.record.mac,
        "address": _address(one.seen),
        "since": _when(now if one.record.gone is None else one.record.gone),
        "until": None if one.until is None else _when(one.until),
    }


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _shown(name: str) -> str:
    """Return a domain's name, which may be anything, fit for a terminal."""
    return name if name.isprintable() else repr(name)


# attach and adopt


class Attaching:
    """Gives one domain an interface."""

    def __init__(self, engine: Engine, uri: str, domain: str, name: str | None) -> None:
        engine.platform.need_rights()
        self._engine, self._uri = engine, uri
        [found] = look(uri, domain)
        self._domain = found.known(engine.domains(), engine.guest_on)
        self._gift = self._plan(name)

    def _plan(self, name: str | None) -> Gift | None:
        """Return what is to be given; None where the domain is on the network vmnet, whose guests its hook makes."""
        ours = [one.guest for one, _, _ in self._domain.ours]
        if name is None and ours and not any(ours):
            return None
        return plan_attach(self._domain, name or next(filter(None, ours), "") or name_for(self._engine, self._domain))

    def preview(self) -> list[Op | GiveInterface]:
        """Return the steps."""
        return preview(self._engine, self._uri, [self._gift]) if self._gift else []

    def carry_out(self, *, as_json: bool) -> None:
        """Do it, and print what the domain has."""
        if self._gift:
            given = give(self._engine, self._uri, self._gift)
        else:
            is_open = self._engine.platform.is_open
            [found] = [found for _, found in survey([self._domain], self._engine.domains(), self._guests(), is_open)]
            given = Given(
                self._domain, found[0].seen.lease if found[0].seen else None, found[0].live, found[0].config, False
            )
        if as_json:
            say(json.dumps(_given_json(self._engine, given)))
        else:
            _print_given([given])

    def _guests(self) -> dict[str, Seen]:
        return {one.lease.name: one for one in self._engine.look()}


@dataclass
class Adopting:
    """Gives each domain on a network of libvirt's an interface, beside or instead of that one."""

    engine: Engine
    uri: str
    network: str
    instead: bool
    _gifts: list[Gift] = field(init=False, default_factory=list)
    _problems: dict[str, VmnetError] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.engine.platform.need_rights()
        if self.network == NETWORK:
            raise UsageError(f"the network {NETWORK} is vmnet's own", hint="name another one, such as default")
        domains = look(self.uri)
        if not any(one.is_on(self.network) for one in domains):
            known = networks(self.uri)
            if self.network not in known:
                raise UsageError(
                    f"libvirt has no network {self.network[:80]!r}", hint=f"it has {', '.join(known) or 'none'}"
                )
        for domain in domains:
            if not domain.is_on(self.network) or domain.ours:
                continue
            try:
                guest = name_for(self.engine, domain)
                if any(gift.guest == guest for gift in self._gifts):
                    raise Conflict(
                        f"another domain on {self.network} is to have the guest {guest}",
                        hint=f"call this again, or vmnet libvirt attach {shlex.quote(domain.name)} --name NAME",
                    )
                self._gifts += plan_adopt(domain, self.network, guest, instead=self.instead)
            except VmnetError as error:
                self._problems[domain.name] = error

    def preview(self) -> list[Op | GiveInterface]:
        """Return the steps that can be done; raises what is in the way where there is none."""
        gifts = []
        for gift in self._gifts:
            try:
                preview(self.engine, self.uri, [gift])
                gifts.append(gift)
            except VmnetError as error:
                self._problems[gift.domain.name] = error
        steps = preview(self.engine, self.uri, gifts)
        self._complain(raising=not steps)
        return steps

    def carry_out(self, *, as_json: bool) -> None:
        """Do what can be done, print it, and raise what could not."""
        given = []
        for gift in self._gifts:
            try:
                given.append(give(self.engine, self.uri, gift))
            except VmnetError as error:
                self._problems[gift.domain.name] = error
        if as_json and not self._problems:
            say(json.dumps([_given_json(self.engine, one) for one in given]))
        elif not as_json and given:
            _print_given(given)
        self._complain(raising=True)

    def _complain(self, *, raising: bool) -> None:
        problems = list(self._problems.items())
        for name, problem in problems[1:] if raising else problems:
            self.engine.report.warn(f"{_shown(name)}: {problem.message}")
        if raising and problems:
            raise problems[0][1]


def _given_json(engine: Engine, given: Given) -> dict[str, Any]:
    lease = given.lease
    return {
        "domain": given.domain.name,
        "uuid": given.domain.uuid,
        "guest": lease.name if lease else None,
        "device": lease.device if lease else None,
        "mac": lease.mac if lease else None,
        "address": dotted(lease.block.first + 2) if lease else None,
        "hostname": f"{lease.name}.{engine.settings.domain}" if lease else None,
        "live": given.live,
        "config": given.config,
        "changed": given.changed,
        "at_next_start": given.waits,
    }


def _print_given(given: Sequence[Given]) -> None:
    rows = []
    for one in given:
        done = "there already" if not one.changed else "at its next start" if one.waits else "done"
        lease = one.lease
        address = dotted(lease.block.first + 2) if lease else "-"
        rows.append((_shown(one.domain.name), lease.name if lease else "-", address, done))
    print_table([("DOMAIN", "GUEST", "ADDRESS", "DONE"), *rows])
