"""restore leaves no trace: the host, and every namespace that was there before, are as they were found.

What is compared is all that the laptop's network shows: links, addresses, routes, rules, neighbours, sysctls, nftables,
tc, the names of namespaces and the hosts file. What others did meanwhile must still be there.
"""

import json
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.kernel.net import FORMS, Laptop, why_no_tap
from tests.kernel.warm import Warm

SIGKILLED = 137
LOOPBACK = ("127.0.0.1", "127.0.0.53", "127.0.1.1", "127.200.0.1")
NATIVE, MAPPED = "--native", "--mapped"
_NETNS_ID = re.compile(r" \(id: \d+\)")
MASQUERADE = "table ip others { chain post { type nat hook postrouting priority 100; oifname wlan0 masquerade; }; }"


pytestmark = pytest.mark.usefixtures("settled")


def inside(laptop: Laptop, name: str) -> dict[str, str]:
    """Return all that a namespace shows that could be changed in it."""
    shown = ["-d link", "addr", "route show table all", "rule", "neigh", "-6 route show table all", "-6 rule"]
    found = {what: laptop.run("ip", "-n", name, *what.split()) for what in shown}
    found["sysctl"] = laptop.run("ip", "netns", "exec", name, "grep", "-rs", "", "/proc/sys/net/ipv4/conf/all")
    # A device that was up once has another queueing discipline for ever.
    return {what: text.replace("qdisc noop ", "qdisc noqueue ") for what, text in found.items()}


# Namespaces that were there before

PREMADE: dict[str, tuple[str, ...]] = {
    "down and bare": (),
    "down with 127.0.0.1/8": ("addr add 127.0.0.1/8 dev lo", "addr add 10.9.9.9/32 dev lo"),
    "down with another": ("addr add 127.0.0.2/8 dev lo", "addr add 127.0.5.5/32 dev lo"),
    "up": ("link set lo up",),
    "many addresses": ("link set lo up", "addr add 127.0.0.2/8 dev lo", "addr add 127.0.5.5/32 dev lo"),
    "shrunk by hand": ("link set lo up", "addr add 127.0.0.1/16 dev lo", "addr del 127.0.0.1/8 dev lo"),
    "with an alias": ("link set lo up alias theirs",),
}
ENDS = ("delete", "restore", "down")
CASES = [(lo, NATIVE, ENDS[number % 3]) for number, lo in enumerate(PREMADE)]
CASES += [("down and bare", MAPPED, "restore"), ("up", MAPPED, "delete"), ("down and bare", NATIVE, "restore")]


@pytest.mark.parametrize(("lo", "mode", "end"), CASES)
def test_a_namespace_that_was_there_is_as_before(lo: str, mode: str, end: str, laptop: Laptop, warm: Warm) -> None:
    laptop.run("ip", "netns", "add", "pre")
    laptop.run("ip", "-n", "pre", "-batch", "-", stdin="\n".join(PREMADE[lo]))
    before = inside(laptop, "pre")
    [info] = warm.vmnet(laptop, "create", "g", "--netns", "pre", mode, "--json").json
    assert laptop.ping(info["address"])
    assert warm.vmnet(laptop, "plan").out == ""
    warm.vmnet(laptop, end, *(["g"] if end != "restore" else []))
    assert inside(laptop, "pre") == before


# The host

SYSCTLS: dict[str, dict[str, int]] = {
    "as the kernel has them": {},
    "forwarding": {"ip_forward": 1},
    "forwarding, one device not": {"ip_forward": 1, "conf/wlan0/forwarding": 0},
    "not forwarding, one device does": {"conf/wlan0/forwarding": 1},
    "not forwarding, new devices do": {"conf/default/forwarding": 1},
    "no redirects": {"conf/all/accept_redirects": 0},
    "no redirects by default": {"conf/default/accept_redirects": 0, "conf/wlan0/accept_redirects": 0},
    "strict": {"conf/all/rp_filter": 1, "conf/default/rp_filter": 2, "conf/all/promote_secondaries": 1},
}


@pytest.mark.parametrize("name", SYSCTLS)
def test_sysctls_are_as_they_were_found(name: str, laptop: Laptop, warm: Warm) -> None:
    for key, value in SYSCTLS[name].items():
        laptop.sysctl(f"ipv4/{key}", value)
    start = laptop.snapshot()
    warm.vmnet(laptop, "carve")
    assert laptop.sysctl("ipv4/ip_forward") == "1"
    warm.vmnet(laptop, "restore")
    assert changes(start, laptop.snapshot()) == {}


def changes(before: dict[str, str], after: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return what differs between two looks."""
    # The number that the kernel gives to a namespace once it has a device's far end is for ever.
    both = {key: [_NETNS_ID.sub("", look.get(key, "")) for look in (before, after)] for key in {*before, *after}}
    return {key: (one, other) for key, (one, other) in both.items() if one != other}


def make_all_kinds(laptop: Laptop, warm: Warm) -> None:
    for number, options in enumerate(FORMS.values()):
        if "veth" in options or not why_no_tap():
            warm.vmnet(laptop, "create", f"g{number}", *options)
    for name, mode in (("pre-native", NATIVE), ("pre-mapped", MAPPED)):
        laptop.run("ip", "netns", "add", name)
        warm.vmnet(laptop, "create", name, "--netns", name, mode)


def test_guests_of_all_kinds_leave_no_trace(laptop: Laptop, warm: Warm) -> None:
    laptop.ip("addr add 127.0.0.2/8 dev lo", "neigh add 192.168.77.9 lladdr 02:00:00:00:00:09 dev wlan0 nud permanent")
    laptop.run("nft", "-f", "-", stdin=MASQUERADE)
    laptop.run("tc", "qdisc", "add", "dev", "wlan0", "clsact")
    laptop.sysctl("ipv4/ip_forward", 1)
    start = laptop.snapshot()
    make_all_kinds(laptop, warm)
    warm.vmnet(laptop, "restore")
    for name in ("pre-native", "pre-mapped"):
        laptop.run("ip", "netns", "del", name)
    assert changes(start, laptop.snapshot()) == {}
    assert {one["state"] for one in warm.vmnet(laptop, "list", "--json").json} == {"down"}
    for _ in range(2):
        again = warm.vmnet(laptop, "restore")
        assert (again.out, again.err) == ("", "")
    assert changes(start, laptop.snapshot()) == {}


def test_restore_after_a_flush_of_all_rules(laptop: Laptop, warm: Warm) -> None:
    start = laptop.snapshot()
    warm.vmnet(laptop, "create", "g", "--kind", "veth")
    laptop.run("nft", "flush", "ruleset")
    warm.vmnet(laptop, "restore")
    assert changes(start, laptop.snapshot()) == {}


def test_restore_with_lo_taken_down_and_up(laptop: Laptop, warm: Warm) -> None:
    laptop.ip("addr add 127.0.0.2/8 dev lo", "addr add 127.0.5.5/32 dev lo")
    start = laptop.snapshot()
    for lines in (["link set lo down", "link set lo up"], ["link set lo down"]):
        warm.vmnet(laptop, "create", "g", "--kind", "veth")
        laptop.ip(*lines)
        warm.vmnet(laptop, "restore")
        laptop.ip("link set lo up")
        assert changes(start, laptop.snapshot()) == {}


# Records and notes that are lost

Spoil = Callable[[Path], object]


def make_a_folder(db: Path) -> None:
    db.unlink()
    db.mkdir()


SPOILS: dict[str, Spoil] = {
    "garbage": lambda db: db.write_bytes(b"this is no database" * 99),
    "cut short": lambda db: db.write_bytes(db.read_bytes()[:5000]),
    "empty": lambda db: db.write_bytes(b""),
    "missing": lambda db: db.unlink(),
    "a folder": make_a_folder,
    "of a newer vmnet": lambda db: db.write_bytes(db.read_bytes()[:60] + b"\0\0\0\x63" + db.read_bytes()[64:]),
    "a page torn": lambda db: db.write_bytes(db.read_bytes()[:4096] + bytes(4096) + db.read_bytes()[8192:]),
}


@pytest.mark.parametrize("name", SPOILS)
def test_restore_needs_no_records(name: str, laptop: Laptop, warm: Warm) -> None:
    laptop.run("ip", "netns", "add", "pre")
    start, inside_start = laptop.snapshot(), inside(laptop, "pre")
    warm.vmnet(laptop, "create", "g", "--kind", "veth")
    warm.vmnet(laptop, "create", "h", "--netns", "pre", NATIVE)
    if not why_no_tap():
        warm.vmnet(laptop, "create", "t", "u")
    SPOILS[name](laptop.folder / "state/vmnet.db")
    warm.vmnet(laptop, "restore")
    assert changes(start, laptop.snapshot()) == {}
    assert changes(inside_start, inside(laptop, "pre")) == {}


@pytest.mark.parametrize("then", ["restore", "up"])
@pytest.mark.parametrize("forwarding", [0, 1])
def test_with_the_run_folder_lost_restore_says_what_it_cannot_know(
    then: str, forwarding: int, laptop: Laptop, warm: Warm
) -> None:
    laptop.sysctl("ipv4/ip_forward", forwarding)
    laptop.ip("addr add 127.0.0.2/8 dev lo", "addr add 10.9.9.9/32 dev lo")
    start = laptop.snapshot()
    warm.vmnet(laptop, "create", "g", "--kind", "veth")
    shutil.rmtree(laptop.folder / "run")
    said = warm.vmnet(laptop, then).err
    assert "how the host was" in said
    if then == "up":
        assert warm.vmnet(laptop, "plan").out == ""
        assert warm.vmnet(laptop, "restore").err == ""
    assert changes(start, laptop.snapshot()) == {}
    assert warm.vmnet(laptop, "restore").err == ""


def test_a_host_shrunk_by_hand_is_none_of_restores_business(laptop: Laptop, warm: Warm) -> None:
    laptop.ip("addr add 127.0.0.1/16 dev lo", "addr del 127.0.0.1/8 dev lo")
    start = laptop.snapshot()
    assert warm.vmnet(laptop, "restore").err == ""
    warm.vmnet(laptop, "carve")
    for _ in range(2):
        warm.vmnet(laptop, "restore")
        assert changes(start, laptop.snapshot()) == {}


# What others do meanwhile


def test_what_others_changed_is_left_alone(laptop: Laptop, warm: Warm) -> None:
    laptop.ip("addr add 127.0.0.2/8 dev lo", "addr add 10.9.9.9/32 dev lo")
    warm.vmnet(laptop, "create", "g", "--kind", "veth")
    laptop.ip(
        "addr del 10.9.9.9/32 dev lo",
        "addr add 10.7.7.7/32 dev lo",
        "addr add 127.0.0.7/8 dev lo",
        "route add 10.7.0.0/16 via 192.168.77.1 src 10.7.7.7",
        "route add unreachable 247.9.0.0/16",
        "rule add pref 77 lookup main",
        "link set lo alias theirs",
    )
    laptop.run("nft", "-f", "-", stdin="table ip theirs { chain c { }; }; table inet vmnet { }")
    with laptop.hosts_file.open("a") as hosts:
        hosts.write("10.7.7.7 theirs")
    warm.vmnet(laptop, "restore")
    lo = [one["local"] for one in json.loads(laptop.run("ip", "-4", "-j", "addr", "show", "lo"))[0]["addr_info"]]
    assert lo == ["127.0.0.1", "10.7.7.7", "127.0.0.2", "127.0.0.7"]
    routes = laptop.run("ip", "route")
    assert "src 10.7.7.7" in routes
    assert "unreachable 247.9.0.0/16" in routes
    assert "77:\tfrom all lookup main" in laptop.run("ip", "rule")
    assert "alias theirs" in laptop.run("ip", "link", "show", "lo")
    assert laptop.run("nft", "list", "tables").split("\n")[:2] == ["table ip theirs", "table inet vmnet"]
    assert laptop.hosts_file.read_text() == "127.0.0.1 localhost\n127.0.1.1 laptop\n10.7.7.7 theirs"


def test_a_lo_that_lost_all_is_given_its_first_address(laptop: Laptop, warm: Warm) -> None:
    warm.vmnet(laptop, "carve")
    laptop.ip("addr flush dev lo")
    warm.vmnet(laptop, "restore")
    laptop.serve(7100, "127.0.0.1")
    assert laptop.tcp("127.0.0.1", 7100) == b"hello"


OTHERS = {
    "nft": ("nft", MASQUERADE),
    "nft inet": ("nft", MASQUERADE.replace("ip others", "inet others")),
    "nft snat": ("nft", MASQUERADE.replace("masquerade", "snat to 192.168.77.2")),
    "by a mark and more": ("nft", MASQUERADE.replace("oifname wlan0", "meta mark 0x2000 oifname wlan0")),
    "iptables-nft": ("iptables-nft", "*nat\n-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\nCOMMIT\n"),
    "iptables-legacy": ("iptables-legacy", "*nat\n-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE\nCOMMIT\n"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_forwarding_that_somebody_else_needs_stays_and_is_said(name: str, laptop: Laptop, warm: Warm) -> None:
    warm.vmnet(laptop, "carve")
    program, rules = OTHERS[name]
    load(laptop, program, rules)
    assert "ip_forward" in warm.vmnet(laptop, "restore").err
    assert laptop.sysctl("ipv4/ip_forward") == "1"
    assert warm.vmnet(laptop, "restore").err == ""


def load(laptop: Laptop, program: str, rules: str) -> None:
    """Load rules with nft or one of iptables' programs."""
    if program != "nft" and shutil.which(f"{program}-restore") is None:
        pytest.skip(f"{program} is missing")
    laptop.run(*(["nft", "-f", "-"] if program == "nft" else [f"{program}-restore"]), stdin=rules)


TAILSCALE = "-m mark --mark 0x40000/0xff0000"
UNTOUCHED = {
    "nft": ("nft", "table inet others { chain f { type filter hook forward priority 0; policy drop; }; }"),
    "by a mark alone": ("nft", MASQUERADE.replace("oifname wlan0", "meta mark & 0xff0000 == 0x40000")),
    "Tailscale": ("iptables-nft", f"*nat\n-A POSTROUTING {TAILSCALE} -j MASQUERADE\nCOMMIT\n"),
    "Tailscale, older iptables": ("iptables-legacy", f"*nat\n-A POSTROUTING {TAILSCALE} -j MASQUERADE\nCOMMIT\n"),
    "iptables-nft": ("iptables-nft", "*nat\n-A PREROUTING -p tcp --dport 80 -j DNAT --to 192.168.77.2:81\nCOMMIT\n"),
    "iptables-legacy": ("iptables-legacy", "*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n"),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_rules_that_translate_no_source_keep_no_forwarding(name: str, laptop: Laptop, warm: Warm) -> None:
    load(laptop, *UNTOUCHED[name])
    start = laptop.snapshot()
    warm.vmnet(laptop, "carve")
    assert warm.vmnet(laptop, "restore").err == ""
    assert changes(start, laptop.snapshot()) == {}


# Killed


@pytest.mark.parametrize("command", ["carve", "restore"])
def test_restore_after_a_command_that_was_killed_anywhere(
    command: str, laptop: Laptop, warm: Warm, pytestconfig: pytest.Config
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is missing")
    laptop.ip("addr add 127.0.0.2/8 dev lo", "addr add 127.0.5.5/32 dev lo")
    laptop.sysctl("ipv4/conf/wlan0/forwarding", 1)
    laptop.sysctl("ipv4/conf/all/accept_redirects", 0)
    start = laptop.snapshot()
    for address in LOOPBACK:
        laptop.serve(address=address)
    for call in ("sendto", "write"):
        every = call == "write" or pytestconfig.getoption("--long")
        for number in count(1, 1 if every else 3):
            if command == "restore":
                warm.vmnet(laptop, "carve")
            kill = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]
            killed = warm.vmnet(laptop, command, check=False, strace=kill).code == SIGKILLED
            for address in LOOPBACK:
                assert laptop.udp(address) == b"hello", f"killed at {call} {number}"
            warm.vmnet(laptop, "restore")
            assert changes(start, laptop.snapshot()) == {}, f"killed at {call} {number}"
            if not killed:
                break
        assert number > 1
