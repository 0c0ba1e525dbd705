"""Where benchmarks happen: laptops out of namespaces, and programs run in them with a watch beside.

A laptop is a network and a mount namespace with a /run of its own. It is held by two descriptors, so nothing of it
outlives this process; the machine's own network is never touched.
"""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vmnet.linux.places import CLONE_NEWNET, CLONE_NEWNS, NAMED, Places, mount, setns, unshare

_MS_PRIVATE, _MS_REC = 1 << 18, 16384
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_SETTLE_STEP = 0.005  # seconds
OUTSIDE = "198.51.100.2"


class Failed(Exception):
    """A program that was measured did not do its work; the message has its words."""


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds by the clock, and seconds of processor time of the program and all that it waited for."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: "Took") -> "Took":
        return Took(self.wall + other.wall, self.cpu + other.cpu)

    def __truediv__(self, count: int) -> "Took":
        return Took(self.wall / count, self.cpu / count)


@dataclass(frozen=True, slots=True)
class Command:
    """A program to be run: what it is called with, what it reads and what its environment has beyond PATH."""

    argv: Sequence[str]
    stdin: Path = Path(os.devnull)
    environment: Mapping[str, str] = field(default_factory=dict)


class Laptop:
    """One host: `folder`, on a real disk, is for what programs keep on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._errors = folder / "stderr"
        self._home = [(_open_namespace("mnt"), CLONE_NEWNS), (_open_namespace("net"), CLONE_NEWNET)]
        unshare(CLONE_NEWNET | CLONE_NEWNS)
        mount("", "/", None, _MS_PRIVATE | _MS_REC)
        mount("tmpfs", "/run", "tmpfs", 0)
        NAMED.mkdir()
        self._own = [(_open_namespace("mnt"), CLONE_NEWNS), (_open_namespace("net"), CLONE_NEWNET)]
        self._places = Places()
        self._leave()
        self.run(Command(["ip", "link", "set", "lo", "up"]))

    def close(self) -> None:
        """Let go of the namespaces: the kernel takes them away with all that is in them."""
        self._places.close()
        for handle, _ in [*self._home, *self._own]:
            os.close(handle)

    def _leave(self) -> None:
        for handle, kind in self._home:
            setns(handle, kind)
        os.chdir("/")

    @contextmanager
    def entered(self, netns: str | None = None) -> Iterator[None]:
        """Do the body inside; `netns` is the name of a namespace in it."""
        for handle, kind in self._own:
            setns(handle, kind)
        try:
            if netns:
                handle = os.open(NAMED / netns, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    setns(handle, CLONE_NEWNET)
                finally:
                    os.close(handle)
            yield
        finally:
            self._leave()

    def make_netns(self, name: str) -> str:
        """Make a named namespace, its lo up, and return the path to it."""
        with self.entered():
            path = str(NAMED / name)
            self._places.make(path, "")
            self._places.forget(path)
            return path

    def drop_netns(self, name: str) -> None:
        """Take a named namespace away."""
        with self.entered():
            self._places.delete(str(NAMED / name))

    def start(self, command: Command, *, netns: str | None = None, output: Path = Path(os.devnull)) -> int:
        """Start a program and return its process id."""
        write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with self.entered(netns):
            return os.posix_spawnp(
                command.argv[0],
                list(command.argv),
                {"PATH": _PATH, "LC_ALL": "C", **command.environment},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, str(command.stdin), os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, str(output), write, 0o600),
                    (os.POSIX_SPAWN_OPEN, 2, str(self._errors), write, 0o600),
                ],
            )

    def run(
        self, command: Command, *, netns: str | None = None, output: Path = Path(os.devnull), code: int = 0
    ) -> Took:
        """Run a program to its end; raises Failed unless it exits with `code`."""
        start = time.perf_counter()
        _, status, usage = os.wait4(self.start(command, netns=netns, output=output), 0)
        wall = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status) != code:
            words = (self._errors.read_text() + (output.read_text() if output.is_file() else "")).strip()
            raise Failed(f"{' '.join(command.argv)[:200]}: {words[-500:] or f'wait status {status}'}")
        return Took(wall, usage.ru_utime + usage.ru_stime)

    def output(self, command: Command, *, netns: str | None = None, code: int = 0) -> str:
        """Run a program and return what it prints; raises Failed unless it exits with `code`."""
        output = self.folder / "stdout"
        self.run(command, netns=netns, output=output, code=code)
        return output.read_text()

    def batch(self, program: str, *lines: str, netns: str | None = None) -> None:
        """Give `lines` to ip or tc as a batch."""
        script = self.folder / "batch"
        script.write_text("".join(f"{line}\n" for line in lines))
        self.run(Command([program, "-batch", str(script)]), netns=netns)

    def plug_in(self) -> None:
        """Connect the laptop to an outside machine, `OUTSIDE` in the namespace `outside`, by its default route."""
        self.make_netns("outside")
        self.batch(
            "ip",
            "link add wan0 type veth peer name wan0 netns outside",
            "addr add 198.51.100.1/24 dev wan0",
            "link set wan0 up",
            f"route add default via {OUTSIDE}",
        )
        self.batch("ip", f"addr add {OUTSIDE}/24 dev wan0", "link set wan0 up", netns="outside")


def _open_namespace(kind: str) -> int:
    return os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def settle(laptop: Laptop) -> None:
    """Wait until the kernel has taken away the namespaces that were let go.

    It does so behind the caller's back, one after another, and holds the lock of all network settings meanwhile:
    so one more is let go, and it is its device whose end is waited for.
    """
    laptop.make_netns("last")
    laptop.batch("ip", "link add last-out type veth peer name last-in netns last")
    laptop.drop_netns("last")
    with laptop.entered():
        while Path("/proc/self/net/dev").read_text().find("last-out") >= 0:
            time.sleep(_SETTLE_STEP)


def build(source: Path, target: Path) -> str:
    """Compile a C program and return the path of it; raises Failed where the compiler does not take it."""
    done = subprocess.run(
        ["gcc", "-O2", "-o", str(target), str(source), "-lpthread"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(done.stderr)
    return str(target)
