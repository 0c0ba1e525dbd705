"""Keep dnsmasq running, and have it read anew what has changed: a small process beside it, with little imported.

It is told of new files by SIGHUP, sees by itself that one of its processes has died, and looks every two seconds at
what nobody tells of: the host's resolvers, a file or a symlink that anybody may replace, and the leases given.
"""

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from vmnet.dnsmasq.held import holders, with_holders
from vmnet.dnsmasq.processes import (
    PATH,
    SERVERS,
    TELLS_OF_NAMES,
    conf_word,
    end,
    end_servers,
    find,
    find_server,
    follows_folders,
    gives_addresses,
    has_devices,
    tell,
    wait_for_end,
)
from vmnet.ondisk import replace, stamp

_INTERVAL = 2.0  # seconds between two looks
_NO_DEVICE = "unknown interface"  # what dnsmasq says where none that fits has an address yet: there will be one
_LONGEST_PAUSE = 64.0  # seconds after which one that does not stay up is tried again
# The system's own dnsmasq, which reads the hosts file at its start and when it is told to: what says that it is to be
# told, its program, and where distributions have its pid.
_FITTED = Path("/etc/dnsmasq.d/vmnet.conf")
_SYSTEMS = "/usr/sbin/dnsmasq"
_SYSTEMS_PIDS = (Path("/run/dnsmasq/dnsmasq.pid"), Path("/run/dnsmasq.pid"))


class _Server:
    """One dnsmasq: the pidfd of its process, the settings it runs by, and when it may be tried again."""

    def __init__(self) -> None:
        self.handle: int | None = None
        self.conf: str | None = None
        self.read: tuple[object, ...] = ()
        self.starting: subprocess.Popen[str] | None = None
        self.pause = 1.0
        self.again = self.started = 0.0
        self.problem = ""


class Keeper:
    """Keeps each dnsmasq of `folder` until it is told to stop. (No dataclass: to make one takes long.)"""

    def __init__(self, folder: Path, leases: Path, resolv: Path) -> None:
        self.folder = folder
        self.leases = leases
        self.resolv = resolv
        self._servers = {name: _Server() for name in SERVERS}
        self._follows: bool | None = None
        self._stop = False
        self._problems: str | None = None
        self._names: tuple[object, ...] = ()
        self._joined: tuple[object, ...] = ()

    def keep(self, wakeup: int) -> None:
        """Keep them; `wakeup` becomes readable with each signal."""
        while not self._stop:
            for name, server in self._servers.items():
                self._look(name, server)
            for name, server in self._servers.items():
                if server.starting:
                    self._finish(name, server, server.starting)
            self._tell()
            self._tell_system()
            self._ask_for_word()
            poll = select.poll()
            for handle in (wakeup, *(one.handle for one in self._servers.values() if one.handle is not None)):
                poll.register(handle, select.POLLIN)
            poll.poll(_INTERVAL * 1000)
            with suppress(BlockingIOError):
                os.read(wakeup, 4096)
        end_servers(self.folder)
        self._names = ()
        self._tell_system()

    def stop(self) -> None:
        """Have `keep` end them and return."""
        self._stop = True

    def _look(self, name: str, server: _Server) -> None:
        conf = _text(self.folder / f"{name}.conf")
        if name == "dhcp" and not self._needs_dhcp(server):
            return
        if server.handle is not None and (wait_for_end(server.handle, 0) or conf != server.conf):
            end([server.handle])
            server.handle = None
            if conf != server.conf:
                server.again = 0.0
        if server.handle is None:
            self._start(name, server, conf)
            return
        # What dnsmasq reads was other when it was told to read it.
        read = self._stamps(name)
        if read != server.read:
            server.read = read
            signal.pidfd_send_signal(server.handle, signal.SIGHUP)

    def _needs_dhcp(self, server: _Server) -> bool:
        """Say whether there is anybody to give an address to; else none runs who could."""
        self._join()
        if not gives_addresses(self.folder):
            running = server.handle if server.handle is not None else find_server(self.folder, "dhcp")
            if running is not None:
                end([running])
            server.handle, server.problem = None, ""
            return False
        return server.handle is not None or has_devices()

    def _stamps(self, name: str) -> tuple[object, ...]:
        if name == "dhcp":
            return stamp(self.folder / "dhcp.live")
        if self._follows is None:
            self._follows = follows_folders(_version_of_dnsmasq())
        return stamp(self.resolv) + (() if self._follows else stamp(self.folder / name))

    def _join(self) -> None:
        """Make dhcp.live of dhcp.hosts and the leases given."""
        live, hosts = self.folder / "dhcp.live", self.folder / "dhcp.hosts"
        sources = (stamp(hosts), stamp(self.leases), stamp(live))
        if sources == self._joined:
            return
        wanted = with_holders(_text(hosts), holders(_text(self.leases)))
        if not live.exists() or wanted != _text(live):
            replace(live, wanted)
        self._joined = (*sources[:2], stamp(live))

    def _start(self, name: str, server: _Server, conf: str) -> None:
        """Take over the process that is there already with these settings, or start one."""
        running = self.folder / f"{name}.running"
        there = find_server(self.folder, name)
        if there is not None and conf != _text(running):
            end([there])
            there = None
        if there is None:
            now = time.monotonic()
            if now < server.again:
                return
            server.pause = min(2 * server.pause, _LONGEST_PAUSE) if now - server.started < _LONGEST_PAUSE else 1.0
            server.started, server.again = now, now + server.pause
            # It reads them after this, so what it is told later is never too much.
            server.read = self._stamps(name)
            (self.folder / f"{name}.pid").unlink(missing_ok=True)
            null, argv = subprocess.DEVNULL, ["dnsmasq", conf_word(self.folder, name), *_as_root(self.folder)]
            try:
                server.starting = subprocess.Popen(
                    argv, stdin=null, stdout=null, stderr=subprocess.PIPE, text=True, errors="replace",
                    env={"PATH": PATH}, cwd="/",
                )  # fmt: skip
            except OSError as error:
                server.problem = f"it cannot be run: {error.strerror}"
        server.handle, server.conf = there, conf

    def _finish(self, name: str, server: _Server, starting: "subprocess.Popen[str]") -> None:
        """Wait until one has gone into the background, and learn what was wrong."""
        words = starting.communicate()[1].strip().removeprefix("dnsmasq: ")
        server.starting, server.problem = None, ""
        if starting.returncode and words.startswith(_NO_DEVICE):
            server.again, server.pause = 0.0, 1.0
        elif starting.returncode:
            server.problem = words or f"it ended with exit code {starting.returncode}"
        else:
            replace(self.folder / f"{name}.running", server.conf or "")
            server.handle = find_server(self.folder, name)

    def _tell_system(self) -> None:
        """Have the system's dnsmasq read the hosts file, which is written before ours, where names have changed."""
        names = stamp(self.folder / "native") + stamp(_FITTED)
        if names == self._names:
            return
        self._names = names
        if not _FITTED.exists():
            return
        for pid_file in _SYSTEMS_PIDS:
            tell(find(pid_file, _SYSTEMS), signal.SIGHUP)

    def _ask_for_word(self) -> None:
        """Have the engine tell of names only where somebody would not hear of them otherwise."""
        asks, file = self._follows is False or _FITTED.exists(), self.folder / TELLS_OF_NAMES
        if asks and not file.exists():
            replace(file, "")
        elif not asks:
            file.unlink(missing_ok=True)

    def _tell(self) -> None:
        """Write down what is wrong, a line for each, for the engine to say; the first time, that all has been tried."""
        problems = "".join(f"{name}: {one.problem}\n" for name, one in self._servers.items() if one.problem)
        if problems != self._problems:
            self._problems = problems
            replace(self.folder / "problems", problems)


def _as_root(folder: Path) -> list[str]:
    """Return the options that keep dnsmasq root where its own user is none here, or may not come to its files."""
    alone = Path("/proc/self/uid_map").read_text().split()[2:] == ["1"]
    shut = any(not one.stat().st_mode & 0o001 for one in (folder, *folder.parents))
    # No group at all: to take root's is setgroups(2), which a user namespace of an ordinary user's refuses.
    return ["--user=root", "--group="] if alone or shut else []


def _version_of_dnsmasq() -> str:
    try:
        told = subprocess.run(
            ["dnsmasq", "--version"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE,
            text=True, errors="replace", check=False, env={"PATH": PATH}, cwd="/",
        )  # fmt: skip
    except OSError:
        return ""
    return told.stdout


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def main() -> None:
    """Be the keeper that the arguments FOLDER LEASES RESOLV VERSION name, unless there is one.

    The file of problems says that all was tried.
    """
    folder, leases, resolv, version = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    os.chdir("/")
    os.umask(0o022)
    # A share of the processor like anybody else, but who writes a name is not interrupted by all who hear of it.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    lock = (folder / "keeper.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    keeper = Keeper(folder, leases, resolv)
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGHUP, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: keeper.stop())
    (folder / "problems").unlink(missing_ok=True)
    replace(folder / "keeper.pid", f"{os.getpid()} {version}\n")
    keeper.keep(reader)


if __name__ == "__main__":
    main()
