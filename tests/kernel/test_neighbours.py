"""Beside other software guests go on, nothing of others is broken, and nothing that others keep closed is opened."""

import socket
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.kernel.machine import ECHO_PORT, wait_until
from tests.kernel.neighbours import (
    FIREWALLD,
    FORWARD_DROP,
    NEIGHBOURS,
    NETWORK_MANAGER,
    NETWORKD,
    PATIENCE,
    RESOLVED,
    Neighbour,
    Scene,
    put_zone,
    reached,
)
from tests.kernel.net import Lab
from tests.kernel.warm import Warm
from tests.kernel.watching import NEVER, Watching
from tests.system.roots import NEIGHBOURS as DEBIAN
from tests.system.roots import Rooted, debian_root

FOUND = 10


@pytest.fixture
def scene(warm: Warm, lab: Lab, neighbour: Neighbour) -> Scene:
    if lab.laptop.execute(neighbour.program, "-S").code:
        pytest.skip(f"needs {neighbour.program}, and a kernel that has its tables")
    made = Scene(warm, lab)
    if neighbour.debian:
        made.debian = Rooted(lab.laptop, debian_root("neighbours", DEBIAN))
    return made


def cases(needs: str = "") -> list[ParameterSet]:
    """Return the table, or those with that need; those that come from a Debian system are marked."""
    chosen = [one for one in NEIGHBOURS if one.needs == needs or not needs]
    return [pytest.param(one, id=one.name, marks=pytest.mark.root if one.debian else ()) for one in chosen]


each = pytest.mark.parametrize("neighbour", cases())


def assert_all_is_well(scene: Scene, neighbour: Neighbour, alone: set[str]) -> None:
    """Assert that guests work, and that others reach what they reach without vmnet: as much, or less that is closed."""
    if neighbour.needs == "watch":
        scene.vmnet("up")
    assert scene.vmnet("plan").out == ""
    scene.assert_guests_work()
    scene.assert_guests_are_closed(neighbour)
    beside = scene.asked(neighbour.opens)
    assert beside <= alone
    assert beside >= neighbour.opens


@each
def test_vmnet_comes_to_where_it_is(scene: Scene, neighbour: Neighbour) -> None:
    neighbour.start(scene)
    alone, theirs = scene.asked(neighbour.opens), scene.theirs()
    assert alone >= neighbour.opens
    assert not alone & neighbour.closes
    scene.create()
    scene.assert_guests_work()
    assert_all_is_well(scene, neighbour, alone)
    if neighbour.again:
        neighbour.again(scene)
        assert_all_is_well(scene, neighbour, alone)
    scene.vmnet("delete", "--all")
    scene.vmnet("restore")
    assert scene.asked(alone) == alone
    left = scene.theirs()
    assert "--comment vmnet" not in str(left)
    if not neighbour.again:
        assert left == theirs


@each
def test_it_comes_to_where_vmnet_is(scene: Scene, neighbour: Neighbour) -> None:
    scene.create()
    scene.assert_guests_work()
    neighbour.start(scene)
    if neighbour.needs == "watch":
        scene.vmnet("up")
    beside = scene.asked(neighbour.opens)
    assert_all_is_well(scene, neighbour, beside)
    if neighbour.again:
        neighbour.again(scene)
        assert_all_is_well(scene, neighbour, beside)
    scene.vmnet("delete", "--all")
    scene.vmnet("restore")
    alone = scene.asked(beside)
    assert alone >= neighbour.opens
    assert not alone & neighbour.closes
    assert beside <= alone
    assert beside >= neighbour.opens
    assert "--comment vmnet" not in str(scene.theirs())


@pytest.mark.parametrize("neighbour", cases("watch"))
def test_the_watcher_does_what_up_does(scene: Scene, neighbour: Neighbour) -> None:
    """By events alone, where the kernel tells of the change: of the older iptables it tells nothing."""
    scene.create()
    told = neighbour.program != "iptables-legacy"
    with Watching(scene.laptop, interval=NEVER if told else 1):
        for deed in (neighbour.start, neighbour.again):
            if deed:
                deed(scene)
                assert wait_until(lambda: scene.vmnet("plan", check=False).code == 0, PATIENCE)
                scene.assert_guests_work()


@pytest.mark.root
@pytest.mark.parametrize("neighbour", [RESOLVED], ids=lambda one: one.name)
def test_resolved_has_the_names_of_guests(scene: Scene, neighbour: Neighbour) -> None:
    """It reads the hosts file, and answers at 127.0.0.53, which stays on lo."""
    scene.create()
    neighbour.start(scene)
    for guest in scene.guests:
        scene.etc("hosts", scene.laptop.hosts_file.read_text())
        name = guest.info["hostname"]
        assert guest.address in scene.debian_run("resolvectl", "query", "--legend=no", name)
        question = (
            b"\x12\x34\1\0\0\1" + bytes(6) + b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
        )
        answer = scene.laptop.udp("127.0.0.53", 53, question + b"\0\0\1\0\1")
        assert answer[:2] == question[:2]
        assert socket.inet_aton(guest.address) in answer


def test_the_manual_has_each_of_them_and_what_guests_need() -> None:
    text = (Path(__file__).parents[2] / "docs/reference/neighbours.md").read_text()
    lines = text.splitlines()
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    told = {(row[0], row[1]) for row in rows if row[1] in ("nothing", "watch", "hooks", "you")}
    known = {(one.row or one.name, one.needs) for one in NEIGHBOURS}
    assert told == known | {("A narrow VPN", "nothing")}
    for rule in FORWARD_DROP.splitlines()[2:-1]:
        assert f"iptables {rule}\n" in text


@pytest.mark.root
@pytest.mark.parametrize("neighbour", [NETWORK_MANAGER, NETWORKD], ids=lambda one: one.name)
def test_without_hooks_it_takes_what_is_ours_and_up_takes_it_back(scene: Scene, neighbour: Neighbour) -> None:
    """What the files of `vmnet hooks install` are for."""
    scene.create()
    neighbour.start(scene)
    if neighbour.again:
        neighbour.again(scene)
    assert wait_until(lambda: scene.vmnet("plan", check=False).code == FOUND, PATIENCE)
    scene.vmnet("up")
    scene.assert_guests_work()


@pytest.mark.root
@pytest.mark.parametrize("neighbour", [FIREWALLD], ids=lambda one: one.name)
def test_firewalld_takes_guests_in_without_a_reload_and_puts_them_into_their_zone_at_the_next(
    scene: Scene, neighbour: Neighbour
) -> None:
    """A reload would take along what others have set in the running firewalld alone."""
    scene.create()
    neighbour.start(scene)
    assert not reached({"out": (scene.guests[0], scene.lab.internet.address, ECHO_PORT)})
    put_zone(scene)
    scene.debian_run("firewall-cmd", "--zone=trusted", "--add-interface=vmn-+")
    scene.assert_guests_work()
    for reload in ("--reload", "--complete-reload"):
        scene.debian_run("firewall-cmd", reload)
        assert scene.debian_run("firewall-cmd", "--get-zone-of-interface=vmn-+").strip() == "vmnet"
        scene.assert_guests_work()
    scene.assert_guests_are_closed(neighbour)
