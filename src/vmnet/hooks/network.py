"""The network `vmnet` of libvirt's, which templates/libvirt/network.xml is: look at it, make it, take it away.

A network of that name on another bridge is somebody else's, and left alone.
"""

import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, TypeAlias
from xml.etree import ElementTree

from vmnet.hooks.install import Run
from vmnet.hooks.parts import ProgramFailed, ask

State: TypeAlias = Literal["missing", "current", "stopped", "foreign", "unknown"]
"""There is none; it is there at every boot; it is there, but does not run or would not at boot; it is somebody else's;
libvirt does not answer."""

NAME = "vmnet"
_VIRSH = ("virsh", "--connect", "qemu:///system")
_PATIENCE = 10  # seconds for an answer


@dataclass(frozen=True, slots=True)
class Network:
    """How the network is: `words` is why that is unknown, `users` are the names of domains on a network of ours."""

    state: State
    active: bool = False
    words: str = ""
    users: tuple[str, ...] = ()


def look() -> Network:
    """Ask libvirt."""
    try:
        if NAME not in _ask("net-list", "--all", "--name").split():
            return Network("missing")
        if _form(_ask("net-dumpxml", "--inactive", NAME)) != _form(_template()):
            return Network("foreign")
        info = dict(re.findall(r"^(\w+): *(\w+)$", _ask("net-info", NAME), re.MULTILINE))
        active = info.get("Active") == "yes"
        state: State = "current" if active and info.get("Autostart") == "yes" else "stopped"
        return Network(state, active, users=_users())
    except ProgramFailed as error:
        return Network("unknown", words=str(error))


def plan_install(network: Network) -> list[Run]:
    """Return the steps that define, start and autostart it; all of them where it is unknown, for a person to type."""
    if network.state in ("current", "foreign"):
        return []
    steps = []
    if network.state != "stopped":
        steps.append(Run((*_VIRSH, "net-define", "/dev/stdin"), _template()))
    if not network.active:
        steps.append(Run((*_VIRSH, "net-start", NAME)))
    return [*steps, Run((*_VIRSH, "net-autostart", NAME))]


def plan_uninstall(network: Network) -> list[Run]:
    """Return the steps that take it away; all of them where it is unknown or has users, for a person to type."""
    if network.state in ("missing", "foreign"):
        return []
    stop = [Run((*_VIRSH, "net-destroy", NAME))] if network.active or network.state == "unknown" else []
    return [*stop, Run((*_VIRSH, "net-undefine", NAME))]


def _ask(*words: str) -> str:
    return ask((*_VIRSH, "--quiet", *words), patience=_PATIENCE)


def _template() -> str:
    return (files("vmnet") / "templates/libvirt/network.xml").read_text()


def _form(xml: str) -> tuple[str | None, ...]:
    root = ElementTree.fromstring(xml)  # noqa: S314 -- libvirt wrote it
    places = (("forward", "mode"), ("bridge", "name"))
    return tuple(found.get(key) if (found := root.find(tag)) is not None else None for tag, key in places)


def _users() -> tuple[str, ...]:
    """Return the names of the domains that are on it, now or at their next start."""
    names = set()
    for uuid in _ask("list", "--all", "--uuid").split():
        for xml in (_ask("dumpxml", uuid), _ask("dumpxml", "--inactive", uuid)):
            root = ElementTree.fromstring(xml)  # noqa: S314 -- libvirt wrote it
            if root.find(f"devices/interface/source[@network='{NAME}']") is not None:
                names.add(root.findtext("name", uuid))
    return tuple(sorted(names))
