"""What the tests of neighbours rely on: a Debian system that shares the laptop's network, and stays as it was made."""

from pathlib import Path

import pytest

from tests.kernel.net import Laptop
from tests.system.roots import NEIGHBOURS, Rooted, debian_root

pytestmark = pytest.mark.root


@pytest.fixture
def debian(laptop: Laptop) -> Rooted:
    return Rooted(laptop, debian_root("neighbours", NEIGHBOURS))


def test_every_package_is_configured(debian: Rooted) -> None:
    states = debian.run("dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n").splitlines()
    assert {state.split()[1] for state in states} == {"installed"}
    assert {state.split()[0] for state in states} >= set(NEIGHBOURS)


def test_its_programs_work_on_the_laptops_network(laptop: Laptop, debian: Rooted) -> None:
    debian.run("ufw", "--force", "enable")
    assert "ufw-user-input" in laptop.run("iptables-save")
    assert "wlan0" in debian.run("ip", "link")


def test_namespaces_are_seen_by_both(laptop: Laptop, debian: Rooted) -> None:
    laptop.run("ip", "netns", "add", "ours")
    debian.run("ip", "netns", "add", "theirs")
    for side in (laptop, debian):
        for name in ("ours", "theirs"):
            assert side.run("ip", "-n", name, "-br", "link").startswith("lo")


def test_what_is_written_stays_with_the_test(debian: Rooted) -> None:
    kept: Path = debian_root("neighbours", NEIGHBOURS)
    debian.path("/etc/hostname").write_text("mine\n")
    assert debian.run("cat", "/etc/hostname") == "mine\n"
    assert (kept / "etc/hostname").read_text() != "mine\n"
