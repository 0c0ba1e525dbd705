"""What cloud-init is told reaches it: by seed images that each program makes alike, and in cloud-init's own hands."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.kernel.clients import PATIENCE, System
from tests.kernel.machine import Machine, wait_until
from tests.kernel.net import Laptop, Result
from vmnet.cloudinit import DOCUMENTS
from vmnet.seed import MAKERS

HOW_TO = Path(__file__).parents[2] / "docs/how-to/cloud-init.md"
MTU = 1400
_USER = 4711


@pytest.fixture
def web(laptop: Laptop, tap: None) -> dict[str, str]:
    """Create a guest; return the documents for its cloud-init."""
    laptop.vmnet("create", "web", "--mtu", str(MTU))
    documents: dict[str, str] = laptop.vmnet("show", "web", "--cloud-init", "--json").json
    assert tuple(documents) == DOCUMENTS
    return documents


def seed_by(laptop: Laptop, program: str, seed: Path, **env: str) -> Result:
    """Have vmnet make a seed image where it finds `program` and no other; what that needs itself is there."""
    folder = laptop.folder / "only" / program
    folder.mkdir(parents=True)
    (folder / program).write_text(f'#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin exec {program} "$@"\n')
    (folder / program).chmod(0o755)
    settings = [f"{key}={value}" for key, value in {"PATH": folder, **env}.items()]
    return laptop.execute("env", *settings, sys.executable, "-m", "vmnet", "show", "web", "--seed", str(seed), "--json")


def contents(laptop: Laptop, seed: Path) -> dict[str, str]:
    """Return the files of an image, as a program reads them that did not make it."""
    folder = laptop.folder / f"in-{seed.name}"
    folder.mkdir()
    laptop.run("xorriso", "-osirrox", "on", "-indev", str(seed), "-extract", "/", str(folder / "files"))
    found = {path.name: path.read_text() for path in (folder / "files").iterdir()}
    for name, text in found.items():
        assert laptop.run("isoinfo", "-i", str(seed), "-J", "-x", f"/{name}") == text
    return found


@pytest.mark.parametrize("program", MAKERS)
def test_each_program_makes_the_same_seed(laptop: Laptop, web: dict[str, str], program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"there is no {program} here")
    seed = laptop.folder / "seed.iso"
    made = seed_by(laptop, program, seed)
    assert (made.code, made.json) == (0, {**web, "seed": str(seed)})
    assert contents(laptop, seed) == web
    # What cloud-init finds it by.
    assert laptop.run("blkid", "-p", "-o", "value", "-s", "LABEL", str(seed)) == "cidata\n"


def test_the_documents_can_be_cut_apart_as_the_manual_says(laptop: Laptop, web: dict[str, str]) -> None:
    [line] = re.findall(r"^\$ vmnet show myvm --cloud-init (\| .*)$", HOW_TO.read_text(), re.MULTILINE)
    printed = laptop.vmnet("show", "web", "--cloud-init").out
    folder = laptop.folder / "apart"
    folder.mkdir()
    laptop.run("sh", "-c", f"cd {folder} && cat {line}", stdin=printed)
    assert {path.name: path.read_text() for path in folder.iterdir()} == web


def test_user_data_can_be_the_users_own(laptop: Laptop, web: dict[str, str]) -> None:
    own = laptop.folder / "login.yaml"
    own.write_text("#cloud-config\nssh_authorized_keys:\n  - ssh-ed25519 AAAA $mac ä\n")
    seed = laptop.folder / "seed.iso"
    laptop.vmnet("show", "web", "--seed", str(seed), "--user-data", str(own))
    assert contents(laptop, seed) == {**web, "user-data": own.read_text()}
    own.write_bytes(b"\xff")
    assert laptop.vmnet("show", "web", "--user-data", str(own), check=False).code == 2
    own.unlink()
    assert laptop.vmnet("show", "web", "--user-data", str(own), check=False).code == 1


def test_a_seed_takes_the_place_of_the_one_before(laptop: Laptop, web: dict[str, str]) -> None:
    seed = laptop.folder / "seed.iso"
    laptop.vmnet("show", "web", "--seed", str(seed))
    before = seed.read_bytes()
    seed.chmod(0o640)
    laptop.vmnet("create", "other")
    with seed.open("rb") as held:
        laptop.vmnet("show", "other", "--seed", str(seed))
        assert held.read() == before  # as a VM does that runs with it
    assert "other" in contents(laptop, seed)["meta-data"]
    assert seed.stat().st_mode & 0o777 == 0o640
    assert not [path for path in laptop.folder.iterdir() if path.name.startswith(".vmnet-")]


def test_what_is_no_seed_of_vmnets_is_left_alone(laptop: Laptop, web: dict[str, str]) -> None:
    folder = laptop.folder / "foreign"
    (folder / "folder").mkdir(parents=True)
    laptop.vmnet("show", "web", "--seed", str(laptop.folder / "seed.iso"))
    ours = (laptop.folder / "seed.iso").read_bytes()
    (folder / "empty").touch()
    (folder / "text").write_text(web["meta-data"])
    (folder / "cut").write_bytes(ours[:30000])
    (folder / "somebody's").write_bytes(ours.replace(b"made by vmnet", b"made by hand "))
    (folder / "label").write_bytes(ours.replace(b"cidata", b"config"))
    (folder / "link").symlink_to(laptop.folder / "seed.iso")
    (folder / "nowhere").symlink_to(folder / "missing")
    os.mkfifo(folder / "pipe")
    before = laptop.run("ls", "-la", "--full-time", str(folder))
    for path in sorted(folder.iterdir()):
        refused = laptop.vmnet("show", "web", "--seed", str(path), check=False)
        assert refused.code == 4, path
        assert f"{path} is there, and is no seed image of vmnet's" in refused.err
    assert laptop.run("ls", "-la", "--full-time", str(folder)) == before


def test_a_program_that_fails_leaves_what_was(laptop: Laptop, web: dict[str, str]) -> None:
    seed = laptop.folder / "seed.iso"
    laptop.vmnet("show", "web", "--seed", str(seed))
    before = seed.read_bytes()
    laptop.run("sh", "-ec", "mkdir /run/small && mount -t tmpfs -o size=64k small /run/small")
    for program in ("genisoimage", "xorriso"):
        failed = seed_by(laptop, program, seed, TMPDIR="/run/small")
        assert failed.code == 1
        assert f"vmnet: {program} made no seed image: " in failed.err
    assert seed.read_bytes() == before
    assert not list(laptop.path("/run/small").iterdir())
    lost = laptop.vmnet("show", "web", "--seed", "/run/nowhere/seed.iso", check=False)
    assert (lost.code, lost.err) == (1, "vmnet: /run/nowhere/seed.iso: No such file or directory\n")


@pytest.mark.root
def test_what_sudo_makes_belongs_to_who_called_it(laptop: Laptop, web: dict[str, str]) -> None:
    seed = laptop.folder / "seed.iso"
    sudo = {"SUDO_UID": str(_USER), "SUDO_GID": "4712"}
    laptop.vmnet("show", "web", "--seed", str(seed), env=sudo)
    assert (seed.stat().st_uid, seed.stat().st_gid) == (_USER, 4712)
    # Once it is there, whose it is does not change any more: libvirt has images belong to its own user.
    laptop.vmnet("show", "web", "--seed", str(seed))
    assert (seed.stat().st_uid, seed.stat().st_gid) == (_USER, 4712)


@pytest.mark.root
@pytest.mark.parametrize("renderer", ["networkd", "netplan"])
def test_cloud_init_configures_a_vm(laptop: Laptop, internet: Machine, web: dict[str, str], renderer: str) -> None:
    internet.serve()
    seed = laptop.folder / "seed.iso"
    laptop.vmnet("show", "web", "--seed", str(seed))
    [info] = laptop.vmnet("list", "--json").json
    vm = System(laptop.boot(info, configured=False), laptop.folder)
    # The folder that stands for the image where there are no disks.
    folder = "/var/lib/cloud/seed/nocloud"
    vm.path(folder).mkdir(parents=True)
    for name, text in contents(laptop, seed).items():
        vm.path(f"{folder}/{name}").write_text(text)
    assert "Valid cloud-config" in vm.run("cloud-init", "schema", "--config-file", f"{folder}/user-data")
    if renderer == "networkd":
        vm.path("/etc/cloud/cloud.cfg.d/99.cfg").write_text("system_info: {network: {renderers: [networkd]}}\n")
        vm.run("cloud-init", "init", "--local")
        assert vm.run("hostname") == "web\n"
    else:
        # By hand, for cloud-init would go on to ask udev for the NIC's name; and a NIC that is a tap in truth has no
        # permanent MAC to be found by.
        convert = "cloud-init devel net-convert --kind yaml --directory / --distro debian --output-kind netplan"
        vm.run(*convert.split(), "--network-data", f"{folder}/network-config")
        vm.run("netplan", "generate")
        vm.run("sed", "-i", "s/^PermanentMACAddress/MACAddress/", "/run/systemd/network/10-netplan-eth0.network")
    vm.start("/lib/systemd/systemd-networkd")
    assert wait_until(vm.is_configured, PATIENCE), vm.read("/run/said")
    link = vm.read("/run/systemd/netif/links/2")
    assert {f"DNS={vm.guest.guest_gateway}", "DOMAINS=vmnet.internal"} <= set(link.splitlines())
    assert f"mtu {MTU} " in vm.guest.run("ip", "link", "show", "eth0")
    assert vm.guest.tcp(internet.address) == b"hello"
    echo = vm.guest.serve()
    assert laptop.tcp(vm.guest.address, payload=b"hi") == b"hi"
    assert echo.peers == [vm.guest.guest_gateway]
