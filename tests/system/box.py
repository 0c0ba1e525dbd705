"""A box for vagrant-libvirt, made from Debian's packages: the least that `vagrant up` and `vagrant ssh` work with.

It has the user and the key that every public box has, OpenSSH and qemu's guest agent, and asks for its address by DHCP.
It boots without a boot loader, from the kernel that lies beside the box.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.system.roots import debian_root, made_once

_PACKAGES = (
    "dbus",
    "initramfs-tools",
    "iproute2",
    "libpam-systemd",
    "linux-image-cloud-amd64",
    "openssh-server",
    "qemu-guest-agent",
    "rsync",
    "sudo",
    "systemd",
    "systemd-sysv",
    "udev",
)
_BEFORE = {
    # The modules of its few devices, instead of all there are.
    "etc/initramfs-tools/conf.d/kept": "MODULES=list\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
}
_AFTER = {
    "etc/fstab": "/dev/vda / ext4 defaults 0 1\n",
    "etc/hostname": "box\n",
    "etc/sudoers.d/vagrant": "vagrant ALL=(ALL) NOPASSWD: ALL\n",
    "etc/systemd/network/all.network": "[Match]\nName=en*\n[Network]\nDHCP=ipv4\n",
}
_KERNEL_FOLDER = "/var/lib/libvirt/box"
# Emulated, as where a test runs nothing else may be there.
_VAGRANTFILE = f"""\
Vagrant.configure("2") do |config|
  config.vm.provider :libvirt do |libvirt|
    libvirt.driver = "qemu"
    libvirt.cpu_mode = "custom"
    libvirt.cpu_model = "qemu64"
    libvirt.kernel = "{_KERNEL_FOLDER}/vmlinuz"
    libvirt.initrd = "{_KERNEL_FOLDER}/initrd.img"
    libvirt.cmd_line = "root=/dev/vda rw console=ttyS0 quiet"
  end
end
"""
_SIZE_GB = 1
_FILL = """
chroot "$1" useradd --create-home --shell /bin/bash vagrant
chroot "$1" systemctl enable systemd-networkd
install -d -m 700 -o 1000 -g 1000 "$1/home/vagrant/.ssh"
install -m 600 -o 1000 -g 1000 "$4" "$1/home/vagrant/.ssh/authorized_keys"
cp "$1"/boot/vmlinuz-* "$2/vmlinuz"
cp "$1"/boot/initrd.img-* "$2/initrd.img"
rm -r "$1/boot"
mke2fs -q -t ext4 -d "$1" -E lazy_itable_init=1,nodiscard "$2/disk.img" "$3G"
qemu-img convert -O qcow2 "$2/disk.img" "$2/box.img"
rm "$2/disk.img"
tar -C "$2" -cf "$2/debian.box" metadata.json Vagrantfile box.img
rm "$2/box.img"
"""


@dataclass(frozen=True, slots=True)
class Box:
    """The box; its kernel and initrd belong where its Vagrantfile says, in `kernel_folder`."""

    file: Path
    kernel: Path
    initrd: Path
    kernel_folder: str = _KERNEL_FOLDER


def debian_box(public_key: Path) -> Box:
    """Return a box whose user vagrant lets in who has the key, made now unless it is there; skip where it cannot be."""
    root = debian_root("box", _PACKAGES, _BEFORE)
    recipe = (root.name, repr(_AFTER), _VAGRANTFILE, str(_SIZE_GB), _FILL, public_key.read_text())
    with made_once("boxed", *recipe) as (place, work):
        if work is not None:
            _fill(root, work, public_key)
    return Box(place / "debian.box", place / "vmlinuz", place / "initrd.img")


def _fill(root: Path, work: Path, public_key: Path) -> None:
    tree, made = work / "tree", work / "made"
    made.mkdir()
    (made / "Vagrantfile").write_text(_VAGRANTFILE)
    (made / "metadata.json").write_text(
        json.dumps({"provider": "libvirt", "format": "qcow2", "virtual_size": _SIZE_GB})
    )
    subprocess.run(["cp", "-a", "--reflink=auto", str(root), str(tree)], check=True)
    for path, text in _AFTER.items():
        (tree / path).write_text(text)
    filled = ["sh", "-euc", _FILL, "sh", str(tree), str(made), str(_SIZE_GB), str(public_key)]
    done = subprocess.run(filled, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
