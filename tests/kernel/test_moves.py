"""Nothing to do on a move: whatever uplinks there are, guests keep their addresses and go on."""

import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest

from tests.kernel import frames
from tests.kernel.flows import Flow, black_holes, unanswered
from tests.kernel.machine import ECHO_PORT, QUIET, TIMEOUT, Machine, wait_until
from tests.kernel.net import FORMS, Guest, Lab, forms_here
from tests.kernel.warm import Warm
from tests.kernel.watching import Watching

ALL = {"tcp", "udp", "ping"}
INTERNET = "198.51.100.2"
HOOKS = ("prerouting", "output")
Move: TypeAlias = Callable[[Lab], Iterator[bool]]


@pytest.fixture
def guests(lab: Lab, warm: Warm) -> list[Guest]:
    """One of each kind and mode, each with an echo server; the internet has one too."""
    lab.internet.serve()
    return made(lab, warm)


def made(lab: Lab, warm: Warm) -> list[Guest]:
    guests = []
    for form, options in forms_here().items():
        [info] = warm.vmnet(lab.laptop, "create", form, *options, "--json").json
        guests.append(lab.laptop.boot(info))
        guests[-1].serve()
    return guests


def assert_all_is_well(lab: Lab, guests: list[Guest], *, online: bool = True) -> None:
    """Check new connections in every direction."""
    for guest, other in zip(guests, guests[1:] + guests[:1], strict=True):
        assert lab.laptop.reaches(guest.address) == ALL, guest
        assert guest.ping(guest.guest_gateway), guest
        assert guest.reaches(guest.knows(other)) == ALL, (guest, other)
        assert guest.reaches(INTERNET, wait=TIMEOUT if online else 0.1) == (ALL if online else set()), guest


def addresses(lab: Lab) -> dict[str, str]:
    return {info["name"]: info["address"] for info in lab.laptop.vmnet("list", "--json").json}


def another_lan(lab: Lab) -> Iterator[bool]:
    """Leave one LAN and join another, whatever addresses it has, with another card."""
    device = "wlan0"
    for number, subnet in enumerate(("10.1.0.0/16", "172.16.5.0/24", "192.168.1.0/24", "100.64.0.0/10")):
        lab.laptop.unplug(device)
        device = f"wlan{number + 1}"
        lab.plug(device, subnet)
        yield True


def another_lan_same_card(lab: Lab) -> Iterator[bool]:
    """Join another Wi-Fi with the same card."""
    lab.laptop.unplug("wlan0")
    lab.plug("wlan0", "192.168.1.0/24")
    yield True


def no_lan(lab: Lab) -> Iterator[bool]:
    """Lose every uplink for a while."""
    lab.laptop.unplug("wlan0")
    yield False
    lab.join("wlan0", lab.lan)
    yield True


def no_route(lab: Lab) -> Iterator[bool]:
    """Lose the way out for a while; the LAN and the address stay."""
    lab.laptop.ip("route del default")
    yield False
    lab.laptop.ip("route add default via 192.168.77.1")
    yield True


def a_new_lease(lab: Lab) -> Iterator[bool]:
    """Get other addresses on the same card from one DHCP server after the other: the LAN is renumbered."""
    held = "192.168.77.2/24"
    for subnet in ("10.7.0", "192.168.77", "172.20.1"):
        lab.lan.ip(f"addr replace {subnet}.1/24 dev lan0")
        lab.internet.ip(f"route replace {subnet}.0/24 via 203.0.113.1 src {INTERNET}")
        lab.laptop.ip(
            f"addr del {held} dev wlan0", f"addr add {subnet}.9/24 dev wlan0", f"route add default via {subnet}.1"
        )
        held = f"{subnet}.9/24"
        yield True


def renamed(lab: Lab) -> Iterator[bool]:
    """Rename the uplink, as udev does, down and (where the kernel takes it) up."""
    lab.laptop.ip("link set wlan0 down", "link set wlan0 name wlp2s0", "link set wlp2s0 up")
    yield False
    lab.laptop.ip("route add default via 192.168.77.1")
    yield True
    lab.laptop.ip("link set wlp2s0 name wlan0", check=False)
    yield True


def a_second_uplink(lab: Lab) -> Iterator[bool]:
    """Plug a cable in as well, with the default route, and out again."""
    lab.plug("enp3s0", "172.20.5.0/24")
    yield True
    lab.laptop.unplug("enp3s0")
    lab.laptop.ip("route add default via 192.168.77.1")
    yield True


def by_metric(lab: Lab) -> Iterator[bool]:
    """Have two uplinks; the better one, then the worse one by now, and then just what makes it better is lost."""
    laptop, cable = lab.laptop, lab.plug("enp3s0", "172.20.5.0/24", default=False)
    wifi_route, cable_route = "default via 192.168.77.1", f"default via {cable.address}"
    laptop.ip("route del default", f"route add {wifi_route} metric 600", f"route add {cable_route} metric 100")
    yield True
    laptop.ip(f"route del {wifi_route} metric 600", f"route add {wifi_route} metric 50")
    yield True
    laptop.ip(f"route del {wifi_route} metric 50")
    yield True
    laptop.ip(f"route add {wifi_route} metric 50")
    yield True
    laptop.ip("addr del 192.168.77.2/24 dev wlan0")
    yield True
    laptop.ip("addr add 192.168.77.2/24 dev wlan0", f"route add {wifi_route} metric 50")
    yield True
    # Without this the kernel goes on to use a link that is dead, for the host too, until somebody takes its route.
    laptop.sysctl("ipv4/conf/all/ignore_routes_with_linkdown", 1)
    lab.lan.ip("link set lan0 down")
    assert wait_until(lambda: "linkdown" in laptop.run("ip", "route"))
    yield True


def full_tunnel(lab: Lab) -> Iterator[bool]:
    """Bring a VPN up as wg-quick does, rules before ours and the default route in a table of its own; and down."""
    router = lab.plug("wg0", "10.8.0.0/24", default=False)
    rules = ("not fwmark 51820 table 51820", "table main suppress_prefixlength 0")
    lab.laptop.ip(
        f"route add default via {router.address} dev wg0 table 51820", *(f"rule add {rule}" for rule in rules)
    )
    yield True
    lab.laptop.ip(*(f"rule del {rule}" for rule in rules))
    yield True
    lab.laptop.ip(*(f"rule add {rule}" for rule in rules))
    yield True
    lab.laptop.ip("link del wg0", *(f"rule del {rule}" for rule in rules))
    yield True


def half_routes(lab: Lab) -> Iterator[bool]:
    """Bring a VPN up as OpenVPN does, with two halves of the default route; it dies and leaves nothing."""
    router = lab.plug("tun0", "10.8.0.0/24", default=False)
    lab.laptop.ip(*(f"route add {half} via {router.address}" for half in ("0.0.0.0/1", "128.0.0.0/1")))
    yield True
    lab.laptop.unplug("tun0")
    yield True


def ipv6_only(lab: Lab) -> Iterator[bool]:
    """Join a LAN that has nothing but IPv6, and one that has IPv4 again."""
    lab.laptop.ip(
        "addr flush dev wlan0", "addr add 2001:db8:77::2/64 dev wlan0", "route add default via 2001:db8:77::1 dev wlan0"
    )
    yield False
    lab.laptop.ip("addr add 192.168.77.2/24 dev wlan0", "route add default via 192.168.77.1")
    yield True


def nothing_but_127(lab: Lab) -> Iterator[bool]:
    """Join a LAN of 127.1.x.x: no kernel, this one neither, sends anything there."""
    lab.lan.sysctl("ipv4/conf/lan0/route_localnet", 1)
    lab.lan.ip("addr add 127.1.0.1/16 dev lan0")
    heard = lab.lan.sniff("lan0")
    lab.laptop.ip(
        "addr flush dev wlan0", "addr add 127.1.0.77/24 dev wlan0", "route add default via 127.1.0.1 dev wlan0"
    )
    yield False
    assert not [frame for frame in heard.frames() if frames.kind_of(frame) == frames.IPV4]
    lab.laptop.ip("addr del 127.1.0.77/24 dev wlan0", "addr add 192.168.77.2/24 dev wlan0")
    lab.laptop.ip("route add default via 192.168.77.1")
    yield True


MOVES = (
    another_lan, another_lan_same_card, no_lan, no_route, a_new_lease, renamed, a_second_uplink, by_metric,
    full_tunnel, half_routes, ipv6_only, nothing_but_127,
)  # fmt: skip
"""Each does the next step of a move when it is asked for one, and yields whether there is a way out by now."""


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_guests_go_on_after_each_step_of_a_move(lab: Lab, guests: list[Guest], move: Move) -> None:
    """New connections work at once; where the translation was the old uplink's, the kernel takes one packet for it."""
    assert_all_is_well(lab, guests)
    before = addresses(lab)
    flows = [Flow(guest, INTERNET, kind) for guest in guests for kind in ("udp", "ping")]
    assert not unanswered(flows)
    for online in move(lab):
        if online:
            assert not black_holes(flows)
        assert_all_is_well(lab, guests, online=online)
    assert addresses(lab) == before
    assert lab.laptop.vmnet("plan").out == ""


@pytest.mark.parametrize("first", ["guests", "lan"])
def test_a_lan_that_gives_out_a_guests_addresses_takes_nothing(lab: Lab, warm: Warm, first: str) -> None:
    """Debian's dhclient and udhcpc were seen to take 127.1.0.2, and 247.1.0.2, from a DHCP server that offers it."""
    lab.internet.serve()
    warm.vmnet(lab.laptop, "carve")
    guests = made(lab, warm) if first == "guests" else []
    for block in range(len(forms_here())):
        ends = (f"{net}.1.0.{4 * block + last}" for net in (127, 247) for last in (1, 2))
        lab.laptop.ip(*(f"addr add {end}/16 dev wlan0" for end in ends))
    guests = guests or made(lab, warm)
    assert_all_is_well(lab, guests)
    assert warm.vmnet(lab.laptop, "plan").out == ""


def test_a_neighbour_with_an_address_of_the_pool_stays_alone(lab: Lab, guests: list[Guest]) -> None:
    """The LAN spells its own with 127.1.x.x: nobody here takes it for a guest or answers it, or asks for it there."""
    lab.laptop.ip("addr add 127.1.0.77/16 dev wlan0")
    heard = lab.lan.sniff("lan0")
    ours, theirs = lab.laptop.mac("wlan0"), lab.lan.mac("lan0")
    targets = [address for guest in guests for address in (guest.address, guest.shadow, guest.gateway)]
    targets += ["127.1.0.77", "127.0.0.1", "192.168.77.2"]
    listeners = [machine.serve(4999) for machine in (lab.laptop, *guests)]
    sources = ["127.1.0.9", *(guest.address for guest in guests)]
    for source, target in itertools.product(sources, targets):
        lab.lan.send(
            "lan0",
            frames.ether(ours, theirs, frames.IPV4, frames.udp(source, target, 4999, b"hello")),
            frames.ether(frames.BROADCAST, theirs, frames.ARP, frames.arp(1, (theirs, source), (ours, target))),
        )
    assert_all_is_well(lab, guests)
    assert not [listener for listener in listeners if listener.received]
    borne = {address for frame in heard.frames() for address in frames.addresses_of(frame)}
    assert not [address for address in borne if address.startswith(("127.", "247."))]


def other_rules() -> str:
    """Return rules of somebody else that keep the kernel's connection tracking at work."""
    hooks = "\n".join(
        f"chain {hook} {{\ntype filter hook {hook} priority 0;\nct state new accept\n}}" for hook in HOOKS
    )
    return f"flush ruleset\ntable ip other {{\n{hooks}\n}}\n"


def test_a_tunnel_that_gets_another_address_black_holes_nothing(lab: Lab, guests: list[Guest]) -> None:
    """With a far end of its own (ppp, OpenVPN's net30) the kernel leaves old translations where they are."""
    tunnel = lab.plug("tun0", "10.8.0.0/24", default=False)
    halves = [f"route replace {half} via {tunnel.address} dev tun0" for half in ("0.0.0.0/1", "128.0.0.0/1")]
    addresses = [f"10.8.0.{last} peer {tunnel.address} dev tun0" for last in (3, 4)]
    flows = [Flow(guest, INTERNET, kind) for guest in guests for kind in ("udp", "ping")]
    with Watching(lab.laptop) as watcher:
        lab.laptop.ip("addr flush dev tun0")
        time.sleep(0.3)  # a look that comes before the address must not be the last one that knows addresses
        lab.laptop.ip(f"addr add {addresses[0]}", *halves)
        assert not black_holes(flows)
        tunnel.ip("route add blackhole 10.8.0.3")
        lab.laptop.ip(f"addr del {addresses[0]}", f"addr add {addresses[1]}", *halves)
        unanswered(flows, QUIET)  # these keep the old translations alive until the watcher has seen what went
        watcher.wait_for("over 10.8.0.3")
        assert not black_holes(flows)


def test_what_begins_without_our_rules_goes_on_with_them(lab: Lab, guests: list[Guest]) -> None:
    """As after `systemctl restart nftables`: their rules track connections, and ours are away for a moment."""
    lab.laptop.run("nft", "-f", "-", stdin=other_rules())
    flows = [Flow(guest, INTERNET, kind) for guest in guests for kind in ("udp", "ping")]
    flows += [Flow(lab.laptop, guest.address, "udp", 4100 + number) for number, guest in enumerate(guests)]
    assert len(unanswered(flows, QUIET)) == len(flows)
    with Watching(lab.laptop):
        assert not black_holes(flows)


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
    lab.laptop.unplug("wlan0")
    lab.plug("wlan1", "10.99.0.0/16")
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
