"""A Mac to run vmnet on: its system commands are fakes, its files are the test's own, and nobody needs root.

    def test_a_guest_has_an_alias(mac: Mac) -> None:
        mac.vmnet("create", "web")                      # the darwin backend, by a fork of a vmnet that has started
        assert mac.aliases() == {"127.0.0.1": 0xFF000000, "127.1.0.2": 0xFFFFFFFF}
        assert mac.calls("ifconfig")[-1][1:] == ["lo0", "alias", "127.1.0.2", "netmask", "255.255.255.255"]

- `mac.state` is the whole state (`fakes/state.py` says what is in it), `mac.set(uid=501, sticky_mask=True)` changes
  fields of it, and `with mac.changed() as state:` anything, with no command in between.
- `mac.fail("ifconfig lo0 alias", stderr="...", rc=1, times=2, partial=True)` has commands fail.
- `mac.run("ifconfig", "lo0")` runs any program there, and `mac.start(...)` leaves it running, until the test ends at
  the latest. `mac.start(*mac.command_line, "watch")` is vmnet in a process of its own.
- `mac.begin("up")` starts vmnet and returns at once; `.wait()` gives the Result: for some at the same time.
"""

import os
import shlex
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.darwin.fakes.state import STATE_FILE, State, held, read
from tests.kernel.net import SOURCES, Result
from tests.kernel.warm import Call, Program, Warm

FAKES = Path(__file__).parent / "fakes"
_CHECKOUT = Path(__file__).parents[2]
_NOT_OURS = ("VMNET_", "SUDO_", "NOTIFY_", "FAKE_MAC_")


class Mac:
    """The machine; a context manager that ends what still runs on it."""

    namespaces: tuple[str, ...] = ()
    command_line = (sys.executable, "-m", "vmnet")

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder = folder
        self.hosts_file = folder / "hosts"
        self.hosts_file.write_text("127.0.0.1 localhost\n")
        self._warm = warm
        self._state = str(folder / "mac.json")
        self._started: list[subprocess.Popen[str]] = []
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)},
            "PATH": os.pathsep.join([str(_programs(folder / "bin")), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            STATE_FILE: self._state,
            "VMNET_PLATFORM": "darwin",
            "VMNET_STATE_DIR": str(folder / "state"),
            "VMNET_RUN_DIR": str(folder / "run"),
            "VMNET_CONFIG": str(folder / "config.toml"),
            "VMNET_HOSTS_FILE": str(self.hosts_file),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._started:
            with process:
                process.kill()

    @property
    def state(self) -> State:
        """All there is, as it is now; nothing comes of changing it."""
        return read(self._state)

    def changed(self) -> AbstractContextManager[State]:
        """Hold the state; what is changed in it is so at the end of the context."""
        return held(self._state)

    def set(self, **fields: Any) -> None:
        """Change fields of the state."""
        with self.changed() as state:
            state.update(fields)

    def fail(self, match: str, *, stderr: str = "", rc: int = 1, times: int = 1, partial: bool = False) -> None:
        """Have commands fail whose argv, joined, has the regular expression; with `partial` they do it all the same."""
        with self.changed() as state:
            state["fail"].append({"match": match, "times": times, "rc": rc, "stderr": stderr, "partial": partial})

    def calls(self, name: str = "") -> list[list[str]]:
        """Return every argv so far, or those of one command."""
        return [argv for argv in self.state["calls"] if name in ("", argv[0])]

    def aliases(self, link: str = "lo0") -> dict[str, int]:
        """Return the mask of each IPv4 address of a link, in their order there."""
        return {one["addr"]: one["mask"] for one in self.state["ifaces"][link]["addrs"] if one["fam"] == "inet"}

    def run(self, *argv: str, stdin: str = "") -> Result:
        """Run a program to its end."""
        done = subprocess.run(argv, env=self.env, cwd=self.folder, input=stdin, capture_output=True, text=True)
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """Start a program and return at once; it is killed at the end at the latest."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(argv, env=self.env, cwd=self.folder, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._started.append(process)
        return process

    def begin(self, *args: str) -> Call | Program:
        """Start the command line and return at once."""
        return self._warm.start(self, *args)

    def vmnet(self, *args: str, check: bool = True) -> Result:
        """Run the command line; with `check` another exit code than 0 fails the test."""
        return self._warm.vmnet(self, *args, check=check)


def _programs(folder: Path) -> Path:
    """Make a program of each fake, and return `folder`, where they are."""
    folder.mkdir()
    python = [sys.executable, "-I", "-S"]
    if sys.pycache_prefix is not None:
        python += ["-X", f"pycache_prefix={sys.pycache_prefix}"]
    for name in sorted(path.stem for path in FAKES.glob("*.py") if path.stem != "state"):
        program = (
            f"import sys; sys.path.append({str(_CHECKOUT)!r}); "
            f"from tests.darwin.fakes.{name} import main; from tests.darwin.fakes.state import run; run({name!r}, main)"
        )
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec {shlex.join([*python, "-c", program])} "$@"\n')
        file.chmod(0o755)
    return folder
