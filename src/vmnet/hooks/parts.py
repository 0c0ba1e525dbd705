"""What vmnet puts into other programs' folders: for each of them the files, and what must hear of them.

A part more is an entry more in `PARTS`, and its templates.
"""

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from vmnet.ondisk import find_program
from vmnet.settings import backend
from vmnet.systemd import is_in_hosts_netns, systemd_runs

_Question: TypeAlias = Callable[[], bool]

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_PATIENCE = 120  # seconds for a program to answer; a start of the service with thousands of guests takes most


@dataclass(frozen=True, slots=True)
class File:
    """A file at `target`, made from a template; or a link, where `link` says what it points to."""

    target: str
    template: str = ""
    mode: int = 0o644
    link: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run after files have changed, if `when` says so; and without a change if it is `overdue`."""

    argv: tuple[str, ...]
    when: _Question
    overdue: _Question = lambda: False


@dataclass(frozen=True, slots=True)
class Part:
    """What is installed for one other program; `found` says whether that is here.

    Commands run after its files are installed, before they are taken away, and after that. Libvirt's network `vmnet`
    belongs to the one that says so. `system` is where it is of any use.
    """

    name: str
    found: _Question
    files: tuple[File, ...]
    installed: tuple[Command, ...] = ()
    leaving: tuple[Command, ...] = ()
    gone: tuple[Command, ...] = ()
    has_network: bool = False
    system: str = "linux"


class ProgramFailed(Exception):
    """A program could not be run, did not end in time, or says that it failed; in its own first line if it has one."""


def _environment() -> Mapping[str, str]:
    """Return the environment of programs; on macOS those of the caller's PATH come first, as ifconfig does."""
    if backend() == "linux":
        return ENVIRONMENT
    path = f"{os.environ.get('PATH', '')}:{ENVIRONMENT['PATH']}".lstrip(":")
    return {**os.environ, **ENVIRONMENT, "PATH": path}


def ask(argv: tuple[str, ...], *, stdin: str = "", patience: float = _PATIENCE) -> str:
    """Run a program to its end and return what it says; raises ProgramFailed."""
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=_environment(),
            timeout=patience,
        )
    except FileNotFoundError:
        raise ProgramFailed(f"there is no {argv[0]}") from None
    except OSError as error:
        raise ProgramFailed(f"{argv[0]} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise ProgramFailed(f"it has not ended after {patience} s") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ProgramFailed(words[0] if words else f"exit code {done.returncode}")
    return done.stdout


def run(argv: tuple[str, ...], stdin: str = "") -> str | None:
    """Run a program to its end; return None when all is well, else what is not."""
    try:
        ask(argv, stdin=stdin)
    except ProgramFailed as error:
        return str(error)
    return None


def _exists(*paths: str) -> _Question:
    return lambda: any(map(os.path.exists, paths))


def _is_program(name: str) -> bool:
    return find_program(name, _environment()["PATH"]) is not None


def _has(program: str) -> _Question:
    return lambda: _is_program(program)


def _says_yes(*argv: str) -> _Question:
    return lambda: _is_program(argv[0]) and run(argv) is None


def _systemd_is_init() -> bool:
    """Say whether systemd is what starts this machine, or will when it is a machine that starts (an image)."""
    return os.path.realpath("/sbin/init").endswith("/systemd/systemd") or systemd_runs()


def _service_may_start() -> bool:
    return systemd_runs() and is_in_hosts_netns()


def _is_down() -> bool:
    units = ("vmnet-watch.service", _SERVER[0])
    return not all(_says_yes("systemctl", "is-active", "--quiet", unit)() for unit in units)


def _sysvinit_runs() -> bool:
    try:
        return Path("/proc/1/comm").read_text().strip() == "init" and is_in_hosts_netns()
    except OSError:
        return False


def _systemd_version() -> int:
    """Return the version of systemd-resolved, 0 where it is not here."""
    try:
        told = subprocess.run(
            ("resolvectl", "--version"), capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=_PATIENCE
        )
    except OSError:
        return 0
    found = re.match(r"systemd (\d+)", told.stdout)
    return int(found[1]) if found else 0


_UNITS = ("vmnet.service", "vmnet-watch.service")
_SERVER = ("vmnet-server.socket", "vmnet-server.service")
_UNIT_FOLDER = "/etc/systemd/system"
_SYSTEM_UNITS = ("/usr/lib/systemd/system", "/lib/systemd/system", "/etc/systemd/system")
_SCRIPT = "/etc/init.d/vmnet"
_DAEMONS = "/Library/LaunchDaemons"
_PLIST = f"{_DAEMONS}/internal.vmnet.watch.plist"
_DAEMON = "system/internal.vmnet.watch"
_IS_LOADED = _says_yes("launchctl", "print", _DAEMON)
_RELOAD = Command(("systemctl", "daemon-reload"), when=systemd_runs)
_RELOAD_NETWORKD = Command(("networkctl", "reload"), when=_says_yes("systemctl", "is-active", "-q", "systemd-networkd"))
_RELOAD_NETWORKMANAGER = Command(("nmcli", "general", "reload", "conf"), when=_says_yes("nmcli", "general", "status"))
_DELEGATES_SINCE = 258  # systemd.dns-delegate(5)
_RESOLVED_RUNS = _says_yes("systemctl", "is-active", "-q", "systemd-resolved")
_RELOAD_RESOLVED = Command(("systemctl", "reload", "systemd-resolved"), when=_RESOLVED_RUNS)
# Settings are read at the start alone (dnsmasq(8), "NOTES"); this is where NetworkManager keeps the pid of its own.
_RELOAD_NETWORKMANAGER_DNS = Command(
    ("nmcli", "general", "reload", "dns-full"), when=_exists("/run/NetworkManager/dnsmasq.pid")
)
_RESTART_DNSMASQ = (
    Command(("systemctl", "restart", "dnsmasq"), when=_says_yes("systemctl", "is-active", "-q", "dnsmasq")),
    Command(
        ("service", "dnsmasq", "restart"),
        when=lambda: not systemd_runs() and _says_yes("service", "dnsmasq", "status")(),
    ),
)
_RELOAD_LIBVIRT = tuple(
    Command(("pkill", "-HUP", "-x", daemon), when=_says_yes("pgrep", "-x", daemon))
    for daemon in ("libvirtd", "virtqemud", "virtnetworkd")
)
_FIREWALLD_RUNS = _says_yes("firewall-cmd", "--state")
# A zone that says the same as ours and is always there, and ours, which firewalld knows when it has started anew.
_ZONE_NOW = "trusted"
_ZONES = (_ZONE_NOW, "vmnet")


def _in_zone(zone: str, verb: str) -> tuple[str, ...]:
    return ("firewall-cmd", f"--zone={zone}", f"--{verb}-interface=vmn-+")


def parts_here() -> list[Part]:
    """Return the parts that are for this system."""
    return [part for part in PARTS if part.system == backend()]


PARTS = (
    Part(
        "systemd",
        found=_systemd_is_init,
        files=(
            *(File(f"{_UNIT_FOLDER}/{unit}", f"systemd/{unit}") for unit in (*_UNITS, *_SERVER)),
            # What `systemctl enable` makes of their [Install], on machines without a systemctl that can run, too.
            *(File(f"{_UNIT_FOLDER}/multi-user.target.wants/{unit}", link=f"{_UNIT_FOLDER}/{unit}") for unit in _UNITS),
            File(f"{_UNIT_FOLDER}/sockets.target.wants/{_SERVER[0]}", link=f"{_UNIT_FOLDER}/{_SERVER[0]}"),
        ),
        installed=(
            _RELOAD,
            Command(("systemctl", "restart", *_UNITS, _SERVER[0]), when=_service_may_start, overdue=_is_down),
        ),
        leaving=(Command(("systemctl", "stop", *_UNITS, *_SERVER), when=systemd_runs),),
        gone=(_RELOAD,),
    ),
    Part(
        "sysvinit",
        found=lambda: not _systemd_is_init() and os.path.isdir("/etc/init.d") and _is_program("start-stop-daemon"),
        files=(File(_SCRIPT, "sysvinit/vmnet", mode=0o755),),
        installed=(
            Command(("update-rc.d", "vmnet", "defaults"), when=_has("update-rc.d")),
            Command(("chkconfig", "--add", "vmnet"), when=_has("chkconfig")),
            Command((_SCRIPT, "restart"), when=_sysvinit_runs),
        ),
        leaving=(
            Command((_SCRIPT, "stop"), when=_sysvinit_runs),
            Command(("chkconfig", "--del", "vmnet"), when=_has("chkconfig")),
        ),
        gone=(Command(("update-rc.d", "vmnet", "remove"), when=_has("update-rc.d")),),
    ),
    Part(
        "networkmanager",
        found=_has("NetworkManager"),
        files=(File("/etc/NetworkManager/conf.d/zz-vmnet.conf", "networkmanager/vmnet.conf"),),
        # Not told when the file has gone: NetworkManager 1.42 that takes lo back while it runs puts 127.0.0.1/8 there,
        # and one that starts takes it as it is.
        installed=(_RELOAD_NETWORKMANAGER,),
    ),
    Part(
        "networkmanager-dns",
        # Nothing reads it until somebody sets dns=dnsmasq.
        found=_has("NetworkManager"),
        files=(File("/etc/NetworkManager/dnsmasq.d/vmnet.conf", "dnsmasq/host.conf"),),
        installed=(_RELOAD_NETWORKMANAGER_DNS,),
        gone=(_RELOAD_NETWORKMANAGER_DNS,),
    ),
    Part(
        "dnsmasq",
        # The program alone is no service, and vmnet's own.
        found=_exists("/etc/init.d/dnsmasq", *(f"{folder}/dnsmasq.service" for folder in _SYSTEM_UNITS)),
        files=(File("/etc/dnsmasq.d/vmnet.conf", "dnsmasq/host.conf"),),
        installed=_RESTART_DNSMASQ,
        gone=_RESTART_DNSMASQ,
    ),
    Part(
        "resolved",
        found=lambda: _systemd_version() >= _DELEGATES_SINCE,
        files=(File("/etc/systemd/dns-delegate.d/vmnet.dns-delegate", "resolved/vmnet.dns-delegate"),),
        installed=(_RELOAD_RESOLVED,),
        gone=(_RELOAD_RESOLVED,),
    ),
    Part(
        "networkd",
        found=_exists("/usr/lib/systemd/systemd-networkd", "/lib/systemd/systemd-networkd"),
        files=(
            File("/etc/systemd/network/05-vmnet.network", "networkd/vmnet.network"),
            File("/etc/systemd/networkd.conf.d/vmnet.conf", "networkd/vmnet.conf"),
        ),
        installed=(_RELOAD_NETWORKD,),
        gone=(_RELOAD_NETWORKD,),
    ),
    Part(
        "udev",
        # It reads its folders again by itself, before the next device.
        found=_exists("/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd", "/bin/udevadm"),
        files=(File("/etc/systemd/network/05-vmnet.link", "udev/vmnet.link"),),
    ),
    Part(
        "sysctl",
        found=_exists("/etc/sysctl.d"),
        files=(File("/etc/sysctl.d/99-vmnet.conf", "sysctl/vmnet.conf"),),
    ),
    Part(
        "libvirt",
        found=_exists("/etc/libvirt", "/usr/sbin/libvirtd", "/usr/sbin/virtqemud"),
        files=tuple(
            File(f"/etc/libvirt/hooks/{driver}.d/vmnet", "libvirt/hook", mode=0o755) for driver in ("qemu", "network")
        ),
        # libvirt looks for hooks when it starts and at SIGHUP; with none there it would not see the first one.
        installed=_RELOAD_LIBVIRT,
        has_network=True,
    ),
    Part(
        "firewalld",
        found=_has("firewalld"),
        files=(File("/etc/firewalld/zones/vmnet.xml", "firewalld/vmnet.xml"),),
        # No reload, which would take away what others have set without --permanent.
        installed=(
            Command(
                _in_zone(_ZONE_NOW, "add"),
                when=lambda: _FIREWALLD_RUNS() and not any(_says_yes(*_in_zone(zone, "query"))() for zone in _ZONES),
            ),
        ),
        leaving=tuple(Command(_in_zone(zone, "remove"), when=_says_yes(*_in_zone(zone, "query"))) for zone in _ZONES),
    ),
    Part(
        "launchd",
        found=_exists(_DAEMONS),
        files=(File(_PLIST, "launchd/vmnet.plist"),),
        installed=(
            # launchd reads a file once, when it is told of it.
            Command(("launchctl", "bootout", _DAEMON), when=_IS_LOADED),
            Command(
                ("launchctl", "bootstrap", "system", _PLIST),
                when=_has("launchctl"),
                overdue=lambda: not _IS_LOADED(),
            ),
        ),
        leaving=(Command(("launchctl", "bootout", _DAEMON), when=_IS_LOADED),),
        system="darwin",
    ),
)
