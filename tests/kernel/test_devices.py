"""Taps and tuns as their users meet them: whose they are, how many queues, what stays; and indexes that are taken."""

import fcntl
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel.net import Laptop
from tests.kernel.warm import Warm

TUNSETIFF = 0x400454CA
TAP, TUN, NO_PI, MULTI_QUEUE = 0x2, 0x1, 0x1000, 0x100
OPEN = f"""
import fcntl, os, struct, sys
device, flags, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for _ in range(times):
    fcntl.ioctl(os.open("/dev/net/tun", os.O_RDWR), {TUNSETIFF}, struct.pack("16sH22x", device.encode(), flags))
"""
PERMITTED, REFUSED = "", "PermissionError"


def opened(laptop: Laptop, device: str, flags: int, *, uid: int, times: int = 1) -> str:
    """Open a device as a user; return the name of what it ended with, if it did not succeed."""
    rights = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    done = subprocess.run(
        laptop.command(*rights, "/usr/bin/env", "python3", "-I", "-c", OPEN, device, str(flags), str(times)),
        capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return done.stderr.strip().rpartition("\n")[2].partition(":")[0]


@pytest.fixture
def anybodys(laptop: Laptop, tap: None) -> Laptop:
    """A laptop with a /dev/net/tun that everybody may open, as udev makes it."""
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no /usr/bin/python3 that another user could run")
    laptop.run("sh", "-c", "mount -t tmpfs none /dev/net && mknod -m 666 /dev/net/tun c 10 200")
    return laptop


@pytest.mark.root
@pytest.mark.parametrize(("kind", "flags"), [("tap", TAP | NO_PI), ("tun", TUN | NO_PI)])
def test_its_owner_may_open_it_and_no_other_user(anybodys: Laptop, kind: str, flags: int) -> None:
    laptop = anybodys
    laptop.vmnet("create", "vm", "--kind", kind, "--owner", "1234")
    assert opened(laptop, "vmn-vm", flags, uid=1234) == PERMITTED
    assert opened(laptop, "vmn-vm", flags, uid=4321) == REFUSED
    laptop.vmnet("create", "mine", "--kind", kind)  # root's own, and nobody else's
    assert opened(laptop, "vmn-mine", flags, uid=1234) == REFUSED


@pytest.mark.root
def test_a_tap_has_as_many_queues_as_are_asked_for(anybodys: Laptop) -> None:
    laptop = anybodys
    laptop.vmnet("create", "vm", "--queues", "4", "--owner", "1234")
    laptop.vmnet("create", "one", "--owner", "1234")
    assert opened(laptop, "vmn-vm", TAP | NO_PI | MULTI_QUEUE, uid=1234, times=4) == PERMITTED
    assert opened(laptop, "vmn-one", TAP | NO_PI | MULTI_QUEUE, uid=1234) == "OSError"
    assert laptop.vmnet("plan").out == ""


def test_a_tap_outlives_its_users(laptop: Laptop, tap: None) -> None:
    laptop.vmnet("create", "vm")
    for _ in range(2):
        with laptop.entered():
            handle = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH22x", b"vmn-vm", TAP | NO_PI))
            os.close(handle)
    assert laptop.vmnet("plan").out == ""


@pytest.mark.parametrize("kind", ["veth", "tap", "tun"])
def test_an_index_that_is_taken_is_left_to_its_holder(laptop: Laptop, kind: str, tap: None) -> None:
    """The first block's devices would be 100000 and 100001."""
    laptop.ip("link add other index 100000 type bridge")
    before = laptop.run("ip", "-d", "link", "show", "other")
    laptop.vmnet("create", "vm", "--kind", kind)
    assert laptop.vmnet("plan").out == ""
    assert laptop.run("ip", "-d", "link", "show", "other") == before


def test_a_guests_own_index_may_be_taken_too(laptop: Laptop) -> None:
    laptop.run("ip", "netns", "add", "there")
    laptop.run("ip", "-n", "there", "link", "add", "other", "index", "100001", "type", "bridge")
    laptop.vmnet("create", "vm", "--netns", "there")
    assert laptop.vmnet("plan").out == ""
    assert "other" in laptop.run("ip", "-n", "there", "link")


def test_whoever_cannot_leave_a_guests_namespace_ends_there(laptop: Laptop) -> None:
    """What came next would be done to the wrong host."""
    if not shutil.which("strace"):
        pytest.skip("strace is missing: bin/test installs it")
    laptop.vmnet("carve")
    barred = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=setns", "-e", "inject=setns:error=EPERM:when=1"]
    done = laptop.execute(*barred, sys.executable, "-m", "vmnet", "create", "web", "--kind", "veth")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("vmnet: the way back into the host's network namespace is barred")
    laptop.vmnet("up")
    assert laptop.vmnet("plan").out == ""
    assert laptop.vmnet("list", "--json").json[0]["state"] == "up"


SNATCH = f"""
import fcntl, os, struct
request = struct.pack("16sH22x", b"vmn-vm", {TAP | NO_PI | MULTI_QUEUE})
print("trying", flush=True)
while True:
    handle = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(handle, {TUNSETIFF}, request)
    except PermissionError:
        os.close(handle)
    else:
        break
print("in", flush=True)
input()
"""


@pytest.mark.root
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace, to slow vmnet down")
def test_nobody_opens_a_tap_with_queues_before_it_has_an_owner(anybodys: Laptop, warm: Warm) -> None:
    laptop = anybodys
    rights = ["setpriv", "--reuid=4321", "--regid=4321", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    other = laptop.start(*rights, "/usr/bin/python3", "-I", "-c", SNATCH)
    assert other.stdout is not None
    assert other.stdout.readline() == "trying\n"
    slow = ["-e", "trace=ioctl", "-e", "inject=ioctl:delay_exit=100000", "-o", "/dev/null"]
    refused = warm.vmnet(laptop, "create", "vm", "--queues", "2", "--owner", "1234", check=False, strace=slow)
    assert other.stdout.readline() == "in\n"
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("vmnet: another program opened vmn-vm before it was anybody's")
    assert "vmn-vm" not in laptop.links()
    assert warm.vmnet(laptop, "list", "--json").json == []
    other.communicate("\n", timeout=30)
    warm.vmnet(laptop, "create", "vm", "--queues", "2", "--owner", "1234")
    flags = TAP | NO_PI | MULTI_QUEUE
    assert opened(laptop, "vmn-vm", flags, uid=1234, times=2) == PERMITTED
