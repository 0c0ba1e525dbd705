"""Have guests answered: what the engine calls to bring dnsmasq's files, and its keeper, to the records."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from vmnet import __version__
from vmnet.dnsmasq.files import DHCP, FOLDERS, SETTINGS, Where, amend_tables, render_settings, render_tables, tables_of
from vmnet.dnsmasq.processes import (
    PATH,
    TELLS_OF_NAMES,
    end,
    end_servers,
    find_keeper,
    find_server,
    has_devices,
    is_there,
    wait_for_end,
)
from vmnet.locks import Locks
from vmnet.model import Block, Lease
from vmnet.ondisk import find_program, replace
from vmnet.ops import EndAnswers, Op, RunAnswers, WriteAnswers
from vmnet.platform import Report
from vmnet.settings import Paths, Settings
from vmnet.store import Store
from vmnet.systemd import is_in_hosts_netns, systemd_runs

_RESOLV = "/etc/resolv.conf"
_PATIENCE = 15.0  # seconds that the keeper has to try everything once
_DHCP_PATIENCE = 2.0  # seconds for the one that gives addresses
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


@dataclass(slots=True)
class Answers:
    """DHCP and DNS for guests; where they cannot be had, that is said, and guests work without.

    dnsmasq's files are in `folder`.
    """

    settings: Settings
    paths: Paths
    report: Report
    locks: Locks
    holds_back: Callable[[Op], bool]
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.paths.answers

    @property
    def _leases(self) -> Path:
        return self.paths.state / "dhcp.leases"

    @property
    def _problems(self) -> Path:
        return self.folder / "problems"

    def plan(self, leases: Sequence[Lease]) -> list[Op]:
        """Return the ops after which guests are answered as those leases, ordered by block, want it.

        Say what is in the way now.
        """
        self._complain(bool(leases))
        with self._keeper() as keeper:
            wanted = self._settings(lease.mtu for lease in leases) | self._tables(leases)
            return self._plan(self._is_right(keeper), self._read([*wanted, *self._other_tables(wanted)]), wanted)

    def _plan(self, alive: bool, held: Mapping[str, str], wanted: Mapping[str, str]) -> list[Op]:
        """Return the ops that make the files that are `held` those that are `wanted`; others of `held` go."""
        if not (alive or _has_guests(wanted)) or self._lacks_dnsmasq():
            return []
        other = tuple(sorted(name for name, text in held.items() if wanted.get(name, "") != text))
        ops: list[Op] = [WriteAnswers(str(self.folder), other)] if other else []
        if not alive:
            ops.append(RunAnswers(str(self.folder)))
        return [op for op in ops if not self.holds_back(op)]

    def write(self, store: Store, blocks: Collection[Block] | None = None) -> None:
        """Have guests answered as the records want it: all of them, or those that hold `blocks`, or held one."""
        with self.locks.answers(), self._keeper() as keeper:
            alive = self._is_right(keeper)
            held, wanted = self._look(store, blocks if alive else None)
            ops = self._plan(alive, held, wanted)
            try:
                if ops:
                    self._apply(ops, wanted, keeper)
            except OSError as error:
                self.report.warn(f"{error.filename or self.folder} cannot be written: {error.strerror}; {_WITHOUT}")
                return
            if keeper is not None and wanted.get(DHCP) and not self._lacks_dnsmasq():
                self._have_dhcp(keeper)
            for op in ops:
                self.report.did(op)
            self._complain(_has_guests(wanted))

    def rehearse(self, store: Store, blocks: Collection[Block]) -> None:
        """Do what `write` does, without writing."""
        with self._keeper() as keeper:
            alive = self._is_right(keeper)
            self._plan(alive, *self._look(store, blocks if alive else None))

    def _look(self, store: Store, blocks: Collection[Block] | None) -> tuple[dict[str, str], dict[str, str]]:
        """Return what files hold and what they are to hold: all of them, or those that say anything of `blocks`."""
        settings = self._settings(store.unusual_mtus_up())
        held = self._read(settings)
        if blocks is not None and held == settings:  # with other settings, lines of other guests may be others, too
            held = self._read(tables_of(blocks, self.settings.plane))
            with suppress(ValueError):
                leases = store.leases_up(blocks)
                return held, amend_tables(held, blocks, leases, self.settings.domain, self.settings.plane)
        wanted = settings | self._tables(store.leases_up())
        return self._read([*wanted, *self._other_tables(wanted)]), wanted

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
            for folder in (*(self.folder / name for name in FOLDERS if (self.folder / name).is_dir()), self.folder):
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
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

    @contextmanager
    def _keeper(self) -> Iterator[int | None]:
        """Lend a pidfd of the keeper, None without one."""
        keeper = self.keeper()
        try:
            yield keeper
        finally:
            if keeper is not None:
                os.close(keeper)

    def _is_right(self, keeper: int | None) -> bool:
        """Say whether a keeper is of this version."""
        return keeper is not None and self._text("keeper.pid").split()[1:] == [_version()]

    def _read(self, names: Iterable[str]) -> dict[str, str]:
        """Return what those files hold; nothing where one is not there, or is no text."""
        return {name: self._text(name) for name in names}

    def _text(self, name: str) -> str:
        try:
            with open(f"{self.folder}/{name}", encoding="utf-8") as file:
                return file.read()
        except (OSError, UnicodeError):
            return ""

    def _other_tables(self, wanted: Container[str]) -> list[str]:
        """Return the tables that are there and are none of those that are wanted."""
        there = [f"{folder}/{name}" for folder in FOLDERS for name in self._names_in(folder)]
        return [name for name in there if name not in wanted]

    def _names_in(self, folder: str) -> list[str]:
        try:
            return [name for name in os.listdir(self.folder / folder) if not name.startswith(".")]
        except OSError:
            return []

    def _settings(self, mtus: Iterable[int]) -> dict[str, str]:
        where = Where(str(self.folder), str(self._leases), _RESOLV)
        return render_settings(_templates(), where, self.settings.domain, self.settings.plane, mtus)

    def _tables(self, leases: Iterable[Lease]) -> dict[str, str]:
        return render_tables(leases, self.settings.domain, self.settings.plane)

    def _lacks_dnsmasq(self) -> bool:
        return find_program("dnsmasq", PATH) is None

    def _complain(self, has_guests: bool) -> None:
        """Say what keeps guests from being answered."""
        if has_guests and self._lacks_dnsmasq():
            self.report.warn(f"dnsmasq is missing; {_WITHOUT} (install it: apt-get install dnsmasq-base)")
        for line in self._text("problems").splitlines():
            self.report.warn(f"dnsmasq for {line}; {_WITHOUT}")

    # What is done

    def _apply(self, ops: Sequence[Op], wanted: Mapping[str, str], keeper: int | None) -> None:
        for folder in (self.folder, *(self.folder / name for name in FOLDERS)):
            if not folder.is_dir():
                folder.mkdir(parents=True)
                folder.chmod(0o755)  # whatever the umask: dnsmasq becomes another user
        for op in ops:
            if isinstance(op, WriteAnswers):
                for name in op.names:
                    self._put(name, wanted.get(name, ""))
                if any("/" not in name for name in op.names) or (self.folder / TELLS_OF_NAMES).exists():
                    self._tell(keeper)
            else:
                self._run()

    def _tell(self, keeper: int | None) -> None:
        """Have the keeper look now."""
        if keeper is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(keeper, signal.SIGHUP)

    def _have_dhcp(self, keeper: int) -> None:
        """Have somebody give addresses, which begins with the device of the first guest that asks for one."""
        if is_there(find_server(self.folder, "dhcp")) or not has_devices():
            return
        self._tell(keeper)
        patience = time.monotonic() + _DHCP_PATIENCE
        while time.monotonic() < patience and not self._text("problems").startswith("dhcp: "):
            if is_there(find_server(self.folder, "dhcp")):
                return
            time.sleep(0.002)

    def _put(self, name: str, text: str) -> None:
        """Write a file; a table of names without a name is gone."""
        if text or "/" not in name:
            replace(self.folder / name, text, self.folder)
        else:
            (self.folder / name).unlink(missing_ok=True)

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


def _has_guests(wanted: Mapping[str, str]) -> bool:
    return any(text and name not in SETTINGS for name, text in wanted.items())


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
