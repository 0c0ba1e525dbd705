"""The data path: what a round trip, a connection, a stream and small packets cost beside the peers.

Round trips and connections stay on one processor: across two they have two speeds, and which one is chance. Streams
and floods have one processor for each end, and want it for themselves: on a busy machine they say little. A stream on
one processor says what a byte costs, whatever else runs.
"""

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.lab import OUTSIDE, Command, Failed, Laptop
from benchmarks.methods import Method
from benchmarks.report import Table, Target
from benchmarks.rows import Bench, fill

_NEAR, _FAR = 7000, 7100
_PATIENCE = 5.0  # seconds
_CPUS = sorted(os.sched_getaffinity(0))
NATIVE, MAPPED, PTP = "vmnet native", "vmnet mapped", "CNI ptp"


@dataclass(frozen=True, slots=True)
class Measure:
    """What is measured, with which word of path.c and how much of it, and what was promised of it beside ptp.

    `outward` is from guest to outside, `apart` with a processor for each end.
    """

    title: str
    unit: str
    verb: str
    amount: int
    outward: bool
    mapped: float | None = None
    native: float | None = None
    least: bool = False
    apart: bool = False

    def table(self) -> Table:
        """Return an empty table for it."""
        limits = {MAPPED: self.mapped, NATIVE: self.native}
        targets = [Target(way, PTP, limit, self.least) for way, limit in limits.items() if limit]
        return Table(self.title, self.unit, targets=targets)


MEASURES = (
    Measure("host to guest, TCP round trip", "us", "tcp-rr", 20_000, False, 1.15, 1.22),
    Measure("host to guest, UDP round trip", "us", "udp-rr", 20_000, False, 1.15, 1.22),
    Measure("host to guest, connection and a byte", "us", "connect", 2_000, False),
    Measure("host to guest, TCP stream", "Gbit/s", "tcp", 100, False, 0.97, 0.97, least=True, apart=True),
    Measure("host to guest, TCP stream on one processor", "Gbit/s", "tcp", 100, False),
    Measure("host to guest, UDP of 64 bytes", "1000/s", "udp", 60, False, apart=True),
    Measure("guest to outside, TCP round trip", "us", "tcp-rr", 20_000, True, 1.10, 1.13),
    Measure("guest to outside, UDP round trip", "us", "udp-rr", 20_000, True, 1.10, 1.13),
    Measure("guest to outside, connection and a byte", "us", "connect", 2_000, True),
    Measure("guest to outside, TCP stream", "Gbit/s", "tcp", 100, True, 0.97, 0.97, least=True, apart=True),
    Measure("guest to outside, TCP stream on one processor", "Gbit/s", "tcp", 100, True),
    Measure("guest to outside, UDP of 64 bytes", "1000/s", "udp", 60, True, apart=True),
)


@dataclass(frozen=True, slots=True)
class Path:
    """A way's data path to and from its newest guest, servers at both ends."""

    way: Method
    program: str
    guest: str
    address: str

    def take(self, measure: Measure) -> float:
        """Measure once; raises Failed."""
        port = _FAR if measure.apart else _NEAR
        address, netns = (OUTSIDE, self.guest) if measure.outward else (self.address, None)
        words = [self.program, str(_CPUS[0]), measure.verb, address, str(port), str(measure.amount)]
        try:
            return float(self.way.laptop.output(Command(words), netns=netns))
        except Failed as error:
            raise Failed(f"{self.way.name}: {error}") from None


def measure(bench: Bench) -> list[Table]:
    """Return the tables of all counts of guests; the slow peers are there for one guest alone."""
    ways = [*bench.vmnet(NATIVE), *bench.vmnet(MAPPED, ("--kind", "veth", "--mapped")), *bench.cni("ptp")]
    others = [*bench.floors(filters=False), *bench.cni("bridge"), *bench.netavark()]
    for way in [*ways, *others]:
        way.prepare()
        way.laptop.plug_in()
    tables = []
    for count in sorted({1, min(100, bench.many), bench.many}):
        for way in ways if count > 1 else [*ways, *others]:
            bench.say(f"{way.name}: {count} guests")
            fill(way, count)
        tables += _measure_at(bench, ways if count > 1 else [*ways, *others], count)
    return tables


def _measure_at(bench: Bench, ways: Sequence[Method], count: int) -> list[Table]:
    guest = f"f{count}"
    servers: list[tuple[Laptop, int]] = []
    try:
        paths = []
        for way in ways:
            for netns in (guest, "outside"):
                servers += [(way.laptop, pid) for pid in _serve(way.laptop, bench.path, netns)]
            paths.append(Path(way, bench.path, guest, way.address(guest)))
            for outward in (False, True):
                _wait_for(paths[-1], next(one for one in MEASURES if one.outward == outward))
        tables = {one: one.table() for one in MEASURES}
        for number in range(max(3, bench.rounds // 4)):
            bench.say(f"round {number + 1}")
            for one in random.sample(MEASURES, len(MEASURES)):
                for path in random.sample(paths, len(paths)):
                    tables[one].add(path.way.name, path.take(one))
    finally:
        for _, pid in servers:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    for table in tables.values():
        table.samples = {way.name: table.samples[way.name] for way in ways}
        table.group = f"data path with {count} guest{'s' if count > 1 else ''}, medians"
    return list(tables.values())


def _serve(laptop: Laptop, program: str, netns: str) -> list[int]:
    return [
        laptop.start(Command([program, str(cpu), "serve", str(port)]), netns=netns)
        for cpu, port in ((_CPUS[0], _NEAR), (_CPUS[-1], _FAR))
    ]


def _wait_for(path: Path, measure: Measure) -> None:
    """Wait until the servers listen and the way there is learnt."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            path.take(measure)
            return
        except Failed:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
