"""More guests than a process may have files open: no command asks for more than its share."""

import sys

import pytest

from tests.kernel.net import Laptop, Result

FILES, GUESTS = 256, 150  # a guest that is looked at takes two files


@pytest.fixture
def few_files(laptop: Laptop) -> Laptop:
    laptop.vmnet("carve")
    return laptop


def limited(laptop: Laptop, *words: str) -> Result:
    return laptop.execute("prlimit", f"--nofile={FILES}", sys.executable, "-m", "vmnet", *words)


def test_many_guests_are_made_seen_planned_and_deleted_with_few_files(few_files: Laptop) -> None:
    before = few_files.snapshot()
    names = [f"v{number}" for number in range(GUESTS)]
    assert limited(few_files, "create", *names, "--kind", "veth").code == 0
    seen = limited(few_files, "list", "--json").json
    assert [guest["state"] for guest in seen] == ["up"] * GUESTS
    plan = limited(few_files, "plan")
    assert (plan.code, plan.out) == (0, ""), plan.err
    assert limited(few_files, "delete", "--all", "--dry-run").code == 10
    assert limited(few_files, "down", *names).code == 0
    assert limited(few_files, "up", "--dry-run").code == 10
    assert limited(few_files, "up").code == 0
    assert limited(few_files, "delete", "--all").code == 0
    assert few_files.snapshot() == before
