"""What the manual shows, run as it stands: each console session in a fresh laptop, its output compared."""

import re
import sys
import time
from pathlib import Path

import pytest

from tests.kernel.net import Laptop, need_own_etc

ROOT = Path(__file__).parents[2]
SESSIONS = [
    ("README.md", 0),
    ("README.md", 2),
    ("docs/how-to/native-mode.md", 0),
    ("docs/how-to/native-mode.md", 1),
    ("docs/how-to/secure-context.md", 0),
]


def session(page: str, number: int) -> list[tuple[str, list[str]]]:
    """Return the commands of a page's console session, each with the output that is shown."""
    block = re.findall(r"^```console\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)[number]
    steps: list[tuple[str, list[str]]] = []
    for line in block.replace("\\\n", "").splitlines():
        if line.startswith("$ "):
            steps.append((line[2:].partition("  #")[0].strip(), []))
        else:
            steps[-1][1].append(line)
    return steps


@pytest.fixture
def shell(laptop: Laptop) -> Laptop:
    """A laptop on which `vmnet` and `sudo` are commands, whose hosts file is the one that programs read."""
    need_own_etc()
    commands = laptop.folder / "bin"
    commands.mkdir()
    for name, line in (("vmnet", f'exec {sys.executable} -m vmnet "$@"'), ("sudo", 'exec "$@"')):
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    laptop.env["VMNET_HOSTS_FILE"] = "/etc/hosts"  # the laptop's own, a private copy
    return laptop


@pytest.mark.parametrize(("page", "number"), SESSIONS)
def test_a_session_of_the_manual_runs_as_it_stands(shell: Laptop, page: str, number: int) -> None:
    if number == 2:  # what it shows is a guest of the session before
        shell.vmnet("create", "web", "--netns", "web")
    replay(shell, page, number)


def replay(shell: Laptop, page: str, number: int, *, limit: float = 20) -> None:
    """Run a console session of the manual, and compare what it shows; what asks others may take `limit` seconds."""
    path = {"PATH": f"{shell.folder}/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    for command, shown in session(page, number):
        if command.endswith("&"):
            shell.start("env", f"PATH={path['PATH']}", "sh", "-c", f"cd / && {command[:-1]}")
            continue
        deadline = time.monotonic() + limit
        while True:
            done = shell.execute("sh", "-c", command, env=path)
            said = [line.rstrip() for line in done.out.splitlines()]
            # A server or a VM that was started a moment ago may need another one.
            done_well = said == shown if "curl" in command else done.code == 0 or not command.startswith("ping")
            if done_well or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        assert done.code == 0, f"{command}: {done.out}{done.err}"
        if shown:
            assert said == shown, command
