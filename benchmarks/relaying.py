"""The relay: what a round trip, a connection and a stream cost through it, beside the same without and beside socat.

Client and server stay on one processor, as in the data path; the relay has the choice of all. socat makes a process
for each connection, so that its connections say what that costs.
"""

import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.lab import Command, Failed, Laptop
from benchmarks.report import Table, Target
from benchmarks.rows import Bench

_CPU = str(min(os.sched_getaffinity(0)))
_SERVER, _ADDRESS = 7000, "127.1.0.2"
_PORTS = {"direct": _SERVER, "relay": 7100, "socat": 7200}
_SERVICES = range(3)  # of path.c: ports in a row
_PATIENCE = 5.0  # seconds
_RELAY = """
import signal, sys
from vmnet.relay import Forward
from vmnet.relay.relays import Relays
address, port, target = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ways = [(number, protocol) for number in range(3) for protocol in ("tcp", "udp")]
Relays().want([Forward(address, port + n, protocol, "127.0.0.1", target + n) for n, protocol in ways])
signal.pause()
"""


@dataclass(frozen=True, slots=True)
class Measure:
    """What is measured, with which word of path.c and how much of it; `limit` is what was promised beside `direct`."""

    title: str
    unit: str
    verb: str
    amount: int
    limit: float
    least: bool = False

    def table(self) -> Table:
        """Return an empty table for it."""
        targets = [Target("relay", "direct", self.limit, self.least)]
        return Table(self.title, self.unit, targets=targets, group="through a relay, medians")


MEASURES = (
    Measure("TCP round trip", "us", "tcp-rr", 5_000, 4),
    Measure("UDP round trip", "us", "udp-rr", 5_000, 5),
    Measure("connection and a byte", "us", "connect", 500, 12),
    Measure("TCP stream", "Gbit/s", "tcp", 100, 0.3, least=True),
)


def measure(bench: Bench) -> list[Table]:
    """Measure every way in every round."""
    laptop = bench.laptop()
    start: dict[str, Callable[[], list[int]]] = {"direct": list, "relay": lambda: [_start_relay(laptop)]}
    if shutil.which("socat"):
        start["socat"] = lambda: _start_socat(laptop)
    else:
        bench.say("skipped: socat (needs socat)")
    running = [laptop.start(Command([bench.path, _CPU, "serve", str(_SERVER)]))]
    tables = {one: one.table() for one in MEASURES}
    try:
        for way, begin in start.items():
            running += begin()
            for one in MEASURES:
                _wait_for(laptop, bench.path, way, one)
        for number in range(max(3, bench.rounds // 4)):
            bench.say(f"round {number + 1}")
            for one in random.sample(MEASURES, len(MEASURES)):
                for way in random.sample(list(start), len(start)):
                    tables[one].add(way, _take(laptop, bench.path, way, one, one.amount))
    finally:
        for pid in running:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    for table in tables.values():
        table.samples = {way: table.samples[way] for way in start}
    return list(tables.values())


def _start_relay(laptop: Laptop) -> int:
    words = [sys.executable, "-c", _RELAY, _ADDRESS, str(_PORTS["relay"]), str(_SERVER)]
    return laptop.start(Command(words, environment={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}))


def _start_socat(laptop: Laptop) -> list[int]:
    started = []
    for number in _SERVICES:
        there, here = f"127.0.0.1:{_SERVER + number}", f"LISTEN:{_PORTS['socat'] + number},bind={_ADDRESS},fork"
        for words in (
            [f"TCP-{here},reuseaddr,backlog=1024,nodelay", f"TCP:{there},nodelay"],
            ["-T5", f"UDP-{here}", f"UDP:{there}"],
        ):
            started += [laptop.start(Command(["socat", *words]))]
    return started


def _take(laptop: Laptop, program: str, way: str, one: Measure, amount: int) -> float:
    address = "127.0.0.1" if way == "direct" else _ADDRESS
    return float(laptop.output(Command([program, _CPU, one.verb, address, str(_PORTS[way]), str(amount)])))


def _wait_for(laptop: Laptop, program: str, way: str, one: Measure) -> None:
    """Wait until the servers listen."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            _take(laptop, program, way, one, 1)
            return
        except Failed:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
