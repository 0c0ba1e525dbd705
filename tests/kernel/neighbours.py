"""Other software on the laptop: what each sets up, with what it has of its own, and what is asked to see who is hurt.

    scene = Scene(warm, lab)
    DOCKER.start(scene)                  # its rules, its bridge and a container: scene.box
    alone = scene.asked()                # the names of those of QUESTIONS that have an answer
    scene.create()                       # two guests
    scene.assert_guests_work()

`NEIGHBOURS` is the table; the rules in it are those that the programs themselves make, or the programs are run.
"""

import errno
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path
from typing import TypeAlias

import vmnet
from tests.kernel.dns import NOERROR, Answer, ask
from tests.kernel.machine import ECHO_PORT, QUIET, Machine, wait_until
from tests.kernel.net import FORMS, Guest, Lab, Result
from tests.kernel.warm import Warm
from tests.system.roots import Rooted

HOST = "192.168.77.2"
ALLOWED, CLOSED, PUBLISHED = 22, 2222, 8080
"""Ports of the laptop: firewalls of the table allow the first, the last is a container's."""

HOSTS = frozenset({"host to internet", "LAN to allowed port"})

Question: TypeAlias = tuple[Machine, str, int]

PATIENCE = 30.0
"""Seconds until a program that is not ready never will be."""


def reached(asked: Mapping[str, Question], expected: Iterable[str] = ()) -> set[str]:
    """Connect to many at once, by TCP; return the names of those that are connected.

    Those `expected` are waited for. What has no answer until they have one, and then ten times as long as the last that
    came took, has none.
    """
    found: set[str] = set()
    patient = set(expected)
    with selectors.DefaultSelector() as poll, ExitStack() as sockets:
        for name, (machine, address, port) in asked.items():
            client = sockets.enter_context(machine.socket(socket.AF_INET, socket.SOCK_STREAM))
            client.setblocking(False)
            if client.connect_ex((address, port)) in (0, errno.EINPROGRESS):
                poll.register(client, selectors.EVENT_WRITE, name)

        begin = time.monotonic()
        took = QUIET / 10

        def all_told() -> bool:
            nonlocal took
            for key, _ in poll.select(0.01):
                poll.unregister(key.fileobj)
                if key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:  # type: ignore[union-attr]
                    found.add(key.data)
                    took = max(took, time.monotonic() - begin)
            return not poll.get_map() or (patient <= found and time.monotonic() - begin > 10 * took)

        wait_until(all_told)
    return found


def tunnel(lab: Lab, mtu: int = 1420, subnet: str = "10.66.0.0/24", device: str = "tun0") -> Machine:
    """Give the laptop a tunnel, .2, and return its far end, .1, which leads to the internet; no route leads into it."""
    network = IPv4Network(subnet)
    far = lab.machine("vpn", str(network[1]))
    near = lab.laptop.open_device(device, "tun")
    lab.wire_up(near, far.open_device("tun0", "tun"))
    lab.wire(far, "inet0", lab.internet, "vpn0")
    far.sysctl("ipv4/ip_forward", 1)
    far.ip(
        f"link set tun0 mtu {mtu} up", f"addr add {network[1]}/{network.prefixlen} dev tun0",
        "addr add 203.0.113.129/30 dev inet0", "route add default via 203.0.113.130",
    )  # fmt: skip
    lab.internet.ip("addr add 203.0.113.130/30 dev vpn0", f"route add {network} via 203.0.113.129 src 198.51.100.2")
    lab.laptop.ip(f"link set {device} mtu {mtu} up", f"addr add {network[2]}/{network.prefixlen} dev {device}")
    return far


class Scene:
    """A laptop between a LAN and an office, a neighbour's container on it perhaps, and two guests after `create`."""

    def __init__(self, warm: Warm, lab: Lab) -> None:
        self.warm, self.lab, self.laptop = warm, lab, lab.laptop
        self.guests: list[Guest] = []
        self.box: Machine | None = None
        self.debian: Rooted | None = None
        self.saved = ""
        self.office = lab.plug("eth1", "10.50.0.0/24", default=False)
        self.office.ip("route add 192.168.77.0/24 via 10.50.0.2")
        lab.lan.ip(f"route add 10.50.0.0/24 via {HOST}")
        for machine in (lab.internet, lab.lan, self.office):
            machine.serve()
        for port in (ALLOWED, CLOSED):
            self.laptop.serve(port)

    def put_box(self, bridge: str, subnet: str) -> None:
        """Put a bridge with a container behind it, as container engines do; the LAN knows the way there."""
        network = IPv4Network(subnet)
        self.box = self.lab.machine("box", str(network[2]))
        self.lab.wire(self.laptop, "veth0box", self.box, "eth0")
        self.laptop.ip(
            f"link add {bridge} type bridge", f"link set veth0box master {bridge}", f"link set {bridge} up",
            f"addr add {network[1]}/{network.prefixlen} dev {bridge}",
        )  # fmt: skip
        self.box.ip(f"addr add {network[2]}/{network.prefixlen} dev eth0", f"route add default via {network[1]}")
        self.adopt_box(self.box)

    def adopt_box(self, box: Machine) -> None:
        """Take a machine for the neighbour's container."""
        self.box = box
        for port in (ECHO_PORT, 80):
            box.serve(port)
        self.lab.lan.ip(f"route add {box.address} via {HOST}")

    def rules(self, program: str, text: str) -> None:
        """Load rules with a program of the restore family, and keep those there are."""
        self.laptop.run(f"{program}-restore", "-n", "-w", stdin=text)

    def nft(self, text: str) -> None:
        """Load rules of nftables."""
        self.laptop.run("nft", "-f", "-", stdin=text)

    def debian_run(self, *argv: str, check: bool = True) -> str:
        """Run a program of the Debian system; return what it printed."""
        assert self.debian
        return self.debian.run(*argv, check=check)

    def daemon(self, *argv: str, until: Callable[[], bool]) -> None:
        """Start a program of the Debian system that stays, and wait until it is ready."""
        assert self.debian
        name = argv[0].rpartition("/")[2]
        self.debian.start("sh", "-c", f'exec "$@" >/tmp/{name}.log 2>&1', "sh", *argv)
        log = self.debian.path(f"/tmp/{name}.log")
        assert wait_until(until, PATIENCE), log.read_text()[-2000:]

    def bus(self) -> None:
        """Start the system's message bus."""
        self.debian_run("mkdir", "-p", "/run/dbus")
        socket_there = self.laptop.path("/run/dbus/system_bus_socket").exists
        self.daemon("dbus-daemon", "--system", "--nofork", "--nopidfile", until=socket_there)

    def etc(self, path: str, text: str) -> None:
        """Write a file of the Debian system's /etc."""
        assert self.debian
        file = self.debian.path(f"/etc/{path}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def create(self) -> None:
        """Create one guest of each mode."""
        for mode in ("native", "mapped"):
            [info] = self.vmnet("create", mode, *FORMS[f"veth-{mode}"], "--json").json
            self.guests.append(self.laptop.boot(info))
        for guest in self.guests:
            guest.serve()

    def vmnet(self, *args: str, check: bool = True) -> Result:
        """Run the command line."""
        return self.warm.vmnet(self.laptop, *args, check=check)

    def asked(self, expected: Iterable[str] = ()) -> set[str]:
        """Return who reaches what, of all that does not need vmnet; see `reached`."""
        lan, laptop = self.lab.lan, self.laptop
        questions: dict[str, Question] = {
            "host to internet": (laptop, self.lab.internet.address, ECHO_PORT),
            "LAN to allowed port": (lan, HOST, ALLOWED),
            "LAN to closed port": (lan, HOST, CLOSED),
            "LAN to office": (lan, self.office.address, ECHO_PORT),
        }
        if self.box:
            questions |= {
                "container to internet": (self.box, self.lab.internet.address, ECHO_PORT),
                "host to container": (laptop, self.box.address, ECHO_PORT),
                "LAN to published port": (lan, HOST, PUBLISHED),
                "LAN to container": (lan, self.box.address, ECHO_PORT),
            }
        return reached(questions, expected)

    def assert_guests_work(self) -> None:
        """Ask from and to guests, in all directions, new connections each time."""
        one, other = self.guests
        asked: dict[str, Question] = {"one to other": (one, one.knows(other), ECHO_PORT)}
        asked["other to one"] = (other, other.knows(one), ECHO_PORT)
        for guest in self.guests:
            asked |= {
                f"host to {guest.mode}": (self.laptop, guest.address, ECHO_PORT),
                f"{guest.mode} to internet": (guest, self.lab.internet.address, ECHO_PORT),
                f"{guest.mode} to LAN": (guest, self.lab.lan.address, ECHO_PORT),
                f"{guest.mode} to office": (guest, self.office.address, ECHO_PORT),
                f"{guest.mode} to names": (guest, guest.guest_gateway, 53),
            }
        assert set(asked) - reached(asked, asked) == set()
        for guest in self.guests:
            assert guest.udp(self.lab.internet.address) == b"hello"
            assert wait_until(partial(self._knows_itself, guest), 10)  # dnsmasq reads names when it is told to
            assert guest.ping(self.lab.internet.address)
            assert self.laptop.ping(guest.address)

    def _knows_itself(self, guest: Guest) -> bool:
        found = ask(guest, guest.guest_gateway, f"{guest.name}.vmnet.internal")
        return found == Answer(NOERROR, (guest.guest_address,))

    def assert_guests_are_closed(self, neighbour: "Neighbour") -> None:
        """Ask what nobody may: LAN and container to guests, guests to the host, and to a container that is closed."""
        asked: dict[str, Question] = {}
        for guest in self.guests:
            self.lab.lan.ip(f"route replace {guest.shadow} via {HOST}")
            asked |= {
                f"LAN to {guest.mode}": (self.lab.lan, guest.shadow, ECHO_PORT),
                f"{guest.mode} to host": (guest, HOST, ALLOWED),
            }
            if self.box:
                asked[f"container to {guest.mode}"] = (self.box, guest.shadow, ECHO_PORT)
                if "LAN to container" in neighbour.closes:
                    asked[f"{guest.mode} to container"] = (guest, self.box.address, ECHO_PORT)
        assert reached(asked) == set()
        if "LAN to published port" in neighbour.opens:
            published = {guest.mode: (guest, HOST, PUBLISHED) for guest in self.guests}
            assert reached(published, published) == set(published)

    def theirs(self) -> dict[str, str]:
        """Return what is in the firewalls of others and in the routing rules, without counters."""
        commands = [f"{program}-save" for program in ("iptables-nft", "iptables-legacy") if self.has(program)]
        shown = {command: self.laptop.run(command) for command in commands}
        for command, text in shown.items():
            lines = [line.partition(" [")[0] for line in text.splitlines() if not line.startswith("#")]
            shown[command] = "\n".join(lines)
        return {**shown, "rules": self.laptop.run("ip", "rule"), "links": str(sorted(self.laptop.links()))}

    def has(self, program: str) -> bool:
        """Tell whether the laptop uses this iptables: to ask the older one is to begin to."""
        if program == "iptables-nft":
            return True
        return "filter" in self.laptop.run("cat", "/proc/net/ip_tables_names", check=False)


Deed: TypeAlias = Callable[[Scene], object]


@dataclass(frozen=True)
class Neighbour:
    """Other software: how it begins, and what it does again later (`again`).

    `needs` is what guests need when it begins, and begins anew: "nothing", "watch" (or `vmnet up`), "hooks", whose
    files are there then, or "you", who has done it. `opens` and `closes` are names of questions that have an answer,
    or none, with it alone. `program` is the iptables that it uses, `debian` says that it comes from a Debian system,
    and `row` is what the manual calls it.
    """

    name: str
    start: Deed
    again: Deed | None = None
    needs: str = "nothing"
    opens: frozenset[str] = HOSTS
    closes: frozenset[str] = frozenset()
    program: str = "iptables-nft"
    debian: bool = False
    row: str = ""


# Docker

VM = HOSTS | {"container to internet", "host to container"}
CONTAINER = VM | {"LAN to published port"}


def docker(rules: str, program: str, bridge: str) -> Deed:
    """Return what the daemon does as it starts: forwarding on, and FORWARD to DROP if it was off."""

    def start(scene: Scene) -> None:
        scene.put_box(bridge, "172.17.0.0/16")
        if scene.laptop.sysctl("ipv4/ip_forward") == "0":
            scene.laptop.sysctl("ipv4/ip_forward", 1)
        # Set in any case: many have it from a start before vmnet's, or from their own rules.
        scene.laptop.run(program, "-P", "FORWARD", "DROP")
        scene.rules(program, rules.replace("docker0", bridge))

    return start


def docker_again(rules: str, program: str, bridge: str) -> Deed:
    """Return what a restart of the daemon does to rules: its own chains are made anew, DOCKER-USER is left."""
    return lambda scene: scene.rules(program, rules.replace("docker0", bridge).replace(":DOCKER-USER - [0:0]\n", ""))


_DOCKER_NAT = """\
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
"""
DOCKER_28 = f"""{_DOCKER_NAT}*raw
-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP
COMMIT
*filter
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-I FORWARD -j DOCKER-FORWARD
-I FORWARD -j DOCKER-USER
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
COMMIT
"""
DOCKER_20 = f"""{_DOCKER_NAT}*filter
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-I FORWARD -i docker0 -o docker0 -j ACCEPT
-I FORWARD -i docker0 ! -o docker0 -j ACCEPT
-I FORWARD -o docker0 -j DOCKER
-I FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-I FORWARD -j DOCKER-ISOLATION-STAGE-1
-I FORWARD -j DOCKER-USER
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""


# As its documentation prints them.
DOCKER_29 = """\
table ip docker-bridges {
    map filter-forward-in-jumps {
        type ifname : verdict
        elements = { "docker0" : jump filter-forward-in__docker0 }
    }
    map filter-forward-out-jumps {
        type ifname : verdict
        elements = { "docker0" : jump filter-forward-out__docker0 }
    }
    map nat-postrouting-out-jumps {
        type ifname : verdict
        elements = { "docker0" : jump nat-postrouting-out__docker0 }
    }
    chain filter-FORWARD {
        type filter hook forward priority filter; policy accept;
        oifname vmap @filter-forward-in-jumps
        iifname vmap @filter-forward-out-jumps
    }
    chain nat-OUTPUT {
        type nat hook output priority -100; policy accept;
        ip daddr != 127.0.0.0/8 fib daddr type local counter jump nat-prerouting-and-output
    }
    chain nat-POSTROUTING {
        type nat hook postrouting priority srcnat; policy accept;
        iifname vmap @nat-postrouting-out-jumps
    }
    chain nat-PREROUTING {
        type nat hook prerouting priority dstnat; policy accept;
        fib daddr type local counter jump nat-prerouting-and-output
    }
    chain nat-prerouting-and-output {
        iifname != "docker0" tcp dport 8080 counter dnat to 172.17.0.2:80
    }
    chain raw-PREROUTING {
        type filter hook prerouting priority raw; policy accept;
        ip daddr 172.17.0.2 iifname != "docker0" counter drop
    }
    chain filter-forward-in__docker0 {
        ct state established,related counter accept
        iifname "docker0" counter accept
        ip daddr 172.17.0.2 tcp dport 80 counter accept
        counter drop
    }
    chain filter-forward-out__docker0 {
        ct state established,related counter accept
        counter accept
    }
    chain nat-postrouting-out__docker0 {
        oifname != "docker0" ip saddr 172.17.0.0/16 counter masquerade
    }
}
"""


def docker_29(scene: Scene) -> None:
    """Start Docker with nftables, which leaves it to the administrator to turn forwarding on."""
    scene.laptop.sysctl("ipv4/ip_forward", 1)
    scene.put_box("docker0", "172.17.0.0/16")
    scene.nft(DOCKER_29)


def dockers() -> Iterable[Neighbour]:
    for name, rules, program, bridge in (
        ("Docker 28", DOCKER_28, "iptables-nft", "docker0"),
        ("Docker 28, older iptables", DOCKER_28, "iptables-legacy", "docker0"),
        ("Docker 20.10", DOCKER_20, "iptables-nft", "br-5f3a6c7d8e9f"),
        ("Docker 20.10, a bridge of another name", DOCKER_20, "iptables-legacy", "mynet0"),
    ):
        yield Neighbour(
            name, docker(rules, program, bridge), docker_again(rules, program, bridge), "watch", CONTAINER,
            frozenset({"LAN to container", "LAN to office"}), program, row="Docker",
        )  # fmt: skip


def docker_saved(scene: Scene) -> None:
    """Docker, whose rules an administrator has saved."""
    docker(DOCKER_28, "iptables-nft", "docker0")(scene)
    scene.saved = "\n".join(line for line in scene.laptop.run("iptables-nft-save").splitlines() if "vmn" not in line)


def restore_saved(scene: Scene) -> None:
    """Put back what was saved, and nothing else: that is what iptables-restore does."""
    scene.laptop.run("iptables-nft-restore", stdin=f"{scene.saved}\n")


# libvirt

LIBVIRT_IPTABLES = """\
*filter
:LIBVIRT_FWI - [0:0]
:LIBVIRT_FWO - [0:0]
:LIBVIRT_FWX - [0:0]
:LIBVIRT_INP - [0:0]
:LIBVIRT_OUT - [0:0]
-A INPUT -j LIBVIRT_INP
-A FORWARD -j LIBVIRT_FWX
-A FORWARD -j LIBVIRT_FWI
-A FORWARD -j LIBVIRT_FWO
-A OUTPUT -j LIBVIRT_OUT
-A LIBVIRT_FWI -d 192.168.122.0/24 -o virbr0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A LIBVIRT_FWI -o virbr0 -j REJECT --reject-with icmp-port-unreachable
-A LIBVIRT_FWO -s 192.168.122.0/24 -i virbr0 -j ACCEPT
-A LIBVIRT_FWO -i virbr0 -j REJECT --reject-with icmp-port-unreachable
-A LIBVIRT_FWX -i virbr0 -o virbr0 -j ACCEPT
-A LIBVIRT_INP -i virbr0 -p udp -m udp --dport 53 -j ACCEPT
-A LIBVIRT_INP -i virbr0 -p tcp -m tcp --dport 53 -j ACCEPT
-A LIBVIRT_INP -i virbr0 -p udp -m udp --dport 67 -j ACCEPT
-A LIBVIRT_INP -i virbr0 -p tcp -m tcp --dport 67 -j ACCEPT
-A LIBVIRT_OUT -o virbr0 -p udp -m udp --dport 53 -j ACCEPT
-A LIBVIRT_OUT -o virbr0 -p tcp -m tcp --dport 53 -j ACCEPT
-A LIBVIRT_OUT -o virbr0 -p udp -m udp --dport 68 -j ACCEPT
-A LIBVIRT_OUT -o virbr0 -p tcp -m tcp --dport 68 -j ACCEPT
COMMIT
*nat
:LIBVIRT_PRT - [0:0]
-A POSTROUTING -j LIBVIRT_PRT
-A LIBVIRT_PRT -s 192.168.122.0/24 -d 224.0.0.0/24 -j RETURN
-A LIBVIRT_PRT -s 192.168.122.0/24 -d 255.255.255.255/32 -j RETURN
-A LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -p tcp -j MASQUERADE --to-ports 1024-65535
-A LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -p udp -j MASQUERADE --to-ports 1024-65535
-A LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -j MASQUERADE
COMMIT
"""
LIBVIRT_NFT = """\
table ip libvirt_network {
    chain forward {
        type filter hook forward priority filter; policy accept;
        counter jump guest_cross
        counter jump guest_input
        counter jump guest_output
    }
    chain guest_output {
        ip saddr 192.168.122.0/24 iifname "virbr0" counter accept
        iifname "virbr0" counter reject
    }
    chain guest_input {
        oifname "virbr0" ip daddr 192.168.122.0/24 ct state related,established counter accept
        oifname "virbr0" counter reject
    }
    chain guest_cross {
        iifname "virbr0" oifname "virbr0" counter accept
    }
    chain guest_nat {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr 192.168.122.0/24 ip daddr 224.0.0.0/24 counter return
        ip saddr 192.168.122.0/24 ip daddr 255.255.255.255 counter return
        meta l4proto tcp ip saddr 192.168.122.0/24 ip daddr != 192.168.122.0/24 counter masquerade to :1024-65535
        meta l4proto udp ip saddr 192.168.122.0/24 ip daddr != 192.168.122.0/24 counter masquerade to :1024-65535
        ip saddr 192.168.122.0/24 ip daddr != 192.168.122.0/24 counter masquerade
    }
}
"""


def libvirt(scene: Scene) -> None:
    scene.laptop.sysctl("ipv4/ip_forward", 1)
    scene.put_box("virbr0", "192.168.122.0/24")
    scene.rules("iptables-nft", LIBVIRT_IPTABLES)


def newer_libvirt(scene: Scene) -> None:
    scene.laptop.sysctl("ipv4/ip_forward", 1)
    scene.put_box("virbr0", "192.168.122.0/24")
    scene.nft(LIBVIRT_NFT)


# Hardening by hand

CIS_IPTABLES = """\
*filter
-A INPUT -i lo -j ACCEPT
-A INPUT -s 127.0.0.0/8 -j DROP
-A OUTPUT -o lo -j ACCEPT
-A INPUT -p tcp -m tcp --dport 2222 -j DROP
COMMIT
"""
CIS_NFT = """\
table inet filter {
    chain input {
        type filter hook input priority filter; policy accept;
        iif lo accept
        ip saddr 127.0.0.0/8 counter drop
        ip6 saddr ::1 counter drop
        tcp dport 2222 drop
    }
}
"""
# What docs/reference/neighbours.md tells those to add who have a policy of their own.
FORWARD_DROP = """\
*filter
:FORWARD DROP [0:0]
-A FORWARD -i vmn-+ -j ACCEPT
-A FORWARD -o vmn-+ -j ACCEPT
COMMIT
"""


def route_localnet(scene: Scene) -> None:
    scene.laptop.sysctl("ipv4/conf/all/route_localnet", 1)


# VPNs

WG_QUICK = """\
table ip wg-quick-tun0 {
    chain preraw {
        type filter hook prerouting priority -300;
        iifname != "tun0" ip daddr 10.66.0.2 fib saddr type != local drop
    }
    chain premangle {
        type filter hook prerouting priority -150;
        meta l4proto udp meta mark set ct mark
    }
    chain postmangle {
        type filter hook postrouting priority -150;
        meta l4proto udp meta mark 51820 ct mark set meta mark
    }
}
"""


def wg_quick(scene: Scene) -> None:
    """Bring a WireGuard tunnel up for all addresses, as wg-quick does."""
    tunnel(scene.lab)
    scene.laptop.ip(
        "route add 0.0.0.0/0 dev tun0 table 51820",
        "rule add not fwmark 51820 table 51820",
        "rule add table main suppress_prefixlength 0",
    )
    scene.laptop.sysctl("ipv4/conf/all/src_valid_mark", 1)
    scene.nft(WG_QUICK)


TAILSCALE = """\
*filter
:ts-forward - [0:0]
:ts-input - [0:0]
-I INPUT -j ts-input
-I FORWARD -j ts-forward
-A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
-A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT
-A ts-forward -s 100.64.0.0/10 -o tailscale0 -j DROP
-A ts-forward -o tailscale0 -j ACCEPT
-A ts-input -s 100.101.102.2/32 -i lo -j ACCEPT
-A ts-input -s 100.115.92.0/23 ! -i tailscale0 -j RETURN
-A ts-input -s 100.64.0.0/10 ! -i tailscale0 -j DROP
-A ts-input -i tailscale0 -j ACCEPT
-A ts-input -p udp -m udp --dport 41641 -j ACCEPT
COMMIT
*nat
:ts-postrouting - [0:0]
-A POSTROUTING -j ts-postrouting
-A ts-postrouting -m mark --mark 0x40000/0xff0000 -j MASQUERADE
COMMIT
"""


def tailscale(scene: Scene) -> None:
    """Bring Tailscale up with an exit node that leaves the LAN reachable."""
    tunnel(scene.lab, 1280, "100.101.102.0/24", "tailscale0")
    scene.rules("iptables-nft", TAILSCALE)
    scene.laptop.ip(
        *(f"rule add pref {pref} fwmark 0x80000/0xff0000 {goes}"
          for pref, goes in ((5210, "table main"), (5230, "table default"), (5250, "unreachable"))),
        "rule add pref 5270 table 52",
        "route add default dev tailscale0 table 52",
        "route add 100.64.0.0/10 dev tailscale0 table 52",
        "route add throw 127.0.0.0/8 table 52",
        "route add throw 192.168.77.0/24 table 52",
        "route add throw 10.50.0.0/24 table 52",
    )  # fmt: skip


# Programs of a Debian system

NETAVARK = {
    "container_id": "0123456789ab",
    "container_name": "box",
    "networks": {"podman": {"static_ips": ["10.88.0.2"], "interface_name": "eth0"}},
    "port_mappings": [{"host_ip": "", "container_port": 80, "host_port": PUBLISHED, "range": 1, "protocol": "tcp"}],
    "network_info": {
        "podman": {
            "name": "podman",
            "id": "2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9",
            "driver": "bridge",
            "network_interface": "podman0",
            "subnets": [{"subnet": "10.88.0.0/16", "gateway": "10.88.0.1"}],
            "ipv6_enabled": False,
            "internal": False,
            "dns_enabled": False,
            "ipam_options": {"driver": "host-local"},
        }
    },
}


def podman(scene: Scene) -> None:
    """Start a container as podman does: by netavark."""
    laptop = scene.laptop
    laptop.run("ip", "netns", "add", "box")
    fd = os.open(laptop.path("/run/netns/box"), os.O_RDONLY | os.O_CLOEXEC)
    scene.lab.at_exit(lambda: os.close(fd))
    assert scene.debian
    scene.debian.run(
        "/usr/lib/podman/netavark", "--config", "/run/netavark", "setup", "/run/netns/box", stdin=json.dumps(NETAVARK)
    )
    scene.adopt_box(Machine(scene.lab, "box", fd, "10.88.0.2"))


def ufw(scene: Scene) -> None:
    scene.debian_run("ufw", "allow", f"{ALLOWED}/tcp")
    scene.debian_run("ufw", "--force", "enable")


def firewalld(scene: Scene) -> None:
    """Start firewalld with the zone that `vmnet hooks install` writes."""
    put_zone(scene)
    firewalld_alone(scene)


def put_zone(scene: Scene) -> None:
    scene.etc("firewalld/zones/vmnet.xml", template("firewalld/vmnet.xml"))


def firewalld_alone(scene: Scene) -> None:
    scene.bus()
    scene.daemon(
        "firewalld", "--nofork", "--nopid",
        until=lambda: scene.debian_run("firewall-cmd", "--state", check=False).strip() == "running",
    )  # fmt: skip


def panic(scene: Scene) -> None:
    """Turn panic mode on and off, and reload."""
    scene.debian_run("firewall-cmd", "--panic-on")
    talks: dict[str, Question] = {"host to internet": (scene.laptop, scene.lab.internet.address, ECHO_PORT)}
    talks |= {one.mode: (one, scene.lab.internet.address, ECHO_PORT) for one in scene.guests}
    assert reached(talks) == set()
    scene.debian_run("firewall-cmd", "--panic-off")
    scene.debian_run("firewall-cmd", "--reload")


def sysctl(scene: Scene) -> None:
    """Apply what Debian says of the network; the rest of the machine it may not write."""
    said = scene.debian_run("sysctl", "--system", check=False)
    assert "Applying /etc/sysctl.conf" in said, said


def hardened_sysctl(scene: Scene) -> None:
    scene.etc("sysctl.d/99-hardening.conf", "net.ipv4.ip_forward = 0\nnet.ipv4.conf.all.rp_filter = 1\n")
    sysctl(scene)


def network_manager(scene: Scene) -> None:
    """Start NetworkManager with the snippet that `vmnet hooks install` writes."""
    scene.etc("NetworkManager/conf.d/zz-vmnet.conf", template("networkmanager/vmnet.conf"))
    network_manager_alone(scene)


def network_manager_alone(scene: Scene) -> None:
    scene.etc("NetworkManager/conf.d/uplinks.conf", "[keyfile]\nunmanaged-devices=interface-name:wlan0,eth1\n")
    without_udev(scene)
    scene.bus()
    scene.daemon(
        "NetworkManager", "--no-daemon",
        until=lambda: "running" in scene.debian_run("nmcli", "-t", "-f", "RUNNING,STARTUP", "general", check=False),
    )  # fmt: skip


def networking_off_and_on(scene: Scene) -> None:
    for word, says in (("off", "disabled"), ("on", "enabled")):
        scene.debian_run("nmcli", "networking", word)
        assert wait_until(lambda says=says: scene.debian_run("nmcli", "networking").strip() == says, PATIENCE)  # type: ignore[misc]


def networkd(scene: Scene) -> None:
    """Start networkd, which is to ask for an address on all it finds, with the files of `vmnet hooks install`."""
    scene.etc("systemd/network/10-vmnet.network", template("networkd/vmnet.network"))
    scene.etc("systemd/networkd.conf.d/vmnet.conf", template("networkd/vmnet.conf"))
    networkd_alone(scene)


def networkd_alone(scene: Scene) -> None:
    scene.etc("systemd/network/50-all.network", "[Match]\nName=!wlan0 eth1\n[Network]\nDHCP=ipv4\n")
    without_udev(scene)
    scene.bus()
    folders = ("/run/systemd/netif", "/run/systemd/netif/links", "/run/systemd/netif/leases")
    scene.debian_run("install", "-d", "-o", "systemd-network", "-g", "systemd-network", *folders)
    scene.daemon("/lib/systemd/systemd-networkd", until=lambda: "lo" in networkd_links(scene))


def networkd_links(scene: Scene) -> dict[str, str]:
    """Return networkd's states of the devices that it knows."""
    lines = scene.debian_run("networkctl", "list", "--no-legend", check=False).splitlines()
    return {words[1]: words[-1] for line in lines if len(words := line.split()) > 4}


def without_udev(scene: Scene) -> None:
    """Let programs take each device as ready: a /sys that nobody writes to says that there is no udev."""
    scene.debian_run("mount", "-o", "remount,bind,ro", "/sys")


def resolved(scene: Scene) -> None:
    scene.bus()
    scene.debian_run("install", "-d", "-o", "systemd-resolve", "-g", "systemd-resolve", "/run/systemd/resolve")
    scene.daemon(
        "/lib/systemd/systemd-resolved",
        until=lambda: scene.laptop.path("/run/systemd/resolve/stub-resolv.conf").exists(),
    )


def template(name: str) -> str:
    """Return a file of vmnet's own templates."""
    return (Path(vmnet.__file__).parent / "templates" / name).read_text()


NETWORK_MANAGER = Neighbour("NetworkManager without hooks", network_manager_alone, networking_off_and_on, debian=True)
NETWORKD = Neighbour("systemd-networkd without hooks", networkd_alone, debian=True)
FIREWALLD = Neighbour("firewalld without hooks", firewalld_alone, debian=True)
RESOLVED = Neighbour("systemd-resolved", resolved, debian=True)
NEIGHBOURS = [
    *dockers(),
    Neighbour("Docker with nftables", docker_29, opens=CONTAINER, closes=frozenset({"LAN to container"})),
    Neighbour("iptables-restore", docker_saved, restore_saved, "watch", CONTAINER, frozenset({"LAN to container"})),
    Neighbour("libvirt", libvirt, opens=VM, closes=frozenset({"LAN to container"})),
    Neighbour("libvirt with nftables", newer_libvirt, opens=VM, closes=frozenset({"LAN to container"}), row="libvirt"),
    Neighbour(
        "CIS rules", lambda scene: scene.rules("iptables-nft", CIS_IPTABLES), closes=frozenset({"LAN to closed port"})
    ),
    Neighbour(
        "CIS rules with nftables", lambda scene: scene.nft(CIS_NFT), closes=frozenset({"LAN to closed port"}),
        row="CIS rules",
    ),
    Neighbour(
        "FORWARD DROP by hand", lambda scene: scene.rules("iptables-nft", FORWARD_DROP), needs="you",
        closes=frozenset({"LAN to office"}),
    ),
    Neighbour("all.route_localnet=1", route_localnet),
    Neighbour("WireGuard", wg_quick),
    Neighbour("Tailscale", tailscale),
    Neighbour("Podman", podman, opens=CONTAINER, debian=True),
    Neighbour(
        "ufw", ufw, lambda scene: scene.debian_run("ufw", "reload"), "watch",
        closes=frozenset({"LAN to closed port", "LAN to office"}), debian=True,
    ),
    Neighbour("firewalld", firewalld, panic, "hooks", closes=frozenset({"LAN to closed port"}), debian=True),
    Neighbour("sysctl --system", sysctl, sysctl, debian=True),
    Neighbour("ip_forward=0 in sysctl.d", hardened_sysctl, sysctl, "watch", debian=True),
    Neighbour("NetworkManager", network_manager, networking_off_and_on, "hooks", debian=True),
    Neighbour(
        "systemd-networkd", networkd, lambda scene: scene.debian_run("networkctl", "reload"), "hooks", debian=True
    ),
    RESOLVED,
]  # fmt: skip
