"""Nobody gets in: what a LAN neighbour and a hostile guest can put on the wire, and where it arrives.

One table of frames for each attacker, sent as they are, and a witness at every place where a frame can arrive. In each
state of the host (vmnet's rules in place, behind somebody's FORWARD DROP, after a flush, after the look that heals it)
that arrives which may, and nothing else; what may after a flush is the table in `docs/reference/security.md`. The last
state is the control: with the protection taken away on purpose every frame of the table arrives, so that each of them
could have.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from random import Random

import pytest

from tests.kernel import frames
from tests.kernel.machine import ECHO_PORT, Machine, Sniffer, answered, wait_until
from tests.kernel.net import FORMS, Guest, Lab, Laptop, forms_here, why_no_tap

SECURITY = Path(__file__).parents[2] / "docs/reference/security.md"
HOST, NEIGHBOUR, INTERNET = "192.168.77.2", "192.168.77.1", "198.51.100.2"
LOOPBACK = {"localhost": "127.0.0.1", "the stub resolver": "127.0.0.53", "the far loopback": "127.200.0.1"}
EVERYBODY = {"all": "255.255.255.255", "all hosts here": "224.0.0.1"}
STRANGER, LINK_LOCAL = "02:00:00:00:be:ef", "fe80::be:ef"
NOT_IPV4 = (frames.IPV6, frames.ARP, frames.VLAN, frames.EXPERIMENT, frames.BY_LENGTH)
PORT = 7
"""A port of the host that no `--allow-host` names."""
SHORT = 0.2
"""Seconds to wait for an answer that must not come; the same wait sees it come when it may."""
SETTLE = 0.03
"""Seconds for the kernel to carry the last frame on, after it was seen on the wire."""


@dataclass(frozen=True)
class Row:
    """A frame of the table: what it is, from whom, to whom, how it is made of a token, and whether it may arrive."""

    what: str
    source: str
    target: str
    make: Callable[[bytes], bytes]
    allowed: bool = False

    @property
    def name(self) -> str:
        return f"{self.what} from {self.source} to {self.target}"


class Attacker:
    """A machine and its device; `host_device` is where its frames come into the laptop."""

    def __init__(self, laptop: Laptop, machine: Machine, device: str, host_device: str) -> None:
        self.machine, self.device, self.host_device = machine, device, host_device
        self.flat = isinstance(machine, Guest) and machine.kind == "tun"
        self.mac = STRANGER if self.flat else machine.mac(device)
        self.host_mac = STRANGER if self.flat else laptop.mac(host_device)

    def wire(self, packet: bytes, kind: int = frames.IPV4, dst: str = "") -> bytes:
        """Return the packet as the attacker's wire bears it."""
        return packet if self.flat else frames.ether(dst or self.host_mac, self.mac, kind, packet)

    def packet(self, protocol: str, src: str, dst: str, port: int = PORT) -> Callable[[bytes], bytes]:
        """Return what makes a packet of "udp", "tcp" (a SYN), "echo" or protocol "253" out of a token."""
        if protocol == "echo":
            return lambda token: self.wire(frames.echo(src, dst, token))
        if protocol == "253":
            return lambda token: self.wire(frames.ipv4(src, dst, frames.UNKNOWN, token))
        make = frames.udp if protocol == "udp" else frames.syn
        return lambda token: self.wire(make(src, dst, port, token))

    def routed(self, src: str, through: str, dst: str) -> Callable[[bytes], bytes]:
        """Return what makes a packet to `through` that asks to be sent on to `dst`."""
        return lambda token: self.wire(frames.source_routed(src, through, dst, token))

    def rows(
        self, protocols: str, sources: dict[str, str], targets: dict[str, str], *, allowed: bool = False
    ) -> Iterator[Row]:
        """Yield a row for every protocol, source and target."""
        for protocol in protocols.split():
            for source, src in sources.items():
                for target, dst in targets.items():
                    if src != dst:
                        yield Row(protocol, source, target, self.packet(protocol, src, dst), allowed)


def shadow_of(address: str) -> str:
    """Return the same 24 bits in 247/8."""
    return address.replace("127.", "247.", 1)


def from_the_lan(me: Attacker, guest: Guest) -> list[Row]:
    """Return what a neighbour can send to the laptop to reach its loopback or `guest`, or in their name."""
    ours = {
        **LOOPBACK,
        "a guest": guest.address,
        "a guest's shadow": guest.shadow,
        "a gateway": guest.gateway,
        "a gateway's shadow": shadow_of(guest.gateway),
        "the far shadow": "247.200.0.1",
    }
    towards = {name: address for name, address in ours.items() if name != "the far shadow"}
    to_localhost = me.packet("udp", NEIGHBOUR, "127.0.0.1")

    def to_all_macs(token: bytes) -> bytes:
        return frames.mac_bytes(frames.BROADCAST) + to_localhost(token)[6:]

    return [
        *me.rows("udp tcp echo 253", {"itself": NEIGHBOUR}, towards),
        *(Row("source route", "itself", name, me.routed(NEIGHBOUR, HOST, to)) for name, to in towards.items()),
        *me.rows("udp tcp", {"the internet": "203.0.113.99", "the host": HOST}, towards),
        *me.rows("udp tcp echo", ours, {"the host": HOST, "localhost": "127.0.0.1"}),
        *me.rows(
            "udp tcp", ours, {"the internet": INTERNET, "a guest": guest.address, "a guest's shadow": guest.shadow}
        ),
        *me.rows("udp", ours, EVERYBODY),
        Row("udp with a priority tag", "itself", "localhost", lambda token: frames.tagged(to_localhost(token), 0)),
        Row("udp to all MACs", "itself", "localhost", to_all_macs),
    ]


def from_a_guest(me: Attacker, guest: Guest, peer: Guest) -> list[Row]:
    """Return what `guest` can send: honest packets, false sources, wrong targets; `peer` is another guest."""
    mapped, own, gateway = guest.mode == "mapped", guest.guest_address, guest.guest_gateway
    spelled = {"its other address": guest.address, "its peer": peer.shadow, "its peer's other address": peer.address}
    if not mapped:
        spelled = {"its other address": guest.shadow, "its peer": peer.address, "its peer's other address": peer.shadow}
    false = {
        **LOOPBACK,
        **spelled,
        "its gateway": gateway,
        "nobody's block": gateway.split(".")[0] + ".9.9.10",
        "the host": HOST,
        "the neighbour": NEIGHBOUR,
        "the internet": "203.0.113.99",
    }
    itself, to_gateway = {"itself": own}, {"its gateway": gateway}
    outside = {"its peer": guest.knows(peer), "the neighbour": NEIGHBOUR, "the internet": INTERNET}
    everybody = {**EVERYBODY, "all of its block": own.rpartition(".")[0] + f".{int(own.rpartition('.')[2]) + 1}"}
    rows = [
        *me.rows("udp tcp echo", itself, outside, allowed=True),
        *me.rows("echo", itself, to_gateway, allowed=True),
        *me.rows("udp tcp 253", itself, to_gateway),
        *me.rows("udp tcp echo 253", itself, {"the host": HOST, **LOOPBACK}),
        *me.rows(
            "udp tcp echo", itself, {"its peer's other address": false["its peer's other address"]}, allowed=not mapped
        ),
        Row("source route", "itself", "the host", me.routed(own, gateway, HOST)),
        Row("source route", "itself", "localhost", me.routed(own, gateway, "127.0.0.1")),
        *me.rows("udp tcp echo", false, {**to_gateway, "the host": HOST, "localhost": "127.0.0.1"}),
        *me.rows("udp", false, outside),
        *me.rows("udp", {**itself, **false}, everybody),
        Row("dns", "itself", "its gateway", me.packet("udp", own, gateway, 53), allowed=True),
        Row("IPv6", "itself", "all", ipv6_of(me)),
    ]
    if me.flat:
        return rows
    # Before it has an address a guest asks all for one.
    dhcp = Row("dhcp", "nobody yet", "all", me.packet("udp", "0.0.0.0", "255.255.255.255", 67), allowed=mapped)
    nobody = Row("udp", "nobody yet", "all", me.packet("udp", "0.0.0.0", "255.255.255.255"))
    return [
        *rows,
        dhcp,
        nobody,
        *typed_and_tagged(me, own, gateway),
        *arp_of(me, own, guest.knows(peer), gateway, mapped),
    ]


def ipv6_of(me: Attacker) -> Callable[[bytes], bytes]:
    return lambda token: me.wire(frames.udp6(LINK_LOCAL, "ff02::1", PORT, token), frames.IPV6, frames.ALL_NODES_MAC)


def typed_and_tagged(me: Attacker, own: str, gateway: str) -> Iterator[Row]:
    """Yield frames of other types than IPv4 and ARP, and with VLAN tags."""
    honest, false = me.packet("echo", own, gateway), me.packet("echo", "127.0.0.1", gateway)
    makers: dict[str, Callable[[bytes], bytes]] = {
        "a router's IPv6": lambda token: me.wire(
            frames.router_advertisement(LINK_LOCAL, me.mac, token), frames.IPV6, frames.ALL_NODES_MAC
        ),
        "an unknown type": lambda token: me.wire(token, frames.EXPERIMENT),
        "a length for a type": lambda token: me.wire(b"\xaa\xaa\x03\0\0\0\x08\0" + token, 46),
        "an unknown type in a VLAN": lambda token: frames.tagged(me.wire(token, frames.EXPERIMENT), 5),
        "echo in two VLANs": lambda token: frames.tagged(frames.tagged(honest(token), 7), 6, frames.QINQ),
    }
    for what, make in makers.items():
        yield Row(what, "itself", "its gateway", make)
    for source, maker in (("itself", honest), ("localhost", false)):
        priority = lambda token, maker=maker: frames.tagged(maker(token), 0)  # noqa: E731
        yield Row("echo with a priority tag", source, "its gateway", priority, allowed=source == "itself")


def arp_of(me: Attacker, own: str, peer: str, gateway: str, mapped: bool) -> Iterator[Row]:
    """Yield ARP from what is the guest's, which a mapped one needs, and from what is not."""

    def make(sender: str, operation: int) -> Callable[[bytes], bytes]:
        return lambda token: me.wire(
            frames.arp(operation, (me.mac, sender), (me.host_mac, gateway), token), frames.ARP, frames.BROADCAST
        )

    for source, sender in {"itself": own, "nobody yet": "0.0.0.0"}.items():
        yield Row("arp", source, "its gateway", make(sender, 1), allowed=mapped)
    false = {"its gateway": gateway, "its peer": peer, "the host": HOST, "the neighbour": NEIGHBOUR, **LOOPBACK}
    for source, sender in {**false, "a stranger": "10.1.2.3"}.items():
        yield Row("arp", source, "its gateway", make(sender, 1))
        yield Row("arp answer", source, "its gateway", make(sender, 2))


class Witnesses:
    """One at each place: what the host's services could read, what a device lets in, each guest's NIC, the LAN.

    The place "answer" is the attacker's own device: what comes back to it.
    """

    def __init__(self, lab: Lab, me: Attacker, guests: Sequence[Guest]) -> None:
        laptop, four, six = (
            lab.laptop,
            (frames.UDP, frames.TCP, frames.ICMP, frames.UNKNOWN),
            (frames.UDP, frames.ICMPV6),
        )
        self.wire = laptop.sniff(me.host_device)
        self.ears = {
            "the host": [laptop.hear(one) for one in four] + [laptop.hear(one, 6) for one in six],
            "its device": [laptop.sniff(me.host_device, kind=kind) for kind in NOT_IPV4]
            if me.machine in guests
            else [],
            "a guest": [guest.sniff() for guest in guests if guest is not me.machine],
            "the LAN": [lab.lan.sniff("lan0")] if me.machine in guests else [],
            "answer": [me.machine.sniff(me.device, kind=frames.IPV4)],
        }

    def look(self) -> list[tuple[str, bytes]]:
        """Return the place and the bytes of each packet that came since the last look."""
        return [(place, packet) for place, ears in self.ears.items() for ear in ears for packet in ear.frames()]


@dataclass(frozen=True)
class Found:
    """What came of a table: the places at which each row arrived, by its name, and every packet with its place."""

    places: dict[str, set[str]]
    packets: list[tuple[str, bytes]]

    def of(self, place: str) -> list[bytes]:
        return [packet for where, packet in self.packets if where == place]


def throw(lab: Lab, me: Attacker, rows: Sequence[Row], guests: Sequence[Guest]) -> Found:
    """Send every row and say where it arrived.

    Each frame is seen to reach the laptop's device: none of them fails by a mistake of the attacker's.
    """
    witnesses = Witnesses(lab, me, guests)
    tokens = {os.urandom(6): row for row in rows}
    assert len(tokens) == len(rows)
    seen: list[tuple[str, bytes]] = []
    missing = set(tokens)
    built = [row.make(token) for token, row in tokens.items()]

    def all_came() -> bool:
        for frame in witnesses.wire.frames():
            missing.difference_update([token for token in missing if token in frame])
        return not missing

    for start in range(0, len(built), 32):
        me.machine.send(me.device, *built[start : start + 32])
        seen += witnesses.look()
        all_came()
    assert wait_until(all_came), [tokens[token].name for token in missing]
    time.sleep(SETTLE)
    seen += witnesses.look()
    places: dict[str, set[str]] = {}
    signs = {sign: row.name for token, row in tokens.items() for sign in frames.signs_of(token)}
    for place, packet in seen:
        for sign, name in signs.items():
            if sign in packet:
                places.setdefault(name, set()).add(place)
    return Found(places, seen)


def flush(laptop: Laptop) -> None:
    laptop.run("nft", "flush", "ruleset")


def drop_forwarding(laptop: Laptop) -> None:
    """Do what Docker, ufw and their kind do."""
    for command in ("iptables -F", "iptables -t nat -F", "iptables -P FORWARD DROP"):
        laptop.run(*command.split())


OPEN = {"route_localnet": 1, "accept_local": 1, "accept_source_route": 1, "rp_filter": 0, "forwarding": 1}


def throw_open(laptop: Laptop, guests: Sequence[Guest]) -> None:
    """Take away all that protects: rules, filters, fences, and the kernel's own distrust of loopback addresses."""
    flush(laptop)
    for guest in guests:
        laptop.run("tc", "qdisc", "del", "dev", guest.host_device, "clsact")
    laptop.ip("route del unreachable 127.0.0.0/10 table local", "route del unreachable 247.0.0.0/8")
    with laptop.entered():
        for folder in Path("/proc/sys/net/ipv4/conf").iterdir():
            for key, value in OPEN.items():
                (folder / key).write_text(f"{value}\n")
    for guest in guests:
        laptop.sysctl(f"ipv6/conf/{guest.host_device}/disable_ipv6", 0)
        if guest.kind != "tun":
            first, last = guest.address.rpartition(".")[0], int(guest.address.rpartition(".")[2])
            block = [f"{first}.{number}" for number in range(last - 1, last + 2)]
            known = f"lladdr {guest.mac(guest.device)} dev {guest.host_device} nud permanent"
            laptop.ip(*(f"neigh replace {address} {known}" for address in [*block, guest.shadow]))


def open_after_a_flush(who: str, rp_filter: int) -> dict[str, set[str]]:
    """Return the rows that arrive although the rules are gone, and where, as the manual lists them."""
    found: dict[str, set[str]] = {}
    for line in SECURITY.read_text().splitlines():
        cells = [cell.strip().split(", ") for cell in line.strip("|").split("|")]
        if (
            len(cells) == 6
            and who in cells[0]
            and cells[5][0] in ("any", *(["0 or 2"] * (rp_filter != 1)), str(rp_filter))
        ):
            for what, source, target in product(*cells[1:4]):
                found[f"{what} from {source} to {target}"] = set(cells[4])
    return found


def inside_addresses(packets: Sequence[bytes]) -> set[str]:
    """Return the addresses of 127/8 and 247/8 that packets bear."""
    return {one for packet in packets for one in frames.addresses_of(packet) if one.startswith(("127.", "247."))}


LIBVIRT = "tap-mapped of libvirt"
ATTACKERS = (*FORMS, LIBVIRT)
SAMPLE = {(form, number % 3) for number, form in enumerate(ATTACKERS)}


@pytest.mark.parametrize(
    ("form", "rp_filter"),
    [pytest.param(*one, marks=[] if one in SAMPLE else pytest.mark.long) for one in product(ATTACKERS, (0, 1, 2))],
)
def test_a_guest_gets_where_it_may_and_nowhere_else(
    lab: Lab, form: str, rp_filter: int, request: pytest.FixtureRequest
) -> None:
    laptop = lab.laptop
    guest = laptop.guest_of_libvirt("guest") if form == LIBVIRT else laptop.guest("guest", *FORMS[form])
    forms = list(forms_here()) if request.config.getoption("--long") else ["veth-mapped", "veth-native"]
    peers = [laptop.guest(name, *FORMS[name]) for name in forms]
    me = Attacker(laptop, guest, guest.device, guest.host_device)
    laptop.rp_filter(rp_filter)
    for peer in peers:
        rows = from_a_guest(me, guest, peer)
        allowed = {row.name for row in rows if row.allowed}
        to_host = {row.name for row in rows if row.allowed and row.target in ("its gateway", "all")}

        found = throw(lab, me, rows, [guest, *peers])
        assert set(found.places) == allowed
        assert not inside_addresses(found.of("the LAN"))

        drop_forwarding(laptop)
        found = throw(lab, me, rows, [guest, *peers])
        assert set(found.places) == to_host
        assert not [frame for frame in found.of("the LAN") if frames.kind_of(frame) == frames.IPV4]

        flush(laptop)
        found = throw(lab, me, rows, [guest, *peers])
        assert found.places == open_after_a_flush(form.partition(" ")[0], rp_filter)
        assert not found.of("answer")
        assert not found.of("a guest")

        laptop.vmnet("up")
        laptop.rp_filter(rp_filter)
        assert set(throw(lab, me, rows, [guest, *peers]).places) == allowed
    throw_open(laptop, [guest, *peers])
    for peer in peers:
        rows = from_a_guest(me, guest, peer)
        assert set(throw(lab, me, rows, [guest, *peers]).places) == {row.name for row in rows}


@pytest.mark.parametrize("rp_filter", [0, 1, 2])
def test_a_neighbour_gets_nowhere(lab: Lab, rp_filter: int) -> None:
    laptop = lab.laptop
    laptop.sysctl("ipv4/icmp_ratelimit", 0)  # or the answers that are ICMP's depend on how fast this machine is
    guests = [laptop.guest(form, *options) for form, options in forms_here().items()]
    guests += [laptop.guest_of_libvirt("libvirt")] if why_no_tap() is None else []
    me = Attacker(laptop, lab.lan, "lan0", "wlan0")
    laptop.rp_filter(rp_filter)
    for guest in guests:
        rows = from_the_lan(me, guest)
        for state in (lambda laptop: None, drop_forwarding):
            state(laptop)
            found = throw(lab, me, rows, guests)
            assert found.places == {}
            assert not inside_addresses(found.of("answer"))
        flush(laptop)
        assert throw(lab, me, rows, guests).places == open_after_a_flush("LAN neighbour", rp_filter)
        laptop.vmnet("up")
        laptop.rp_filter(rp_filter)
        assert throw(lab, me, rows, guests).places == {}
    throw_open(laptop, guests)
    for guest in guests:
        rows = from_the_lan(me, guest)
        assert set(throw(lab, me, rows, guests).places) == {row.name for row in rows}


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("tun")])
def test_a_vlan_tag_keeps_a_frame_out(lab: Lab, form: str) -> None:
    """A priority tag is no VLAN: the same frame with it shows that only the number makes the difference."""
    laptop, guest = lab.laptop, lab.laptop.guest("guest", *FORMS[form])
    me = Attacker(laptop, guest, guest.device, guest.host_device)
    honest = me.packet("echo", guest.guest_address, guest.guest_gateway)
    for clean in (lambda laptop: None, flush):
        clean(laptop)
        heard = laptop.hear(frames.ICMP)
        for number, tag in product((5, 4094, 0), (frames.VLAN, frames.QINQ)):
            guest.send(guest.device, frames.tagged(honest(b"%d, %x" % (number, tag)), number, tag))
        packets: list[bytes] = []

        def last_came(packets: list[bytes] = packets, heard: Sniffer = heard) -> bool:
            packets.extend(heard.frames())
            return any(b"0, 88a8" in packet for packet in packets)

        if guest.mode == "mapped" or clean is not flush:
            assert wait_until(last_came)
        time.sleep(SETTLE)
        last_came()
        assert not [packet for packet in packets if b"5, " in packet or b"4094, " in packet]


def test_invented_arp_senders_do_not_fill_the_neighbour_table(lab: Lab) -> None:
    """The table is the machine's: 1024 entries, and a host that has no room for its router is off its LAN."""
    laptop, guest = lab.laptop, lab.laptop.guest("guest", *FORMS["veth-mapped"])
    me = Attacker(laptop, guest, guest.device, guest.host_device)

    def invented(number: int) -> bytes:
        sender = f"247.1.{number // 200}.{number % 200 + 4}"
        message = frames.arp(1, (me.mac, sender), (me.host_mac, guest.guest_gateway), b"%06d" % number)
        return me.wire(message, frames.ARP, frames.BROADCAST)

    def came(heard: Sniffer, number: bytes) -> bool:
        return any(number in frame for frame in heard.frames())

    def flood() -> int:
        """Send 300 requests from as many senders, and return how many of them the host has learned."""
        heard = laptop.sniff(guest.host_device)
        for start in range(0, 300, 50):
            guest.send(guest.device, *(invented(number) for number in range(start, start + 50)))
            assert wait_until(partial(came, heard, b"%06d" % (start + 49)))
        time.sleep(SETTLE)
        known = json.loads(laptop.run("ip", "-j", "neigh", "show", "dev", guest.host_device))
        return len([one for one in known if one["dst"] != guest.shadow])

    assert flood() == 0
    flush(laptop)
    assert flood() == 0
    throw_open(laptop, [guest])
    # Of senders on the device's own link; a request for an address of the host makes a neighbour.
    laptop.ip(f"addr add 247.1.0.1/16 dev {guest.host_device}")
    assert flood() > 200


def test_what_the_laptop_says_by_arp_on_its_lan(lab: Lab) -> None:
    """It answers for its own end of each block, as for all its addresses, and for nothing of 127/8 and no guest."""
    laptop, lan = lab.laptop, lab.lan
    guests = [laptop.guest(form, *options) for form, options in forms_here().items()]
    me = Attacker(laptop, lan, "lan0", "wlan0")
    gateways = {shadow_of(guest.gateway) for guest in guests}
    asked = {
        "127.0.0.1",
        HOST,
        *gateways,
        *(one for guest in guests for one in (guest.address, guest.gateway, guest.shadow)),
    }

    def answered() -> set[str]:
        heard = lan.sniff("lan0", kind=frames.ARP)
        for address in asked:
            message = frames.arp(1, (me.mac, NEIGHBOUR), ("00:00:00:00:00:00", address))
            lan.send("lan0", me.wire(message, frames.ARP, frames.BROADCAST))
        time.sleep(SETTLE)
        return {frames.arp_sender(frame) for frame in heard.frames()} & asked

    assert answered() == {HOST, *gateways}
    throw_open(laptop, guests)
    assert answered() >= {HOST, *gateways, "127.0.0.1"}


def test_the_hosts_services_are_closed_to_guests_and_its_loopback_to_all(lab: Lab) -> None:
    """With real stacks on both sides, and services on all addresses, on all of both versions, and on 127.0.0.1."""
    laptop, lan = lab.laptop, lab.lan
    guests = [laptop.guest(form, *options) for form, options in forms_here().items()]
    services = [laptop.serve(1001, "0.0.0.0"), laptop.serve(1002, "::"), laptop.serve(1003, "127.0.0.1")]
    lan.sysctl("ipv4/conf/all/route_localnet", 1)
    lan.ip(
        "addr del 127.0.0.1/8 dev lo",
        f"route add table local 127.0.0.1 via {HOST} dev lan0 src {NEIGHBOUR}",
        *(f"route add {address} via {HOST}" for guest in guests for address in (guest.shadow, guest.guest_gateway)),
    )
    laptop.rp_filter(0)

    asked: list[tuple[Machine, str, int]] = [(lan, "127.0.0.1", service.port) for service in services]
    asked += [(guest, to, one.port) for guest in guests for to in (guest.guest_gateway, HOST) for one in services]

    assert laptop.reaches("127.0.0.1", 1003) == {"tcp", "udp", "ping"}
    assert lan.reaches(HOST, 1002) == {"tcp", "udp", "ping"}
    for service in services:
        service.peers.clear()
    assert answered(asked, SHORT) == set()
    assert [service.peers for service in services] == [[], [], []]
    flush(laptop)
    assert answered(asked, SHORT) == set()
    # One way: what a mapped guest sends to a service that is there for the LAN too is heard, and not answered.
    assert set(services[0].peers) == {guest.shadow for guest in guests if guest.mode == "mapped"}
    assert services[2].peers == []
    throw_open(laptop, guests)
    assert len(answered(asked, SHORT)) > len(guests)


def test_a_source_route_does_not_lead_to_the_hosts_end_of_a_block(lab: Lab) -> None:
    """On a host that takes source routes at all: the kernel rewrites the destination after prerouting."""
    laptop, lan = lab.laptop, lab.lan
    guest = laptop.guest("vm", "--kind", "veth")
    gateway = guest.info["shadow"].rpartition(".")[0] + ".1"
    for name in ("all", "wlan0"):
        laptop.sysctl(f"ipv4/conf/{name}/accept_source_route", 1)
    laptop.rp_filter(0)
    ear = laptop.socket(socket.AF_INET, socket.SOCK_RAW, frames.UNKNOWN)
    ear.bind((gateway, 0))
    ear.settimeout(SHORT)
    packet = frames.source_routed(NEIGHBOUR, HOST, gateway, b"token")
    frame = frames.ether(laptop.mac("wlan0"), lan.mac("lan0"), frames.IPV4, packet)
    lan.send("lan0", frame)
    with pytest.raises(TimeoutError):
        ear.recv(2048)
    throw_open(laptop, [guest])
    lan.send("lan0", frame)
    assert b"token" in ear.recv(2048)


def test_without_rules_nothing_at_all_reaches_a_guest(lab: Lab) -> None:
    """From the host, the LAN and the other guests, by whatever address, and no answer to what a guest says."""
    laptop, lan = lab.laptop, lab.lan
    guests = [laptop.guest(form, *options) for form, options in forms_here().items()]
    for guest in guests:
        guest.serve()
    lab.internet.serve()
    lan.ip(*(f"route add {guest.shadow} via {HOST}" for guest in guests))

    forbidden = [(lan, guest.shadow, ECHO_PORT) for guest in guests]
    allowed: list[tuple[Machine, str, int]] = [
        *((laptop, address, ECHO_PORT) for guest in guests for address in (guest.address, guest.shadow)),
        *((here, here.knows(there), ECHO_PORT) for here, there in product(guests, guests) if here is not there),
        *((guest, INTERNET, ECHO_PORT) for guest in guests),
    ]
    all_of_them = {(machine.name, address, port) for machine, address, port in allowed}
    assert answered(allowed) == all_of_them
    assert answered(forbidden, SHORT) == set()
    flush(laptop)
    ears = [guest.sniff(guest.device, kind=frames.IPV4) for guest in guests]
    assert answered([*allowed, *forbidden], SHORT) == set()
    assert [ear.frames() for ear in ears] == [[] for _ in guests]
    laptop.vmnet("up")
    assert answered(allowed) == all_of_them
    assert all(ear.frames() for ear in ears)
    throw_open(laptop, guests)
    assert answered(forbidden, SHORT)


def test_nothing_of_127_or_247_leaves_by_the_uplink(lab: Lab) -> None:
    """What the host and its guests send to blocks that nobody has fails at once, and goes nowhere."""
    laptop, lan = lab.laptop, lab.lan
    guests = [laptop.guest(form, *options) for form, options in forms_here().items()]
    lab.internet.serve()
    lost = ("127.1.9.10", "127.63.255.254", "247.1.9.10", "247.63.255.254", "247.200.0.1")

    def left() -> set[str]:
        heard = lan.sniff("lan0")
        answered([(machine, to, 9) for machine in (laptop, *guests) for to in (*lost, INTERNET)], SHORT)
        time.sleep(SETTLE)
        return inside_addresses(heard.frames())

    assert left() == set()
    laptop.vmnet("down", guests[0].name)
    assert left() == set()
    drop_forwarding(laptop)
    assert left() == set()
    throw_open(laptop, guests[1:])
    assert left() >= {"247.1.9.10", "247.200.0.1"}


@pytest.mark.parametrize("form", FORMS)
def test_invented_packets_with_a_false_source_get_nowhere(lab: Lab, form: str, request: pytest.FixtureRequest) -> None:
    """Whatever the addresses, the protocol and the port; the seed is fixed, so that a failure comes again."""
    laptop = lab.laptop
    guest, peer = laptop.guest("guest", *FORMS[form]), laptop.guest("peer", *FORMS["veth-mapped"])
    guests, me, dice = [guest, peer], Attacker(laptop, guest, guest.device, guest.host_device), Random(form)
    known = [HOST, NEIGHBOUR, INTERNET, *LOOPBACK.values(), *EVERYBODY.values(), "0.0.0.0", "255.255.255.255"]
    known += [one for each in guests for one in (each.address, each.shadow, each.gateway, shadow_of(each.gateway))]

    def address() -> str:
        wild = f"{dice.choice((127, 247))}.{dice.randrange(64)}.{dice.randrange(256)}.{dice.randrange(256)}"
        return dice.choice([wild, socket.inet_ntoa(dice.randbytes(4)), *known])

    def invent() -> Row:
        src, dst, what, port = (
            address(),
            address(),
            dice.choice(("udp", "tcp", "echo", "253")),
            dice.randrange(1, 65536),
        )
        while src in (guest.guest_address, "0.0.0.0"):
            src = address()
        return Row(what, src, f"{dst} {port} {dice.random()}", me.packet(what, src, dst, port))

    rows: list[Row] = []
    for _ in range(25 if request.config.getoption("--long") else 1):
        rows = [invent() for _ in range(200)]
        for clean in (lambda laptop: None, flush):
            clean(laptop)
            assert throw(lab, me, rows, guests).places == {}
        laptop.vmnet("up")
    throw_open(laptop, guests)
    assert len(throw(lab, me, rows, guests).places) > 40
