"""Run the system's programs, each within a time."""

import os
import subprocess
from typing import NamedTuple

from vmnet.model import HostLacks, KernelRefused
from vmnet.ondisk import find_program

_SYSTEMS = "/sbin:/usr/sbin:/bin:/usr/bin"  # also for a caller, such as cron, whose PATH has no sbin
_PATIENCE = 5.0  # seconds; a call of ifconfig takes about a millisecond


class Done(NamedTuple):
    """How a program ended."""

    code: int
    out: str
    err: str


def find(name: str) -> str:
    """Return where a program is, by PATH first; raises HostLacks without one."""
    path = ":".join(filter(None, [os.environ.get("PATH", ""), _SYSTEMS]))
    found = find_program(name, path)
    if found is None:
        raise HostLacks(f"{name} is missing, in {path}", hint="it comes with macOS and with FreeBSD: mend PATH")
    return found


def environment() -> dict[str, str]:
    """Return the environment of programs, whose messages are to be the C library's own."""
    return {**os.environ, "LC_ALL": "C"}


def call(*argv: str) -> Done:
    """Run a program to its end; raises HostLacks without it, KernelRefused where its time is up."""
    try:
        done = subprocess.run(
            [find(argv[0]), *argv[1:]],
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise KernelRefused(
            f"{' '.join(argv)} was not done within {_PATIENCE:g} s", hint="try again; vmnet plan says what is left"
        ) from None
    except OSError as error:
        raise KernelRefused(f"{argv[0]} cannot be run: {error.strerror}") from None
    return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace").strip())
