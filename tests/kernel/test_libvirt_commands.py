"""`vmnet libvirt` and a real libvirtd: what it has, giving it more, and domains that are gone."""

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.kernel.libvirtd import Domain, Libvirtd, domain_xml, ethernet, on_network
from tests.kernel.machine import Machine, wait_until
from tests.kernel.net import Laptop, Result
from tests.kernel.test_hooks import hooks, program  # noqa: F401 -- fixtures
from tests.kernel.test_libvirt import hooked, libvirt, shown  # noqa: F401
from tests.kernel.vm import LIMIT
from tests.kernel.watching import Watching

pytestmark = pytest.mark.root

MAC = "52:54:00:7f:01:16"
UUID = "c7a5fdbd-cdaf-9455-926a-d65c16db1809"
OTHER = "c7a5fdbd-cdaf-9455-926a-d65c16db1810"
# Slots for what is plugged in later: libvirt makes no more of them than a domain needs when it is defined.
ROOM = "<controller type='pci' index='0' model='pcie-root'/>" + "".join(
    f"<controller type='pci' index='{number}' model='pcie-root-port'/>" for number in range(1, 7)
)
ON_DEFAULT = (
    f"<interface type='network'><mac address='{MAC}'/><source network='default'/><model type='e1000e'/>"
    "<boot order='1'/></interface>"
)


@pytest.fixture
def virt(libvirt: Libvirtd) -> Libvirtd:  # noqa: F811
    """libvirt, and a Python that can ask it."""
    libvirt.give_python()
    return libvirt


@pytest.fixture
def hooked_virt(virt: Libvirtd, hooks: Callable[..., Result]) -> Libvirtd:  # noqa: F811
    """The same with vmnet's hooks."""
    hooks("install", "libvirt")
    return virt


def interfaces(virt: Libvirtd, name: str, *options: str) -> list[dict[str, str | None]]:
    """Return what libvirt says of a domain's interfaces."""
    root = ElementTree.fromstring(virt.virsh("dumpxml", name, *options).out)
    found = []
    for one in root.iterfind("devices/interface"):
        words = {child.tag: child for child in one}
        found.append(
            {
                "type": one.get("type"),
                "mac": words["mac"].get("address"),
                "model": words["model"].get("type"),
                "network": words["source"].get("network") if "source" in words else None,
                "device": words["target"].get("dev") if "target" in words else None,
                "managed": words["target"].get("managed") if "target" in words else None,
            }
        )
    return found


def attach(virt: Libvirtd, *words: str) -> dict[str, Any]:
    done: dict[str, Any] = virt.laptop.vmnet("libvirt", "attach", *words, "--json").json
    return done


def status(virt: Libvirtd) -> dict[str, Any]:
    found: dict[str, Any] = virt.laptop.vmnet("libvirt", "status", "--json").json
    return found


def test_a_domain_that_is_attached_has_its_address_when_it_starts(
    laptop: Laptop, internet: Machine, hooked_virt: Libvirtd
) -> None:
    web = Domain(hooked_virt, "Web Server", ROOM, guest="web-server")
    done = attach(hooked_virt, "Web Server")
    info = shown(laptop, "web-server")
    assert done == {
        "domain": "Web Server", "uuid": web.uuid, "guest": "web-server", "device": info["device"], "mac": info["mac"],
        "address": info["address"], "hostname": info["hostname"], "live": False, "config": True, "changed": True,
        "at_next_start": False,
    }  # fmt: skip
    assert interfaces(hooked_virt, "Web Server") == [
        {
            "type": "ethernet", "mac": info["mac"], "model": "virtio", "network": None, "device": info["device"],
            "managed": "no",
        }
    ]  # fmt: skip
    before = hooked_virt.virsh("dumpxml", "Web Server").out
    assert attach(hooked_virt, "Web Server") == {**done, "changed": False}
    assert hooked_virt.virsh("dumpxml", "Web Server").out == before
    web.start()
    assert web.http() == f"web-server {info['shadow']}"


def test_a_domain_that_runs_is_attached_at_once_and_for_good(laptop: Laptop, hooked_virt: Libvirtd) -> None:
    web = Domain(hooked_virt, "web", ROOM)
    hooked_virt.virsh("start", "--paused", "web")
    done = attach(hooked_virt, "web")
    assert (done["live"], done["config"], done["at_next_start"]) == (True, True, False)
    assert laptop.run("cat", "/sys/class/net/vmn-web/carrier").strip() == "1"
    for options in ((), ("--inactive",)):
        assert [(one["device"], one["mac"]) for one in interfaces(hooked_virt, "web", *options)] == [
            ("vmn-web", done["mac"])
        ]
    assert attach(hooked_virt, "web") == {**done, "changed": False}
    [told] = status(hooked_virt)["domains"]
    assert [(one["guest"], one["state"], one["drift"]) for one in told["interfaces"]] == [("web", "up", [])]
    hooked_virt.virsh("destroy", "web")
    web.await_state("shut off")
    assert shown(laptop, "web")["state"] == "down"
    hooked_virt.virsh("start", "--paused", "web")
    assert shown(laptop, "web") == {**shown(laptop, "web"), "state": "up", "address": done["address"]}


def test_what_a_domain_has_in_half_is_made_whole(laptop: Laptop, virt: Libvirtd) -> None:
    web = Domain(virt, "web", ROOM)
    virt.virsh("start", "--paused", "web")
    attach(virt, "web")
    virt.define(domain_xml("web", ROOM, uuid=web.uuid))
    assert interfaces(virt, "web", "--inactive") == []
    done = attach(virt, "web")
    assert (done["changed"], done["live"], done["config"]) == (True, True, True)
    assert [one["mac"] for one in interfaces(virt, "web", "--inactive")] == [done["mac"]]


def test_attach_takes_the_guest_and_the_name_that_it_is_told(laptop: Laptop, virt: Libvirtd) -> None:
    Domain(virt, "one", ROOM)
    Domain(virt, "two", ROOM)
    [made] = laptop.vmnet("create", "shop", "--queues", "2", "--mtu", "1400", "--json").json
    done = attach(virt, "one", "--name", "shop")
    assert (done["guest"], done["mac"], done["address"]) == ("shop", made["mac"], made["address"])
    xml = virt.virsh("dumpxml", "one").out
    assert "queues='2'" in xml
    assert "<mtu size='1400'/>" in xml
    assert attach(virt, "one")["guest"] == "shop"
    assert attach(virt, "one", "--name", "one-2")["changed"]
    assert [one["device"] for one in interfaces(virt, "one")] == ["vmn-shop", "vmn-one-2"]
    refused = laptop.vmnet("libvirt", "attach", "two", "--name", "shop", check=False)
    assert refused.code == 4
    assert "belongs to the domain 'one'" in refused.err
    assert interfaces(virt, "two") == []


def test_a_dry_run_of_attach_does_nothing(laptop: Laptop, virt: Libvirtd) -> None:
    Domain(virt, "web", ROOM)
    planned = laptop.vmnet("libvirt", "attach", "web", "--dry-run", "-v", check=False)
    assert planned.code == 10
    assert laptop.vmnet("list", "--json").json == []
    assert interfaces(virt, "web") == []
    attached = re.search(r"^virsh .*<<'END'\n(.*?)\nEND$", planned.out, re.MULTILINE | re.DOTALL)
    assert attached
    laptop.run("sh", "-euc", planned.out[planned.out.index(attached[0]) :])  # what is printed can be typed
    assert [one["device"] for one in interfaces(virt, "web")] == ["vmn-web"]
    laptop.vmnet("create", "web")
    assert laptop.vmnet("libvirt", "attach", "web", "--dry-run").code == 0


def test_what_libvirt_refuses_leaves_no_guest(laptop: Laptop, virt: Libvirtd) -> None:
    Domain(virt, "web", "")
    virt.virsh("start", "--paused", "web")

    def plug_in(name: str) -> Result:
        return laptop.vmnet("libvirt", "attach", "web", "--name", name, check=False)

    # Libvirt makes few slots more than a domain needs when it is defined.
    full = next(name for name in (f"web-{number}" for number in range(20)) if plug_in(name).code != 0)
    before = laptop.vmnet("list", "--json").json, interfaces(virt, "web"), interfaces(virt, "web", "--inactive")
    refused = plug_in(full)
    assert refused.code == 1
    assert "PCI" in refused.err
    assert f"vmn-{full}" not in laptop.links()
    after = laptop.vmnet("list", "--json").json, interfaces(virt, "web"), interfaces(virt, "web", "--inactive")
    assert after == before
    # One that was there stays as it was.
    laptop.vmnet("create", full)
    laptop.vmnet("down", full)
    was = shown(laptop, full)
    assert plug_in(full).code == 1
    assert shown(laptop, full) == was
    virt.virsh("destroy", "web")
    assert plug_in(full).code == 0
    assert shown(laptop, full)["address"] == was["address"]


def test_a_domain_of_any_name(laptop: Laptop, virt: Libvirtd) -> None:
    Domain(virt, "日本;$(touch owned)", ROOM, uuid=UUID)
    Domain(virt, "日本", ROOM, uuid=OTHER)
    assert attach(virt, UUID)["guest"] == "touch-owned"
    assert not laptop.path("/owned").exists()
    refused = laptop.vmnet("libvirt", "attach", "日本", check=False)
    assert refused.code == 2
    assert "--name" in refused.err
    assert attach(virt, "日本", "--name", "nihon")["changed"]
    assert "nihon" in laptop.vmnet("libvirt", "status").out


WRONG = {
    "domain": (["attach", "nobody"], 3, "nobody"),
    "network": (["adopt", "nothing"], 2, "'nothing'"),
    "own": (["adopt", "vmnet"], 2, "vmnet's own"),
    "none": (["attach"], 2, "DOMAIN"),
    "name": (["attach", "nobody", "--name", "A B"], 2, "'A B'"),
    "uri": (["status", "--connect", "nonsense:///"], 7, "nonsense"),
    "remote": (["status", "--connect", "qemu+tcp://127.0.0.1:9/system"], 7, "127.0.0.1"),
    "options": (["status", "--instead"], 2, "status"),
}


def test_what_makes_no_sense_is_said(laptop: Laptop, virt: Libvirtd) -> None:
    for words, code, text in WRONG.values():
        refused = laptop.vmnet("libvirt", *words, "--json", check=False)
        assert (refused.code, refused.json["error"]["code"]) == (code, code), (words, refused)
        assert text in refused.err + refused.out, words
        assert "Traceback" not in refused.err


# adopt


def test_domains_of_a_network_get_an_address_beside_their_own(
    laptop: Laptop, internet: Machine, hooked_virt: Libvirtd
) -> None:
    virt = hooked_virt
    web = Domain(virt, "web", ON_DEFAULT + ROOM)
    Domain(virt, "other", ROOM)
    Domain(virt, "has", ethernet("vmn-has", "52:54:00:7f:01:17"))
    planned = laptop.vmnet("libvirt", "adopt", "default", "--dry-run", "--json", check=False)
    assert planned.code == 10
    assert [op["text"] for op in planned.json if op["op"] == "GiveInterface"] == [
        "+ interface vmn-web of domain web (config)"
    ]
    assert laptop.vmnet("list", "--json").json == []
    [done] = laptop.vmnet("libvirt", "adopt", "default", "--json").json
    assert (done["domain"], done["guest"], done["config"]) == ("web", "web", True)
    old, new = interfaces(virt, "web")
    assert (old["network"], old["mac"]) == ("default", MAC)
    assert (new["device"], new["mac"]) == ("vmn-web", done["mac"])
    assert laptop.vmnet("libvirt", "adopt", "default", "--json").json == []
    assert laptop.vmnet("libvirt", "adopt", "default", "--dry-run").code == 0
    assert interfaces(virt, "other") == []
    assert web.state() == "shut off"


def test_domains_of_a_network_get_an_address_instead_of_their_own(
    laptop: Laptop, internet: Machine, hooked_virt: Libvirtd
) -> None:
    virt = hooked_virt
    virt.virsh("net-start", "default")
    web = Domain(virt, "web", ON_DEFAULT)
    Domain(virt, "runs", ON_DEFAULT.replace(MAC, "52:54:00:7f:01:18"))
    virt.virsh("start", "--paused", "runs")
    slots = {name: pci_slots(virt, name) for name in ("web", "runs")}
    assert laptop.vmnet("libvirt", "adopt", "default", "--instead", "--dry-run", check=False).code == 10
    done = {one["domain"]: one for one in laptop.vmnet("libvirt", "adopt", "default", "--instead", "--json").json}
    assert {name: one["at_next_start"] for name, one in done.items()} == {"web": False, "runs": True}
    for name, mac in (("web", MAC), ("runs", "52:54:00:7f:01:18")):
        assert interfaces(virt, name, "--inactive") == [
            {
                "type": "ethernet", "mac": mac, "model": "e1000e", "network": None, "device": f"vmn-{name}",
                "managed": "no",
            }
        ]  # fmt: skip
        assert pci_slots(virt, name) == slots[name]
        assert shown(laptop, name)["mac"] == mac
    assert [one["network"] for one in interfaces(virt, "runs")] == ["default"]
    assert laptop.vmnet("libvirt", "adopt", "default", "--instead", "--json").json == []
    virt.virsh("destroy", "runs")
    virt.virsh("start", "--paused", "runs")
    assert shown(laptop, "runs")["state"] == "up"
    assert laptop.run("cat", "/sys/class/net/vmn-runs/carrier").strip() == "1"
    assert web.state() == "shut off"


def pci_slots(virt: Libvirtd, name: str) -> list[dict[str, str]]:
    root = ElementTree.fromstring(virt.virsh("dumpxml", name, "--inactive").out)
    return [dict(one.attrib) for one in root.iterfind("devices/interface/address")]


# status


def test_status_tells_drift(laptop: Laptop, hooked_virt: Libvirtd) -> None:
    virt = hooked_virt
    Domain(virt, "web", ethernet("vmn-web", MAC), uuid=UUID)

    def drift() -> list[str]:
        [told] = [one for one in status(virt)["domains"] if one["name"] == "web"]
        [one] = told["interfaces"]
        assert laptop.vmnet("libvirt", "status").out
        return [drift["what"] for drift in one["drift"]]

    assert drift() == ["no record"]
    virt.virsh("start", "--paused", "web")
    assert drift() == []
    laptop.vmnet("down", "web")
    assert drift() == ["it has lost its device"]
    laptop.vmnet("up", "web")
    assert drift() == ["it has lost its device"]
    virt.virsh("destroy", "web")
    virt.virsh("start", "--paused", "web")
    assert drift() == []
    laptop.ip("link set vmn-web down")
    assert drift() == ["its device is not as recorded"]
    virt.virsh("destroy", "web")
    virt.define(domain_xml("web", ethernet("vmn-web", "52:54:00:00:00:99").replace("no'", "yes'"), uuid=UUID))
    assert drift() == ["managed is not 'no'", f"its record has the MAC {MAC}"]
    virt.virsh("undefine", "web")
    virt.define(domain_xml("web", ethernet("vmn-web", MAC), uuid=OTHER))
    assert drift() == [f"its record is of another domain, of UUID {UUID}"]
    assert [(one["guest"], one["uuid"]) for one in status(virt)["gone"]] == [("web", UUID)]


def test_status_says_that_no_hook_is_installed(laptop: Laptop, virt: Libvirtd) -> None:
    assert [one["hint"] for one in status(virt)["drift"]] == ["vmnet hooks install libvirt"]
    assert "vmnet hooks install libvirt" in laptop.vmnet("libvirt", "status").out


def test_another_libvirt_says_nothing_of_guests_of_this_one(laptop: Laptop, hooked_virt: Libvirtd) -> None:
    Domain(hooked_virt, "web", ethernet("vmn-web", MAC), uuid=UUID)
    hooked_virt.virsh("start", "--paused", "web")
    told = laptop.vmnet("libvirt", "status", "--connect", "test:///default", "--json").json
    assert [one["name"] for one in told["domains"]] == ["test"]
    assert told["gone"] == []
    assert status(hooked_virt)["gone"] == []


def test_a_domain_on_the_network_vmnet_has_all_it_needs(laptop: Laptop, hooked_virt: Libvirtd) -> None:
    virt = hooked_virt
    Domain(virt, "web", on_network(MAC) + ON_DEFAULT.replace(MAC, "52:54:00:7f:01:17"))

    def told() -> list[dict[str, Any]]:
        [domain] = status(virt)["domains"]
        return list(domain["interfaces"])

    [before] = told()
    assert (before["type"], before["guest"], before["mac"]) == ("network", None, MAC)
    assert [drift["what"] for drift in before["drift"]] == ["no record"]
    assert not attach(virt, "web")["changed"]
    virt.virsh("net-start", "default")
    virt.virsh("start", "--paused", "web")
    [one] = told()
    assert (one["guest"], one["type"], one["state"], one["live"], one["config"]) == ("web", "network", "up", True, True)
    assert one["drift"] == []
    assert one["address"] == shown(laptop, "web")["address"]
    done = attach(virt, "web")
    assert (done["guest"], done["changed"]) == ("web", False)
    assert attach(virt, "web", "--name", "web") == done
    assert laptop.vmnet("libvirt", "adopt", "default", "--json").json == []
    assert len(interfaces(virt, "web")) == 2
    laptop.vmnet("libvirt", "attach", "web", "--dry-run")


# No libvirt


def test_without_libvirt_python_it_is_said_how_to_get_it(laptop: Laptop) -> None:
    if _is_importable(laptop):
        pytest.skip("this machine's own Python has libvirt-python")
    for words in (["status"], ["attach", "web"], ["adopt", "default"]):
        refused = laptop.vmnet("libvirt", *words, "--json", check=False)
        assert (refused.code, refused.json["error"]["code"]) == (7, 7)
        assert "libvirt-python" in refused.json["error"]["message"]
        assert "python3-libvirt" in refused.json["error"]["hint"]


def _is_importable(laptop: Laptop) -> bool:
    return laptop.execute("/usr/bin/python3", "-I", "-c", "import libvirt").code == 0


def test_the_systems_python_asks_where_vmnets_cannot(
    laptop: Laptop,
    libvirt: Libvirtd,  # noqa: F811
    hooks: Callable[..., Result],  # noqa: F811
) -> None:
    if not _is_importable(laptop):
        pytest.skip("python3-libvirt of the kept system is for another Python than /usr/bin/python3")
    hooks("install", "libvirt")
    start_once(libvirt, "web")
    assert [one["name"] for one in status(libvirt)["domains"]] == ["web"]
    assert attach(libvirt, "web", "--name", "other")["changed"]
    with watching(laptop, 0.2) as watcher:
        assert wait_until(lambda: "/client.py listen" in laptop.run("ps", "-eo", "args"), LIMIT), watcher.log()


def test_without_libvirtd_it_is_said(laptop: Laptop, virt: Libvirtd) -> None:
    laptop.vmnet("create", "web")
    virt.stop()
    refused = laptop.vmnet("libvirt", "status", check=False)
    assert refused.code == 7
    assert "libvirt-sock" in refused.err
    virt.start()


def test_a_libvirtd_that_hangs_is_not_waited_for(laptop: Laptop, virt: Libvirtd) -> None:
    Domain(virt, "web", ROOM)
    laptop.run("kill", "-STOP", str(virt.pid))
    try:
        refused = laptop.vmnet("libvirt", "attach", "web", check=False)
    finally:
        laptop.run("kill", "-CONT", str(virt.pid))
    assert refused.code == 1
    assert "did not answer" in refused.err
    assert laptop.vmnet("list", "--json").json == []


# Domains that are gone


def gone(virt: Libvirtd) -> set[str]:
    """Return the guests whose domains are recorded as gone."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.deserialize(virt.laptop.path("/var/lib/vmnet/vmnet.db").read_bytes())
        return {name for (name,) in db.execute("SELECT name FROM domain WHERE gone IS NOT NULL")}


def watching(laptop: Laptop, interval: float) -> Watching:
    return Watching(laptop, interval=interval, env={"PYTHONPATH": laptop.env["PYTHONPATH"]})


def names(laptop: Laptop) -> set[str]:
    return {one["name"] for one in laptop.vmnet("list", "--json").json}


def start_once(virt: Libvirtd, name: str) -> Domain:
    """Have the hook make a domain's guest."""
    domain = Domain(virt, name, ethernet(f"vmn-{name}", MAC))
    virt.virsh("start", "--paused", name)
    virt.virsh("destroy", name)
    domain.await_state("shut off")
    return domain


def test_the_watcher_hears_of_domains_that_go_and_come_back(laptop: Laptop, hooked_virt: Libvirtd) -> None:
    virt = hooked_virt
    with watching(laptop, 1) as watcher:
        web = start_once(virt, "web")
        Domain(virt, "other", "")
        xml = virt.virsh("dumpxml", "web").out
        virt.virsh("undefine", "web")
        assert wait_until(lambda: gone(virt) == {"web"}, LIMIT), watcher.log()
        virt.define(xml)
        assert wait_until(lambda: gone(virt) == set(), LIMIT), watcher.log()
        # A libvirtd that ends is no domain that is gone, and the next one is heard again.
        virt.stop()
        virt.start()
        virt.virsh("undefine", "web")
        assert wait_until(lambda: gone(virt) == {"web"}, LIMIT), watcher.log()
        assert [(one["guest"], one["uuid"]) for one in status(virt)["gone"]] == [("web", web.uuid)]
        virt.define(xml)
        virt.virsh("start", "--paused", "web")
        assert gone(virt) == set()
        assert names(laptop) == {"web"}


def test_the_watcher_frees_a_guest_whose_domain_has_been_gone_for_long(laptop: Laptop, hooked_virt: Libvirtd) -> None:
    virt = hooked_virt
    laptop.path("/etc/vmnet").mkdir(exist_ok=True)
    laptop.path("/etc/vmnet/config.toml").write_text("libvirt_grace = 0\n")
    laptop.vmnet("create", "mine", "--mac", MAC)
    start_once(virt, "mine")
    start_once(virt, "web")
    start_once(virt, "kept")
    with watching(laptop, 1) as watcher:
        for name in ("mine", "web"):
            virt.virsh("undefine", name)
        assert wait_until(lambda: gone(virt) == {"mine", "web"}, LIMIT), watcher.log()
        virt.virsh("start", "--paused", "kept")  # whatever is heard next
        watcher.wait_for("freed guest=web")
        assert names(laptop) == {"mine", "kept"}
        assert "web" not in laptop.hosts_file.read_text().split()
        assert shown(laptop, "kept")["state"] == "up"


def test_a_libvirtd_that_hangs_keeps_the_watcher_from_nothing(laptop: Laptop, hooked_virt: Libvirtd) -> None:
    start_once(hooked_virt, "web")
    laptop.run("kill", "-STOP", str(hooked_virt.pid))
    try:
        with watching(laptop, 0.2) as watcher:
            laptop.vmnet("create", "other")
            laptop.ip("link del vmn-other")
            assert wait_until(lambda: "vmn-other" in laptop.links(), LIMIT), watcher.log()
            assert gone(hooked_virt) == set()
    finally:
        laptop.run("kill", "-CONT", str(hooked_virt.pid))
    assert "vmnet.libvirt.client" not in laptop.run("ps", "-eo", "args")


def test_a_watcher_that_is_killed_leaves_nobody_listening(laptop: Laptop, hooked_virt: Libvirtd) -> None:
    start_once(hooked_virt, "web")

    def listens() -> bool:
        return "vmnet.libvirt.client listen" in laptop.run("ps", "-eo", "args")

    with watching(laptop, 0.2) as watcher:
        assert wait_until(listens, LIMIT), watcher.log()
        watcher.kill()
    assert wait_until(lambda: not listens(), LIMIT)
