"""Many at once: commands of several processes meet, and none of them loses, doubles or breaks anything."""

import fcntl
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.kernel.alive import Guests
from tests.kernel.machine import somebody_waits_for, wait_until
from tests.kernel.net import Laptop, Result, why_no_tap
from tests.kernel.warm import Warm
from vmnet.ipam import Pool
from vmnet.store import LeaseRequest, Store

REFUSED, NO_SUCH_GUEST, CONFLICT = 1, 3, 4
FORMS: list[tuple[str, ...]] = [
    ("--kind", "veth"),
    ("--kind", "veth", "--mapped"),
    *([] if why_no_tap() else [("--kind", "tap"), ("--kind", "tun")]),
]


class Crowd:
    """Runs commands in one laptop, many at once."""

    def __init__(self, warm: Warm, laptop: Laptop) -> None:
        self.warm, self.laptop, self.alive = warm, laptop, Guests(laptop.lab)

    def run(self, commands: Sequence[Sequence[str]]) -> list[Result]:
        """Run all of them at once; a traceback from any fails the test."""
        calls = [self.warm.start(self.laptop, *command) for command in commands]
        results = [call.wait() for call in calls]
        for command, result in zip(commands, results, strict=True):
            assert "Traceback" not in result.err, f"{command}: {result.err}"
        return results

    def guests(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.warm.vmnet(self.laptop, "list", "--json").json
        return found

    def converges(self) -> None:
        """Assert that the next `up` leaves nothing to be done, and that guests answer."""
        self.warm.vmnet(self.laptop, "up")
        self.is_right()

    def is_right(self) -> None:
        """Assert that the kernel is as recorded, guests answer, and no two share anything."""
        plan = self.warm.vmnet(self.laptop, "plan", check=False)
        assert plan.code == 0, plan.out + plan.err
        guests = self.guests()
        assert {guest["state"] for guest in guests} <= {"up"}
        for key in ("block", "device", "hostname"):
            assert len({guest[key] for guest in guests}) == len(guests), key
        ours = {link for link in self.laptop.links() if link.startswith("vmn-")}
        assert ours == {guest["device"] for guest in guests}
        hosts = self.laptop.hosts_file.read_text()
        assert {line.split()[1] for line in hosts.splitlines() if "vmnet.internal" in line} == {
            guest["hostname"] for guest in guests
        }
        for guest in guests:
            assert self.alive.work(guest), f"{guest['name']} does not work"


@pytest.fixture
def crowd(warm: Warm, laptop: Laptop) -> Iterator[Crowd]:
    """A crowd; after the test nothing of it may stay."""
    before = laptop.snapshot()
    made = Crowd(warm, laptop)
    yield made
    warm.vmnet(laptop, "delete", "--all")
    warm.vmnet(laptop, "restore")
    after = laptop.snapshot()
    assert {key: (before[key], value) for key, value in after.items() if value != before[key]} == {}


def _codes(results: Sequence[Result]) -> list[int]:
    return [result.code for result in results]


def test_sixteen_guests_are_created_at_once(crowd: Crowd) -> None:
    names = [f"g{number}" for number in range(16)]
    commands = [("create", name, *FORMS[number % len(FORMS)]) for number, name in enumerate(names)]
    assert _codes(crowd.run(commands)) == [0] * 16
    assert sorted(guest["name"] for guest in crowd.guests()) == sorted(names)
    crowd.is_right()
    assert _codes(crowd.run([("delete", name) for name in names])) == [0] * 16
    assert crowd.guests() == []
    crowd.is_right()


def test_one_guest_is_created_by_many_at_once(crowd: Crowd) -> None:
    assert _codes(crowd.run([("create", "web", "--kind", "veth")] * 8)) == [0] * 8
    assert [guest["name"] for guest in crowd.guests()] == ["web"]
    crowd.is_right()
    assert set(_codes(crowd.run([("delete", "web")] * 8))) <= {0, NO_SUCH_GUEST}
    assert crowd.guests() == []


def test_of_those_who_want_it_different_one_kind_wins(crowd: Crowd) -> None:
    modes = ["--native", "--mapped"] * 4
    codes = _codes(crowd.run([("create", "web", "--kind", "veth", mode) for mode in modes]))
    [web] = crowd.guests()
    assert codes == [0 if mode == f"--{web['mode']}" else CONFLICT for mode in modes]
    crowd.is_right()


@pytest.mark.parametrize("wanted", ["--address 127.1.7.2", "--netns shared"])
def test_of_those_who_want_the_same_thing_one_gets_it(crowd: Crowd, wanted: str) -> None:
    for _ in range(3):
        names = [f"g{number}" for number in range(6)]
        results = crowd.run([("create", name, "--kind", "veth", *wanted.split()) for name in names])
        winners = [name for name, result in zip(names, results, strict=True) if result.code == 0]
        assert [guest["name"] for guest in crowd.guests()] == winners
        assert len(winners) == 1
        assert set(_codes(results)) <= {0, REFUSED, CONFLICT}
        crowd.is_right()
        [late] = crowd.run([("create", "late", "--kind", "veth", *wanted.split())])
        assert late.code == CONFLICT
        crowd.is_right()
        crowd.warm.vmnet(crowd.laptop, "delete", "--all")


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_one_guest_is_created_and_deleted_again_and_again(crowd: Crowd, form: tuple[str, ...]) -> None:
    for _ in range(6):
        results = crowd.run([("create", "web", *form), ("delete", "web")] * 4)
        assert set(_codes(results[::2])) <= {0}, results
        assert set(_codes(results[1::2])) <= {0, NO_SUCH_GUEST}, results
    crowd.converges()


def test_up_comes_while_guests_are_created(crowd: Crowd) -> None:
    creates = [("create", f"g{number}", *FORMS[number % len(FORMS)]) for number in range(8)]
    assert _codes(crowd.run([*creates[:4], ("up",), ("up",), *creates[4:], ("up",), ("up",)])) == [0] * 12
    assert len(crowd.guests()) == 8
    crowd.is_right()


def test_guests_go_up_and_down_at_once(crowd: Crowd) -> None:
    names = [f"g{number}" for number in range(4)]
    crowd.warm.vmnet(crowd.laptop, "create", *names, "--kind", "veth")
    commands = [(verb, name) for name in names for verb in ("down", "up", "down", "up")]
    random.Random(127).shuffle(commands)
    assert set(_codes(crowd.run(commands))) == {0}
    crowd.converges()


def test_the_host_is_carved_and_restored_while_guests_come_and_go(crowd: Crowd) -> None:
    for turn in range(3):
        commands = [
            ("carve",),
            ("restore",),
            ("create", "a", "--kind", "veth"),
            ("up",),
            ("restore",),
            ("delete", "--all"),
        ]
        commands += [("create", f"g{turn}", *FORMS[turn % len(FORMS)]), ("down",), ("carve",), ("list",), ("plan",)]
        results = crowd.run(commands)
        for command, result in zip(commands, results, strict=True):
            assert result.code in ((0, 10) if command == ("plan",) else (0,)), (command, result)
    crowd.converges()


def test_one_that_cannot_be_made_undoes_nobody_elses(laptop: Laptop) -> None:
    laptop.run("ip", "netns", "add", "there")
    laptop.vmnet("carve")
    lock = laptop.folder / "run/guests.lock"
    with lock.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        command = laptop.start(*laptop.call, "create", "web", "--netns", "there")
        assert wait_until(lambda: somebody_waits_for(lock), 10)
        laptop.run("ip", "netns", "delete", "there")
        with Store.open(laptop.folder / "state", write=True) as store:  # it is deleted, and made by somebody else
            [lease] = store.leases()
            store.release(["web"], freed=1.0)
            theirs = LeaseRequest("web", "veth", "native", None, 1500, 4202, 1, lease.netns, None)
            made = store.allocate([theirs], pool=Pool(), created=lease.created)
    out, err = command.communicate(timeout=20)
    assert (command.returncode, out) == (4, ""), err
    with Store.open(laptop.folder / "state", write=False) as store:
        assert store.leases() == made


_MEANWHILE = """
import subprocess, sys
from vmnet.cli import main
from vmnet.store import Store

allocate, others = Store.allocate, sys.argv.pop(1).split()

def overtaken(self, *args, **values):
    Store.allocate = allocate
    subprocess.run([*others, "create", "web", "--kind", "veth"], check=True, stdout=subprocess.DEVNULL)
    try:
        return allocate(self, *args, **values)
    finally:
        subprocess.run([*others, "delete", "web"], check=True)

Store.allocate = overtaken
main()
"""


def test_what_comes_and_goes_in_between_is_in_nobodys_way(laptop: Laptop) -> None:
    laptop.vmnet("carve")
    words = [sys.executable, "-c", _MEANWHILE, " ".join(laptop.call), "create", "web", "--kind", "veth"]
    assert laptop.execute(*words).code == 0
    assert [one["state"] for one in laptop.vmnet("list", "--json").json] == ["up"]
