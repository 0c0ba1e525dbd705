"""`vmnet hooks` and a real libvirtd: the network `vmnet` comes and goes with the hooks."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.kernel.libvirtd import Domain, Libvirtd, ethernet, on_network
from tests.kernel.machine import wait_until
from tests.kernel.net import Laptop, Result
from tests.kernel.test_hooks import etc, hooks, program  # noqa: F401 -- fixtures
from tests.kernel.test_libvirt import MAC, libvirt, record  # noqa: F401 -- fixtures
from tests.kernel.vm import LIMIT

pytestmark = pytest.mark.root

THEIRS = "<network><name>vmnet</name><forward mode='bridge'/><bridge name='br0'/></network>"


def networks(libvirt: Libvirtd) -> dict[str, list[str]]:  # noqa: F811
    """Return of each network whether it runs, and whether it will after a restart."""
    lines = libvirt.virsh("net-list", "--all").out.splitlines()
    return {line.split()[0]: line.split()[1:3] for line in lines}


def part(done: Result) -> Any:
    return done.json[0]


def test_the_network_comes_with_the_hooks_and_goes_with_them(
    laptop: Laptop,
    libvirt: Libvirtd,  # noqa: F811
    hooks: Callable[..., Result],  # noqa: F811
) -> None:
    calls = record(libvirt, "network.d/theirs")
    before, others = etc(laptop), networks(libvirt)
    assert part(hooks("status", "libvirt", "--json"))["network"] == "missing"
    planned = hooks("install", "libvirt", "--dry-run", check=False)
    assert (planned.code, planned.out.count("net-")) == (10, 3)
    assert (etc(laptop), networks(libvirt)) == (before, others)

    done = hooks("install", "libvirt")
    assert done.err == ""
    assert re.findall("ran: .*(net-[a-z]+)", done.out) == ["net-define", "net-start", "net-autostart"]
    assert networks(libvirt) == {**others, "vmnet": ["active", "yes"]}
    assert wait_until(lambda: "network.d/theirs vmnet started begin -" in calls.read_text(), LIMIT)
    assert part(hooks("status", "libvirt", "--json"))["network"] == "current"
    assert re.search("network vmnet +current", hooks("status", "libvirt").out)
    again = hooks("install", "libvirt", "--json")
    assert (again.json["ran"], again.json["to_do"]) == ([], [])
    assert hooks("install", "libvirt", "--dry-run").out == ""

    # It is what people start and stop.
    libvirt.virsh("net-destroy", "vmnet")
    libvirt.virsh("net-autostart", "vmnet", "--disable")
    assert part(hooks("status", "libvirt", "--json"))["network"] == "stopped"
    assert len(hooks("install", "libvirt", "--json").json["ran"]) == 2
    assert networks(libvirt)["vmnet"] == ["active", "yes"]

    assert hooks("uninstall", "libvirt", "--dry-run", check=False).out.count("net-") == 2
    gone = hooks("uninstall", "libvirt")
    assert gone.err == ""
    assert networks(libvirt) == others
    assert hooks("uninstall", "libvirt", "--json").json == {"files": [], "ran": [], "to_do": []}
    # libvirt makes the folder in which it lists what starts by itself.
    assert etc(laptop).keys() - before.keys() <= {"libvirt/qemu/networks/autostart"}


def test_a_network_of_somebody_elses_is_left_alone(
    laptop: Laptop,
    libvirt: Libvirtd,  # noqa: F811
    hooks: Callable[..., Result],  # noqa: F811
) -> None:
    path = laptop.folder / "theirs.xml"
    path.write_text(THEIRS)
    libvirt.virsh("net-define", str(path))
    before = libvirt.virsh("net-dumpxml", "vmnet").out
    for verb in ("install", "install", "uninstall"):
        done = hooks(verb, "libvirt")
        assert "was left as it is" in done.err
        assert "net-" not in done.out
    assert part(hooks("status", "libvirt", "--json"))["network"] == "foreign"
    assert libvirt.virsh("net-dumpxml", "vmnet").out == before


def test_a_network_that_domains_use_stays_until_they_do_not(
    libvirt: Libvirtd,  # noqa: F811
    hooks: Callable[..., Result],  # noqa: F811
) -> None:
    hooks("install", "libvirt")
    Domain(libvirt, "shop", ethernet("vmn-shop", "52:54:00:7f:01:17"), guest="shop")
    Domain(libvirt, "web's", on_network(MAC), guest="web")
    done = hooks("uninstall", "libvirt")
    assert "domains are on it: web's\n" in done.err
    assert re.findall("net-[a-z]+", done.out.partition("to do by hand:")[2]) == ["net-destroy", "net-undefine"]
    assert networks(libvirt)["vmnet"] == ["active", "yes"]
    libvirt.virsh("undefine", "web's")
    hooks("uninstall", "libvirt")
    assert "vmnet" not in networks(libvirt)


def test_where_libvirt_does_not_answer_a_person_is_told_what_to_type(
    laptop: Laptop,
    libvirt: Libvirtd,  # noqa: F811
    hooks: Callable[..., Result],  # noqa: F811
) -> None:
    libvirt.stop()
    done = hooks("install", "libvirt")
    assert "was not made" in done.err
    assert part(hooks("status", "libvirt", "--json"))["network"] == "unknown"
    typed = done.out.partition("to do by hand:\n")[2]
    assert hooks("install", "libvirt", "--json").json["to_do"] == [
        "\n".join(one) for one in [typed.splitlines()[:-2], *([line] for line in typed.splitlines()[-2:])]
    ]
    libvirt.start()
    laptop.run("sh", "-ec", typed)
    assert networks(libvirt)["vmnet"] == ["active", "yes"]
    assert part(hooks("status", "libvirt", "--json"))["network"] == "current"
    libvirt.stop()
    gone = hooks("uninstall", "libvirt")
    assert "was not taken away" in gone.err
    libvirt.start()
    laptop.run("sh", "-c", gone.out.partition("to do by hand:\n")[2])
    assert "vmnet" not in networks(libvirt)


def test_below_a_prefix_libvirt_is_not_asked(
    laptop: Laptop,
    libvirt: Libvirtd,  # noqa: F811
    hooks: Callable[..., Result],  # noqa: F811
) -> None:
    root = laptop.folder / "image"
    done = hooks("install", "libvirt", "--prefix", str(root), "--json")
    assert (done.err, done.json["ran"], len(done.json["to_do"])) == ("", [], 3)
    assert hooks("uninstall", "libvirt", "--prefix", str(root), "--json").json["to_do"] == []
    assert "vmnet" not in networks(libvirt)
