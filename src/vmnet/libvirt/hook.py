"""What libvirt calls when a domain or an interface of one comes and goes: vmnet in hooks/qemu.d and hooks/network.d.

Only `prepare` may fail: then the domain does not start, and the user is told. All else ends well whatever happens,
for libvirt kills a running domain whose `reconnect` fails. Nothing here ever asks libvirt, which waits for us.
(libvirt's page on hooks; folders of them since 6.5.0.)
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TypeAlias

from vmnet.engine import Engine
from vmnet.libvirt.domain import LARGEST, Domain, Interface, Port, is_our_network, label, parse_domain, parse_port
from vmnet.libvirt.element import need_tap
from vmnet.linux.platform import LinuxPlatform
from vmnet.model import Conflict, NoSuchGuest, UsageError, VmnetError
from vmnet.platform import Listener
from vmnet.settings import Paths, load_settings
from vmnet.specs import GuestSpec
from vmnet.store import DomainKey

_FAILED = 1


def main(arguments: list[str]) -> int:
    """Do what one call asks for; `arguments` are driver, domain or network, operation, sub-operation and extra.

    The script that runs this ends it by SIGTERM when its time is up, says so itself, and kills what does not end soon.
    """
    operation = arguments[2] if len(arguments) > 2 else ""
    act = _ACTS.get((arguments[0], operation)) if arguments else None
    if act is None:
        return 0
    late: list[int] = []

    def stop(number: int, _: object) -> None:
        late.append(number)
        raise VmnetError("the time is up")  # what was begun is undone

    signal.signal(signal.SIGTERM, stop)
    try:
        call = act(sys.stdin.buffer.read(LARGEST + 1))
        if call:
            paths = Paths.from_environment()
            with LinuxPlatform(paths.run) as platform:
                # What stands on stderr is for a domain that is not started.
                call(Engine(platform, load_settings(paths.config), paths, Listener()))
    except (VmnetError, OSError) as error:
        if operation == "prepare":
            if late:
                return _FAILED
            said = error.message if isinstance(error, VmnetError) else str(error)
            hint = f" ({error.hint})" if isinstance(error, VmnetError) and error.hint else ""
            print(f"vmnet: {said}{hint}".replace("\n", " ")[:2000], file=sys.stderr)
            return _FAILED
    return 0


def prepare(engine: Engine, domain: Domain) -> None:
    """Have the tap of each interface there, before qemu opens it; raises what keeps the domain from starting."""
    macs = {one.mac or "" for one in domain.interfaces}
    for one in domain.interfaces:
        key = DomainKey(domain.uuid, one.mac or "", domain.name)
        name = domain.guest_name(one, engine.guest_on) or engine.guest_for(key, _label(domain.name), macs)
        if one.managed:
            raise UsageError(
                f"libvirt would make the device {one.device} itself",
                hint=f"<target dev='{one.device}' managed='no'/>",
            )
        engine.claim(_spec(engine, name, one), key)
    engine.finish_removals()


def _label(domain: str) -> str:
    name = label(domain)
    if not name:
        raise UsageError(
            f"no guest's name can be made from the domain's, {domain!r}",
            hint="name the guest by the interface's device: <target dev='vmn-NAME'/>",
        )
    return name


def _spec(engine: Engine, name: str, one: Interface) -> GuestSpec:
    """Return what to create; of a guest that is there nothing but its kind and queues have to fit."""
    with suppress(NoSuchGuest):
        lease = engine.lease(name)
        need_tap(lease)
        if one.maker == "vmnet" and lease.queues != (one.queues or 1):
            raise Conflict(
                f"{name} has {lease.queues} queues, and the domain's interface {one.queues or 1}",
                hint=f"<driver queues='{lease.queues}'/>, or vmnet delete {name}",
            )
        return GuestSpec(name, kind="tap", address=one.address, maker=one.maker)
    return GuestSpec(
        name, kind="tap", mac=one.mac, mtu=one.mtu, queues=one.queues, address=one.address, maker=one.maker
    )


def _names(engine: Engine, domain: Domain) -> Iterator[str]:
    """Yield the names of a domain's guests that are there."""
    for one in domain.interfaces:
        with suppress(UsageError):
            name = domain.guest_name(one, engine.guest_on)
            if name:
                yield name
            elif lease := engine.guest_of(domain.uuid, one.mac or ""):
                yield lease.name


def release(engine: Engine, domain: Domain) -> None:
    """Take the taps of a domain that has ended away, and keep the records."""
    for name in _names(engine, domain):
        with suppress(NoSuchGuest):
            engine.unclaim(name, domain.uuid)


def repair(engine: Engine, domain: Domain) -> None:
    """Put right what has changed while nobody looked, and take over the taps that libvirt has just made."""
    engine.keep(list(_names(engine, domain)), orphans=False)


def plug(engine: Engine, port: Port) -> None:
    """Have the record there of an interface that libvirt makes: before its domain starts, or while that runs.

    At a start `prepare` came before; and there is nothing to do when libvirtd has started anew.
    """
    lease = engine.guest_of(port.uuid, port.mac)
    if lease is None or lease.wish != "up":
        key = DomainKey(port.uuid, port.mac, port.domain)
        name = engine.guest_for(key, _label(port.domain), None)
        engine.claim(GuestSpec(name, kind="tap", mac=None if lease else port.mac, maker="libvirt"), key)


def unplug(engine: Engine, port: Port) -> None:
    """Keep the record of an interface that is gone."""
    lease = engine.guest_of(port.uuid, port.mac)
    if lease:
        engine.unclaim(lease.name, port.uuid)


def begin(engine: Engine) -> None:
    """Have the bridge there as long as the network is active."""
    engine.keep_bridge(wanted=True)


def end(engine: Engine) -> None:
    """Take the bridge away with the network."""
    engine.keep_bridge(wanted=False)


_Call: TypeAlias = Callable[[Engine], None]


def _for_domain(act: Callable[[Engine, Domain], None], xml: bytes) -> _Call | None:
    domain = parse_domain(xml)
    return (lambda engine: act(engine, domain)) if domain.interfaces else None


def _for_port(act: Callable[[Engine, Port], None], xml: bytes) -> _Call | None:
    port = parse_port(xml)
    return (lambda engine: act(engine, port)) if port else None


def _for_network(act: _Call, xml: bytes) -> _Call | None:
    return act if is_our_network(xml) else None


_ACTS: dict[tuple[str, str], Callable[[bytes], _Call | None]] = {
    ("qemu", "prepare"): partial(_for_domain, prepare),
    ("qemu", "start"): partial(_for_domain, repair),
    ("qemu", "reconnect"): partial(_for_domain, repair),
    ("qemu", "release"): partial(_for_domain, release),
    ("network", "start"): partial(_for_network, begin),
    ("network", "stopped"): partial(_for_network, end),
    ("network", "port-created"): partial(_for_port, plug),
    ("network", "port-deleted"): partial(_for_port, unplug),
}
