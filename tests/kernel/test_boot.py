"""A boot: the kernel is new, what lay in /run is gone, and the records have stayed."""

import socket
from pathlib import Path

import pytest

from tests.kernel.net import Lab, Laptop


def reboot(lab: Lab, tmp_path: Path) -> Laptop:
    """Return the laptop after a boot."""
    (tmp_path / "boot").mkdir()
    boot = Laptop(lab, tmp_path / "boot")
    boot.env["VMNET_STATE_DIR"] = lab.laptop.env["VMNET_STATE_DIR"]
    name = tmp_path / "boot_id"
    name.write_text("7f000001-0000-4000-8000-00007f000002\n")
    boot.run("mount", "--bind", str(name), "/proc/sys/kernel/random/boot_id")
    return boot


@pytest.fixture
def booted(lab: Lab, tmp_path: Path) -> Laptop:
    """The laptop after a boot, with the records of a guest made before it."""
    lab.laptop.vmnet("create", "web", "--kind", "veth")
    return reboot(lab, tmp_path)


@pytest.mark.parametrize("command", ["up", "watch --once"])
@pytest.mark.parametrize("forwards", [0, 1])
def test_guests_are_back(command: str, forwards: int, booted: Laptop) -> None:
    booted.sysctl("ipv4/ip_forward", forwards)
    booted.vmnet(*command.split())
    assert booted.vmnet("plan", check=False).code == 0
    booted.boot(booted.vmnet("show", "web", "--json").json).serve()
    assert booted.reaches("127.1.0.2") == {"tcp", "udp", "ping"}


def test_what_starts_after_the_carve_finds_its_address(lab: Lab, tmp_path: Path) -> None:
    """A program that had an address of the pool before the boot has it after it, though vmnet starts first."""
    server = lab.laptop.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.bind(("127.5.5.5", 80))
    server.listen()
    lab.laptop.vmnet("create", "web", "--kind", "veth")
    boot = reboot(lab, tmp_path)
    boot.vmnet("watch", "--once")
    later = boot.socket(socket.AF_INET, socket.SOCK_STREAM)
    later.bind(("127.5.5.5", 80))
    later.listen()
    client = boot.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.connect(("127.5.5.5", 80))
    # Who has gone for good is forgotten with the next carve of the same boot.
    later.close()
    boot.vmnet("restore")
    boot.vmnet("up")
    assert "127.5.5.5" not in boot.run("ip", "route", "show", "table", "local")
