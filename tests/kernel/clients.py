"""VMs that configure themselves with Debian's own programs: a system behind a tap, and the DHCP clients in it.

    vm = System(laptop.boot(info, configured=False), laptop.folder)  # an eth0 that is down, a Debian around it
    CLIENTS["dhclient"].start(vm)
    assert wait_until(vm.is_configured, PATIENCE)
    assert CLIENTS["dhclient"].told(vm) == Told([vm.guest.guest_gateway], "vmnet.internal", "web")

A `System` is namespaces of the VM's own, of every kind but users, over a kept Debian (`tests/system/roots.py`): what
its programs do to host name, /etc and network stays in it, and all of them end with the test. It has no init.
"""

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.kernel.net import Guest, Result
from tests.system.roots import debian_root

PACKAGES = (
    "cloud-init",
    "dbus",
    "dhcpcd-base",
    "iproute2",
    "isc-dhcp-client",
    "netplan.io",
    "procps",
    "python3-cffi-backend",
    "systemd",
    "udhcpc",
)
"""What a VM configures its network with; debootstrap does not find python3-cffi-backend for cloud-init by itself."""

PATIENCE = 120.0
"""Seconds until a client that has no lease on a busy machine never will have one."""

_BOOT = """
read pid rest </proc/self/stat
mkdir -p "$1" && mount -t tmpfs tmpfs "$1" && cd "$1" && mkdir upper work system &&
mount -t overlay overlay -o "lowerdir=$2,upperdir=upper,workdir=work" system && cd system &&
mount -t proc proc proc && mount -t tmpfs tmpfs run && mount --rbind /dev dev &&
# Read-only, as a container's: networkd waits for a udev otherwise.
mount -t sysfs -o ro sysfs sys &&
hostname localhost && rm -f etc/resolv.conf etc/hostname && mkdir -p run/lock run/systemd/netif &&
chroot . chown -R systemd-network: /run/systemd/netif || exit 1
# Told from inside: before that, /proc/PID/root is this machine's own.
exec chroot . sh -c 'echo "$1" && exec env --ignore-signal=CHLD cat' sh "$pid"
"""
_ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


class System:
    """A Debian that runs as `guest`; `folder` on this machine holds nothing of it but mounts."""

    def __init__(self, guest: Guest, folder: Path) -> None:
        self.guest = guest
        root = debian_root("guests", PACKAGES)
        unshare = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--propagation=private"]
        with guest.entered():
            self._anchor = subprocess.Popen(
                [*unshare, "sh", "-c", _BOOT, "sh", str(folder / guest.name), str(root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        guest.lab.at_exit(self._anchor.communicate)
        assert self._anchor.stdout
        self._pid = self._anchor.stdout.readline().strip()
        assert self._pid, f"{guest.name}: no system"

    def path(self, inside: str) -> Path:
        """Return where a path of the system is found from here."""
        return Path("/proc", self._pid, "root", inside.lstrip("/"))

    def read(self, inside: str) -> str:
        """Return a file of the system, "" for none."""
        try:
            return self.path(inside).read_text()
        except FileNotFoundError:
            return ""

    def execute(self, *argv: str) -> Result:
        """Run a program of the system and return how it ended."""
        done = subprocess.run(self._command(argv), capture_output=True, text=True, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    def run(self, *argv: str) -> str:
        """Run a program of the system and return its output; its failure fails the test."""
        done = self.execute(*argv)
        assert done.code == 0, f"{self.guest.name}: {' '.join(argv)}: {done.code}\n{done.out}{done.err}"
        return done.out

    def start(self, *argv: str) -> subprocess.Popen[bytes]:
        """Start a program of the system; what it says is in /run/said there."""
        with self.path("/run/said").open("ab") as log:
            return subprocess.Popen(self._command(argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _command(self, argv: Sequence[str]) -> list[str]:
        kinds = [f"--{kind}" for kind in ("mount", "uts", "ipc", "net", "pid", "root", "wd")]
        own = [f"{key}={value}" for key, value in _ENV.items()]
        return ["nsenter", f"--target={self._pid}", *kinds, "--", "env", "-i", *own, *argv]

    def addresses(self) -> list[str]:
        """Return the IPv4 addresses of eth0, with their prefixes."""
        [link] = json.loads(self.guest.run("ip", "-j", "-4", "addr", "show", "dev", "eth0")) or [{"addr_info": []}]
        return [f"{one['local']}/{one['prefixlen']}" for one in link.get("addr_info", [])]

    def gateways(self) -> list[str]:
        """Return the gateways of the default routes."""
        return [one["gateway"] for one in json.loads(self.guest.run("ip", "-j", "-4", "route", "show", "default"))]

    def is_configured(self) -> bool:
        """Tell whether the guest has its own address, that one alone, and the way out by its gateway alone."""
        own = f"{self.guest.guest_address}/{self.guest.info['guest_prefix']}"
        return self.addresses() == [own] and self.gateways() == [self.guest.guest_gateway]


@dataclass(frozen=True, slots=True)
class Told:
    """What a client keeps of a lease besides addresses; `name` is None where it keeps none."""

    resolvers: list[str]
    domain: str
    name: str | None


@dataclass(frozen=True, slots=True)
class Client:
    """A DHCP client: what is run to start it, the last of them in the foreground, and what has it renew its lease."""

    programs: tuple[tuple[str, ...], ...]
    renewal: tuple[str, ...]
    told: Callable[[System], Told]
    files: tuple[tuple[str, str], ...] = ()

    def start(self, vm: System) -> None:
        for path, text in self.files:
            vm.path(path).write_text(text)
        for program in self.programs[:-1]:
            vm.run(*program)
        vm.start(*self.programs[-1])

    def renew(self, vm: System) -> None:
        vm.run(*self.renewal)


def _in_resolv_conf(vm: System) -> Told:
    lines = [line.split() for line in vm.read("/etc/resolv.conf").splitlines() if line and line[0] not in "#;"]
    found = {key: [line[1:] for line in lines if line[0] == key] for key in ("nameserver", "domain")}
    [[domain]] = found["domain"] or [[""]]
    # dhcpcd makes the name complete.
    name = vm.run("hostname").strip().removesuffix(f".{domain}")
    return Told([address for line in found["nameserver"] for address in line], domain, name)


def _in_lease(vm: System) -> Told:
    [lease] = vm.path("/run/systemd/netif/leases").iterdir()
    values = dict(line.split("=", 1) for line in lease.read_text().splitlines() if "=" in line)
    return Told(values.get("DNS", "").split(), values.get("DOMAINNAME", ""), values.get("HOSTNAME", ""))


_DHCLIENT = ("dhclient", "-4", "-pf", "/run/dhclient.eth0.pid", "-lf", "/var/lib/dhcp/dhclient.eth0.leases", "eth0")
CLIENTS: dict[str, Client] = {
    # The script that Debian gives it does nothing about the name.
    "udhcpc": Client(
        (("udhcpc", "-f", "-i", "eth0", "-O", "mtu"),),
        ("pkill", "-USR1", "-x", "udhcpc"),
        lambda vm: replace(_in_resolv_conf(vm), name=None),
    ),
    # A second one takes the first one's place, and begins with the lease that it had.
    "dhclient": Client((("touch", "/etc/resolv.conf"), (*_DHCLIENT, "-d")), _DHCLIENT, _in_resolv_conf),
    "dhcpcd": Client((("dhcpcd", "-B", "eth0"),), ("dhcpcd", "-n", "eth0"), _in_resolv_conf),
    # It hands resolver and name to daemons that are not here; what it hands on is in its lease.
    "networkd": Client(
        (
            ("mkdir", "-p", "/run/dbus"),
            ("dbus-daemon", "--system"),
            ("/lib/systemd/systemd-networkd",),
        ),
        ("networkctl", "renew", "eth0"),
        _in_lease,
        (("/etc/systemd/network/eth0.network", "[Match]\nName=eth0\n[Network]\nDHCP=ipv4\n[DHCPv4]\nUseMTU=yes\n"),),
    ),
}
"""Debian's DHCP clients, as they are run by hand or by ifupdown; udhcpc and networkd ask for an MTU only if told to."""
