"""The hook as libvirt calls it: by its file, with the domain's XML on stdin."""

import pytest

from tests.kernel.net import Laptop, Result
from tests.unit.test_libvirt import BOMB, domain, ethernet, sample

pytestmark = [pytest.mark.usefixtures("tap"), pytest.mark.root]

MAC = "<mac address='52:54:00:aa:00:01'/>"
WEB = domain(ethernet("vmn-web", MAC), name="webserver").decode()


@pytest.fixture
def hook(laptop: Laptop) -> str:
    """Install the hook, and return its path."""
    laptop.run("mkdir", "-p", "/etc/libvirt/hooks")
    laptop.vmnet("hooks", "install", "libvirt")
    return "/etc/libvirt/hooks/qemu.d/vmnet"


def call(laptop: Laptop, hook: str, operation: str, xml: str = WEB, name: str = "webserver") -> Result:
    """Call the hook as libvirt does: with an environment of its own, from /."""
    clean = ["env", "-i", "LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "--chdir=/"]
    sub = "end" if operation in ("stopped", "release") else "begin"
    return laptop.execute(*clean, hook, name, operation, sub, "-", stdin=xml)


def test_a_domain_comes_and_goes(laptop: Laptop, hook: str) -> None:
    assert call(laptop, hook, "prepare") == Result(0, "", "")
    made = laptop.vmnet("show", "web", "--json").json
    assert (made["state"], made["kind"], made["mac"]) == ("up", "tap", "52:54:00:aa:00:01")
    for operation in ("start", "started", "reconnect", "prepare"):
        assert call(laptop, hook, operation) == Result(0, "", "")
    assert laptop.vmnet("show", "web", "--json").json == made
    for operation in ("stopped", "release", "release"):
        assert call(laptop, hook, operation) == Result(0, "", "")
    assert "vmn-web" not in laptop.links()
    assert laptop.vmnet("show", "web", "--json").json == {**made, "state": "down"}
    assert call(laptop, hook, "prepare").code == 0
    assert laptop.vmnet("show", "web", "--json").json == made


def test_a_guest_that_is_there_is_the_domains(laptop: Laptop, hook: str) -> None:
    [made] = laptop.vmnet("create", "web", "--kind", "tap", "--mtu", "1400", "--json").json
    assert call(laptop, hook, "prepare") == Result(0, "", "")
    assert laptop.vmnet("list", "--json").json == [made]
    assert call(laptop, hook, "release").code == 0
    assert laptop.vmnet("list", "--json").json == [{**made, "state": "down"}]


def test_a_guest_with_a_long_name_is_told_by_its_device_whatever_the_domain_is_called(
    laptop: Laptop, hook: str
) -> None:
    laptop.vmnet("create", "webserver-of-the-shop", "webserver-of-the-office")
    [made, other] = laptop.vmnet("list", "--json").json
    xml = domain(ethernet(made["device"], MAC), name="shop").decode()
    assert call(laptop, hook, "prepare", xml) == Result(0, "", "")
    assert call(laptop, hook, "release", xml) == Result(0, "", "")
    assert laptop.vmnet("list", "--json").json == [{**made, "state": "down"}, other]


@pytest.mark.parametrize("kind", ["veth", "alias"])
def test_a_guest_that_is_no_vms_does_not_become_the_domains(laptop: Laptop, hook: str, kind: str) -> None:
    [made] = laptop.vmnet("create", "web", "--kind", kind, "--json").json
    refused = call(laptop, hook, "prepare")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith(f"vmnet: web is of kind {kind}")
    assert call(laptop, hook, "release") == Result(0, "", "")
    assert laptop.vmnet("list", "--json").json == [made]


def test_what_a_domain_has_not_claimed_is_not_taken_down(laptop: Laptop, hook: str) -> None:
    laptop.vmnet("create", "web", "--kind", "tap")
    assert call(laptop, hook, "release") == Result(0, "", "")
    assert laptop.vmnet("show", "web", "--json").json["state"] == "up"


def test_a_device_of_somebody_elses_is_named_and_left_alone(laptop: Laptop, hook: str) -> None:
    laptop.ip("tuntap add vmn-web mode tap user 7")
    before = laptop.run("ip", "-d", "link", "show", "vmn-web")
    refused = call(laptop, hook, "prepare")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.count("\n") == 1
    assert "vmn-web" in refused.err
    assert laptop.run("ip", "-d", "link", "show", "vmn-web") == before
    assert laptop.vmnet("list", "--json").json == []


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        (domain(ethernet("vmn-web", managed="yes")).decode(), "managed='no'"),
        (domain(ethernet("vmn-ab_cdefghij")).decode(), "vmn-ab_cdefghij"),
        (domain(ethernet("vmn-UP;$(reboot)")).decode(), "UP"),
        (BOMB.decode() + "vmn-", "document type"),
        ("vmn-<domain", "cannot be read"),
    ],
    ids=["managed", "unknown", "hostile", "entities", "broken"],
)
def test_a_domain_that_asks_for_what_cannot_be_is_refused_in_one_line(
    laptop: Laptop, hook: str, xml: str, words: str
) -> None:
    refused = call(laptop, hook, "prepare", xml)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("vmnet: ")
    assert refused.err.count("\n") == 1
    assert words in refused.err
    for operation in ("release", "reconnect", "started", "migrate", "restore", "nonsense"):
        assert call(laptop, hook, operation, xml) == Result(0, "", "")
    assert laptop.vmnet("list", "--json").json == []


def test_other_domains_are_no_concern_of_the_hook(laptop: Laptop, hook: str) -> None:
    other = sample("qemu-prepare-begin").decode().replace("vmn-", "tap")
    for operation in ("prepare", "started", "release"):
        # Not even a Python is started.
        assert call(laptop, hook, operation, other) == Result(0, "", "")
    assert laptop.vmnet("list", "--json").json == []
    assert "127.0.0.1/8" in laptop.run("ip", "addr", "show", "lo")


def test_a_second_domain_does_not_get_what_a_running_one_has(laptop: Laptop, hook: str) -> None:
    assert call(laptop, hook, "prepare").code == 0
    laptop.open_device("vmn-web", "tap")
    laptop.await_link("vmn-web")
    other = WEB.replace("7f000102", "7f000999")
    refused = call(laptop, hook, "prepare", other)
    assert (refused.code, refused.out) == (1, "")
    assert "in use by another domain" in refused.err
    assert call(laptop, hook, "release", other) == Result(0, "", "")
    assert laptop.vmnet("show", "web", "--json").json["state"] == "up"


def test_uninstall_takes_away_just_that(laptop: Laptop, hook: str) -> None:
    laptop.path("/etc/libvirt/hooks/qemu.d/others").write_text("#!/bin/sh\n")
    laptop.vmnet("hooks", "uninstall", "libvirt")
    assert laptop.run("ls", "-A", "/etc/libvirt/hooks/qemu.d").split() == [".made-by-vmnet", "others"]
