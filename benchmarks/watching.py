"""The watcher: how soon it puts right what others undo, what it costs when nobody does, and what a storm costs it.

A change counts from just before the program starts that makes it until the programs that show it say what they said
before: they are asked again and again, so some milliseconds of each time are theirs.
"""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lab import Failed
from benchmarks.methods import Vmnet
from benchmarks.report import Table, Target
from benchmarks.rows import Bench

_PATIENCE = 30.0
_PAUSE = 0.001
# After an event the watcher is wary of a storm for a second, and slower.
_QUIET = 1.2
_INTERVAL, _SHORT, _NEVER, _LOOKS = 15.0, 1.5, 3600.0, 10
_FULL_ROUNDS = 10  # with fewer it is to be quick
_ALL = "all of them"
_STORM = 10_000
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Drift:
    """What somebody does to a host or to its guest GUEST, and the programs that show it."""

    name: str
    change: Sequence[str]
    shown: Sequence[str]


_LO, _ROUTES, _RULES = "ip -o -4 addr show dev lo", "ip route show table local proto 127", "nft list table ip vmnet"
_ADDRESS, _LINK = "ip -o -4 addr show dev GUEST", "ip -o link show dev GUEST"
_ROUTE, _NEIGHBOUR = "ip route show table local dev GUEST", "ip neigh show dev GUEST nud permanent"
_FILTER, _CONF = "tc filter show dev GUEST ingress", "cat /proc/sys/net/ipv4/conf/GUEST"
_CONF6 = "cat /proc/sys/net/ipv6/conf/GUEST"
_INSIDE = "ip -n NAME -o -4 addr show dev eth0"

TOLD = (
    Drift("lo back at /8", ["ip addr add 127.0.0.1/8 dev lo"], [_LO]),
    Drift("lo down and up", ["ip link set lo down", "ip link set lo up"], [_LO, _ROUTES]),
    Drift("a fence removed", ["ip route del unreachable 127.0.0.0/10 table local"], [_ROUTES]),
    Drift("all rules flushed", ["nft flush ruleset"], [_RULES]),
    Drift("our table altered", ["nft insert rule ip vmnet forw accept"], [_RULES]),
    Drift("the hosts file rewritten", ["cp /etc/hosts HOSTS"], ["cat HOSTS"]),
    Drift("forwarding off", ["sysctl -qw net.ipv4.ip_forward=0"], ["cat /proc/sys/net/ipv4/ip_forward"]),
    Drift("an address removed", ["ip addr flush dev GUEST"], [_ADDRESS, _ROUTE]),
    Drift("a route removed", ["ip route del table local BLOCK dev GUEST"], [_ROUTE]),
    Drift("a neighbour altered", ["ip neigh replace ADDRESS lladdr 02:00:00:00:00:01 dev GUEST"], [_NEIGHBOUR]),
    Drift("a filter removed", ["tc filter del dev GUEST ingress"], [_FILTER]),
    Drift("another group", ["ip link set GUEST group 0"], [_LINK]),
    Drift("a device down", ["ip link set GUEST down"], [_LINK, _ROUTE, _NEIGHBOUR]),
    Drift("a device removed", ["ip link del GUEST"], [_LINK, _ADDRESS, _ROUTE, _NEIGHBOUR, _FILTER, _INSIDE]),
    Drift("an address removed inside", ["ip -n NAME addr flush dev eth0"], [_INSIDE]),
)
"""Changes that the kernel tells of."""

SILENT = (
    Drift("route_localnet on", ["sysctl -qw net.ipv4.conf.GUEST.route_localnet=1"], [f"{_CONF}/route_localnet"]),
    Drift("IPv6 on", ["sysctl -qw net.ipv6.conf.GUEST.disable_ipv6=0"], [f"{_CONF6}/disable_ipv6"]),
)
"""Changes that nobody is told of."""


class Watcher:
    """`vmnet watch` on a laptop; the process is gone when `stop` returns."""

    def __init__(self, vmnet: Vmnet, interval: float) -> None:
        self._vmnet = vmnet
        self.pid = vmnet.laptop.start(vmnet.command("watch", "--interval", str(interval)))
        wait_until(lambda: self.counts().get("looks_total", 0) > 0, "the watcher does not look")

    def counts(self) -> dict[str, int]:
        """Return what it has counted since it started, nothing before its first look."""
        with suppress(OSError, ValueError):
            status = json.loads(Path(f"/proc/{self.pid}/root/run/vmnet/watch.json").read_text())
            if status["pid"] == self.pid:
                return dict(status["counts"])
        return {}

    def processor(self) -> float:
        """Return seconds of processor time so far: its own, and that of the programs it has waited for."""
        own = time.clock_gettime(~self.pid << 3 | 2)  # the clock of another process: clock_getcpuclockid(3)
        ticks = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return own + (int(ticks[13]) + int(ticks[14])) / os.sysconf("SC_CLK_TCK")

    def memory(self, kind: str = "VmRSS") -> float:
        """Return what it has in memory now, or with VmHWM had at most, in MiB."""
        found = re.search(rf"^{kind}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert found
        return int(found[1]) * 1024 / _MIB

    def stop(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)


@contextmanager
def watching(vmnet: Vmnet, interval: float) -> Iterator[Watcher]:
    """Have a watcher at work meanwhile."""
    watcher = Watcher(vmnet, interval)
    try:
        yield watcher
    finally:
        watcher.stop()


def wait_until(met: Callable[[], bool], trouble: str) -> None:
    """Wait until it is so; raises Failed when it takes too long."""
    end = time.monotonic() + _PATIENCE
    while not met():
        if time.monotonic() > end:
            raise Failed(trouble)
        time.sleep(_PAUSE)


def measure(bench: Bench) -> list[Table]:
    """Return the tables of all three."""
    if not bench.vmnet():
        return []
    return [*heal(bench), *idle(bench), *storm(bench)]


def heal(bench: Bench) -> list[Table]:
    """How soon each drift is put right, with ten guests there."""
    [vmnet] = bench.vmnet()
    vmnet.prepare()
    vmnet.create(names := [f"f{number}" for number in range(10)])
    guests = _guests(vmnet, names)
    by_event = Table("put right after an event", "ms", {_ALL: []}, targets=[Target(_ALL, None, 100)], alone=True)
    slowest = Table("the slowest of them", "ms", targets=[Target(_ALL, None, 1000)])
    by_look = Table(f"put right without an event, one look every {_SHORT:g} s", "intervals", {_ALL: []}, alone=True)
    latest = Table("the latest of them", "intervals", targets=[Target(_ALL, None, 1.1)])
    for number in range(bench.rounds):
        bench.say(f"drift, round {number + 1} of {bench.rounds}")
        # What is undone more than five times in a minute is left alone for a while: a new watcher knows nothing of it.
        with watching(vmnet, _NEVER):
            for drift in random.sample(TOLD, len(TOLD)):
                time.sleep(_QUIET)
                _note(by_event, drift, _heal_once(vmnet, drift, guests[number % 10]) * 1e3)
        with watching(vmnet, _SHORT):
            for drift in random.sample(SILENT, len(SILENT)):
                time.sleep(_QUIET + random.uniform(0, _SHORT))
                _note(by_look, drift, _heal_once(vmnet, drift, guests[number % 10]) / _SHORT)
    slowest.add(_ALL, max(by_event.samples[_ALL]))
    latest.add(_ALL, max(by_look.samples[_ALL]))
    return [by_event, slowest, by_look, latest]


def _guests(vmnet: Vmnet, names: Sequence[str]) -> list[dict[str, str]]:
    return [json.loads(vmnet.laptop.output(vmnet.command("show", name, "--json"))) for name in names]


def _note(table: Table, drift: Drift, value: float) -> None:
    table.add(_ALL, value)
    table.add(drift.name, value)


def _heal_once(vmnet: Vmnet, drift: Drift, guest: Mapping[str, str]) -> float:
    """Do it, and return in how many seconds it was put right; raises Failed when it is not."""
    words = {
        "GUEST": guest["device"], "NAME": guest["name"], "BLOCK": guest["block"], "ADDRESS": guest["guest_address"],
        "HOSTS": vmnet.environment["VMNET_HOSTS_FILE"],
    }  # fmt: skip

    def run(line: str) -> str:
        argv = [words.get(word, word) for word in re.sub(r"(?<=[./])GUEST", words["GUEST"], line).split()]
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout

    with vmnet.laptop.entered():
        right = [run(line) for line in drift.shown]
        start = time.perf_counter()
        for line in drift.change:
            run(line)
        wait_until(lambda: [run(line) for line in drift.shown] == right, f"{drift.name} is not put right")
        return time.perf_counter() - start


def idle(bench: Bench) -> list[Table]:
    """What a watcher costs while nothing happens: four of them at the same time, each on a laptop of its own."""
    interval = _INTERVAL if bench.rounds >= _FULL_ROUNDS else _SHORT
    limits = {10: 0.1, bench.many: 0.5}
    options = {"taps": ("--kind", "tap"), "veths": ("--kind", "veth")}
    tables = []
    with ExitStack() as stack:
        watchers = {}
        for count, (kind, words) in itertools.product(limits, options.items()):
            bench.say(f"{count} {kind}")
            [vmnet] = bench.vmnet(options=words)
            vmnet.prepare()
            vmnet.create([f"f{number}" for number in range(count)])
            watchers[f"{count} {kind}"] = stack.enter_context(watching(vmnet, interval))
        # It looks into the namespaces of some at a time, more closely when it does so first; and new devices do
        # something by themselves.
        while any(one.counts()["looks_total"] < 2 + bench.many // 100 for one in watchers.values()):
            time.sleep(interval)
        before = {name: (one.processor(), one.counts()) for name, one in watchers.items()}
        bench.say(f"{_LOOKS} looks, one every {interval:g} s")
        time.sleep(_LOOKS * interval + 1)
        for name, watcher in watchers.items():
            processor, counts = before[name]
            now = watcher.counts()
            looks = now["looks_total"] - counts["looks_total"]
            share = 100 * (watcher.processor() - processor) / max(looks, 1) / _INTERVAL
            rows = {
                f"processor time of a look every {_INTERVAL:g} s": ("%", share, limits[int(name.split()[0])]),
                "most memory": ("MiB", watcher.memory("VmHWM"), 60),
                "changes made": ("in all", now["changes_total"], 0),
                "looks": ("in all", looks, None),
            }
            for title, (unit, value, limit) in rows.items():
                targets = [] if limit is None else [Target(name, None, limit)]
                tables.append(Table(title, unit, {name: [float(value)]}, targets=targets, group=f"idle with {name}"))
    return tables


def storm(bench: Bench) -> list[Table]:
    """What 10,000 events of links and addresses cost, told within a second or two."""
    [vmnet] = bench.vmnet()
    vmnet.prepare()
    vmnet.create([f"f{number}" for number in range(10)])
    vmnet.laptop.batch("ip", "link add s0 type veth peer name s1", "link set s0 up", "link set s1 up")
    # Each of these is one event at least, some of a guest's device: an address brings routes with it.
    [info] = _guests(vmnet, ["f0"])
    guest = f"link set {info['device']} txqueuelen"
    others = ["addr add 192.0.2.1/24 dev s0", "addr del 192.0.2.1/24 dev s0"] * 9
    lines = [f"{guest} 999", *others, f"{guest} 1000"]  # the kernel takes half a millisecond for such a length
    group = f"a storm of {_STORM} events"
    tables = {
        "it lasts": Table("it lasts", "s", group=group),
        "looks": Table("looks until it is over", "in all", targets=[Target("vmnet", None, 10)], group=group),
        "processor": Table("processor time for it", "s", group=group),
        "before": Table("memory before", "MiB", group=group),
        "after": Table("memory after", "MiB", group=group),
        "most": Table("most memory", "MiB", targets=[Target("vmnet", None, 60)], group=group),
    }
    for number in range(max(3, bench.rounds // 4)):
        bench.say(f"storm {number + 1}")
        with watching(vmnet, _NEVER) as watcher:
            time.sleep(_QUIET)
            looks, processor, memory = watcher.counts()["looks_total"], watcher.processor(), watcher.memory()
            start = time.monotonic()
            vmnet.laptop.batch("ip", *lines * (_STORM // len(lines)))
            found = {"it lasts": time.monotonic() - start}
            time.sleep(2 * _QUIET)
            found |= {
                "looks": watcher.counts()["looks_total"] - looks,
                "processor": watcher.processor() - processor,
                "before": memory,
                "after": watcher.memory(),
                "most": watcher.memory("VmHWM"),
            }
        for key, value in found.items():
            tables[key].add("vmnet", value)
    return list(tables.values())
