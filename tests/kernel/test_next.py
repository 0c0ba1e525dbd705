"""What `create` prints is what works: qemu's arguments as they stand, run by the tap's owner, and libvirt's XML."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.kernel.machine import wait_until
from tests.kernel.net import Laptop
from tests.kernel.warm import Warm

NOBODY, OTHER = 65534, 65533
PATIENCE = 30.0
QMP = """
{"execute": "qmp_capabilities"}
{"execute": "human-monitor-command", "arguments": {"command-line": "info network"}}
{"execute": "quit"}
"""


def on_a_terminal(laptop: Laptop, *args: str) -> str:
    """Return what vmnet prints when somebody looks on."""
    main, other = os.openpty()
    done = subprocess.run(
        laptop.command(sys.executable, "-m", "vmnet", *args), stdout=other, check=True, env=laptop.env
    )
    os.close(other)
    assert done.returncode == 0
    shown = b""
    with open(main, "rb", buffering=0) as terminal:
        while True:
            try:
                shown += terminal.read(65536)
            except OSError:  # EIO: nobody writes any more
                return shown.decode().replace("\r\n", "\n")


def printed_words(shown: str) -> list[str]:
    """Return qemu's arguments as a shell would get them from what is printed."""
    command = shown[shown.index("qemu-system-x86_64") : shown.index("\nor,")]
    first, ellipsis, *words = command.replace("\\\n", " ").split()
    assert (first, ellipsis) == ("qemu-system-x86_64", "...")
    return words


@pytest.fixture
def anybodys(laptop: Laptop, tap: None) -> Laptop:
    """A laptop with a /dev/net/tun that everybody may open, as udev makes it, and a qemu."""
    if not shutil.which("qemu-system-x86_64"):
        pytest.skip("needs qemu-system-x86_64")
    laptop.run("sh", "-c", "mount -t tmpfs none /dev/net && mknod -m 666 /dev/net/tun c 10 200")
    return laptop


def qemu(laptop: Laptop, uid: int, words: Sequence[str]) -> subprocess.Popen[str]:
    """Start qemu as a user, with no VM running in it; it talks QMP."""
    rights = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    machine = ["-nodefaults", "-machine", "q35,accel=tcg", "-m", "64", "-display", "none", "-S", "-qmp", "stdio"]
    return laptop.start(*rights, "qemu-system-x86_64", *machine, *words)


def carrier(laptop: Laptop, device: str) -> bool:
    """Say whether a program has the tap open."""
    return laptop.run("cat", f"/sys/class/net/{device}/carrier", check=False) == "1\n"


@pytest.mark.root
@pytest.mark.parametrize(
    "options", [(), ("--mtu", "1400"), ("--queues", "2"), ("--queues", "3", "--mtu", "9000")], ids=" ".join
)
def test_qemu_runs_with_what_is_printed_for_the_owner_and_nobody_else(
    anybodys: Laptop, warm: Warm, options: tuple[str, ...]
) -> None:
    laptop = anybodys
    words = printed_words(on_a_terminal(laptop, "create", "vm", "--owner", "nobody", *options))
    assert " ".join(words) + "\n" == warm.vmnet(laptop, "show", "vm", "--qemu").out
    guest = warm.vmnet(laptop, "show", "vm", "--json").json
    mac, queues = guest["mac"], guest["queues"]
    refused = qemu(laptop, OTHER, words)
    _, err = refused.communicate(timeout=PATIENCE)
    assert refused.returncode == 1
    assert "could not configure /dev/net/tun (vmn-vm): Operation not permitted" in err
    process = qemu(laptop, NOBODY, words)
    assert wait_until(lambda: carrier(laptop, "vmn-vm"), PATIENCE)
    out, err = process.communicate(QMP, timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    [network] = [answer for answer in map(json.loads, out.splitlines()) if isinstance(answer.get("return"), str)]
    assert f"model=virtio-net-pci,macaddr={mac}" in network["return"]
    assert network["return"].count("type=tap,ifname=vmn-vm,script=no,downscript=no") == queues
    assert warm.vmnet(laptop, "plan").out == ""  # the tap is there for the next start


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ((), {}),
        (("--queues", "4"), {"driver": {"queues": "4"}}),
        (("--mtu", "9000"), {"mtu": {"size": "9000"}}),
        (("--queues", "2", "--mtu", "1400"), {"driver": {"queues": "2"}, "mtu": {"size": "1400"}}),
    ],
)
def test_the_interface_is_for_a_tap_that_libvirt_has_not_made(
    laptop: Laptop, warm: Warm, tap: None, options: tuple[str, ...], more: dict[str, dict[str, str]]
) -> None:
    shown = on_a_terminal(laptop, "create", "vm", *options)
    text = shown[shown.index("  <interface") : shown.index("</interface>")] + "</interface>"
    guest = warm.vmnet(laptop, "show", "vm", "--json").json
    interface = ElementTree.fromstring(text)
    assert (interface.tag, interface.attrib) == ("interface", {"type": "ethernet"})
    assert {one.tag: one.attrib for one in interface} == {
        "mac": {"address": guest["mac"]},
        "target": {"dev": guest["device"], "managed": "no"},
        "model": {"type": "virtio"},
        **more,
    }
    again = warm.vmnet(laptop, "show", "vm", "--libvirt")
    assert ElementTree.canonicalize(again.out, strip_text=True) == ElementTree.canonicalize(text, strip_text=True)
    assert warm.vmnet(laptop, "show", "vm", "--libvirt", "--json").json == again.out.removesuffix("\n")


def test_it_is_said_who_may_start_the_vm(laptop: Laptop, tap: None) -> None:
    assert "next, as root: qemu-system-x86_64" in on_a_terminal(laptop, "create", "mine")
    assert "next, as uid 54321: qemu-system-x86_64" in on_a_terminal(laptop, "create", "vm", "--owner", "54321")


def test_programs_get_the_same_words(laptop: Laptop, warm: Warm, tap: None) -> None:
    assert "next" not in warm.vmnet(laptop, "create", "vm", "--queues", "2").out
    line = warm.vmnet(laptop, "show", "vm", "--qemu").out
    assert warm.vmnet(laptop, "show", "vm", "--qemu", "--json").json == line.split()
    assert ",queues=2" in line
    assert ",mq=on,vectors=6" in line
    assert "vhost" not in line or Path("/dev/vhost-net").exists()


@pytest.mark.parametrize("option", ["--qemu", "--libvirt"])
@pytest.mark.parametrize("kind", ["veth", "tun", "alias"])
def test_what_is_no_vms_has_none_of_it(laptop: Laptop, warm: Warm, tap: None, kind: str, option: str) -> None:
    warm.vmnet(laptop, "create", "web", "--kind", kind)
    refused = warm.vmnet(laptop, "show", "web", option, check=False)
    assert (refused.code, refused.out) == (4, "")
    assert refused.err.startswith(f"vmnet: web is of kind {kind}: no VM has it\n")


@pytest.mark.root
@pytest.mark.parametrize(
    ("node", "owner", "is_used"),
    [
        ("-m 600", "nobody", False),
        ("-m 600", "root", True),
        ("-m 666", "nobody", True),
        ("-m 664", "nobody", False),
        ("-m 660 group", "nobody", True),
        ("-m 606 group", "nobody", False),
        ("-m 660 group", "54321", False),
        ("a file", "root", False),
        ("nothing", "root", False),
    ],
)
def test_vhost_is_for_owners_who_may_use_it(
    laptop: Laptop, warm: Warm, tap: None, node: str, owner: str, is_used: bool
) -> None:
    laptop.run(
        "sh", "-ec",
        "mount -t tmpfs -o mode=755 none /dev; mkdir /dev/net; mknod -m 666 /dev/net/tun c 10 200;"
        "mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9",
    )  # fmt: skip
    mode, _, group = node.partition(" group")
    if mode.startswith("-m"):
        laptop.run("sh", "-ec", f"mknod {mode} /dev/vhost-net c 10 238")
    elif node == "a file":
        laptop.run("touch", "/dev/vhost-net")
    if node.endswith("group"):
        laptop.run("chgrp", "nogroup", "/dev/vhost-net")
    assert group == ""
    warm.vmnet(laptop, "create", "vm", "--owner", owner)
    assert (",vhost=on" in warm.vmnet(laptop, "show", "vm", "--qemu").out) is is_used
