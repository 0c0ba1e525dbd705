"""Many moves in a row, at random, with traffic running all the time: what was not bound to an old LAN is never lost."""

import os
import random
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.kernel.dns import ask
from tests.kernel.flows import Flow, black_holes
from tests.kernel.machine import ECHO_PORT, TIMEOUT, Machine, answered, wait_until
from tests.kernel.net import Guest, Lab, Router, forms_here
from tests.kernel.warm import Warm
from tests.kernel.watching import Watching

SEED = int(os.environ.get("VMNET_TEST_SEED", "0")) or random.randrange(1 << 32)
INTERNET = "198.51.100.2"
LANS = ("10.99.0.0/16", "172.16.5.0/24", "192.168.1.0/24", "100.64.0.0/10", "10.1.0.0/24")
TUNNEL_RULES = ("not fwmark 51820 table 51820", "table main suppress_prefixlength 0")
_PACE = 0.02
_PATIENCE = 10.0
_OFTEN = 0.5
_LINGER_0 = struct.pack("ii", 1, 0)


class Traffic:
    """Connections over which a word goes to and fro all the time; `lost` names those that ended."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        self._rounds: dict[str, int] = {}
        self._poll = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let it run meanwhile."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    def add(self, name: str, machine: Machine, address: str, port: int = ECHO_PORT) -> None:
        """Open one more connection."""
        client = machine.socket(socket.AF_INET, socket.SOCK_STREAM)
        client.settimeout(TIMEOUT)
        client.connect((address, port))
        client.setblocking(False)
        with self._lock:
            self._rounds[name] = 0
            self._poll.register(client, selectors.EVENT_READ, name)
            client.send(b"go on")

    def drop(self, name: str) -> None:
        """Let go of a connection."""
        with self._lock:
            for key in [key for key in self._poll.get_map().values() if key.data == name]:
                self._end(key)
            self._rounds.pop(name, None)
            self.lost = [one for one in self.lost if one != name]

    def stalled(self) -> list[str]:
        """Return the connections over which nothing comes back any more."""
        before = dict(self._rounds)
        wait_until(lambda: all(self._rounds.get(name, 0) > count for name, count in before.items()), _PATIENCE)
        return [name for name, count in before.items() if self._rounds.get(name, 0) <= count]

    def _run(self) -> None:
        while not self._over.wait(_PACE):
            with self._lock:
                for key, _ in self._poll.select(0):
                    self._go_on(key)

    def _go_on(self, key: selectors.SelectorKey) -> None:
        client = key.fileobj
        assert isinstance(client, socket.socket)
        try:
            if client.recv(100):
                self._rounds[key.data] += 1
                client.send(b"go on")
                return
        except OSError:
            pass
        self.lost.append(key.data)
        self._end(key)

    def _end(self, key: selectors.SelectorKey) -> None:
        client = key.fileobj
        assert isinstance(client, socket.socket)
        self._poll.unregister(client)
        # No FIN that would be sent again and again by a way that is no more.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
        client.close()


@dataclass
class Uplink:
    """An uplink as it should be by now; `age` counts what no connection over it outlives."""

    device: str
    router: Router
    metric: int
    host: int = 2
    age: int = 0
    has_address: bool = True
    has_route: bool = True
    has_carrier: bool = True

    @property
    def works(self) -> bool:
        return self.has_address and self.has_route and self.has_carrier

    @property
    def address(self) -> str:
        return f"{self.router.subnet[self.host]}/{self.router.subnet.prefixlen}"

    @property
    def route(self) -> str:
        return f"default via {self.router.address} dev {self.device} metric {self.metric}"


class Travels:
    """What happens to the laptop: each `move` changes one thing, and returns what it did."""

    def __init__(self, lab: Lab, guests: list[Guest], dice: random.Random) -> None:
        self._lab, self._laptop, self._dice, self._guests = lab, lab.laptop, dice, guests
        self._count = 0
        self._laptop.sysctl("ipv4/conf/all/ignore_routes_with_linkdown", 1)
        self._free = [lab.network(subnet) for subnet in LANS]
        self._vpn = lab.plug("wg0", "10.8.0.0/24", default=False)
        self._laptop.ip("link set wg0 mtu 1380", f"route add default via {self._vpn.address} dev wg0 table 51820")
        self._tunnel: str | None = None
        self._uplinks = [Uplink("wlan0", lab.lan, 600)]
        self._laptop.ip("route del default", f"route add {self._uplinks[0].route}")
        self._on_the_wire: list[str] = []

    @property
    def way_out(self) -> tuple[object, ...] | None:
        """What a connection to the internet is bound to now, None without any way out."""
        if self._tunnel:
            return ("wg0", self._tunnel)
        best = min((one for one in self._uplinks if one.works), key=lambda one: one.metric, default=None)
        return (best.device, best.router.address, best.host, best.age) if best else None

    def move(self) -> str:
        """Change one thing that can be changed."""
        steps = self._dice.sample(_STEPS, len(_STEPS))
        return next(f"{step.__name__} {done}" for step in steps if (done := step(self)))

    def _one(self, suits: Callable[[Uplink], bool]) -> Uplink | None:
        those = [one for one in self._uplinks if suits(one)]
        return self._dice.choice(those) if those else None

    def join(self) -> str:
        """Plug one more uplink in, better or worse than the others."""
        if not self._free or len(self._uplinks) == 3:
            return ""
        self._count += 1
        router = self._free.pop(self._dice.randrange(len(self._free)))
        uplink = Uplink(self._dice.choice(["wlan", "enp3s", "usb"]) + str(self._count), router, self._new_metric())
        self._lab.join(uplink.device, router, default=False)
        self._laptop.ip(f"route add {uplink.route}")
        self._uplinks.append(uplink)
        return uplink.route

    def _new_metric(self) -> int:
        taken = {one.metric for one in self._uplinks}
        return self._dice.choice([metric for metric in range(50, 1000, 50) if metric not in taken])

    def leave(self) -> str:
        """Pull an uplink out, the last one too."""
        uplink = self._one(lambda _: True)
        if not uplink:
            return ""
        self._laptop.unplug(uplink.device)
        self._uplinks.remove(uplink)
        self._free.append(uplink.router)
        return uplink.device

    def replace(self) -> str:
        """Leave one LAN and join another."""
        return f"{self.leave()}: {self.join()}" if self._uplinks and self._free else ""

    def rename(self) -> str:
        """Rename an uplink, which takes it down on most kernels."""
        uplink = self._one(lambda one: one.has_carrier)
        if not uplink:
            return ""
        self._count += 1
        old, uplink.device = uplink.device, f"ren{self._count}"
        self._laptop.ip(f"link set {old} down", f"link set {old} name {uplink.device}", f"link set {uplink.device} up")
        self._laptop.await_link(uplink.device)
        if uplink.has_address and uplink.has_route:
            self._laptop.ip(f"route add {uplink.route}")
        uplink.age += 1
        return f"{old} to {uplink.device}"

    def prefer(self) -> str:
        """Give an uplink another metric, the new route first."""
        uplink = self._one(lambda one: one.works)
        if not uplink:
            return ""
        old, uplink.metric = uplink.route, self._new_metric()
        self._laptop.ip(f"route add {uplink.route}", f"route del {old}")
        return uplink.route

    def lose_route(self) -> str:
        """Take nothing but the route away."""
        uplink = self._one(lambda one: one.works)
        if not uplink:
            return ""
        self._laptop.ip(f"route del {uplink.route}")
        uplink.has_route = False
        return uplink.device

    def lose_address(self) -> str:
        """Take nothing but the address away; the kernel takes the routes, with the last address of a device."""
        uplink = self._one(lambda one: one.works)
        if not uplink:
            return ""
        self._take_address(uplink)
        return uplink.device

    def _take_address(self, uplink: Uplink) -> None:
        self._laptop.ip(f"addr del {uplink.address} dev {uplink.device}")
        self._laptop.ip(f"route del {uplink.route}", check=False)
        uplink.has_address = uplink.has_route = False
        uplink.age += 1

    def lose_carrier(self) -> str:
        """Take nothing but the carrier away."""
        uplink = self._one(lambda one: one.works)
        if not uplink:
            return ""
        uplink.router.ip("link set lan0 down")
        assert wait_until(lambda: "linkdown" in self._laptop.run("ip", "route", "show", "dev", uplink.device))
        uplink.has_carrier = False
        return uplink.device

    def renumber(self) -> str:
        """Get another address in the same LAN, as by DHCP."""
        uplink = self._one(lambda one: one.works)
        if not uplink:
            return ""
        old, uplink.host = uplink.address, self._dice.choice([n for n in range(3, 250) if n != uplink.host])
        self._laptop.ip(
            f"addr del {old} dev {uplink.device}",
            f"addr add {uplink.address} dev {uplink.device}",
            f"route replace {uplink.route}",
        )
        uplink.age += 1
        return uplink.address

    def recover(self) -> str:
        """Give an uplink back what it has lost."""
        uplink = self._one(lambda one: not one.works)
        if not uplink:
            return ""
        if not uplink.has_carrier:
            uplink.router.ip("link set lan0 up")
            self._laptop.await_link(uplink.device)
        if not uplink.has_address:
            self._laptop.ip(f"addr add {uplink.address} dev {uplink.device}")
        if not uplink.has_route:
            self._laptop.ip(f"route add {uplink.route}")
        uplink.has_carrier = uplink.has_address = uplink.has_route = True
        return uplink.device

    def tunnel(self) -> str:
        """Have a VPN take the default route, in either of the usual ways, or end it."""
        halves = [f"route {{}} {half} via {self._vpn.address}" for half in ("0.0.0.0/1", "128.0.0.0/1")]
        lines = {"rules": [f"rule {{}} {rule}" for rule in TUNNEL_RULES], "halves": halves}
        if self._tunnel:
            self._laptop.ip(*(line.format("del") for line in lines[self._tunnel]))
            self._tunnel = None
            return "down"
        self._tunnel = self._dice.choice(sorted(lines))
        self._laptop.ip(*(line.format("add") for line in lines[self._tunnel]))
        return self._tunnel

    def ipv6_only(self) -> str:
        """Lose IPv4 on every uplink; IPv6 stays."""
        those = [one for one in self._uplinks if one.has_address]
        for one in those:
            self._laptop.ip(f"addr replace fd00::{one.host}/64 dev {one.device}")
            self._take_address(one)
        return " ".join(one.device for one in those)

    def pool_on_the_wire(self) -> str:
        """Get a guest's very address from a LAN, beside the other one; or lose it again."""
        if self._on_the_wire:
            line = self._on_the_wire.pop()
            self._laptop.ip(f"addr del {line}", check=False)
            return f"no more {line}"
        uplink, guest = self._one(lambda one: one.works), self._dice.choice(self._guests)
        if not uplink:
            return ""
        line = f"{self._dice.choice([guest.address, guest.shadow, guest.gateway])}/16 dev {uplink.device}"
        self._laptop.ip(f"addr add {line}")
        self._on_the_wire.append(line)
        return line


_STEPS = (
    Travels.join, Travels.leave, Travels.replace, Travels.rename, Travels.prefer, Travels.lose_route,
    Travels.lose_address, Travels.lose_carrier, Travels.renumber, Travels.recover, Travels.recover, Travels.tunnel,
    Travels.ipv6_only, Travels.pool_on_the_wire,
)  # fmt: skip


@dataclass
class Life:
    """What the guests do all the time, and what they try anew after each move."""

    lab: Lab
    guests: list[Guest]
    traffic: Traffic

    def __post_init__(self) -> None:
        self._flows = [Flow(guest, INTERNET, kind) for guest in self.guests for kind in ("udp", "ping")]
        self._names = self.lab.laptop.hosts_file.read_text()
        for machine in (self.lab.internet, *self.guests):
            machine.serve()
        for guest, other in zip(self.guests, self.guests[1:] + self.guests[:1], strict=True):
            self.traffic.add(f"the host to {guest.name}", self.lab.laptop, guest.address)
            self.traffic.add(f"{guest.name} to {other.name}", guest, guest.knows(other))
        self.bind()

    def bind(self) -> None:
        """Open the connections that hang on the way out of now."""
        for guest in self.guests:
            self.traffic.add(f"{guest.name} out", guest, INTERNET)

    def unbind(self) -> None:
        """Let go of the connections that hung on a way out that is no more."""
        for guest in self.guests:
            self.traffic.drop(f"{guest.name} out")

    def go_out(self) -> None:
        """Check that each guest gets out, by new connections and by flows of before."""
        asked = [(guest, INTERNET, ECHO_PORT) for guest in self.guests]
        assert not black_holes(self._flows)
        assert answered(asked) == {(guest.name, address, port) for guest, address, port in asked}

    def try_to_go_out(self) -> None:
        """Send where there is no way."""
        for flow in self._flows:
            flow.ask()

    def check(self) -> None:
        """Check what no move may touch."""
        assert not self.traffic.stalled()
        assert not self.traffic.lost
        assert self.lab.laptop.hosts_file.read_text() == self._names
        for guest, other in zip(self.guests, self.guests[1:] + self.guests[:1], strict=True):
            assert ask(guest, guest.guest_gateway, f"{other.name}.vmnet.internal").values == (guest.knows(other),)


@pytest.mark.parametrize("moves", [20, pytest.param(200, marks=pytest.mark.long)])
def test_no_connection_is_lost_that_was_not_bound_to_an_old_lan(lab: Lab, warm: Warm, moves: int) -> None:
    """And a watcher that looks all the time finds nothing to put right, only old connections to forget."""
    print(f"VMNET_TEST_SEED={SEED}")
    guests = []
    for form, options in forms_here().items():
        [info] = warm.vmnet(lab.laptop, "create", form, *options, "--json").json
        guests.append(lab.laptop.boot(info))
    travels = Travels(lab, guests, random.Random(SEED))
    life, way_out = Life(lab, guests, Traffic()), travels.way_out
    with Watching(lab.laptop, interval=_OFTEN) as watcher, life.traffic.running():
        for number in range(moves):
            print(number, travels.move())
            before, way_out = way_out, travels.way_out
            if way_out != before:
                life.unbind()
            if way_out:
                life.go_out()
            else:
                life.try_to_go_out()
            if way_out and way_out != before:
                life.bind()
            life.check()
        assert not [line for line in watcher.changes() if "- connections of guests over" not in line]
    assert warm.vmnet(lab.laptop, "plan").out == ""
