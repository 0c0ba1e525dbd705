"""Ask libvirt, in a process that is ended when it takes too long: whatever libvirtd does, vmnet goes on.

Not to be called while any lock of vmnet's is held: a hook that libvirt waits for may want that lock.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vmnet.libvirt.interfaces import Domain
from vmnet.model import HostLacks, KernelRefused, NoSuchGuest, NotPermitted, VmnetError

SYSTEM = "qemu:///system"
LIMIT = 30.0  # seconds; the first connection to a libvirtd that has just been installed takes 8 s
_SYSTEM_PYTHON = "/usr/bin/python3"


class NoAnswer(KernelRefused):
    """libvirt did not answer in time: whether it did what it was asked to is not known."""


def client(*arguments: str) -> list[str]:
    """Return the command that talks to libvirt, by this Python or, if it has no libvirt-python, by the system's.

    A checkout's .venv sees none of the system's packages, and what is put into it goes when it is made anew.
    """
    # No way looks into the current folder, which may have a libvirt.py of anybody's.
    if find_spec("libvirt") is None and os.access(_SYSTEM_PYTHON, os.X_OK):
        return [_SYSTEM_PYTHON, "-I", str(Path(__file__).with_name("client.py")), *arguments]
    return [sys.executable, "-I" if sys.flags.isolated else "-P", "-m", "vmnet.libvirt.client", *arguments]


def ask(uri: str, do: str, **more: Any) -> Any:
    """Return what libvirt answers; raises what keeps it from that: HostLacks, NotPermitted, KernelRefused."""
    try:
        done = subprocess.run(
            client("ask", uri),
            input=json.dumps({"do": do, **more}),
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(
            f"libvirt at {uri} did not answer within {LIMIT:g} s", hint="see what libvirtd does; then try again"
        ) from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        words = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise KernelRefused(f"libvirt at {uri} could not be asked: {words}") from None
    if "error" in answer:
        raise _explained(uri, answer["error"]["kind"], answer["error"]["words"])
    return answer["done"]


def _explained(uri: str, kind: str, words: str) -> VmnetError:
    match kind:
        case "lacks":
            return HostLacks(
                f"libvirt-python is missing: {words}",
                hint="install it: apt-get install python3-libvirt (or your system's package)",
            )
        case "connect":
            hint = "systemctl start libvirtd" if uri == SYSTEM else f"--connect is {SYSTEM} by default"
            return HostLacks(f"libvirt at {uri} cannot be reached: {words}", hint=hint)
        case "denied":
            hint = "run it with sudo" if os.geteuid() else ""
            return NotPermitted(f"libvirt at {uri} does not permit it: {words}", hint=hint)
        case "missing":
            return NoSuchGuest(f"libvirt at {uri}: {words}", hint="virsh list --all shows those there are")
    return KernelRefused(f"libvirt at {uri} refuses: {words}")


def look(uri: str, domain: str | None = None) -> list[Domain]:
    """Return libvirt's domains in the order of their names, or the one of that name or UUID; raises as `ask` does."""
    more = {} if domain is None else {"domain": domain}
    return sorted((Domain.read(told) for told in ask(uri, "look", **more)), key=lambda one: one.name)


def networks(uri: str) -> list[str]:
    """Return the names of libvirt's networks."""
    found: list[str] = ask(uri, "networks")
    return found
