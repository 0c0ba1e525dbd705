"""Nothing to do on a move: whatever uplinks there are, guests keep their addresses and go on."""

import json
import socket
from collections.abc import Callable

import pytest

from tests.kernel.machine import ECHO_PORT, TIMEOUT, Machine
from tests.kernel.net import FORMS, Guest, Lab, forms_here

ALL = {"tcp", "udp", "ping"}
INTERNET = "198.51.100.2"


@pytest.fixture
def guests(lab: Lab) -> list[Guest]:
    """One of each kind and mode, each with an echo server; the internet has one too."""
    made = [lab.laptop.guest(form, *options) for form, options in forms_here().items()]
    for guest in made:
        guest.serve()
    lab.internet.serve()
    return made


def assert_all_is_well(lab: Lab, guests: list[Guest], *, online: bool = True) -> None:
    """Check new connections in every direction."""
    for guest, other in zip(guests, guests[1:] + guests[:1], strict=True):
        assert lab.laptop.reaches(guest.address) == ALL, guest
        assert guest.ping(guest.guest_gateway), guest
        assert guest.reaches(guest.knows(other)) == ALL, (guest, other)
        assert guest.reaches(INTERNET, wait=TIMEOUT if online else 0.1) == (ALL if online else set()), guest


def addresses(lab: Lab) -> dict[str, str]:
    return {info["name"]: info["address"] for info in lab.laptop.vmnet("list", "--json").json}


def exchange(lab: Lab) -> None:
    """Leave one LAN and join another."""
    lab.laptop.unplug("wlan0")
    lab.plug("wlan1", "10.99.0.0/16")


def add_second(lab: Lab) -> None:
    """Plug a cable in as well, with the default route."""
    lab.plug("enp3s0", "172.20.5.0/24")


def same_name_other_lan(lab: Lab) -> None:
    """Join another Wi-Fi with the same card."""
    lab.laptop.unplug("wlan0")
    lab.plug("wlan0", "192.168.1.0/24")


def full_tunnel(lab: Lab) -> None:
    """Bring a VPN up as wg-quick does: rules before ours, the default route in a table of its own."""
    router = lab.plug("wg0", "10.8.0.0/24", default=False)
    lab.laptop.ip(
        f"route add default via {router.address} dev wg0 table 51820",
        "rule add not fwmark 51820 table 51820",
        "rule add table main suppress_prefixlength 0",
    )


MOVES: dict[str, Callable[[Lab], None]] = {
    "another LAN": exchange,
    "a second uplink": add_second,
    "the same card": same_name_other_lan,
    "a full tunnel": full_tunnel,
}


@pytest.mark.parametrize("move", MOVES)
def test_guests_go_on_after_a_move(lab: Lab, guests: list[Guest], move: str) -> None:
    assert_all_is_well(lab, guests)
    before = addresses(lab)
    MOVES[move](lab)
    assert_all_is_well(lab, guests)
    assert addresses(lab) == before


def test_guests_go_on_without_any_uplink(lab: Lab, guests: list[Guest]) -> None:
    lab.laptop.unplug("wlan0")
    assert_all_is_well(lab, guests, online=False)
    lab.plug("eth9", "10.1.0.0/24")
    assert_all_is_well(lab, guests)


def test_guests_are_made_without_any_uplink(lab: Lab) -> None:
    lab.laptop.unplug("wlan0")
    guest = lab.laptop.guest("web", *FORMS["veth-mapped"])
    guest.serve()
    lab.internet.serve()
    assert lab.laptop.reaches(guest.address) == ALL
    lab.plug("wlan0", "192.168.1.0/24")
    assert guest.reaches(INTERNET) == ALL


def test_open_connections_outlive_a_move(lab: Lab, guests: list[Guest]) -> None:
    """Those between the host and a guest, and between guests; what went out by the old uplink is gone with it."""
    pairs: list[tuple[Machine, str]] = [(lab.laptop, guest.address) for guest in guests]
    pairs += [(guests[0], guests[0].knows(guest)) for guest in guests[1:]]
    open_ones = [machine.socket(socket.AF_INET, socket.SOCK_STREAM) for machine, _ in pairs]
    for connection, (_, address) in zip(open_ones, pairs, strict=True):
        connection.settimeout(3)
        connection.connect((address, ECHO_PORT))
        connection.sendall(b"before")
        assert connection.recv(100) == b"before"
    exchange(lab)
    for connection in open_ones:
        connection.sendall(b"after")
        assert connection.recv(100) == b"after"


REVERSE_PATH = [(where, value) for where in ("everywhere", "all", "wlan0") for value in (0, 1, 2)]


@pytest.mark.parametrize(
    ("where", "value"),
    [pytest.param(*one, marks=[] if one[0] == "everywhere" else pytest.mark.long) for one in REVERSE_PATH],
)
def test_the_reverse_path_filter_does_not_matter(lab: Lab, guests: list[Guest], where: str, value: int) -> None:
    if where == "everywhere":
        lab.laptop.rp_filter(value)
    else:
        lab.laptop.sysctl(f"ipv4/conf/{where}/rp_filter", value)
    assert_all_is_well(lab, guests)


@pytest.mark.parametrize("gone", [False, True], ids=["present", "removed"])
def test_a_rule_of_somebody_else_does_not_matter(lab: Lab, guests: list[Guest], gone: bool) -> None:
    """The first rule parts the tables local and main for good: what only their union decided is decided anew."""
    lab.laptop.ip("rule add fwmark 0x7777 table 77", "route add 192.0.2.0/24 dev wlan0 table 77")
    if gone:
        lab.laptop.ip("rule del fwmark 0x7777 table 77")
    assert_all_is_well(lab, guests)


def test_guests_are_made_beside_a_rule_of_somebody_else(lab: Lab) -> None:
    lab.laptop.ip("rule add from all fwmark 0x7777 table 77")
    lab.internet.serve()
    guest = lab.laptop.guest("web", *FORMS["veth-native"])
    guest.serve()
    assert lab.laptop.reaches(guest.address) == ALL
    assert guest.reaches(INTERNET) == ALL


def test_lo_goes_down_and_up(lab: Lab, guests: list[Guest]) -> None:
    lab.laptop.ip("link set lo down", "link set lo up")
    assert_all_is_well(lab, guests)
    lab.laptop.ip("addr replace 127.0.0.1/8 dev lo")
    assert_all_is_well(lab, guests)


def test_no_rule_route_or_setting_names_an_uplink(lab: Lab, guests: list[Guest]) -> None:
    laptop = lab.laptop
    assert "wlan0" not in laptop.run("nft", "list", "ruleset")
    ours = json.loads(laptop.run("ip", "-j", "route", "show", "table", "all", "proto", "127"))
    assert ours
    assert not [route for route in ours if route.get("dev") == "wlan0"]
