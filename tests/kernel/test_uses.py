"""Addresses that somebody uses already are found before the carve, and nothing is broken silently.

What is used is kept out of the pool and goes where it went: the kernel is asked for its way before and after. What
vmnet cannot do without makes the carve refuse, with exit code 4 and the list of it.
"""

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.kernel.machine import wait_until
from tests.kernel.net import Laptop
from tests.kernel.warm import Warm

DEVICE = ("link add d0 type veth peer name d1", "link set d0 up addrgenmode none", "link set d1 up addrgenmode none")
SHRUNK = ("addr add 127.0.0.1/16 dev lo", "addr del 127.0.0.1/8 dev lo")
UNMERGED = ("rule add pref 100 lookup main",)
CONFLICT = 4


pytestmark = pytest.mark.usefixtures("settled")


Open = Callable[[Laptop], list[socket.socket]]


@dataclass(frozen=True)
class Case:
    """How somebody uses addresses: lines of ip(8), sockets, lines of the hosts file.

    `used` are addresses that must go where they went, `free` ones beside them that are fenced, `block` a guest's
    address that must not be given out, empty where none is touched.
    """

    lines: tuple[str, ...] = ()
    sockets: Open | None = None
    hosts: str = ""
    used: tuple[str, ...] = ("127.5.0.5",)
    free: tuple[str, ...] = ("127.5.0.9", "127.5.0.3")
    block: str = "127.5.0.6"
    said: str = "127.5.0.5/32"


def bound(kind: int, address: str, family: int = socket.AF_INET) -> Open:
    def make(laptop: Laptop) -> list[socket.socket]:
        made = laptop.socket(family, kind)
        made.bind((address, 7000))
        if kind == socket.SOCK_STREAM:
            made.listen()
        return [made]

    return make


def connected(kind: int) -> Open:
    """Return what lets a client talk to 127.5.0.5 of a server that listens everywhere."""

    def make(laptop: Laptop) -> list[socket.socket]:
        server, client = laptop.socket(socket.AF_INET, kind), laptop.socket(socket.AF_INET, kind)
        server.bind(("0.0.0.0", 7000))
        if kind == socket.SOCK_STREAM:
            server.listen()
        client.connect(("127.5.0.5", 7000))
        return [client, server]

    return make


SUBNET = Case(used=("127.5.0.5", "127.5.0.77"), free=("127.5.1.1",), said="127.5.0.0/24")


def subnet(*lines: str, free: tuple[str, ...] = SUBNET.free) -> Case:
    return Case(lines=lines, used=SUBNET.used, free=free, said=SUBNET.said)


CASES = {
    "tcp": Case(sockets=bound(socket.SOCK_STREAM, "127.5.0.5")),
    "udp": Case(sockets=bound(socket.SOCK_DGRAM, "127.5.0.5")),
    "tcp, IPv6-mapped": Case(sockets=bound(socket.SOCK_STREAM, "::ffff:127.5.0.5", socket.AF_INET6)),
    "udp, IPv6-mapped": Case(sockets=bound(socket.SOCK_DGRAM, "::ffff:127.5.0.5", socket.AF_INET6)),
    "a tcp connection": Case(sockets=connected(socket.SOCK_STREAM)),
    "a udp connection": Case(sockets=connected(socket.SOCK_DGRAM)),
    "raw": Case(sockets=lambda laptop: [raw(laptop)]),
    "an address on lo": Case(lines=("addr add 127.5.0.5/32 dev lo",)),
    "a wide address on lo": Case(lines=("addr add 127.5.0.5/8 dev lo",)),
    "a subnet on lo": subnet("addr add 127.5.0.1/24 dev lo"),
    "a local route": subnet("route add local 127.5.0.0/24 dev lo"),
    "a hosts line": Case(hosts="127.5.0.5 web # comment\n"),
    "a hosts line, IPv6-mapped": Case(hosts="\t::ffff:127.5.0.5 web\n"),
    "another device": subnet(*DEVICE, "addr add 127.5.0.1/24 dev d0"),
    "another device, lo shrunk by hand": subnet(*SHRUNK, *DEVICE, "addr add 127.5.0.1/24 dev d0"),
    "another device, local apart": subnet(*SHRUNK, *UNMERGED, *DEVICE, "addr add 127.5.0.1/24 dev d0"),
    "the far end of another device": Case(lines=(*DEVICE, "addr add 192.0.2.1 peer 127.5.0.5 dev d0")),
    "a route": subnet("route add 127.5.0.0/24 via 192.168.77.1"),
    "a route, local apart": subnet(*SHRUNK, *UNMERGED, "route add 127.5.0.0/24 via 192.168.77.1"),
    "a multipath route": subnet("route add 127.5.0.0/24 nexthop via 192.168.77.1 nexthop via 192.168.77.9"),
    "a route by a nexthop": subnet("nexthop add id 7 dev wlan0", "route add 127.5.0.0/24 nhid 7"),
    "a route in another table": subnet(
        *SHRUNK, "route add 127.5.0.0/24 via 192.168.77.1 table 100", "rule add pref 50 lookup 100"
    ),
    "a blackhole": subnet("route add blackhole 127.5.0.0/24"),
    "beyond the pool": Case(
        lines=(*SHRUNK, *UNMERGED, *DEVICE, "addr add 127.100.0.1/24 dev d0"),
        used=("127.100.0.1", "127.100.0.77"), free=("127.5.0.5",), block="", said="127.100.0.0/24",
    ),
    "in the host part": Case(
        lines=(
            "addr add 127.0.0.1/32 dev lo", "addr del 127.0.0.1/8 dev lo", *UNMERGED, *DEVICE,
            "addr add 127.0.5.1/24 dev d0",
        ),
        used=("127.0.5.1", "127.0.5.77"), free=("127.5.0.5",), block="", said="127.0.5.0/24",
    ),
    "kubefwd": Case(
        lines=tuple(f"addr add 127.1.27.{last}/32 dev lo" for last in range(1, 41)),
        hosts="".join(f"127.1.27.{last} svc-{last}\n" for last in range(1, 41)),
        used=("127.1.27.1", "127.1.27.40"), free=("127.1.27.41",), block="127.1.27.42", said="127.1.27.1/32",
    ),
}  # fmt: skip


def raw(laptop: Laptop) -> socket.socket:
    made = laptop.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    made.bind(("127.5.0.5", 0))
    return made


def way(laptop: Laptop, address: str) -> list[Any]:
    """Return how the kernel would route to an address; what it refuses to say is an answer, too."""
    shown = laptop.run("ip", "-j", "route", "get", address, check=False)
    return [(one.get("type"), one.get("dev"), one.get("gateway")) for one in json.loads(shown or "[]")]


def begin(case: Case, laptop: Laptop) -> None:
    laptop.ip(*case.lines)
    # The kernel tells the state of a carrier up to a second later: until then no two looks are the same.
    assert DEVICE[0] not in case.lines or wait_until(lambda: "state UP" in laptop.run("ip", "link", "show", "d0"))
    with laptop.hosts_file.open("a") as hosts:
        hosts.write(case.hosts)


@pytest.mark.parametrize("name", CASES)
def test_what_is_used_is_found_kept_and_given_back(name: str, laptop: Laptop, warm: Warm) -> None:
    case = CASES[name]
    begin(case, laptop)
    start = laptop.snapshot()
    open_sockets = case.sockets(laptop) if case.sockets else []
    ways = {address: way(laptop, address) for address in case.used}

    carved = warm.vmnet(laptop, "carve")
    assert case.said in carved.err
    assert len(carved.err.splitlines()) <= 22
    assert {address: way(laptop, address) for address in case.used} == ways
    assert [address for address in case.free if way(laptop, address)] == []
    assert warm.vmnet(laptop, "plan").out == ""
    if case.block:
        refused = warm.vmnet(laptop, "create", "g", "--kind", "veth", "--address", case.block, check=False)
        assert refused.code == CONFLICT, refused
        assert "reserved" in refused.err
    warm.vmnet(laptop, "restore")
    assert laptop.snapshot() == start

    for one in open_sockets:
        one.close()
    undo(case, laptop)
    assert warm.vmnet(laptop, "carve").err == ""
    if case.block:
        warm.vmnet(laptop, "create", "g", "--kind", "veth", "--address", case.block)
        assert laptop.ping(case.block)


def undo(case: Case, laptop: Laptop) -> None:
    """End the use."""
    text = laptop.hosts_file.read_text()
    laptop.hosts_file.write_text(text.removesuffix(case.hosts))
    back = {DEVICE[0]: "link del d0", SHRUNK[1]: "addr add 127.0.0.1/8 dev lo"}
    for line in [back.get(line, line.replace(" add ", " del ")) for line in case.lines]:
        laptop.ip(line, check=False)


@pytest.mark.parametrize("lines", [("addr add 127.5.0.5/32 dev lo",), (*DEVICE, "addr add 127.5.0.5/30 dev d0")])
def test_a_guest_can_have_the_block_beside(lines: tuple[str, ...], laptop: Laptop, warm: Warm) -> None:
    begin(Case(lines), laptop)
    start = laptop.snapshot()
    for name, address in (("a", "127.5.0.2"), ("b", "127.5.0.10")):
        warm.vmnet(laptop, "create", name, "--kind", "veth", "--address", address)
        assert laptop.ping(address)
    assert warm.vmnet(laptop, "plan").out == ""
    warm.vmnet(laptop, "delete", "a")
    assert way(laptop, "127.5.0.2") == []
    warm.vmnet(laptop, "restore")
    assert laptop.snapshot() == start


REFUSED = {
    "an address of the shadow": ((*DEVICE, "addr add 247.3.0.1/24 dev d0"), "247.3.0.0/24"),
    "an address of the shadow on lo": (("addr add 247.200.0.1/32 dev lo",), "247.200.0.1/32"),
    "the far end of an address": ((*DEVICE, "addr add 192.0.2.1 peer 247.0.0.1 dev d0"), "247.0.0.1/32"),
    "a route into the shadow": (("route add 247.1.0.0/16 via 192.168.77.1",), "247.1.0.0/16"),
    "a route to the shadow": (("route add blackhole 247.0.0.0/8",), "247.0.0.0/8"),
    "a route in another table": (("route add 247.0.0.0/8 via 192.168.77.1 table 7",), "247.0.0.0/8"),
    "a route over the shadow": (("route add 240.0.0.0/4 via 192.168.77.1",), "240.0.0.0/4"),
    "a route over the pool": (("route add 127.0.0.0/9 via 192.168.77.1",), "127.0.0.0/9"),
    "a route of the pool": (("route add 127.0.0.0/10 via 192.168.77.1",), "127.0.0.0/10"),
    "the pool is local": (("route add local 127.0.0.0/10 dev lo",), "127.0.0.0/10"),
    "the pool is lo's": (("addr add 127.0.0.1/10 dev lo",), "127.0.0.0/10"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_carve_refuses_what_it_cannot_do_without(name: str, laptop: Laptop, warm: Warm) -> None:
    lines, network = REFUSED[name]
    begin(Case(lines=lines), laptop)
    start = laptop.snapshot()
    for command in (["carve", "--dry-run"], ["carve"], ["create", "g", "--kind", "veth"]):
        refused = warm.vmnet(laptop, *command, check=False)
        assert refused.code == CONFLICT, refused
        assert network in refused.err
    assert laptop.snapshot() == start
    assert warm.vmnet(laptop, "list", "--json").json == []


HARMLESS = {
    "pieces of a default route": ("route add 0.0.0.0/1 via 192.168.77.1", "route add 128.0.0.0/1 via 192.168.77.1"),
    "more pieces": ("route add 224.0.0.0/3 via 192.168.77.1", "route add 126.0.0.0/7 via 192.168.77.1"),
    "multicast": ("route add 224.0.0.0/4 dev wlan0",),
    "all of class E but the shadow": ("route add 248.0.0.0/5 via 192.168.77.1", "route add 246.0.0.0/8 dev wlan0"),
    "a transparent proxy": ("route add local default dev lo table 100", "rule add pref 50 fwmark 1 lookup 100"),
    "old loopback routes": ("route add 127.0.0.0/8 dev lo",),
    "our local routes": ("route add local 127.64.0.0/10 dev lo", "route add local 127.128.0.0/9 dev lo"),
    "a wider loopback": ("addr add 127.0.0.1/9 dev lo",),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_not_in_the_way_is_left_alone(name: str, laptop: Laptop, warm: Warm) -> None:
    laptop.ip(*HARMLESS[name])
    start = laptop.snapshot()
    [info] = warm.vmnet(laptop, "create", "g", "--kind", "veth", "--json").json
    assert laptop.ping(info["address"])
    assert warm.vmnet(laptop, "plan").out == ""
    assert way(laptop, "127.9.9.9") == []
    warm.vmnet(laptop, "delete", "g")
    assert warm.vmnet(laptop, "restore").err == ""
    assert laptop.snapshot() == start


@pytest.mark.parametrize("use", ["socket", "hosts", "address"])
def test_what_a_guest_holds_is_refused_and_named(use: str, laptop: Laptop, warm: Warm) -> None:
    [info] = warm.vmnet(laptop, "create", "web", "--kind", "veth", "--json").json
    address = info["address"]
    warm.vmnet(laptop, "restore")
    plain = laptop.hosts_file.read_text()
    with laptop.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        if use == "socket":
            server.bind((address, 80))
            server.listen()
        elif use == "hosts":
            laptop.hosts_file.write_text(f"{plain}{address} somebody\n")
        else:
            laptop.ip(f"addr add {address}/32 dev lo")
        start = laptop.snapshot()
        for command in ("carve", "up"):
            refused = warm.vmnet(laptop, command, check=False)
            assert refused.code == CONFLICT, refused
            assert address in refused.err
            assert "web" in refused.err
        assert laptop.snapshot() == start
    laptop.hosts_file.write_text(plain)
    laptop.ip(f"addr del {address}/32 dev lo", check=False)
    assert warm.vmnet(laptop, "up").err == ""
    assert laptop.ping(address)


def test_a_connection_that_no_program_has_any_more_is_no_use(laptop: Laptop, warm: Warm) -> None:
    client, server = connected(socket.SOCK_STREAM)(laptop)
    peer, _ = server.accept()
    peer.close()
    client.close()
    server.close()
    assert "127.5.0.5" in laptop.run("ss", "-tan", "state", "time-wait")
    assert warm.vmnet(laptop, "carve").err == ""


def test_connections_to_guests_are_not_taken_for_somebody_elses_use(laptop: Laptop, warm: Warm) -> None:
    [info] = warm.vmnet(laptop, "create", "web", "--kind", "veth", "--json").json
    laptop.boot(info).serve()
    with laptop.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.connect((info["address"], 7))
        (laptop.folder / "run/found.json").unlink()
        warm.vmnet(laptop, "up")
        assert laptop.ping(info["address"])


# Settings


def test_reserved_ranges_and_what_is_beside_the_pool_stay_local(laptop: Laptop, warm: Warm) -> None:
    (laptop.folder / "config.toml").write_text(
        'pool = ["127.9.0.0/16", "127.20.0.0/15"]\nreserved = ["127.9.0.0/24", "127.20.3.4", "127.99.0.0/16"]\n'
    )
    warm.vmnet(laptop, "carve")
    local = ("127.1.0.2", "127.8.255.254", "127.9.0.77", "127.20.3.4", "127.22.0.1", "127.63.255.254", "127.99.0.1")
    fenced = ("127.9.1.0", "127.9.255.255", "127.20.0.1", "127.20.3.5", "127.21.255.255")
    for address in local:
        laptop.serve(7100, address)
        assert laptop.tcp(address, 7100) == b"hello"
    assert [address for address in fenced if way(laptop, address)] == []
    [first] = warm.vmnet(laptop, "create", "g", "--kind", "veth", "--json").json
    assert first["address"] == "127.9.1.2"
    for address, code in (("127.20.3.6", CONFLICT), ("127.9.0.2", CONFLICT), ("127.8.0.2", 2)):
        assert warm.vmnet(laptop, "create", "x", "--kind", "veth", "--address", address, check=False).code == code


@pytest.mark.parametrize(
    "settings", ['reserved = ["127.1.0.0/24"]', 'reserved = ["127.1.0.2"]', 'pool = ["127.9.0.0/16"]']
)
def test_a_guest_keeps_its_address_when_the_settings_take_it(settings: str, laptop: Laptop, warm: Warm) -> None:
    [info] = warm.vmnet(laptop, "create", "web", "--kind", "veth", "--json").json
    served = laptop.boot(info).serve()
    (laptop.folder / "config.toml").write_text(settings + "\n")
    warm.vmnet(laptop, "up")
    assert laptop.tcp(info["address"]) == b"hello"
    assert served.received == [b"hello"]
    assert warm.vmnet(laptop, "plan").out == ""
    warm.vmnet(laptop, "create", "other", "--kind", "veth")
    warm.vmnet(laptop, "delete", "web")
    warm.vmnet(laptop, "up")
    assert way(laptop, info["address"]) == [("local", "lo", None)]
