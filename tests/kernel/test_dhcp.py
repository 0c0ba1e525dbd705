"""A guest has its address by DHCP: by its device, whatever MAC it shows, whatever is restarted meanwhile."""

import os
import signal
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.dhcp import (
    ACK,
    BROADCAST_ADDRESS,
    DISCOVER,
    DOMAIN,
    FOR_EVER,
    HOST_NAME,
    LEASE_TIME,
    MASK,
    MTU,
    NAK,
    RELEASE,
    REQUEST,
    RESOLVER,
    ROUTER,
    SERVER,
    Client,
)
from tests.kernel.machine import QUIET, wait_until
from tests.kernel.net import Guest, Lab, Laptop

pytestmark = pytest.mark.usefixtures("tap")

A, B, C = "52:54:00:12:34:56", "52:54:00:aa:aa:aa", "52:54:00:bb:bb:bb"


def bare(laptop: Laptop, name: str, *options: str) -> Guest:
    """Create a tap and boot a VM that has configured nothing."""
    [info] = laptop.vmnet("create", name, "--kind", "tap", *options, "--json").json
    return switched_on(laptop, info)


def switched_on(laptop: Laptop, info: dict[str, Any]) -> Guest:
    """Boot a VM that has configured nothing."""
    guest = laptop.boot(info, configured=False)
    guest.ip("link set eth0 up")
    laptop.await_link(guest.host_device)
    return guest


def server(laptop: Laptop, name: str = "dhcp") -> int:
    """Return the pid of a dnsmasq, as the laptop numbers it; 0 while there is none."""
    try:
        return int(Path(laptop.env["VMNET_RUN_DIR"], "dns", f"{name}.pid").read_text())
    except (FileNotFoundError, ValueError):
        return 0


def kill(laptop: Laptop, *names: str) -> None:
    """Kill processes of the laptop by their pid files."""
    folder = Path(laptop.env["VMNET_RUN_DIR"], "dns")
    for name in names:
        laptop.run("kill", "-KILL", (folder / f"{name}.pid").read_text().split()[0])


def lives(laptop: Laptop, pid: int) -> bool:
    return pid != 0 and "dnsmasq" in laptop.run("cat", f"/proc/{pid}/cmdline", check=False)


def gets(guest: Guest, mac: str, identifier: bytes = b"") -> bool:
    """Say whether a client has the guest's own address within ten seconds, in which it asks again and again."""

    def has_it() -> bool:
        with suppress(TimeoutError):
            lease = Client(guest, mac, identifier).lease()
            return (lease.kind, lease.address) == (ACK, guest.guest_address)
        return False

    return wait_until(has_it, 10.0)


def test_a_lease_has_all_that_a_guest_needs(laptop: Laptop) -> None:
    guest = bare(laptop, "web", "--mtu", "1400")
    lease = Client(guest, guest.info["mac"]).lease()
    assert (lease.kind, lease.address) == (ACK, guest.guest_address)
    assert lease.addresses(MASK) == ["255.255.255.252"]
    assert lease.addresses(ROUTER) == lease.addresses(RESOLVER) == lease.addresses(SERVER) == [guest.guest_gateway]
    assert (lease.number(MTU), lease.text(HOST_NAME), lease.text(DOMAIN)) == (1400, "web", "vmnet.internal")
    assert lease.number(LEASE_TIME) == FOR_EVER
    assert BROADCAST_ADDRESS not in lease.options
    usual = bare(laptop, "usual")
    assert MTU not in Client(usual, usual.info["mac"]).lease().options


def test_the_device_decides_and_no_mac(laptop: Laptop) -> None:
    """MACs come and go without a word: each has the address at its first question, and the last one loses it."""
    guest = bare(laptop, "web")
    for mac in (guest.info["mac"], A, B, C, A, guest.info["mac"], B):
        for identifier in (b"", b"\xff" + os.urandom(18)):
            assert gets(guest, mac, identifier), mac


def test_clones_with_one_mac_have_an_address_each(laptop: Laptop) -> None:
    """As VMs that were started without one: qemu gives all of them the same."""
    guests = [bare(laptop, name) for name in ("one", "two", "three")]
    for guest in [*guests, *reversed(guests)]:
        assert Client(guest, A).lease().address == guest.guest_address
    for guest, other in combinations(guests, 2):
        assert Client(guest, other.info["mac"]).lease().address == guest.guest_address
        assert Client(other, guest.info["mac"]).lease().address == other.guest_address


def test_a_lease_is_renewed_and_a_wrong_one_refused(laptop: Laptop) -> None:
    guest, other = bare(laptop, "web"), bare(laptop, "db")
    client = Client(guest, guest.info["mac"])
    client.lease()
    guest.configure()
    assert client.ask(REQUEST, here=guest.guest_address).kind == ACK
    assert client.ask(REQUEST, wanted=guest.guest_address).kind == ACK  # INIT-REBOOT
    for wrong in (other.guest_address, "192.168.1.7", guest.guest_gateway, "247.0.0.2"):
        assert client.ask(REQUEST, wanted=wrong).kind == NAK
    assert client.ask(REQUEST, wanted=guest.guest_address).kind == ACK


def test_leases_outlive_what_is_restarted(laptop: Laptop) -> None:
    guests = [bare(laptop, name) for name in ("web", "db")]
    for guest in guests:
        assert Client(guest, guest.info["mac"]).lease().address == guest.guest_address
        guest.configure()
    leases = Path(laptop.env["VMNET_STATE_DIR"], "dhcp.leases")
    assert wait_until(lambda: guests[1].guest_address in leases.read_text())
    before = server(laptop)
    kill(laptop, "dhcp")
    assert wait_until(lambda: server(laptop) != before and lives(laptop, server(laptop)))
    for guest in guests:
        assert Client(guest, guest.info["mac"]).ask(REQUEST, here=guest.guest_address).kind == ACK
    laptop.vmnet("restore")
    assert leases.exists()
    laptop.vmnet("up")
    again = [switched_on(laptop, info) for info in laptop.vmnet("list", "--json").json]
    for guest, mac in zip(again, (B, C), strict=True):
        assert Client(guest, mac).ask(REQUEST, wanted=guest.guest_address).kind == ACK
    laptop.vmnet("restore", "--purge")
    assert not leases.exists()


def test_more_guests_restart_nothing(laptop: Laptop) -> None:
    guest = bare(laptop, "web")
    client = Client(guest, guest.info["mac"])
    client.lease()
    guest.configure()
    pids = [server(laptop, name) for name in ("dhcp", "mapped", "native")]
    laptop.vmnet("create", *(f"vm{number}" for number in range(50)), "--kind", "tap")
    late = bare(laptop, "late")
    assert gets(late, late.info["mac"])
    assert client.ask(REQUEST, here=guest.guest_address).kind == ACK
    laptop.vmnet("delete", "vm7", "vm8")
    assert [server(laptop, name) for name in ("dhcp", "mapped", "native")] == pids
    assert all(lives(laptop, pid) for pid in pids)


@pytest.mark.parametrize("killed", ["dhcp", "mapped native", "keeper", "keeper dhcp mapped"])
def test_what_was_killed_comes_back(laptop: Laptop, killed: str) -> None:
    guest = bare(laptop, "web")
    kill(laptop, *killed.split())
    if "keeper" in killed:
        assert laptop.vmnet("plan", check=False).code == 10
        laptop.vmnet("up")
    assert wait_until(lambda: all(lives(laptop, server(laptop, name)) for name in ("dhcp", "mapped", "native")))
    assert gets(guest, A)
    assert laptop.vmnet("plan").out == ""
    assert laptop.run("pgrep", "-c", "-x", "dnsmasq").strip() == "3"


def test_who_gives_addresses_runs_while_anybody_asks_for_one(laptop: Laptop) -> None:
    laptop.vmnet("create", "native", "--kind", "veth")
    assert server(laptop) == 0
    guest = bare(laptop, "web")
    pid = server(laptop)
    assert lives(laptop, pid)
    assert gets(guest, A)
    assert laptop.vmnet("plan").out == ""
    laptop.vmnet("delete", "web")
    assert wait_until(lambda: not lives(laptop, pid))
    assert lives(laptop, server(laptop, "native"))
    assert laptop.vmnet("plan").out == ""
    assert gets(bare(laptop, "web"), A)


def test_nobody_is_interrupted_for_them(laptop: Laptop) -> None:
    laptop.vmnet("create", "web", "--kind", "tap")
    for name in ("keeper", "dhcp", "mapped", "native"):
        pid = Path(laptop.env["VMNET_RUN_DIR"], "dns", f"{name}.pid").read_text().split()[0]
        assert "SCHED_BATCH" in laptop.run("chrt", "--pid", pid)


def test_without_a_device_it_waits_for_one_without_a_word(laptop: Laptop) -> None:
    """dnsmasq does not start where there is no device for it."""
    laptop.vmnet("create", "web", "--kind", "tap")
    laptop.run("ip", "link", "delete", "vmn-web")
    kill(laptop, "keeper", "dhcp")
    made = laptop.vmnet("create", "alias", "--kind", "alias", "--json")
    assert (made.json[0]["state"], made.err) == ("up", "")
    assert not lives(laptop, server(laptop))
    done = laptop.vmnet("up")
    assert done.err == ""
    assert wait_until(lambda: lives(laptop, server(laptop)), 10)


def test_a_file_that_somebody_changed_is_put_right(laptop: Laptop) -> None:
    guest = bare(laptop, "web")
    folder = Path(laptop.env["VMNET_RUN_DIR"], "dns")
    (folder / "dhcp.hosts").write_text("")
    (folder / "dhcp.conf").write_text((folder / "dhcp.conf").read_text() + "dhcp-ignore=tag:!nobody\n")
    laptop.vmnet("up")
    assert gets(guest, A)


def test_a_released_address_is_had_again(laptop: Laptop) -> None:
    guest = bare(laptop, "web")
    client = Client(guest, A)
    client.lease()
    with pytest.raises(TimeoutError):
        client.ask(RELEASE, here=guest.guest_address, server=guest.guest_gateway, wait=QUIET)
    assert gets(guest, B)


def test_nobody_on_the_lan_is_offered_anything(laptop: Laptop, lab: Lab) -> None:
    bare(laptop, "web")
    neighbour = Guest(lab, {**laptop.vmnet("show", "web", "--json").json, "kind": "tap"}, lab.lan.fd)
    neighbour.device = "lan0"
    with pytest.raises(TimeoutError):
        Client(neighbour, A).ask(DISCOVER, wait=2.0)


def test_a_port_that_is_taken_is_said(laptop: Laptop) -> None:
    """A DHCP server that has all of port 67, as isc-dhcp-server does; when it ends, ours starts."""
    taken = laptop.serve(67, "0.0.0.0")
    said = laptop.vmnet("create", "web", "--kind", "tap").err
    assert "warning: dnsmasq for dhcp: " in said
    assert "Address already in use" in said
    assert taken.port == 67


def test_signals_of_others_do_no_harm(laptop: Laptop) -> None:
    guest = bare(laptop, "web")
    keeper = (Path(laptop.env["VMNET_RUN_DIR"], "dns", "keeper.pid")).read_text().split()[0]
    for _ in range(20):
        laptop.run("kill", f"-{signal.SIGHUP.value}", keeper)
    assert gets(guest, A)
    assert laptop.vmnet("plan").out == ""
