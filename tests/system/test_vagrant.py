"""vagrant/: what Debian's Vagrant and vagrant-libvirt make of it."""

import platform
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.kernel.libvirtd import Libvirtd
from tests.kernel.machine import ECHO_PORT
from tests.kernel.net import Lab, Laptop, Result
from tests.system.box import debian_box
from tests.system.roots import Rooted, debian_root

pytestmark = pytest.mark.root

PACKAGES = ("iproute2", "qemu-utils", "sudo", "vagrant", "vagrant-libvirt")
CHECKOUT = Path(__file__).parents[2]
MACHINES = sorted(path.parent.name for path in CHECKOUT.glob("vagrant/*/Vagrantfile"))
INTERNET = "198.51.100.2"


class Vagrant:
    """Vagrant, in a system of its own on the laptop, with some of this checkout in /vmnet."""

    def __init__(self, laptop: Laptop) -> None:
        self._laptop = laptop
        self._root = debian_root("vagrant", PACKAGES)
        self._debian = Rooted(laptop, self._root)
        for folder in ("bin", "vagrant"):
            shutil.copytree(CHECKOUT / folder, self.path(folder), ignore=shutil.ignore_patterns(".vagrant"))

    def path(self, inside: str) -> Path:
        """Return where a path of the checkout is found from here."""
        return self._debian.path(f"/vmnet/{inside}")

    def execute(self, machine: str, *args: str) -> Result:
        """Run vagrant in the folder of a machine."""
        command = f"cd /vmnet/vagrant/{machine} && {shlex.join(['vagrant', *args])}"
        return self._debian.execute("sh", "-c", command, env={"BOX": "debian"})

    def run(self, machine: str, *args: str) -> str:
        """Run vagrant in the folder of a machine, and return what it says; a failure fails the test."""
        done = self.execute(machine, *args)
        assert done.code == 0, f"vagrant {' '.join(args)}: {done.code}\n{done.out[-4000:]}{done.err[:4000]}"
        return done.out

    def meet(self, libvirt: Libvirtd) -> None:
        """Give it what it needs to bring a machine up: a box, and the laptop's vmnet."""
        [key] = self._root.glob("usr/share/rubygems-integration/all/gems/vagrant-2*/keys/vagrant.pub")
        box = debian_box(key)
        libvirt.laptop.run("mkdir", box.kernel_folder)
        libvirt.laptop.run("cp", str(box.kernel), str(box.initrd), box.kernel_folder)
        shutil.copy(box.file, self._debian.path("/debian.box"))
        self.run("guest", "box", "add", "--name", "debian", "/debian.box")
        # Out of this system into the laptop's own, where process 1 is at home.
        command = [
            "nsenter",
            "--target",
            "1",
            "--root",
            "--wd=/",
            "env",
            f"PYTHONPATH={libvirt.laptop.env['PYTHONPATH']}",
        ]
        vmnet = self._debian.path("/usr/bin/vmnet")
        vmnet.write_text(f'#!/bin/sh\nexec {shlex.join([*command, sys.executable])} -m vmnet "$@"\n')
        vmnet.chmod(0o755)
        # sudo asks for the machine's own name.
        self._debian.path("/etc/hosts").write_text(f"127.0.0.1 localhost {platform.node()}\n")


@pytest.fixture
def vagrant(laptop: Laptop) -> Vagrant:
    return Vagrant(laptop)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_vagrantfile_is_valid(vagrant: Vagrant, machine: str) -> None:
    assert "validated successfully" in vagrant.run(machine, "validate")


@pytest.mark.parametrize("machine", MACHINES)
def test_an_option_that_vagrant_libvirt_has_not_is_found(vagrant: Vagrant, machine: str) -> None:
    file = vagrant.path(f"vagrant/{machine}/Vagrantfile")
    file.write_text(file.read_text().replace("libvirt.default_prefix", "libvirt.default_prefiks"))
    done = vagrant.execute(machine, "validate")
    assert done.code != 0
    assert "default_prefiks" in done.out + done.err


@pytest.mark.long
def test_the_guest_has_its_address_each_time_it_starts(lab: Lab) -> None:
    laptop = lab.laptop
    lab.internet.serve()
    with Libvirtd(laptop) as libvirt:
        vagrant = Vagrant(laptop)
        vagrant.meet(libvirt)

        def check() -> None:
            [nic] = vagrant.run("guest", "ssh", "-c", "ip -4 -o addr show scope global").splitlines()
            assert "inet 247.1.7.2/30" in nic
            ask = f"exec 3<>/dev/tcp/{INTERNET}/{ECHO_PORT}; echo hello >&3; head -n 1 <&3"
            assert vagrant.run("guest", "ssh", "-c", ask).strip() == "hello"
            assert laptop.run("getent", "ahostsv4", "web.vmnet.internal").startswith("127.1.7.2 ")

        assert "SSH address: 127.1.7.2:22" in vagrant.run("guest", "up", "--provider", "libvirt")
        check()
        vagrant.run("guest", "halt", "--force")
        # The other way to have a tap: libvirt asks for it at each start, and has it taken away.
        laptop.vmnet("hooks", "install", "libvirt")
        assert "SSH address: 127.1.7.2:22" in vagrant.run("guest", "up")
        check()
        vagrant.run("guest", "destroy", "--force")
        assert "vmn-web" not in laptop.links()
        assert libvirt.virsh("list", "--all").out.strip() == ""
        assert laptop.vmnet("ip", "web").out == "127.1.7.2\n"


@pytest.mark.long
def test_the_developers_machine_has_the_checkout(laptop: Laptop) -> None:
    with Libvirtd(laptop) as libvirt:
        vagrant = Vagrant(laptop)
        vagrant.meet(libvirt)
        vagrant.path(".venv").mkdir()
        vagrant.path("link").symlink_to("bin")
        # What it provisions is what the README begins with: see test_machine.py. Here there are no mirrors.
        vagrant.run("developer", "up", "--provider", "libvirt", "--no-provision")
        assert vagrant.run(
            "developer", "ssh", "-c", "hostname; ls -A vmnet; readlink vmnet/link; ls vmnet/bin"
        ).split() == [
            *("vmnet-developer", "bin", "link", "vagrant", "bin"),
            *sorted(path.name for path in (CHECKOUT / "bin").iterdir()),
        ]
