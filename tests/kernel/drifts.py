"""What others do to the host or to a guest: each deed as one row, for `up` and for the watcher to put right."""

import fcntl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from tests.kernel.alive import Guests
from tests.kernel.net import FORMS, Lab, Result
from tests.kernel.warm import Warm

FOUND = 10
OTHER = "02:00:00:00:be:ef"
PASS_ALL = "bpf da bytecode '1,6 0 0 4294967295,'"
TUNSETPERSIST, TUNSETOWNER = 0x400454CB, 0x400454CC  # linux/if_tun.h

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

    def do_all(self) -> None:
        """Do all to the guest and the host that can be done at once."""
        deeds = [drift for drift in (*INSIDE, *DEVICE) if self.form in drift.forms and drift.name not in APART]
        for drift in reversed([*deeds, *HOST]):
            with suppress(AssertionError):  # an earlier deed took away what this one is about
                drift.do(self)

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
    Drift("a port of a bridge", ip("link add theirs0 type bridge", "link set {device} master theirs0"), ETHER),
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
    Drift("its own route lost", ip("route del table local {address}/32 dev {device}")),
    Drift("the shadow's route lost", ip("route del table local {shadow}/32 dev {device}")),
    Drift("another source", ip("route change table local {block} dev {device} proto 127 scope link src 192.168.77.2")),
    Drift("a route too many", ip("route add 10.67.0.0/24 dev {device} proto 127")),
    Drift("the neighbour lost", ip("neigh del {guest_address} dev {device}"), VETH),
    Drift("another neighbour", ip(f"neigh replace {{guest_address}} lladdr {OTHER} dev {{device}}"), ETHER),
    Drift("a learnt one", ip(f"neigh replace {{guest_address}} lladdr {OTHER} dev {{device}} nud stale"), VETH),
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
    Drift("not persistent, and closed", holder(TUNSETPERSIST, 0), OPENED, "down"),
    Drift("another owner", holder(TUNSETOWNER, 1234), OPENED),
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


# What takes the device away leaves nothing for the others to be done to; one that has lost its alias and has another
# group as well is nobody's.
APART = ("renamed", "deleted", "not persistent, and closed", "eth0 deleted", "eth0 renamed", "the alias lost")
