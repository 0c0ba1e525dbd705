"""What libvirt's hook does when vmnet cannot go on, and with what anybody may write into a domain."""

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from xml.sax.saxutils import escape

import pytest

from tests.kernel.libvirtd import Domain, Libvirtd, domain_xml, ethernet
from tests.kernel.machine import wait_until
from tests.kernel.net import Laptop
from tests.kernel.test_hooks import hooks, program  # noqa: F401 -- fixtures
from tests.kernel.test_libvirt import MAC, UUID, devices, hooked, libvirt, shown  # noqa: F401 -- fixtures
from tests.kernel.vm import LIMIT

pytestmark = pytest.mark.root

LOCKS = ["/run/vmnet/host.lock", "/run/vmnet/guests.lock", "/var/lib/vmnet/vmnet.db"]


@contextmanager
def held(laptop: Laptop, path: str) -> Iterator[None]:
    """Hold a lock of vmnet's as another vmnet would; of the records, the one that keeps others from writing."""
    if path.endswith(".db"):
        # SQLite's RESERVED lock (its file locking page): of one byte, 2^30 + 1 into the file.
        first, count = (1 << 30) + 1, 1
    else:
        first, count = 0, 0
    lock = os.open(laptop.path(path), os.O_RDWR)
    try:
        if path.endswith("host.lock"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        else:
            fcntl.lockf(lock, fcntl.LOCK_EX, count, first)
        yield
    finally:
        os.close(lock)


def said_by_hook(error: str) -> list[str]:
    """Return the lines that virsh shows of a hook that failed."""
    words = re.search(r"Hook script execution failed.*unexpected exit status (\d+): (.*)", error, re.DOTALL)
    assert words, error
    assert 1 <= int(words[1]) <= 10
    return words[2].strip().splitlines()


@pytest.mark.parametrize("lock", LOCKS, ids=["host", "guests", "records"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "known"])
def test_a_domain_that_starts_while_vmnet_is_locked(laptop: Laptop, hooked: Libvirtd, lock: str, there: bool) -> None:  # noqa: F811
    laptop.vmnet("create", "other")
    Domain(hooked, "web", ethernet("vmn-web", MAC))
    if there:
        hooked.virsh("start", "--paused", "web")
        hooked.virsh("destroy", "web")
    before, links = laptop.vmnet("list", "--json").json, devices(laptop)
    with held(laptop, lock):
        done = hooked.virsh("start", "--paused", "web", check=False)
        assert done.code != 0
        [line] = said_by_hook(done.err)
        assert line.startswith("vmnet: ")
    laptop.vmnet("watch", "--once")
    assert laptop.vmnet("list", "--json").json == before
    assert devices(laptop) == links
    hooked.virsh("start", "--paused", "web")
    assert shown(laptop, "web")["state"] == "up"


# Where not even the records can be written, nothing tells that the domain has ended.
@pytest.mark.parametrize("lock", LOCKS[:2], ids=["host", "guests"])
def test_a_domain_that_ends_while_vmnet_is_locked(laptop: Laptop, hooked: Libvirtd, lock: str) -> None:  # noqa: F811
    web = Domain(hooked, "web", ethernet("vmn-web", MAC))
    Domain(hooked, "other", ethernet("vmn-other", "52:54:00:7f:01:17"))
    hooked.virsh("start", "--paused", "web")
    with held(laptop, lock):
        assert hooked.virsh("destroy", "web").err == ""
        web.await_state("shut off")
    # Its device goes when another domain starts, at the latest.
    hooked.virsh("start", "--paused", "other")
    assert devices(laptop) == {"vmn-other"}
    assert shown(laptop, "web")["state"] == "down"
    hooked.virsh("start", "--paused", "web")
    assert shown(laptop, "web")["state"] == "up"
    hooked.virsh("destroy", "web")
    assert wait_until(lambda: devices(laptop) == {"vmn-other"}, LIMIT)


def test_a_domain_that_ends_while_nothing_can_be_recorded(laptop: Laptop, hooked: Libvirtd) -> None:  # noqa: F811
    web = Domain(hooked, "web", ethernet("vmn-web", MAC))
    hooked.virsh("start", "--paused", "web")
    with held(laptop, LOCKS[2]):
        assert hooked.virsh("destroy", "web").err == ""
        web.await_state("shut off")
    hooked.virsh("start", "--paused", "web")
    hooked.virsh("destroy", "web")
    assert wait_until(lambda: devices(laptop) == set(), LIMIT)


def test_a_vmnet_that_does_not_even_end_is_killed(laptop: Laptop, hooked: Libvirtd) -> None:  # noqa: F811
    Domain(hooked, "web", ethernet("vmn-web", MAC))
    python = laptop.folder / "a 100% place/bin/python"
    python.unlink()
    python.write_text("#!/bin/sh\ntrap '' TERM\necho begun >&2\nexec sleep 1234\n")
    python.chmod(0o755)
    done = hooked.virsh("start", "--paused", "web", check=False)
    assert done.code != 0
    assert [line.partition(":")[0] for line in said_by_hook(done.err)] == ["begun", "vmnet"]
    assert laptop.execute("pgrep", "-x", "sleep").code == 1


MIB = 1 << 20
WILD = "'\";$(touch owned)`touch owned`\\\\ %s"


def describe(text: str) -> Callable[[str], str]:
    return lambda xml: xml.replace("<os>", f"<metadata><a:a xmlns:a='urn:a'>{text}</a:a></metadata><os>")


def put(old: str, new: str, before: str = "") -> Callable[[str], str]:
    def change(xml: str) -> str:
        assert old in xml
        return before + xml.replace(old, new, 1)

    return change


# What becomes of each: it starts, or who refuses it. Messages of libvirt's protocol have strings of 4 MiB at most.
HOSTILE = {
    "newline": (put("<name>web", "<name>web&#10;reboot"), "libvirt"),
    "slashes": (put("<name>web", "<name>../../web"), "libvirt"),
    "tab": (put("<name>web", "<name>&#9;web"), "starts"),
    "quotes": (put("<name>web", f"<name>{escape(WILD)}"), "starts"),
    "references": (put("vmn-web", "&#118;&#x6d;n-web"), "starts"),
    "entity": (put('"vmn-web"', '"&x;"', before='<!DOCTYPE domain [<!ENTITY x "vmn-web">]>'), "starts"),
    "file": (
        put("<os>", "<title>&x;</title><os>", before='<!DOCTYPE domain [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
        "starts",
    ),
    "3 MiB": (describe("x" * 3 * MIB), "starts"),
    "8 MiB": (describe("x" * 8 * MIB), "libvirt"),
    "elements": (describe("<a:b/>" * 400_000), "starts"),
    "depth": (describe("<a:b>" * 200 + "</a:b>" * 200), "starts"),
    "inside": (describe(f"{escape(WILD)}<domain><name>evil</name>{ethernet('vmn-evil', MAC)}</domain>"), "starts"),
    "device": (put('"vmn-web"', '"vmn-&apos;;$(id)"'), "vmnet"),
    "lines": (put('"vmn-web"', '"vmn-a&#10;b"'), "vmnet"),
    "path": (put("vmn-web", "vmn-../../x"), "vmnet"),
    "long": (put("vmn-web", "vmn-" + "w" * 3 * MIB), "vmnet"),
}


@pytest.mark.parametrize(("change", "end"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_domain_starts_or_is_refused_in_one_line(
    laptop: Laptop,
    hooked: Libvirtd,  # noqa: F811
    change: Callable[[str], str],
    end: str,
) -> None:
    path = laptop.folder / "hostile.xml"
    path.write_text(change(domain_xml("web", ethernet("vmn-web", MAC), uuid=UUID)))
    defined = hooked.virsh("define", str(path), check=False)
    assert (defined.code == 0) == (end != "libvirt"), defined.err[:2000]
    if end == "libvirt":
        return
    started = hooked.virsh("start", "--paused", UUID, check=False)
    assert (started.code == 0) == (end == "starts"), started.err[:2000]
    if end == "vmnet":
        [line] = said_by_hook(started.err)
        assert line.startswith("vmnet: ")
    assert devices(laptop) == ({"vmn-web"} if end == "starts" else set())
    hooked.virsh("destroy", UUID, check=end == "starts")
    assert wait_until(lambda: devices(laptop) == set(), LIMIT)
    assert len(laptop.vmnet("list", "--json").json) == (end == "starts")
    assert not laptop.path("/owned").exists()
