"""The disk of a whole Debian machine with Debian's kernel, systemd, udev and NetworkManager; made once, and kept.

What it holds besides Debian: /root/vmnet with the `.venv` that bin/setup makes for the tests, from packages that this
machine downloads, and the service that takes the tests' orders (`orders.py`). The checkout itself comes with the boot.
"""

import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.roots import debian_root, made_once

CHECKOUT = Path(__file__).parents[2]
PORT = "orders"
"""The name of the serial port that orders come by."""

_MACHINE = (
    # What makes it a machine. The kernel for clouds is Debian's own without the drivers of hardware.
    "dbus",
    "initramfs-tools",
    "libpam-systemd",
    "linux-image-cloud-amd64",
    "network-manager",
    "systemd",
    "systemd-sysv",
    "udev",
    # For the tests' own programs.
    "socat",
)
_TABLES = re.compile("^    cat <<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)
_SERVICE = f"""\
[Unit]
Description=Orders of the tests
[Service]
ExecStart=/usr/bin/python3 -I /usr/local/lib/orders.py /dev/virtio-ports/{PORT}
Environment=HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
"""
_BEFORE = {
    # The modules of this machine's few devices, instead of all there are.
    "etc/initramfs-tools/conf.d/kept": "MODULES=list\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
}
_AFTER = {
    "etc/fstab": "/dev/vda / ext4 defaults 0 1\n",
    "etc/hostname": "laptop\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n127.0.1.1\tlaptop\n",
    # An empty one would make each boot a first boot.
    "etc/machine-id": "7f00000100000000000000007f000001\n",
    "etc/systemd/system/orders.service": _SERVICE,
    "usr/local/lib/orders.py": (Path(__file__).parent / "orders.py").read_text(),
}
_SIZE = "4G"
_FILL = """
unshare --mount --propagation private --net --pid --fork --kill-child sh -euc '
    mount -t proc proc "$1/proc" && mount --bind /dev "$1/dev"
    chroot "$1" systemctl enable orders.service
    chroot "$1" systemctl disable e2scrub_reap.service
    chroot "$1" env -i PATH=/usr/sbin:/usr/bin HOME=/root PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels \
        /root/vmnet/bin/setup requirements-test.lock' sh "$1"
rm -r "$1/wheels"
cp "$1"/boot/vmlinuz-* "$2/vmlinuz"
cp "$1"/boot/initrd.img-* "$2/initrd.img"
rm -r "$1/boot"
mke2fs -q -t ext4 -d "$1" -E lazy_itable_init=1,nodiscard "$2/disk.img" "$3"
"""


@dataclass(frozen=True, slots=True)
class Image:
    """The files to boot from; nothing may write to them."""

    disk: Path
    kernel: Path
    initrd: Path


def machine_image() -> Image:
    """Return the image, made now unless it is there; skip the test where none can be made."""
    for program in ("qemu-system-x86_64", "mke2fs", "dnsmasq"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}, to boot a machine")
    if platform.machine() != "x86_64":
        pytest.skip("the machine to boot is an x86_64, and this is none")
    root = debian_root("machine", [*_MACHINE, *_asked_for()], _BEFORE)
    setup = {
        name: (CHECKOUT / name).read_text() for name in ("bin/setup", "requirements.lock", "requirements-test.lock")
    }
    with made_once("disk", root.name, repr(_AFTER), repr(setup), _SIZE, _FILL) as (place, work):
        if work is not None:
            _fill(root, work, setup)
    return Image(place / "disk.img", place / "vmlinuz", place / "initrd.img")


def _asked_for() -> list[str]:
    """Return the Debian packages that bin/setup wants for the tests: it has no network where it fills the disk."""
    rows = "".join(_TABLES.findall((CHECKOUT / "bin/setup").read_text())).splitlines()
    return [package for row in rows for package in row.split()[1].split(",")]


def _fill(root: Path, work: Path, setup: dict[str, str]) -> None:
    tree, made = work / "tree", work / "made"
    made.mkdir()
    subprocess.run(["cp", "-a", "--reflink=auto", str(root), str(tree)], check=True)
    for path, text in {**_AFTER, **{f"root/vmnet/{name}": text for name, text in setup.items()}}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    (tree / "root/vmnet/bin/setup").chmod(0o755)
    (tree / "root/vmnet/src").mkdir()
    _download(tree, tree / "wheels")
    done = subprocess.run(
        ["sh", "-euc", _FILL, "sh", str(tree), str(made), _SIZE], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _download(root: Path, folder: Path) -> None:
    """Download the tests' Python packages for the Python of `root`."""
    [version] = {path.name.removeprefix("python") for path in (root / "usr/bin").glob("python3.*[0-9]")}
    wanted = ["--require-hashes", "--no-deps", "--only-binary=:all:", f"--python-version={version}", "--quiet"]
    lock = str(CHECKOUT / "requirements-test.lock")
    got = subprocess.run(
        [sys.executable, "-m", "pip", "download", *wanted, "-d", str(folder), "-r", lock],
        capture_output=True,
        text=True,
        check=False,
    )
    if got.returncode != 0:
        pytest.skip(f"no Python packages for the machine: {got.stderr.strip().splitlines()[-1]}")
