"""What libvirt calls when a domain comes and goes: hooks/qemu.d/vmnet (libvirt's hooks page, since 6.5.0).

Only `prepare` may fail: then the domain does not start, and the user is told. All else ends well whatever happens,
for libvirt kills a running domain whose `reconnect` fails. Nothing here ever asks libvirt, which waits for us.
"""

import signal
import sys
from contextlib import suppress

from vmnet.engine import Engine
from vmnet.libvirt.domain import LARGEST, Domain, Interface, parse_domain
from vmnet.linux.platform import LinuxPlatform
from vmnet.model import Conflict, NoSuchGuest, UsageError, VmnetError
from vmnet.platform import Listener
from vmnet.settings import Paths, load_settings
from vmnet.specs import GuestSpec
from vmnet.store import DomainKey

_LIMIT = 5  # seconds
_FAILED = 1


def main(arguments: list[str]) -> int:
    """Do what one call asks for; `arguments` are driver, domain, operation, sub-operation and extra."""
    operation = arguments[2] if len(arguments) > 2 else ""
    act = {"prepare": prepare, "release": release, "reconnect": repair}.get(operation)
    if act is None or arguments[0] != "qemu":
        return 0
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(_LIMIT)
    try:
        domain = parse_domain(sys.stdin.buffer.read(LARGEST + 1))
        if domain.interfaces:
            paths = Paths.from_environment()
            with LinuxPlatform() as platform:
                # What stands on stderr is for a domain that is not started.
                act(Engine(platform, load_settings(paths.config), paths, Listener()), domain)
    except (VmnetError, OSError) as error:
        if operation == "prepare":
            said = error.message if isinstance(error, VmnetError) else str(error)
            hint = f" ({error.hint})" if isinstance(error, VmnetError) and error.hint else ""
            print(f"vmnet: {said}{hint}".replace("\n", " ")[:2000], file=sys.stderr)
            return _FAILED
    finally:
        signal.alarm(0)  # the end of the interpreter, which hears no signal, is not to be cut off
    return 0


def _too_late(*_: object) -> None:
    raise VmnetError(f"vmnet was not done after {_LIMIT} s", hint="another vmnet may hold its lock: try again")


def prepare(engine: Engine, domain: Domain) -> None:
    """Have the tap of each interface there, before qemu opens it; raises what keeps the domain from starting."""
    for one in domain.interfaces:
        name = domain.guest_name(one)
        if one.managed:
            raise UsageError(
                f"libvirt would make the device {one.device} itself",
                hint=f"<target dev='{one.device}' managed='no'/>",
            )
        engine.claim(_spec(engine, name, one), DomainKey(domain.uuid, one.mac or ""))


def _spec(engine: Engine, name: str, one: Interface) -> GuestSpec:
    """Return what to create; of a guest that is there nothing but its kind and queues have to fit."""
    with suppress(NoSuchGuest):
        lease = engine.lease(name)
        if lease.queues != (one.queues or 1):
            raise Conflict(
                f"{name} has {lease.queues} queues, and the domain's interface {one.queues or 1}",
                hint=f"<driver queues='{lease.queues}'/>, or vmnet delete {name}",
            )
        return GuestSpec(name, kind="tap")
    return GuestSpec(name, kind="tap", mac=one.mac, mtu=one.mtu, queues=one.queues)


def release(engine: Engine, domain: Domain) -> None:
    """Take the taps of a domain that has ended away, and keep the records."""
    for one in domain.interfaces:
        with suppress(UsageError, NoSuchGuest):
            engine.unclaim(domain.guest_name(one), domain.uuid)


def repair(engine: Engine, domain: Domain) -> None:
    """Put right what has changed while nobody looked."""
    names = []
    for one in domain.interfaces:
        with suppress(UsageError):
            names.append(domain.guest_name(one))
    engine.keep(names, orphans=False)
