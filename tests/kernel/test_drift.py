"""Whatever others do to the host or to a guest, `plan` shows it, `list` does not call it up, and `up` heals it.

Each row of the tables is one such deed. After it, a guest that it was not about has its connection still, and after
`up` all guests answer the host and reach the internet.
"""

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest

from tests.kernel.alive import Guests
from tests.kernel.net import FORMS, Lab, Result, why_no_tap
from tests.kernel.warm import Warm

FOUND = 10
CONFLICT = 4
OTHER = "02:00:00:00:be:ef"
PASS_ALL = "bpf da bytecode '1,6 0 0 4294967295,'"
_TUNSETPERSIST, _TUNSETOWNER = 0x400454CB, 0x400454CC  # linux/if_tun.h

VETH = ("veth-native", "veth-mapped")
ETHER = (*VETH, "tap-mapped")
NATIVE = ("veth-native",)
OPENED = ("tap-mapped", "tun-native", "tun-mapped")
ALL = tuple(FORMS)


class Scene:
    """A laptop with a guest that something happens to, and a bystander that must not notice."""

    def __init__(self, warm: Warm, lab: Lab, form: str) -> None:
        self.warm, self.lab, self.laptop, self.form = warm, lab, lab.laptop, form
        self.alive = Guests(lab)
        self.vmnet("create", "bystander", "--kind", "veth")
        [self.info] = self.vmnet("create", "g", *FORMS[form], "--json").json
        self.talk = self.alive.talk(self.state_of("bystander"))
        self.guest = self.alive.boot(self.info)
        native = self.info["mode"] == "native"
        self.words = {
            **self.info,
            "here": self.info["gateway"].replace("127.", "247.", 1),
            "other_group": "32001" if native else "32002",
        }

    def vmnet(self, *args: str, check: bool = True) -> Result:
        return self.warm.vmnet(self.laptop, *args, check=check)

    def state_of(self, name: str) -> dict[str, Any]:
        [found] = [info for info in self.vmnet("list", "--json").json if info["name"] == name]
        return dict(found)

    def ip(self, *lines: str) -> None:
        """Run lines of ip on the host; {device}, {block} and the like are the guest's."""
        self.laptop.ip(*(line.format(**self.words) for line in lines))

    def inside(self, *lines: str) -> None:
        """Run lines of ip in the guest's namespace."""
        self.guest.ip(*(line.format(**self.words) for line in lines))

    def sees(self, state: str) -> None:
        """Assert that `plan` shows something to do and `list` has the guest in this state."""
        plan = self.vmnet("plan", check=False)
        assert plan.code == FOUND, plan
        assert plan.out
        assert self.state_of("g")["state"] == state

    def heals(self) -> None:
        """Assert that one `up` puts all of it right."""
        self.vmnet("up")
        plan = self.vmnet("plan", check=False)
        assert (plan.code, plan.out) == (0, "")
        for info in self.vmnet("list", "--json").json:
            assert info["state"] == "up", info
            assert self.alive.work(info), f"{info['name']} does not work"
        self.talk.goes_on()


Deed: TypeAlias = Callable[[Scene], object]


@dataclass(frozen=True)
class Drift:
    """What somebody does: the guests it can be done to (`forms`), and what `list` says of such a guest then."""

    name: str
    do: Deed
    forms: tuple[str, ...] = ALL
    state: str = "degraded"


def ip(*lines: str) -> Deed:
    return lambda scene: scene.ip(*lines)


def inside(*lines: str) -> Deed:
    return lambda scene: scene.inside(*lines)


def nft(script: str) -> Deed:
    return lambda scene: scene.laptop.run("nft", "-f", "-", stdin=script)


def tc(*lines: str) -> Deed:
    return lambda scene: scene.laptop.run("tc", "-batch", "-", stdin="\n".join(lines).format(**scene.words))


def sysctl(key: str, value: int) -> Deed:
    return lambda scene: scene.laptop.sysctl(key.format(**scene.words), value)


def sysctl_inside(key: str, value: int) -> Deed:
    return lambda scene: scene.guest.sysctl(key, value)


def holder(request: int, value: int) -> Deed:
    """Do what the program that has a tap or tun open can do to it, and end it."""

    def do(scene: Scene) -> None:
        fcntl.ioctl(scene.alive.wire(scene.info), request, value)
        scene.alive.stop("g")

    return do


def on_hosts(change: Callable[[str], str]) -> Deed:
    def do(scene: Scene) -> None:
        file = scene.laptop.hosts_file
        text = file.read_text()
        assert change(text) != text
        file.write_text(change(text))

    return do


HOST = [
    Drift("lo back at /8", ip("addr add 127.0.0.1/8 dev lo")),
    Drift("lo at /8 alone", ip("addr add 127.0.0.1/8 dev lo", "addr del 127.0.0.1/16 dev lo")),
    Drift("lo without its address", ip("addr del 127.0.0.1/16 dev lo")),
    Drift("lo down and up", ip("link set lo down", "link set lo up")),
    Drift("lo down", ip("link set lo down")),
    *(
        Drift(f"without the route {route}", ip(f"route del {route}"))
        for route in (
            "local 127.0.0.0/16 dev lo table local proto 127",
            "local 127.64.0.0/10 dev lo table local",
            "local 127.128.0.0/9 dev lo table local",
            "unreachable 127.0.0.0/10 table local",
            "unreachable 247.0.0.0/8",
        )
    ),
    Drift("a route too many", ip("route add unreachable 247.128.0.0/9 proto 127")),
    Drift("forwarding off", sysctl("ipv4/ip_forward", 0)),
    Drift("all rules flushed", nft("flush ruleset")),
    Drift("the table deleted", nft("delete table ip vmnet")),
    Drift("the table emptied", nft("flush table ip vmnet")),
    Drift("a rule added", nft("insert rule ip vmnet forw accept")),
    Drift("the same rule twice", nft("add rule ip vmnet late ip daddr 247.0.0.0/8 drop")),
    Drift("a chain emptied", nft("flush chain ip vmnet to_guest")),
    Drift("a chain added", nft("add chain ip vmnet mine")),
    Drift("a policy changed", nft("chain ip vmnet inp { policy drop; }")),
    Drift("the table asleep", nft("add table ip vmnet { flags dormant; }")),
    Drift("a name's address changed", on_hosts(lambda text: text.replace("127.1.0.6\t", "127.1.0.10\t")), state="up"),
    Drift("a name lost", on_hosts(lambda text: text.replace("127.1.0.6\tg.vmnet.internal\n", "")), state="up"),
    Drift("all names lost", on_hosts(lambda text: text.partition("# BEGIN")[0]), state="up"),
    Drift("the hosts file's end lost", on_hosts(lambda text: text.partition("# END")[0]), state="up"),
]
DEVICE = [
    Drift("the alias lost", ip("link set {device} alias ''")),
    Drift("another group", ip("link set {device} group 0")),
    Drift("the other mode's group", ip("link set {device} group {other_group}")),
    Drift("another MTU", ip("link set {device} mtu 1400")),
    Drift("another MAC", ip(f"link set {{device}} address {OTHER}"), ETHER),
    Drift("multicast on", ip("link set {device} multicast on")),
    *(
        Drift(f"{key} {value}", sysctl(f"ipv4/conf/{{device}}/{key}", value))
        for key, value in (("route_localnet", 1), ("accept_local", 1), ("forwarding", 0))
    ),
    Drift("IPv6 on", sysctl("ipv6/conf/{device}/disable_ipv6", 0)),
    Drift("the address lost", ip("addr del {here}/30 dev {device}")),
    Drift("an address too many", ip("addr add 10.66.0.1/24 dev {device}")),
    Drift("another prefix", ip("addr del {here}/30 dev {device}", "addr add {here}/24 dev {device}")),
    Drift("the route lost", ip("route del table local {block} dev {device}")),
    Drift("another source", ip("route change table local {block} dev {device} proto 127 scope link src 192.168.77.2")),
    Drift("a route too many", ip("route add 10.67.0.0/24 dev {device} proto 127")),
    Drift("the neighbour lost", ip("neigh del {guest_address} dev {device}"), ETHER),
    Drift("another neighbour", ip(f"neigh replace {{guest_address}} lladdr {OTHER} dev {{device}}"), ETHER),
    Drift("a learnt one", ip(f"neigh replace {{guest_address}} lladdr {OTHER} dev {{device}} nud stale"), ETHER),
    Drift("no way in", tc("filter del dev {device} ingress")),
    Drift("no way out", tc("filter del dev {device} egress")),
    Drift("no filters", tc("qdisc del dev {device} clsact")),
    Drift("another program", tc(f"filter replace dev {{device}} ingress pref 1 protocol all handle 1 {PASS_ALL}")),
    Drift("a second program", tc(f"filter add dev {{device}} egress pref 1 protocol all handle 2 {PASS_ALL}")),
    Drift("a program for IPv4 alone", tc(
        "filter del dev {device} ingress", f"filter add dev {{device}} ingress pref 1 protocol ip handle 1 {PASS_ALL}",
    )),
    Drift("down", ip("link set {device} down")),
    Drift("down and up", ip("link set {device} down", "link set {device} up")),
    Drift("renamed", ip("link set {device} down", "link set {device} name mine", "link set mine up")),
    Drift("deleted", ip("link del {device}"), state="down"),
    Drift("not persistent, and closed", holder(_TUNSETPERSIST, 0), OPENED, "down"),
    Drift("another owner", holder(_TUNSETOWNER, 1234), OPENED),
]  # fmt: skip
INSIDE = [
    Drift("the address lost", inside("addr flush dev eth0")),
    Drift("eth0 down", inside("link set eth0 down")),
    Drift("eth0 down and up", inside("link set eth0 down", "link set eth0 up")),
    Drift("eth0 deleted", inside("link del eth0"), state="down"),
    Drift("eth0 renamed", inside("link set eth0 down", "link set eth0 name mine", "link set mine up")),
    Drift("another MAC", inside(f"link set eth0 address {OTHER}")),
    Drift("another MTU", inside("link set eth0 mtu 1400")),
    Drift("no default route", inside("route del default")),
    Drift("lo down", inside("link set lo down")),
    Drift("lo down and up", inside("link set lo down", "link set lo up"), NATIVE),
    Drift("lo back at /8", inside("addr add 127.0.0.1/8 dev lo"), NATIVE),
    Drift("no way to the pool", inside("route del table local 127.0.0.0/10 dev eth0"), NATIVE),
    Drift("no way to the gateway", inside("route del table local {gateway}/32 dev eth0"), NATIVE),
    Drift("no host part", inside("route del local 127.0.0.0/16 dev lo table local proto 127"), NATIVE),
    Drift("no far loopback", inside("route del local 127.64.0.0/10 dev lo table local"), NATIVE),
    Drift("the gateway's MAC lost", inside("neigh del {gateway} dev eth0"), NATIVE),
    Drift("lo without its address", inside("addr del 127.0.0.1/16 dev lo"), NATIVE),
    Drift("another gateway's MAC", inside(f"neigh replace {{gateway}} lladdr {OTHER} dev eth0 nud permanent"), NATIVE),
    Drift("route_localnet 0", sysctl_inside("ipv4/conf/eth0/route_localnet", 0), NATIVE),
]


def _cases(drifts: list[Drift], forms: tuple[str, ...]) -> list[Any]:
    """Return each drift with each guest it can be done to; one of these, in turn, is for every run."""
    cases = []
    for number, drift in enumerate(drifts):
        possible = [form for form in forms if form in drift.forms]
        for place, form in enumerate(possible):
            marks = () if place == number % len(possible) else pytest.mark.long
            cases.append(pytest.param(form, drift, id=f"{form}-{drift.name}", marks=marks))
    return cases


def _skip_unless_possible(form: str) -> None:
    if form in OPENED and (reason := why_no_tap()):
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("form", "drift"), [*_cases(HOST, ("veth-native",)), *_cases(DEVICE, ALL), *_cases(INSIDE, VETH)]
)
def test_drift_is_seen_and_healed(form: str, drift: Drift, warm: Warm, lab: Lab) -> None:
    _skip_unless_possible(form)
    scene = Scene(warm, lab, form)
    drift.do(scene)
    scene.sees(drift.state)
    if drift not in HOST:
        scene.talk.goes_on()
    scene.heals()


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("value", [0, 2])
def test_the_reverse_path_filter_of_a_device_is_anybodys(form: str, value: int, warm: Warm, lab: Lab) -> None:
    """Udev and systemd-sysctl write their own on each new device: it is no drift, and nothing depends on it."""
    _skip_unless_possible(form)
    scene = Scene(warm, lab, form)
    key = f"ipv4/conf/{scene.info['device']}/rp_filter"
    assert lab.laptop.sysctl(key) == "1"
    lab.laptop.sysctl(key, value)
    assert scene.state_of("g")["state"] == "up"
    plan = scene.vmnet("plan", check=False)
    assert (plan.code, plan.out) == (0, "")
    assert scene.alive.work(scene.info)
    # What else is healed on the device leaves it alone, too.
    lab.laptop.sysctl(key.replace("rp_filter", "forwarding"), 0)
    scene.heals()
    assert lab.laptop.sysctl(key) == str(value)


# What takes the device away leaves nothing for the others to be done to; one that has lost its alias and has another
# group as well is nobody's.
APART = ("renamed", "deleted", "not persistent, and closed", "eth0 deleted", "eth0 renamed", "the alias lost")


@pytest.mark.parametrize("form", ALL)
def test_all_drift_at_once_is_healed(form: str, warm: Warm, lab: Lab) -> None:
    _skip_unless_possible(form)
    scene = Scene(warm, lab, form)
    deeds = [drift for drift in (*INSIDE, *DEVICE) if form in drift.forms and drift.name not in APART]
    for drift in reversed([*deeds, *HOST]):
        try:
            drift.do(scene)
        except AssertionError:
            continue  # an earlier deed took away what this one is about
    scene.sees("degraded")
    scene.heals()


def test_a_lost_note_of_how_the_host_was_is_made_up(warm: Warm, lab: Lab) -> None:
    """Nothing shows it but `restore`, which has to guess then."""
    before = lab.laptop.snapshot()
    scene = Scene(warm, lab, "veth-native")
    (lab.laptop.folder / "run/found.json").unlink()
    scene.heals()
    scene.vmnet("delete", "--all")
    scene.vmnet("restore")
    after = lab.laptop.snapshot()
    # It was off before, and nothing is left that says so.
    forwarding = {key: after[key] for key in before if "forwarding" in key or "ip_forward" in key}
    assert {**after, **forwarding} == {**before, **forwarding}


@pytest.mark.parametrize("form", VETH)
def test_a_namespace_of_ours_that_is_deleted_is_made_again(form: str, warm: Warm, lab: Lab) -> None:
    scene = Scene(warm, lab, form)
    scene.laptop.run("ip", "netns", "del", "g")
    scene.sees("degraded")
    scene.talk.goes_on()
    scene.heals()


def _fails_alone(scene: Scene, name: str, words: str) -> None:
    """Assert that `up` heals all others, and says in words what is wrong with that one guest."""
    assert scene.state_of(name)["state"] in ("degraded", "down")
    scene.talk.goes_on()
    scene.laptop.ip("link set vmn-bystander mtu 1400", "link set vmn-bystander mtu 1400")
    assert scene.state_of("bystander")["state"] == "degraded"
    failed = scene.vmnet("up", check=False)
    assert failed.code in (1, CONFLICT)
    assert words in failed.err
    assert "hint: " in failed.err
    assert scene.state_of(name)["state"] in ("degraded", "down")
    assert scene.state_of("bystander")["state"] == "up"
    scene.talk.goes_on()


@pytest.mark.parametrize("form", VETH)
def test_a_namespace_that_is_not_the_guests_is_never_entered(form: str, warm: Warm, lab: Lab) -> None:
    scene = Scene(warm, lab, form)
    scene.laptop.run("ip", "netns", "del", "g")
    scene.laptop.run("ip", "netns", "add", "g")

    def shown() -> list[str]:
        looks = ("-d link", "addr", "route show table all", "neigh")
        return [scene.laptop.run("ip", "-n", "g", *look.split()) for look in looks]

    before = shown()
    _fails_alone(scene, "g", "another network namespace")
    assert shown() == before
    scene.vmnet("delete", "g")
    assert shown() == before


# Takes numbers of inodes until the freed one comes again, and puts that namespace in its place.
SAME_NUMBER = """
number=$(stat -Lc %i /run/netns/g); ip netns del g
for i in $(seq 300); do
  ip netns add x$i
  [ "$(stat -Lc %i /run/netns/x$i)" = "$number" ] || continue
  touch /run/netns/g; mount --bind /run/netns/x$i /run/netns/g; exit 0
done
exit 1
"""


@pytest.mark.parametrize("owned", [True, False], ids=["owned", "premade"])
def test_a_namespace_that_got_the_number_of_the_guests_is_not_the_guests(owned: bool, warm: Warm, lab: Lab) -> None:
    laptop = lab.laptop
    if not owned:
        laptop.run("ip", "netns", "add", "g")
    warm.vmnet(laptop, "create", "g", "--netns", "g")
    if laptop.execute("sh", "-c", SAME_NUMBER).code:
        pytest.skip("the kernel has not given the number of the namespace again")
    shown = laptop.run("ip", "-n", "g", "-d", "addr")
    assert warm.vmnet(laptop, "list", "--json").json[0]["state"] == "down"
    failed = warm.vmnet(laptop, "up", check=False)
    assert failed.code == CONFLICT
    assert "another network namespace" in failed.err
    warm.vmnet(laptop, "delete", "g")
    assert laptop.run("ip", "-n", "g", "-d", "addr") == shown


def test_a_namespace_of_others_that_is_gone_is_missed(warm: Warm, lab: Lab) -> None:
    scene = Scene(warm, lab, "veth-native")
    scene.laptop.run("ip", "netns", "add", "pre")
    scene.vmnet("create", "kept", "--netns", "pre")
    scene.laptop.run("ip", "netns", "del", "pre")
    _fails_alone(scene, "kept", "is gone")
    assert not scene.laptop.path("/run/netns/pre").exists()
    scene.laptop.run("ip", "netns", "add", "pre")
    _fails_alone(scene, "kept", "another network namespace")
    scene.vmnet("create", "kept", "--netns", "pre")
    scene.heals()


def test_a_device_that_others_made_their_own_is_left_alone(warm: Warm, lab: Lab) -> None:
    scene = Scene(warm, lab, "veth-native")
    scene.ip("link set {device} alias mine")
    shown = scene.laptop.run("ip", "-d", "addr", "show", "dev", "vmn-g")
    _fails_alone(scene, "g", "not ours")
    assert scene.laptop.run("ip", "-d", "addr", "show", "dev", "vmn-g") == shown
    scene.ip("link set {device} alias ''")
    scene.heals()


@pytest.mark.parametrize("form", OPENED)
@pytest.mark.parametrize(("request_", "value"), [(_TUNSETPERSIST, 0), (_TUNSETOWNER, 1234)], ids=["persist", "owner"])
def test_what_its_holder_did_to_a_tap_is_healed_when_that_ends(
    form: str, request_: int, value: int, warm: Warm, lab: Lab
) -> None:
    _skip_unless_possible(form)
    scene = Scene(warm, lab, form)
    held = os.dup(scene.alive.wire(scene.info))
    try:
        fcntl.ioctl(held, request_, value)
        scene.sees("degraded")
        _fails_alone(scene, "g", "another program")
        assert scene.laptop.ping(scene.guest.address)
    finally:
        os.close(held)
        scene.alive.stop("g")
    scene.heals()
