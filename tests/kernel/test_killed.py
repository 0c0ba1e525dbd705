"""Nothing breaks: vmnet is killed at each system call that changes anything, and the next look puts it right.

A first run under strace tells which calls those are; then, for each of them, in a fresh laptop, the command is killed
just before it. The states between two changes are all there are, so that is every crash. After each of them `vmnet
list` tells no lie, `vmnet up` converges, and after `delete --all` and `restore` no trace is left.

The normal run takes a sample, spread over the kinds of calls and of files; `--long` takes them all.
"""

import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.kernel.alive import Guests, Talk
from tests.kernel.net import Lab, Result, why_no_tap
from tests.kernel.warm import Warm

SEED = 127
SAMPLE = 3
SIGKILLED = 137
PREMADE = "pre"
BY_FILE = (
    "openat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "fchmod", "fchown", "chmod", "rename", "unlink",
    "mkdir", "rmdir",
)  # fmt: skip
"""Calls that are about one file; which of them strace is to count is told by its path."""
BY_ORDER = ("sendto", "sendmsg", "ioctl", "mount", "umount2", "unshare", "setns", "execve")
OF_CHILDREN = ("execve", "sendmsg", "unshare")
"""What nft does, and what is done to start it; the rest of its calls only ask."""
_LINE = re.compile(r"(?P<pid>\d+) +(?P<call>\w+)\((?P<arguments>.*)")
_FILE = re.compile(r'(?:\d+<(?P<open>/[^>]+)>|(?:AT_FDCWD<[^>]*>, )?"(?P<named>/[^"]+)")')
_OF_PROCESS = re.compile(r"\.\d+$")
_NETLINK_TYPE = re.compile(r"nlmsg_type=(?P<kind>0x[0-9a-f]+|[^,]+)")

Command: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Scenario:
    """A command to be killed, and those before it; with `bystander` another guest is there, and must not notice."""

    command: Command
    before: tuple[Command, ...] = ()
    bystander: bool = False


@dataclass(frozen=True)
class Point:
    """The `number`th `call` of the command itself, or of the first of its children to come so far.

    Calls about a file are counted for each `path`, in the test's folder or absolute; `what` says it shortly.
    """

    call: str
    number: int
    what: str
    path: str = ""
    child: bool = False

    def __str__(self) -> str:
        return f"{'child ' if self.child else ''}{self.call} #{self.number} ({self.what})"

    def strace(self, folder: Path) -> list[str]:
        """Return the options that have strace kill there, before the call has done anything."""
        options = ["-e", f"trace={self.call}", "-e", f"inject={self.call}:signal=KILL:when={self.number}"]
        options += ["-P", str(folder / self.path)] if self.path else []
        return ["-f", *options] if self.child else options


CREATE: dict[str, Command] = {
    "veth": ("create", "g", "--kind", "veth"),
    "premade": ("create", "g", "--netns", PREMADE, "--mapped"),
    "tap": ("create", "g", "--kind", "tap"),
    "tun": ("create", "g", "--kind", "tun"),
}


def _scenarios() -> dict[str, Scenario]:
    many = ("a", "b", "c", "--kind", "veth")
    found = {
        "carve": Scenario(("carve",)),
        "create-many": Scenario(("create", *many)),
        "delete-many": Scenario(("delete", "--all"), (("create", *many),)),
    }
    for kind, create in CREATE.items():
        found |= {
            f"create-{kind}": Scenario(create),
            f"delete-{kind}": Scenario(("delete", "g"), (create,), bystander=True),
            f"down-{kind}": Scenario(("down", "g"), (create,), bystander=True),
            f"up-{kind}": Scenario(("up",), (create, ("down",))),
            f"restore-{kind}": Scenario(("restore",), (create,)),
        }
    return found


SCENARIOS = _scenarios()


@pytest.fixture(autouse=True)
def _strace(_namespaces: str | None) -> None:
    if _namespaces is not None:
        pytest.skip(_namespaces)
    if shutil.which("strace") is None:
        pytest.skip("strace is missing")


def _points(trace: Sequence[str], folder: Path) -> list[Point]:
    """Return where a command that strace recorded can be killed: itself at each call, its children at a few."""
    itself = trace[0].split()[0]
    counts: Counter[tuple[str, str, str]] = Counter()
    found: dict[Point, None] = {}
    for line in trace:
        parts = _LINE.match(line)
        if parts is None:
            continue
        pid, call, arguments = parts.groups()
        file = _FILE.match(arguments) if call in BY_FILE else None
        path = (file["open"] or file["named"]).replace(f"{folder}/", "") if file else ""
        what = _about(call, arguments, path)
        if _OF_PROCESS.search(path):
            path = ""  # it is called otherwise in the next process
        counts.update({(pid, call, path), (pid, call, "")})
        number = counts[pid, call, path]
        if pid != itself and call in OF_CHILDREN:
            found[Point(call, number, call, child=True)] = None
        # The kernel restarts a write to a sysctl as often as it finds its lock taken.
        if pid == itself and what and not (path.startswith("/proc/sys") and number > 1):
            found[Point(call, number, what, path)] = None
    return list(found)


def _about(call: str, arguments: str, path: str) -> str:
    """Say what a call changes; an empty string for nothing that outlives the process."""
    if path:
        return "" if call == "openat" and "O_CREAT" not in arguments else _OF_PROCESS.sub("", path.rpartition("/")[2])
    match call:
        case "ioctl":
            return arguments.split(", ")[1] if "TUNSET" in arguments else ""
        case "sendto" | "sendmsg":
            kind = _NETLINK_TYPE.search(arguments)
            # Requests of rtnetlink come in fours, new, del, get, set; strace has no name for them in all sockets.
            asks = kind is None or "GET" in kind[1] or (kind[1].startswith("0x") and int(kind[1], 16) & 3 == 2)
            return "" if kind is None or asks else kind[1]
        case "mount" | "umount2" | "unshare" | "setns":
            return call
    return ""


def _sample(points: Sequence[Point], size: int, seed: str) -> list[Point]:
    """Return `size` points of as many kinds as there are."""
    dice = random.Random(f"{SEED} {seed}")
    kinds: dict[tuple[bool, str, str], list[Point]] = {}
    for point in points:
        kinds.setdefault((point.child, point.call, point.what), []).append(point)
    turns = [dice.sample(kind, len(kind)) for kind in kinds.values()]
    dice.shuffle(turns)
    return [point for turn in zip_longest(*turns) for point in turn if point][:size]


class Crash:
    """One laptop in which one command is killed."""

    def __init__(self, warm: Warm, lab: Lab, scenario: Scenario) -> None:
        self.warm, self.lab, self.laptop, self.scenario = warm, lab, lab.laptop, scenario
        self.laptop.run("ip", "netns", "add", PREMADE)
        # The kernel numbers a namespace as soon as a device leads to it, and never takes the number back.
        self.laptop.run("ip", "netns", "set", PREMADE, "1")
        self.start = self.snapshot()
        self.alive = Guests(lab)
        self.talk: Talk | None = None
        if scenario.bystander:
            self.vmnet("create", "bystander", "--kind", "veth")
            self.talk = self.alive.talk(self.guests()[0])
        for command in scenario.before:
            self.vmnet(*command)

    def vmnet(self, *args: str, check: bool = True, strace: Sequence[str] = ()) -> Result:
        return self.warm.vmnet(self.laptop, *args, check=check, strace=strace)

    def guests(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.vmnet("list", "--json").json
        return found

    def snapshot(self) -> dict[str, str]:
        """Return all that the laptop shows, the namespace that somebody else made included."""
        shown = self.laptop.snapshot()
        for what in ("-d link", "addr", "route show table all", "neigh show nud permanent", "rule"):
            shown[f"{PREMADE}: {what}"] = self.laptop.run("ip", "-n", PREMADE, *what.split())
        return shown

    def points(self, *command: str) -> list[Point]:
        """Run a command and return where it can be killed."""
        trace = self.laptop.folder / "trace"
        calls = ",".join((*BY_FILE, *BY_ORDER))
        self.vmnet(*command, strace=["-f", "-y", "-o", str(trace), "-e", f"trace={calls}"])
        lines = trace.read_text().splitlines()
        trace.unlink()
        return _points(lines, self.laptop.folder)

    def kill(self, *command: str, at: Point) -> bool:
        """Run a command and have it killed; tell whether it came that far."""
        result = self.vmnet(*command, check=False, strace=at.strace(self.laptop.folder))
        assert "Traceback" not in result.err, result.err
        # A child that is killed is an error like others; it may even be one that does not matter.
        assert result.code in ((0, 1) if at.child else (0, SIGKILLED)), result
        return at.child or result.code != 0

    def check(self) -> None:
        """Assert what must hold after a command was killed."""
        links = self.laptop.links()
        for info in self.guests():
            assert (info["state"] == "down") == (info["device"] not in links), info
            assert info["state"] != "up" or self.alive.work(info), f"{info['name']} is said to be up"
        if self.talk:
            self.talk.goes_on()

    def heal(self) -> None:
        """Assert that `up` converges."""
        self.vmnet("up")
        plan = self.vmnet("plan", check=False)
        assert (plan.code, plan.out) == (0, "")
        for info in self.guests():
            assert info["state"] == "up", info
            assert self.alive.work(info), f"{info['name']} does not answer"
        if self.talk:
            self.talk.goes_on()

    def leave(self) -> None:
        """Assert that no trace is left."""
        self.alive.stop()
        self.vmnet("delete", "--all")
        self.vmnet("restore")
        assert self.snapshot() == self.start
        assert self.guests() == []
        folder = self.laptop.folder
        assert _names(self.laptop.path("/run/netns")) == {PREMADE}
        assert _names(folder) == {"hosts", "state", "run"}
        assert _names(folder / "state") - {"dhcp.leases"} == {"vmnet.db", "vmnet.db-journal"}
        kept = {path.name for path in folder.glob("run/nftables-*.listing")}
        assert len(kept) <= 1
        kept |= {
            path.name for path in folder.glob("run/*nftables.seen*")
        }  # of a killed one under its partial name, too
        assert _names(folder / "run") - kept <= {"host.lock", "guests.lock", "answers.lock"}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextmanager
def _crash(warm: Warm, folder: Path, scenario: Scenario) -> Iterator[Crash]:
    folder.mkdir()
    with Lab(folder) as lab:
        yield Crash(warm, lab, scenario)


def _survives(warm: Warm, folder: Path, scenario: Scenario, *kills: tuple[Command, Point]) -> bool:
    """Assert that all is well after commands were killed one after the other; tell whether all of them were."""
    killed = True
    try:
        with _crash(warm, folder, scenario) as crash:
            for command, point in kills:
                killed &= crash.kill(*command, at=point)
                crash.check()
            crash.heal()
            crash.leave()
    except BaseException as error:
        error.add_note("; ".join(f"{' '.join(command)} was killed at {point}" for command, point in kills))
        raise
    return killed


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_command_is_put_right_by_up(
    name: str, warm: Warm, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    scenario = SCENARIOS[name]
    if name.endswith(("-tap", "-tun")) and (reason := why_no_tap()):
        pytest.skip(reason)
    with _crash(warm, tmp_path / "trace", scenario) as crash:
        points = crash.points(*scenario.command)
    if not pytestconfig.getoption("--long"):
        points = _sample(points, SAMPLE, name)
    killed = [
        _survives(warm, tmp_path / f"{number}", scenario, (scenario.command, point))
        for number, point in enumerate(points)
    ]
    # A new namespace may have the number of the old one by chance: then there is a transaction less.
    assert sum(killed) * 4 >= len(points) * 3


@pytest.mark.parametrize("kind", CREATE)
def test_a_healing_that_is_killed_too_is_put_right(
    kind: str, warm: Warm, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    if kind in ("tap", "tun") and (reason := why_no_tap()):
        pytest.skip(reason)
    scenario = Scenario(CREATE[kind])
    size = 6 if pytestconfig.getoption("--long") else 2
    with _crash(warm, tmp_path / "trace", scenario) as crash:
        firsts = _sample(crash.points(*scenario.command), size, f"first {kind}")
    for first in firsts:
        with _crash(warm, tmp_path / f"trace {first}", scenario) as crash:
            crash.kill(*scenario.command, at=first)
            seconds = _sample(crash.points("up"), size, f"second {kind} {first}")
        for second in seconds:
            _survives(warm, tmp_path / f"{first}, {second}", scenario, (scenario.command, first), (("up",), second))
