"""Have guests answered: what the engine calls to bring dnsmasq's files, and its keeper, to the records."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from vmnet import __version__
from vmnet.dnsmasq.files import Where, render_settings, render_tables
from vmnet.dnsmasq.processes import PATH, end, end_servers, find_keeper, is_there, tell, wait_for_end
from vmnet.locks import Locks
from vmnet.model import Lease
from vmnet.ondisk import find_program, replace
from vmnet.ops import EndAnswers, Op, RunAnswers, WriteAnswers
from vmnet.platform import Report
from vmnet.settings import Paths, Settings
from vmnet.systemd import is_in_hosts_netns, systemd_runs

_RESOLV = "/etc/resolv.conf"
_PATIENCE = 15.0  # seconds that the keeper has to try everything once
_UNIT = "vmnet-dnsmasq.service"
# Without Restart=: whoever starts it anew looks first whether it is still wanted.
# What dnsmasq needs: devices and neighbours, raw and low ports, another user, and to reach files wherever they lie.
_CAPABILITIES = " ".join(
    f"CAP_{name}"
    for name in (
        "NET_ADMIN", "NET_RAW", "NET_BIND_SERVICE", "SETUID", "SETGID", "SETPCAP", "KILL", "DAC_OVERRIDE", "CHOWN",
    )
)  # fmt: skip
_SANDBOX = (
    f"CapabilityBoundingSet={_CAPABILITIES}",
    "NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=read-only", "PrivateTmp=yes", "PrivateDevices=yes",
    "ProtectKernelTunables=yes", "ProtectKernelModules=yes", "ProtectKernelLogs=yes", "ProtectControlGroups=yes",
    "ProtectClock=yes", "ProtectHostname=yes", "RestrictNamespaces=yes", "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes", "LockPersonality=yes", "MemoryDenyWriteExecute=yes", "SystemCallArchitectures=native",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_NETLINK AF_UNIX AF_PACKET", "UMask=0022",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answers:
    """DHCP and DNS for guests; where they cannot be had, that is said, and guests work without."""

    settings: Settings
    paths: Paths
    report: Report
    locks: Locks
    holds_back: Callable[[Op], bool]

    @property
    def folder(self) -> Path:
        """Where dnsmasq's files are."""
        return self.paths.answers

    @property
    def _leases(self) -> Path:
        return self.paths.state / "dhcp.leases"

    @property
    def _problems(self) -> Path:
        return self.folder / "problems"

    def plan(self, leases: Sequence[Lease]) -> list[Op]:
        """Return the ops after which guests are answered as those leases want it; say what is in the way now."""
        self._complain(leases)
        return self._plan(leases)[0]

    def _plan(self, leases: Sequence[Lease]) -> tuple[list[Op], Mapping[str, str]]:
        """Return the ops, and the texts of the files that they write."""
        alive = self._keeper_is_right()
        if not (alive or leases) or self._lacks_dnsmasq():
            return [], {}
        wanted = self._render(leases)
        other = tuple(name for name, text in wanted.items() if not self._holds(name, text))
        ops: list[Op] = [WriteAnswers(str(self.folder), other)] if other else []
        if not alive:
            ops.append(RunAnswers(str(self.folder)))
        return [op for op in ops if not self.holds_back(op)], wanted

    def write(self, ask: Callable[[], Sequence[Lease]]) -> None:
        """Have guests answered as the leases that `ask` returns want it; it is asked when nobody else writes."""
        with self.locks.answers():
            leases = ask()
            ops, wanted = self._plan(leases)
            try:
                if ops:
                    self._apply(ops, wanted)
            except OSError as error:
                self.report.warn(f"{error.filename or self.folder} cannot be written: {error.strerror}; {_WITHOUT}")
                return
            for op in ops:
                self.report.did(op)
            self._complain(leases)

    def clear(self) -> None:
        """End it all, and leave no file."""
        if not self.folder.exists():
            return
        with self.locks.answers():
            op = EndAnswers(str(self.folder))
            keeper = self.keeper()
            if keeper is not None:
                end([keeper])
            end_servers(self.folder)
            for file in self.folder.iterdir():
                file.unlink()
            self.folder.rmdir()
            self.report.did(op)

    def plan_clear(self) -> list[Op]:
        """Return the op that ends it all."""
        return [EndAnswers(str(self.folder))] if self.folder.exists() else []

    def forget(self) -> None:
        """Forget the leases that were given."""
        self._leases.unlink(missing_ok=True)

    def keeper(self) -> int | None:
        """Return a pidfd of the keeper, None without one."""
        return find_keeper(self.folder)

    def stamp(self) -> tuple[int, ...]:
        """Return what differs when the keeper is another, is gone, or says something else is wrong."""
        if not is_there(self.keeper()):
            return ()
        try:
            found = [os.stat(file) for file in (self.folder / "keeper.pid", self._problems)]
        except OSError:
            return (0,)
        return tuple(number for one in found for number in (one.st_ino, one.st_mtime_ns))

    # How it is

    def _keeper_is_right(self) -> bool:
        """Say whether there is a keeper of this version."""
        if not is_there(self.keeper()):
            return False
        with suppress(OSError):
            return (self.folder / "keeper.pid").read_text().split()[1:] == [_version()]
        return False

    def _holds(self, name: str, text: str) -> bool:
        try:
            return (self.folder / name).read_text() == text
        except (OSError, UnicodeError):
            return False

    def _render(self, leases: Sequence[Lease]) -> Mapping[str, str]:
        where = Where(str(self.folder), str(self._leases), _RESOLV)
        plane = self.settings.plane
        return {
            **render_tables(leases, self.settings.domain, plane),
            **render_settings(_templates(), where, self.settings.domain, plane, leases),
        }

    def _lacks_dnsmasq(self) -> bool:
        return find_program("dnsmasq", PATH) is None

    def _complain(self, leases: Sequence[Lease]) -> None:
        """Say what keeps guests from being answered."""
        if leases and self._lacks_dnsmasq():
            self.report.warn(f"dnsmasq is missing; {_WITHOUT} (install it: apt-get install dnsmasq-base)")
        with suppress(OSError):
            for line in self._problems.read_text().splitlines():
                self.report.warn(f"dnsmasq for {line}; {_WITHOUT}")

    # What is done

    def _apply(self, ops: Sequence[Op], wanted: Mapping[str, str]) -> None:
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        for op in ops:
            if isinstance(op, WriteAnswers):
                for name in op.names:
                    replace(self.folder / name, wanted[name])
            else:
                self._run()
        tell(self.keeper(), signal.SIGHUP)

    def _run(self) -> None:
        """Start the keeper, in the place of another one, and wait until it has tried everything."""
        former = self.keeper()
        if former is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(former, signal.SIGKILL)  # what it keeps is taken over
            wait_for_end(former, _PATIENCE)
            os.close(former)
        problems = self._problems
        problems.unlink(missing_ok=True)
        started = self._start([*_KEEPER, str(self.folder), str(self._leases), _RESOLV, _version()])
        end_of_patience = time.monotonic() + _PATIENCE
        while not problems.exists() and time.monotonic() < end_of_patience and started.poll() in (None, 0):
            time.sleep(0.002)
        if not problems.exists():
            self.report.warn(f"DHCP and DNS do not start; {_WITHOUT}")

    def _start(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start the keeper so that it outlives this process, what it was called from, and the sandbox of a service."""
        null = subprocess.DEVNULL
        if not (systemd_runs() and is_in_hosts_netns()):
            return subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")
        # A child would end with the user's session, or live in the sandbox of the watcher's.
        subprocess.run(["systemctl", "--quiet", "stop", _UNIT], stdin=null, stderr=null, check=False)
        sandbox = [*_SANDBOX, f"ReadWritePaths={self.folder} {self.paths.state}"]
        properties = [f"--property={one}" for one in sandbox]
        unit = ["systemd-run", "--quiet", "--collect", f"--unit={_UNIT}", "--description=DHCP and DNS for guests"]
        return subprocess.Popen([*unit, *properties, "--", *argv], stdin=null, stdout=null, stderr=null)


# This very vmnet, wherever it lies, and nobody else's modules.
_KEEPER = (
    sys.executable,
    "-I",
    "-c",
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from vmnet.dnsmasq.keeper import main; main()",
    str(Path(__file__).parents[2]),
)
_WITHOUT = "guests have no DHCP or no names until that is put right"


@cache
def _templates() -> Mapping[str, str]:
    folder = files("vmnet") / "templates" / "dnsmasq"
    return {name: (folder / f"{name}.conf").read_text() for name in ("dns", "dhcp")}


@cache
def _version() -> str:
    """Return what differs when the keeper that runs is another than the one that would be started."""
    folder = Path(__file__).parent
    code = b"".join((folder / name).read_bytes() for name in ("keeper.py", "held.py", "processes.py", "../ondisk.py"))
    return f"{__version__}-{sha256(code).hexdigest()[:12]}"
