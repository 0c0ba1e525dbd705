"""How a service calls vmnet: after a reboot, from no folder in particular, with nobody's environment."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from vmnet.hooks.parts import ENVIRONMENT
from vmnet.model import HostLacks, UsageError
from vmnet.settings import Paths, Settings, load_settings


@dataclass(frozen=True, slots=True)
class Call:
    """The first words of a command, the variables to be set for it, and the settings that it finds.

    Raises UsageError for what no file of settings can hold: control characters, and bytes that are no text.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        for text in (*self.argv, *self.environment.values()):
            if not text.isprintable():
                raise UsageError(f"{text!r} cannot be written into a service's files", hint="give it another path")

    @classmethod
    def from_here(cls) -> "Call":
        """Return how to call this very vmnet, on the records that the environment names.

        By its interpreter: in a checkout bin/vmnet would install what a new version lacks, which is nothing for a
        machine that starts. -I, because a service has no folder, no PYTHONPATH and no home to take modules from.
        """
        settings = load_settings(Paths.from_environment().config)
        return cls((sys.executable, "-I", "-m", "vmnet"), _environment(), settings)

    def check(self) -> None:
        """Raise HostLacks where that does not run vmnet."""
        argv, words = (*self.argv, "--version"), ""
        try:
            done = subprocess.run(argv, cwd="/", env=ENVIRONMENT, capture_output=True, text=True, check=False)
            if done.returncode:
                words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        except OSError as error:
            words = str(error.strerror)
        if words:
            raise HostLacks(
                f"a service cannot run vmnet as {' '.join(self.argv)}: {words}",
                hint="install it for the whole machine: docs/how-to/install.md",
            )

    def owners(self) -> set[int]:
        """Return the uids, other than root's, that decide what is run: owners of the interpreter and of vmnet."""
        places = (self.argv[0], sys.prefix, os.path.dirname(__file__))
        return {os.stat(place).st_uid for place in places} - {0}


def _environment() -> dict[str, str]:
    """Return the variables that name other places than the defaults."""
    chosen, usual = Paths.from_environment(), Paths.from_environment({})
    places = {
        "VMNET_STATE_DIR": (chosen.state, usual.state),
        "VMNET_RUN_DIR": (chosen.run, usual.run),
        "VMNET_CONFIG": (chosen.config, usual.config),
        "VMNET_HOSTS_FILE": (chosen.hosts, usual.hosts),
    }
    return {
        name: os.path.abspath(place) if place else "" for name, (place, default) in places.items() if place != default
    }
