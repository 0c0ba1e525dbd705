"""Packets have the last word: every kind of guest, in every mode, talks to the host, the others and the internet."""

import json
from pathlib import Path

import pytest

from tests.kernel.machine import ECHO_PORT, Machine
from tests.kernel.net import FORMS, Guest, Lab, Laptop, forms_here

ALL = {"tcp", "udp", "ping"}
BIG = bytes(range(250)) * 16
"""4000 bytes: three fragments on a link of 1500."""
BULK = bytes(range(256)) * 1024


@pytest.fixture(params=FORMS)
def guest(laptop: Laptop, request: pytest.FixtureRequest) -> Guest:
    """A guest of every kind and mode."""
    return laptop.guest("web", *FORMS[request.param])


def test_the_host_reaches_a_guest_by_its_127_address(laptop: Laptop, guest: Guest) -> None:
    echo = guest.serve()
    assert guest.address.startswith("127.1.")
    assert laptop.reaches(guest.address) == ALL
    assert laptop.http(guest.address) == guest.guest_gateway
    assert set(echo.peers) == {guest.guest_gateway}


def test_a_guest_pings_its_gateway(guest: Guest) -> None:
    assert guest.ping(guest.guest_gateway)
    assert guest.ping(guest.guest_gateway, size=4000)


def test_large_datagrams_and_streams_pass_both_ways(laptop: Laptop, internet: Machine, guest: Guest) -> None:
    guest.serve()
    internet.serve()
    for here, address in ((laptop, guest.address), (guest, internet.address)):
        assert here.udp(address, payload=BIG) == BIG
        assert here.tcp(address, payload=BULK) == BULK


def test_a_guest_reaches_the_internet_in_the_hosts_name(internet: Machine, guest: Guest) -> None:
    echo = internet.serve()
    assert guest.reaches(internet.address) == ALL
    assert set(echo.peers) == {"192.168.77.2"}


@pytest.mark.parametrize("protocol", ["udp", "icmp"])
def test_a_guest_traces_the_way_out(lan: Machine, internet: Machine, guest: Guest, protocol: str) -> None:
    way = [guest.guest_gateway, lan.address, internet.address]
    assert guest.trace(internet.address, "udp" if protocol == "udp" else "icmp") == way


def test_a_guest_learns_the_mtu_of_the_path(lab: Lab, guest: Guest) -> None:
    lab.internet.serve()
    lab.narrow(1300)
    assert guest.path_mtu(lab.internet.address) == 1300
    assert guest.udp(lab.internet.address, payload=BIG) == BIG
    assert guest.tcp(lab.internet.address, payload=BULK) == BULK


def test_a_closed_port_is_refused_at_once(laptop: Laptop, internet: Machine, guest: Guest) -> None:
    """The answer to UDP is an ICMP error, which quotes a header that was rewritten on the way."""
    for here, address in ((laptop, guest.address), (guest, internet.address)):
        with pytest.raises(ConnectionRefusedError):
            here.udp(address, 9)
        with pytest.raises(ConnectionRefusedError):
            here.tcp(address, 9)


def test_guests_reach_each_other_in_every_mixture(laptop: Laptop) -> None:
    pairs = [laptop.guests([f"one-{name}", f"other-{name}"], *options) for name, options in forms_here().items()]
    echoes = {guest: guest.serve() for pair in pairs for guest in pair}
    for one, other in ((pair[0], second[1]) for pair in pairs for second in pairs):
        for here, there in ((one, other), (other, one)):
            address = here.knows(there)
            assert here.reaches(address) == ALL, (here, there)
            assert set(echoes[there].peers[-2:]) == {there.knows(here)}, (here, there)
            assert here.udp(address, payload=BIG) == BIG, (here, there)
            assert here.trace(address) == [here.guest_gateway, address], (here, there)
            with pytest.raises(ConnectionRefusedError):
                here.udp(address, 9)


def test_a_guest_reaches_itself(guest: Guest) -> None:
    guest.serve()
    assert guest.reaches(guest.guest_address) == ALL
    assert guest.reaches("127.0.0.1") == ALL


def test_the_hosts_file_has_the_name_of_the_json(laptop: Laptop, guest: Guest) -> None:
    names = [line.split() for line in laptop.hosts_file.read_text().splitlines() if line.startswith("127.1.")]
    [line] = [line for line in names if guest.info["hostname"] in line]
    assert line[0] == guest.address


def test_a_mapped_guest_keeps_its_settings_and_its_loopback(lab: Lab) -> None:
    other = lab.machine("untouched")
    lab.wire(lab.lan, "spare0", other, "eth0")
    guest = lab.laptop.guest("web", *FORMS["veth-mapped"])
    assert settings_of(guest) == settings_of(other)
    assert loopback_of(guest) == loopback_of(other)


def test_a_native_guest_has_its_own_localhost(laptop: Laptop) -> None:
    guest = laptop.guest("web", *FORMS["veth-native"])
    guest.serve(ECHO_PORT, "127.0.0.1")
    laptop.serve(ECHO_PORT, "127.0.0.1")
    assert guest.tcp("127.0.0.1") == b"hello"
    guest.ip("link set lo down", "link set lo up")
    assert guest.tcp("127.0.0.1") == b"hello"
    assert guest.ping(guest.gateway)


def settings_of(machine: Machine) -> dict[str, str]:
    """Return the IPv4 settings of a machine's devices and of the machine."""
    with machine.entered():
        folders = [Path("/proc/sys/net/ipv4/conf", name) for name in ("all", "default", "lo", "eth0")]
        files = [Path("/proc/sys/net/ipv4/ip_forward"), *(path for folder in folders for path in folder.iterdir())]
        return {str(path): path.read_text() for path in files}


def loopback_of(machine: Machine) -> list[dict[str, object]]:
    [lo] = json.loads(machine.run("ip", "-j", "addr", "show", "dev", "lo"))
    return [{key: one[key] for key in ("local", "prefixlen", "scope")} for one in lo["addr_info"]]


def test_the_rules_do_not_grow_with_the_guests(laptop: Laptop) -> None:
    laptop.vmnet("create", "first", "--kind", "veth")
    before = laptop.run("nft", "list", "ruleset")
    laptop.vmnet("create", *(f"more-{number}" for number in range(12)), "--kind", "veth")
    assert laptop.run("nft", "list", "ruleset") == before


def test_an_address_without_a_guest_fails_at_once(laptop: Laptop) -> None:
    laptop.vmnet("carve")
    laptop.serve()
    for address in ("127.1.9.10", "127.63.255.254"):
        with pytest.raises(OSError, match=r"unreachable|No route"):
            laptop.tcp(address)


def test_what_is_not_ours_stays_the_hosts_loopback(laptop: Laptop) -> None:
    laptop.vmnet("carve")
    laptop.serve()
    for address in ("127.0.0.1", "127.0.0.53", "127.0.1.1", "127.64.0.1", "127.200.3.4", "127.255.255.254"):
        assert laptop.reaches(address) == ALL
