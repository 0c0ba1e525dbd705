"""Domains on the network `vmnet`: libvirt makes their taps, and hooks or the watcher give them to their guests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.libvirtd import Domain, Libvirtd, domain_xml, ethernet, on_network
from tests.kernel.machine import Machine, wait_until
from tests.kernel.net import Laptop
from tests.kernel.test_hooks import hooks, program  # noqa: F401 -- fixtures
from tests.kernel.test_libvirt import (  # noqa: F401 -- fixtures
    MAC,
    UUID,
    assert_at_home,
    assert_gone,
    devices,
    hooked,
    libvirt,
    shown,
)
from tests.kernel.vm import LIMIT
from tests.kernel.watching import NEVER, Watching
from vmnet.model import LIBVIRT_BRIDGE

pytestmark = pytest.mark.root

SECOND = "52:54:00:7f:01:17"
BRIDGED = f"/sys/class/net/{LIBVIRT_BRIDGE}/brif"


@pytest.fixture
def network(hooked: Libvirtd) -> Libvirtd:  # noqa: F811
    """libvirt with vmnet's hooks and its network."""
    return hooked


def ports(laptop: Laptop) -> list[str]:
    """Return the ports of libvirt's bridge."""
    return os.listdir(laptop.path(BRIDGED))


def states(laptop: Laptop) -> dict[str, str]:
    """Return the guests' states by their names."""
    return {one["name"]: one["state"] for one in laptop.vmnet("list", "--json").json}


def attach(libvirt: Libvirtd, domain: str, xml: str, *options: str) -> None:  # noqa: F811
    path = libvirt.laptop.folder / "interface.xml"
    path.write_text(xml)
    libvirt.virsh("attach-device", domain, str(path), *options)


@pytest.fixture
def watched(laptop: Laptop, network: Libvirtd) -> Iterator[Watching]:
    """A watcher that hears, and does not look without hearing anything."""
    with Watching(laptop, interval=NEVER) as watching:
        yield watching


def test_an_interface_is_plugged_into_a_domain_that_runs(
    laptop: Laptop, internet: Machine, network: Libvirtd, watched: Watching
) -> None:
    web = Domain(network, "web", "")
    Domain(network, "other", on_network(SECOND)).launch()
    network.virsh("start", "web")
    web.await_ready()  # a guest that has not booted does not let go of a card
    for _ in range(2):
        attach(network, "web", on_network(MAC))
        assert wait_until(lambda: states(laptop) == {"web": "up", "other": "up"}, LIMIT), watched.log()
        info = shown(laptop, "web")
        assert (info["mac"], info["address"]) == (MAC, "127.1.0.6")
        assert ports(laptop) == []
        network.virsh("detach-interface", "web", "bridge", "--mac", MAC)
        assert wait_until(lambda: "vmn-web" not in laptop.links(), LIMIT)
        assert states(laptop) == {"web": "down", "other": "up"}
    assert web.state() == "running"


def test_the_guest_in_an_interface_that_was_plugged_in_works(
    laptop: Laptop, internet: Machine, network: Libvirtd, watched: Watching
) -> None:
    web = Domain(network, "web", "")
    network.virsh("start", "--paused", "web")
    attach(network, "web", on_network(MAC))
    assert wait_until(lambda: states(laptop) == {"web": "up"}, LIMIT), watched.log()
    network.virsh("resume", "web")
    web.connect()
    web.await_ready()
    assert_at_home(web)
    network.virsh("destroy", "web")
    assert_gone(web)


def test_a_link_that_is_pulled_and_put_back_stays_the_guests(
    laptop: Laptop, internet: Machine, network: Libvirtd, watched: Watching
) -> None:
    web = Domain(network, "web", on_network(MAC))
    web.start()
    for state in ("down", "up"):
        network.virsh("domif-setlink", "web", "vnet0", state)
    assert wait_until(lambda: ports(laptop) == [] and states(laptop) == {"web": "up"}, LIMIT), watched.log()
    assert_at_home(web)


def test_libvirt_knows_the_tap_by_the_name_that_it_was_given(
    laptop: Laptop, internet: Machine, network: Libvirtd
) -> None:
    web = Domain(network, "web", on_network(MAC, "vmn-web"))
    web.start()
    assert_at_home(web)
    assert "vmn-web rx_bytes" in network.virsh("domifstat", "web", "vmn-web").out
    shop = Domain(network, "shop", on_network(SECOND, "vmn-store"), guest="store")
    shop.start()
    assert_at_home(shop)
    assert network.virsh("domif-getlink", "shop", "vmn-store").out.split() == ["vmn-store", "up"]


def test_the_metadata_name_the_guest_and_its_address(laptop: Laptop, internet: Machine, network: Libvirtd) -> None:
    wish = f"<vmnet:interface xmlns:vmnet='urn:vmnet:domain' mac='{SECOND}' name='store' address='127.7.7.2'/>"
    xml = domain_xml("web", on_network(MAC) + on_network(SECOND), uuid=UUID)
    network.define(xml.replace("<memory ", f"<metadata>{wish}</metadata><memory ", 1))
    network.virsh("start", "web")
    listed = {one["name"]: (one["mac"], one["address"]) for one in laptop.vmnet("list", "--json").json}
    assert listed == {"store": (SECOND, "127.7.7.2"), "web": (MAC, "127.1.0.2")}
    assert set(states(laptop).values()) == {"up"}


def test_domains_of_like_names_have_guests_of_their_own(laptop: Laptop, network: Libvirtd) -> None:
    macs = {"web": MAC, "Web": SECOND, "w.e.b": "52:54:00:7f:01:18"}
    found = {}
    for _ in range(2):
        for name, mac in macs.items():
            Domain(network, name, on_network(mac), guest="web")
            network.virsh("start", "--paused", name)
            [found[name]] = [one["name"] for one in laptop.vmnet("list", "--json").json if one["mac"] == mac]
            network.virsh("destroy", name)
            network.virsh("undefine", name)
    assert found == {"web": "web", "Web": "web-2", "w.e.b": "w-e-b"}


def test_a_guest_whose_domain_has_another_mac_now_stays_that_guest(laptop: Laptop, network: Libvirtd) -> None:
    for mac in (MAC, SECOND):
        Domain(network, "web", on_network(mac), uuid=UUID)
        network.virsh("start", "--paused", "web")
        assert shown(laptop, "web")["mac"] == mac
        assert states(laptop) == {"web": "up"}
        network.virsh("destroy", "web")


def test_two_domains_of_one_mac_do_not_run_at_once(laptop: Laptop, network: Libvirtd) -> None:
    for name in ("web", "shop"):
        Domain(network, name, on_network(MAC))
    network.virsh("start", "--paused", "web")
    done = network.virsh("start", "shop", check=False)
    assert done.code == 1
    assert f"vmnet: web, which runs, has the MAC {MAC}, too" in done.err
    assert states(laptop)["web"] == "up"
    network.virsh("destroy", "web")
    network.virsh("start", "--paused", "shop")
    assert states(laptop) == {"web": "down", "shop": "up"}


def test_a_domain_changes_from_one_way_to_the_other(laptop: Laptop, internet: Machine, network: Libvirtd) -> None:
    address = ""
    for xml in (ethernet("vmn-web", MAC), on_network(MAC), on_network(MAC, "vmn-web"), ethernet("vmn-web", MAC)):
        web = Domain(network, "web", xml, uuid=UUID)
        web.start()
        assert_at_home(web)
        assert web.address == (address or web.address)
        address = web.address
        network.virsh("destroy", "web")
        assert_gone(web)


def test_a_network_of_somebody_elses_of_that_name_is_left_alone(laptop: Laptop, hooked: Libvirtd) -> None:  # noqa: F811
    for verb in ("net-destroy", "net-undefine"):
        hooked.virsh(verb, "vmnet")
    path = laptop.folder / "theirs.xml"
    path.write_text("<network><name>vmnet</name><ip address='10.66.0.1' netmask='255.255.255.0'/></network>")
    hooked.virsh("net-create", str(path))
    Domain(hooked, "web", on_network(MAC), guest="web")
    hooked.virsh("start", "--paused", "web")
    assert "vnet0" in laptop.links()
    assert "master virbr" in laptop.ip("link show vnet0")
    assert devices(laptop) == set()
    hooked.virsh("destroy", "web")


def test_a_tap_of_nobody_on_the_bridge_leads_nowhere(laptop: Laptop, network: Libvirtd) -> None:
    Domain(network, "web", on_network(MAC))
    network.virsh("start", "--paused", "web")
    (network.hooks / "qemu.d/vmnet").unlink()
    Domain(network, "shop", on_network(SECOND), guest="web")
    laptop.vmnet("delete", "web")
    network.virsh("start", "--paused", "shop", check=False)
    laptop.vmnet("up")
    assert all("state disabled" in line for line in laptop.run("bridge", "link").splitlines())


def test_restore_takes_the_bridge_and_the_next_start_makes_it_anew(
    laptop: Laptop, internet: Machine, network: Libvirtd
) -> None:
    web = Domain(network, "web", on_network(MAC))
    web.start()
    network.virsh("destroy", "web")
    laptop.vmnet("restore")
    assert not Path(laptop.path(f"/sys/class/net/{LIBVIRT_BRIDGE}")).exists()
    web.start()
    assert_at_home(web)


def test_the_bridge_is_there_while_the_network_is_active(laptop: Laptop, network: Libvirtd) -> None:
    def is_active() -> bool:
        return network.virsh("net-list", "--name").out.split() == ["vmnet"]

    assert LIBVIRT_BRIDGE in laptop.links()
    laptop.vmnet("up")
    network.stop()
    network.start()
    assert is_active()
    network.virsh("net-destroy", "vmnet")
    assert LIBVIRT_BRIDGE not in laptop.links()
    network.virsh("net-start", "vmnet")
    Domain(network, "web", on_network(MAC))
    network.virsh("start", "--paused", "web")
    network.virsh("net-destroy", "vmnet")
    assert LIBVIRT_BRIDGE in laptop.links()  # its guest's tap may come back to it
    laptop.vmnet("delete", "web")
    laptop.vmnet("restore")
    assert LIBVIRT_BRIDGE not in laptop.links()


def test_the_bridge_that_somebody_puts_up_goes_down_again(laptop: Laptop, network: Libvirtd) -> None:
    Domain(network, "web", on_network(MAC))
    network.virsh("start", "--paused", "web")
    laptop.ip(f"link set {LIBVIRT_BRIDGE} up")
    assert laptop.vmnet("plan", check=False).out.splitlines() == [f"~ device {LIBVIRT_BRIDGE}: down"]
    laptop.vmnet("watch", "--once")
    assert laptop.vmnet("plan").out == ""


_OPEN = """
import fcntl, os, struct
tun = open("/dev/net/tun", "r+b", buffering=0)  # as anybody may where udev is
os.setresuid(65534, 65534, 65534)
fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"vmn-web", 0x5102))
"""


def test_nobody_opens_a_queue_of_a_tap_that_has_several(laptop: Laptop, internet: Machine, network: Libvirtd) -> None:
    queues = on_network(MAC).replace("<model type='virtio'/>", "<model type='virtio'/><driver queues='2'/>")
    web = Domain(network, "web", queues)
    web.start()
    assert "multi_queue" in laptop.run("ip", "-d", "link", "show", "vmn-web")
    assert "Operation not permitted" in laptop.execute(sys.executable, "-c", _OPEN).err
    assert_at_home(web)
    assert states(laptop) == {"web": "up"}
