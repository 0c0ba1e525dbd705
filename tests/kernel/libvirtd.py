"""A real libvirtd on the laptop, as Debian packages it, and the tiny VM as its domains.

    from tests.kernel.libvirtd import Domain, Libvirtd

    def test_a_domain_has_its_address(laptop: Laptop) -> None:
        with Libvirtd(laptop) as libvirt:                          # started, its first connection made
            made = laptop.vmnet("create", "web", "--json").json[0]
            web = Domain(libvirt, "web", ethernet("vmn-web", made["mac"]))    # defined, not started
            web.start()                                            # virsh start, then until it is ready
            assert web.http() == f"web {made['shadow']}"
            libvirt.virsh("destroy", "web")

libvirtd, virsh and their libraries come from a kept Debian (`tests/system/roots.py`) and lie below the machine's own
/usr, so that vmnet, qemu and whatever hooks call run beside them as on a machine that has libvirt. /etc and /run are
the laptop's, /var is made private too: vmnet keeps its records, run folder and hosts file where it does by default,
because libvirt hands no environment down to hooks. There is no systemd, and libvirt's own security drivers are off.

`libvirt.hooks` is /etc/libvirt/hooks as it is found from here. Domains migrate to `qemu+tcp://ADDRESS/system` where two
laptops are wired together. Everything ends with the laptop at the latest.
"""

import platform
import signal
import socket
import sys
import sysconfig
from types import TracebackType
from typing import Self
from uuid import uuid4
from xml.sax.saxutils import escape, quoteattr

import pytest

from tests.kernel.machine import wait_until
from tests.kernel.net import Laptop, Result, need_own_etc
from tests.kernel.vm import LIMIT, Booted, Line, vm_files
from tests.system.roots import cache, debian_root

PACKAGES = (
    "dbus", "dbus-user-session", "dnsmasq-base", "iptables", "libpam-systemd", "libvirt-clients",
    "libvirt-daemon-system", "python3-libvirt", "virtinst",
)  # fmt: skip
"""libvirt and what it calls; dbus, its sessions and libpam-systemd are what dependencies leave open to choose."""

_SETTINGS = {
    "qemu.conf": """\
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
remember_owner = 0
""",
    "libvirtd.conf": """\
auth_unix_rw = "none"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
""",
}
# The machine's own /usr comes first: only what it has not is looked up in the kept system.
_ENTER = """
root=$1 kept=$2
mount -t overlay overlay -o "lowerdir=/usr:$root/usr" /usr
mkdir /run/var /run/var-work
mount -t overlay overlay -o lowerdir=/var,upperdir=/run/var,workdir=/run/var-work /var
for folder in etc/libvirt var/lib/libvirt var/log/libvirt var/cache/libvirt var/lib/usbutils; do
    rm -rf "/$folder"
    cp -a "$root/$folder" "/$folder"
done
mount --bind "$kept" /var/cache/libvirt
for file in passwd group; do
    grep -q ^libvirt-qemu: "/etc/$file" || grep -E '^(libvirt|kvm)' "$root/etc/$file" >>"/etc/$file"
done
# As udev makes it. Where qemu has one that its user may not open, libvirt takes its cache for outdated, always.
if [ -e /dev/kvm ]; then
    cp -a /dev/kvm /run/kvm
    chmod 666 /run/kvm
    mount --bind /run/kvm /dev/kvm
fi
rm -rf /var/lib/vmnet /etc/vmnet
"""
_ENVIRONMENT = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root")
_PID_FILE = "/run/libvirtd.pid"
_VM = "/var/lib/libvirt/images"
_FILES = "/var/lib/libvirt/qemu"


class Libvirtd:
    """libvirtd on a laptop; as a context manager it runs from the start to the end of it."""

    def __init__(self, laptop: Laptop) -> None:
        need_own_etc()
        root, files = debian_root("libvirt", PACKAGES), vm_files()
        # What qemu can do takes libvirt 8 s to find out; it keeps that, and knows by itself when it is out of date.
        kept = cache() / f"{root.name}-capabilities"
        kept.mkdir(exist_ok=True)
        self.laptop = laptop
        self.hooks = laptop.path("/etc/libvirt/hooks")
        laptop.run("sh", "-euc", _ENTER, "sh", str(root), str(kept))
        for name, text in _SETTINGS.items():
            laptop.path(f"/etc/libvirt/{name}").write_text(text)
        # Copies, since libvirt makes the files of a VM its user's.
        laptop.run("cp", f"{files}/vmlinuz", f"{files}/initrd.img", _VM)
        hosts = laptop.path("/etc/hosts")
        # libvirt asks for the machine's own name at each start of a guest, and a resolver that is away costs 10 s.
        hosts.write_text(f"{laptop.hosts_file.read_text()}127.0.1.1 {platform.node()}\n")
        laptop.hosts_file = hosts
        for name in ("STATE_DIR", "RUN_DIR", "CONFIG", "HOSTS_FILE"):
            del laptop.env[f"VMNET_{name}"]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The daemon's process id inside the laptop."""
        return int(self.laptop.path(_PID_FILE).read_text())

    def start(self) -> None:
        """Start the daemon, and return when it has answered."""
        self.laptop.run("env", "-i", *_ENVIRONMENT, "libvirtd", "--daemon", "--listen", "--pid-file", _PID_FILE)
        self.virsh("version")

    def stop(self) -> None:
        """End the daemon by SIGTERM; guests go on."""
        pid = self.pid
        self._signal(signal.SIGTERM)
        assert wait_until(lambda: not self.laptop.path(f"/proc/{pid}").exists(), LIMIT), "libvirtd does not end"

    def reload(self) -> None:
        """Have the daemon read its settings again, by SIGHUP."""
        self._signal(signal.SIGHUP)

    def _signal(self, number: int) -> None:
        self.laptop.run("kill", f"-{number}", str(self.pid))

    def give_python(self) -> None:
        """Let vmnet in the laptop import libvirt-python, Debian's; skip where that is for another Python."""
        packages = debian_root("libvirt", PACKAGES) / "usr/lib/python3/dist-packages"
        files = [packages / "libvirt.py", packages / f"libvirtmod{sysconfig.get_config_var('EXT_SUFFIX')}"]
        if not all(file.exists() for file in files):
            pytest.skip(f"python3-libvirt of {packages} is for another Python than {sys.executable}")
        folder = self.laptop.folder / "libvirt-python"
        folder.mkdir()
        for file in files:
            (folder / file.name).symlink_to(file)
        self.laptop.env["PYTHONPATH"] += f":{folder}"

    def log(self) -> str:
        """Return what the daemon has written about warnings and errors."""
        return self.laptop.path("/var/log/libvirt/libvirtd.log").read_text()

    def virsh(self, *args: str, check: bool = True) -> Result:
        """Run virsh; with `check` another exit code than 0 fails the test."""
        done = self.laptop.execute("virsh", "--quiet", "--connect", "qemu:///system", *args, env={"LC_ALL": "C"})
        assert not check or done.code == 0, f"virsh {' '.join(args)}: {done.code}\n{done.out}{done.err}"
        return done

    def define(self, xml: str) -> None:
        """Define a domain."""
        path = self.laptop.folder / "domain.xml"
        path.write_text(xml)
        self.virsh("define", str(path))

    def running(self) -> list[str]:
        """Return the names of the domains that run, or are paused."""
        return self.virsh("list", "--name").out.split()


def ethernet(device: str, mac: str) -> str:
    """Return the interface of a domain on a tap that it finds made, by vmnet or by its hook."""
    return (
        f"<interface type='ethernet'><mac address={quoteattr(mac)}/>"
        f"<target dev={quoteattr(device)} managed='no'/><model type='virtio'/></interface>"
    )


def on_network(mac: str, device: str = "") -> str:
    """Return the interface of a domain on the network `vmnet`, whose tap libvirt makes: `device`, or vnetN."""
    target = f"<target dev={quoteattr(device)}/>" if device else ""
    return (
        f"<interface type='network'><mac address={quoteattr(mac)}/><source network='vmnet'/>{target}"
        "<model type='virtio'/></interface>"
    )


def domain_xml(name: str, interfaces: str, *, uuid: str, console: str = "/dev/null", shell: str = "") -> str:
    """Return a domain that is the tiny VM: its first serial port writes to a file, the second is a socket."""
    return f"""\
<domain type='qemu'>
  <name>{escape(name)}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>128</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{_VM}/vmlinuz</kernel>
    <initrd>{_VM}/initrd.img</initrd>
    <cmdline>console=ttyS0 quiet panic=-1</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <devices>
    {interfaces}
    <serial type='file'><source path='{console}'/><target port='0'/></serial>
    {f"<serial type='unix'><source mode='bind' path='{shell}'/><target port='1'/></serial>" if shell else ""}
    <memballoon model='none'/>
  </devices>
</domain>
"""


class Domain(Booted):
    """A domain with the tiny VM in it, defined when this is made and started by `start`.

    `guest` is its name as vmnet has it, the domain's own unless said; `address` is asked for when it starts.
    """

    def __init__(self, libvirt: Libvirtd, name: str, interfaces: str, *, guest: str = "", uuid: str = "") -> None:
        self.libvirt = libvirt
        self.guest = guest or name
        self.uuid = uuid or str(uuid4())
        self._socket = f"{_FILES}/{self.uuid}.shell"
        console = f"{_FILES}/{self.uuid}.console"
        unconnected = socket.socket(socket.AF_UNIX)
        super().__init__(libvirt.laptop, name, "", libvirt.laptop.path(console), Line(unconnected))
        libvirt.laptop.lab.at_exit(lambda: self._shell.close())  # noqa: PLW0108 -- of then, not of now
        libvirt.define(domain_xml(name, interfaces, uuid=self.uuid, console=console, shell=self._socket))

    def start(self) -> None:
        """Start it and wait until it is ready, with an address or without: `says("nolease")` tells."""
        self.launch()
        self.await_ready()

    def launch(self) -> None:
        """Start it, or go on with what was saved, and do not wait."""
        self.libvirt.virsh("start", self.name)
        self._boots = 0
        self.connect()

    def connect(self) -> None:
        """Find its shell and its address, which are new whenever there is a new qemu."""
        self._shell.close()
        line = socket.socket(socket.AF_UNIX)
        line.connect(str(self._laptop.path(self._socket)))
        self._shell = Line(line)
        self.address = self._laptop.vmnet("ip", self.guest).out.strip()

    @property
    def pid(self) -> int:
        """Its qemu's process id inside the laptop."""
        return int(self._laptop.path(f"/run/libvirt/qemu/{self.name}.pid").read_text())

    def state(self) -> str:
        """Return what libvirt says about it: running, paused, shut off."""
        return self.libvirt.virsh("domstate", self.name).out.strip()

    def await_state(self, state: str) -> None:
        """Wait until libvirt says so about it."""
        assert wait_until(lambda: self.state() == state, LIMIT), f"{self.name} is {self.state()}, not {state}"
