"""A boot: the kernel is new, what lay in /run is gone, and the records have stayed."""

from pathlib import Path

import pytest

from tests.kernel.net import Lab, Laptop


@pytest.fixture
def booted(lab: Lab, tmp_path: Path) -> Laptop:
    """The laptop after a boot, with the records of a guest made before it."""
    lab.laptop.vmnet("create", "web", "--kind", "veth")
    (tmp_path / "boot").mkdir()
    boot = Laptop(lab, tmp_path / "boot")
    boot.env["VMNET_STATE_DIR"] = lab.laptop.env["VMNET_STATE_DIR"]
    name = tmp_path / "boot_id"
    name.write_text("7f000001-0000-4000-8000-00007f000002\n")
    boot.run("mount", "--bind", str(name), "/proc/sys/kernel/random/boot_id")
    return boot


@pytest.mark.parametrize("command", ["up", "watch --once"])
@pytest.mark.parametrize("forwards", [0, 1])
def test_guests_are_back(command: str, forwards: int, booted: Laptop) -> None:
    booted.sysctl("ipv4/ip_forward", forwards)
    booted.vmnet(*command.split())
    assert booted.vmnet("plan", check=False).code == 0
    booted.boot(booted.vmnet("show", "web", "--json").json).serve()
    assert booted.reaches("127.1.0.2") == {"tcp", "udp", "ping"}
