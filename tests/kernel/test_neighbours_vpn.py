"""A VPN takes the default route, is narrower than a LAN, and tells nobody: TCP of guests goes through it."""

import struct

import pytest

from tests.kernel.machine import ECHO_PORT, QUIET, Machine
from tests.kernel.neighbours import tunnel
from tests.kernel.net import FORMS, Guest, Lab

BULK = bytes(range(256)) * 256
NARROW = 1280
PUBLISHED = 8007
# A guest's port as others publish it: vmnet lets pass what somebody's rules have translated.
PUBLISH = (
    "table ip others {{ chain pre {{ type nat hook prerouting priority -100; tcp dport {port} dnat to {to}; }}; }}"
)
SILENT = (
    "table ip others { chain out { type filter hook output priority 0; icmp type destination-unreachable drop; }; }"
)

MASQUERADE = "table ip others { chain p { type nat hook postrouting priority 100; ip saddr 10.9.0.0/24 masquerade; }; }"


@pytest.fixture
def vpn(lab: Lab) -> Machine:
    """The far end of a tunnel with a small MTU, which never says that something is too big for it."""
    far = tunnel(lab, NARROW)
    far.run("nft", "-f", "-", stdin=SILENT)
    lab.laptop.ip("route replace default dev tun0 src 10.66.0.2")
    return far


def first_sizes(frames: list[bytes]) -> set[int]:
    """Return the maximum segment sizes that the SYNs among IPv4 frames of Ethernet announce."""
    found = set()
    for frame in frames:
        packet = frame[14:]
        segment = packet[(packet[0] & 15) * 4 :]
        if frame[12:14] == b"\x08\x00" and packet[9] == 6 and segment[13] & 2 and segment[20:22] == b"\x02\x04":
            found.add(struct.unpack("!H", segment[22:24])[0])
    return found


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=[] if form in ("veth-native", "tap-mapped") else pytest.mark.long) for form in FORMS],
)
def test_tcp_fits_into_a_way_that_is_narrow_and_silent(form: str, lab: Lab, vpn: Machine) -> None:
    """In both directions, whoever begins; without our rule it hangs."""
    laptop, internet = lab.laptop, lab.internet
    guest = laptop.guest("web", *FORMS[form])
    guest.serve()
    internet.serve()
    laptop.run("nft", "-f", "-", stdin=PUBLISH.format(port=PUBLISHED, to=f"{guest.shadow}:{ECHO_PORT}"))
    assert guest.tcp(internet.address, payload=BULK) == BULK
    assert internet.tcp("10.66.0.2", PUBLISHED, BULK) == BULK
    laptop.run("nft", "flush", "chain", "ip", "vmnet", "clamp")
    for here, there, port in ((guest, internet.address, ECHO_PORT), (internet, "10.66.0.2", PUBLISHED)):
        assert here.tcp(there, port) == b"hello"
        # The guest has learnt by ICMP of its own host what it may send, and would announce as much.
        guest.ip("route flush cache")
        with pytest.raises(TimeoutError):
            here.tcp(there, port, BULK, wait=4 * QUIET)


def test_what_is_no_guests_keeps_its_size(lab: Lab, vpn: Machine) -> None:
    laptop, internet = lab.laptop, lab.internet
    other = lab.machine("other")
    lab.wire(laptop, "others0", other, "eth0")
    laptop.ip("addr add 10.9.0.1/24 dev others0")
    other.ip("addr add 10.9.0.2/24 dev eth0", "route add default via 10.9.0.1")
    laptop.sysctl("ipv4/ip_forward", 1)
    laptop.run(
        "nft",
        "-f",
        "-",
        stdin=MASQUERADE,
    )
    guest: Guest = laptop.guest("web", *FORMS["veth-native"])
    internet.serve()
    for here, size in ((guest, NARROW - 40), (other, 1460)):
        arrived = internet.sniff("vpn0")
        assert here.tcp(internet.address) == b"hello"
        assert first_sizes(arrived.frames()) == {size}, here
