"""The rows: what is measured, and what was promised of it."""

import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from benchmarks.lab import Command, Laptop, Took, build, settle
from benchmarks.methods import Cni, Floor, IpBatch, IpTaps, Method, Netavark, Served, Vmnet
from benchmarks.report import Table, Target
from vmnet.ipam import Pool
from vmnet.store import LeaseRequest, Store

_T = TypeVar("_T", bound=Method)
_HERE = Path(__file__).resolve().parent
_BLOCKS = 100_000
_TELLING = """import sys
from vmnet.cli import main
report = sys.argv.pop(1)
try:
    main()
finally:
    print(*sys.modules, file=open(report, "w"))"""
_TRIVIAL = "app = typer.Typer()\n@app.command()\ndef create(names: list[str]) -> None: ...\napp(['web'])"


@dataclass
class Bench:
    """One run of the benchmarks: how much of it, where, and which laptops it has so far."""

    folder: Path
    rounds: int
    many: int
    say: Callable[[str], None]
    laptops: list[Laptop] = field(default_factory=list)
    started: list[Method] = field(default_factory=list)

    @cached_property
    def floor(self) -> str:
        """floor.c, compiled."""
        return build(_HERE / "floor.c", self.folder / "floor")

    @cached_property
    def path(self) -> str:
        """path.c, compiled."""
        return build(_HERE / "path.c", self.folder / "path")

    def laptop(self) -> Laptop:
        """Return a new laptop."""
        self.laptops.append(Laptop(self.folder / f"laptop{len(self.laptops)}"))
        return self.laptops[-1]

    def vmnet(self, name: str = "vmnet", options: Sequence[str] = ("--kind", "veth")) -> list[Vmnet]:
        """Return vmnet on a laptop of its own; the same for the other ways: a list without what is not installed."""
        return [] if self._lacks(name, Vmnet) else [self._started(Vmnet(name, self.laptop(), options))]

    def served(self, name: str = "vmnet, server", options: Sequence[str] = ("--kind", "veth")) -> list[Served]:
        """Return vmnet with a server."""
        return [] if self._lacks(name, Served) else [self._started(Served(name, self.laptop(), options))]

    def _started(self, way: _T) -> _T:
        """Have a way ended in the end."""
        self.started.append(way)
        return way

    def floors(self, *, filters: bool = True) -> list[Method]:
        """Return the floor, and what it is with filters."""
        if self._lacks("floor", Floor):
            return []
        wanted = {"floor": False, "floor with filters": True} if filters else {"floor": False}
        return [Floor(name, self.laptop(), self.floor, filters=flag) for name, flag in wanted.items()]

    def cni(self, *plugins: str) -> list[Method]:
        """Return CNI plugins."""
        return [
            Cni(f"CNI {plugin}", self.laptop(), plugin) for plugin in plugins if not self._lacks(f"CNI {plugin}", Cni)
        ]

    def netavark(self) -> list[Method]:
        """Return netavark."""
        return [] if self._lacks("netavark", Netavark) else [Netavark("netavark", self.laptop())]

    def ip_batch(self) -> list[Method]:
        """Return iproute2's batches and nft."""
        return [] if self._lacks("ip -batch", IpBatch) else [IpBatch("ip -batch + nft -f", self.laptop())]

    def ip_taps(self) -> list[Method]:
        """Return iproute2's batches for taps."""
        return [] if self._lacks("ip -batch", IpTaps) else [IpTaps("ip -batch", self.laptop())]

    def _lacks(self, name: str, way: type[Method]) -> bool:
        packages = way.missing()
        if packages:
            self.say(f"skipped: {name} (needs {packages})")
        return packages is not None

    def each_round(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Do all jobs once in each round; in an order of its own, but for the first."""
        for number in range(self.rounds):
            self.say(f"round {number + 1} of {self.rounds}")
            for job in random.sample(jobs, len(jobs)) if number else jobs:
                job()


def prepare(ways: Sequence[Method]) -> None:
    """Make the ways ready, and warm: the first guest loads modules and makes bridges, chains and caches."""
    for way in ways:
        way.prepare()
        way.laptop.make_netns("f0")
        way.create(["f0"])
        way.delete(["f0"])
        way.laptop.drop_netns("f0")
        settle(way.laptop)


def one(bench: Bench) -> list[Table]:
    """One guest: the whole command, for a namespace that is there."""
    vmnets = bench.vmnet()
    ways = [
        *vmnets, *bench.served(), *bench.floors(filters=False), *bench.ip_batch(), *bench.cni("ptp", "bridge"),
        *bench.netavark(),
    ]  # fmt: skip
    prepare(ways)
    create = Table(
        "create one guest, process start included",
        "ms",
        targets=[
            Target("vmnet", "its imports", 1.25),
            Target("vmnet, server", "CNI ptp", 0.85),
            Target("vmnet, server", "netavark", 0.5),
        ],
    )
    delete = Table("delete one guest", "ms", targets=[Target("vmnet, server", "CNI ptp", 0.2)])

    def guest(way: Method) -> None:
        way.laptop.make_netns("f1")
        _note(create, way.name, way.create(["f1"]))
        _note(delete, way.name, way.delete(["f1"]))
        way.laptop.drop_netns("f1")
        settle(way.laptop)

    def python(name: str, code: str) -> None:
        _note(create, name, vmnets[0].laptop.run(Command([sys.executable, "-c", code])))

    jobs: list[Callable[[], None]] = [partial(guest, way) for way in ways]
    if vmnets:
        imports = "\n".join(f"import {module}" for module in needed_imports(vmnets[0]))
        jobs += [
            partial(python, "python -c pass", "pass"),
            partial(python, "its imports", imports),
            partial(python, "its imports and a typer app", f"{imports}\n{_TRIVIAL}"),
        ]
    bench.each_round(jobs)
    return [create, delete]


def server(bench: Bench) -> list[Table]:
    """What a command costs that a server does, by its parts: the interpreter, the client, the fork that works."""
    ways = bench.served()
    if not ways:
        return []
    [way] = ways
    prepare([way])
    way.laptop.make_netns("f1")
    way.create(["f1"])
    title = "one command that a server does, process start included"
    table = Table(title, "ms", targets=[Target("the address of a guest", "python -c pass", 1.6)])

    def note(name: str, command: Command) -> Callable[[], None]:
        return lambda: _note(table, name, way.laptop.run(command))

    with way.answering() as environment:
        client = Command(way.command("ip", "f1").argv, environment=environment)
        bench.each_round(
            [
                note("python -c pass", Command([sys.executable, "-c", "pass"])),
                note("python -IS -c pass", Command([sys.executable, "-IS", "-c", "pass"])),
                note("the client alone", client),
                note("the address of a guest", way.command("ip", "f1")),
                note("the address of a guest, without a server", _without_server(way.command("ip", "f1"))),
            ]
        )
    return [table]


def _without_server(command: Command) -> Command:
    """Return the same command where it finds no server."""
    return Command(command.argv, environment={**command.environment, "VMNET_RUN_DIR": "/run/vmnet-without"})


def needed_imports(vmnet: Vmnet) -> list[str]:
    """Return the modules beside its own that vmnet has imported when it has made a guest."""
    report = vmnet.laptop.folder / "imports"
    vmnet.laptop.make_netns("f1")
    argv = [sys.executable, "-c", _TELLING, str(report), "create", "f1", "--netns", "f1"]
    vmnet.laptop.run(Command(argv, environment=vmnet.environment))
    vmnet.delete(["f1"])
    vmnet.laptop.drop_netns("f1")
    return [name for name in report.read_text().split() if name.partition(".")[0] not in ("vmnet", "__main__")]


def veths(bench: Bench) -> list[Table]:
    """Many veth guests in one command, a namespace for each."""
    names = [f"f{number}" for number in range(1, bench.many + 1)]
    quick = [*bench.vmnet(), *bench.served(), *bench.floors()]
    create = Table(
        f"create {bench.many} veth guests, each",
        "ms",
        targets=[
            Target("vmnet", "floor", 2.5),
            Target("vmnet", "floor with filters", 2.5),
            Target("vmnet", "CNI ptp", 1 / 20),
            Target("vmnet, server", "floor", 2.5),
        ],
    )
    limits = [Target(name, None, 1.0) for name in ("vmnet", "vmnet, server")]
    delete = Table(f"delete {bench.many} veth guests, each", "ms", targets=limits)
    prepare(quick)
    bench.each_round([partial(_many, way, names, create, delete) for way in quick])
    growth = Table(f"create the last tenth of {bench.many} guests, each, beside the first tenth", "times")
    for way in bench.cni("ptp"):
        prepare([way])
        bench.say(f"{way.name}, once: a minute or two")
        _slowly(way, names, create, growth)
    return [create, delete, growth] if growth.samples else [create, delete]


def _many(way: Method, names: Sequence[str], create: Table, delete: Table) -> None:
    settle(way.laptop)
    _note(create, way.name, way.create(names) / len(names))
    _note(delete, way.name, way.delete(names) / len(names))
    settle(way.laptop)


def _slowly(way: Method, names: Sequence[str], create: Table, growth: Table) -> None:
    for name in names:
        way.laptop.make_netns(name)
    tenth = len(names) // 10
    first = way.create(names[:tenth])
    rest = way.create(names[tenth:-tenth])
    last = way.create(names[-tenth:])
    _note(create, way.name, (first + rest + last) / len(names))
    growth.add(way.name, last.wall / first.wall)


def taps(bench: Bench) -> list[Table]:
    """Many taps in one command."""
    names = [f"f{number}" for number in range(1, bench.many + 1)]
    taps_ = ("--kind", "tap")
    ways = [*bench.vmnet(options=taps_), *bench.served(options=taps_), *bench.ip_taps()]
    targets = [Target(name, "ip -batch", 2.5) for name in ("vmnet", "vmnet, server")]
    create = Table(f"create {bench.many} taps, each", "ms", targets=targets)
    delete = Table(f"delete {bench.many} taps, each", "ms", targets=[Target("vmnet", None, 1.0)])
    for way in ways:
        way.prepare()
        way.create(names[:2])
        way.delete(names[:2])
    bench.each_round([partial(_many, way, names, create, delete) for way in ways])
    return [create, delete]


def growth(bench: Bench) -> list[Table]:
    """One guest where there is none, where there are many, and where many blocks are allocated."""
    crowd, blocks = f"{bench.many} guests there", f"{_BLOCKS} blocks allocated"
    found: list[Table] = []
    for kind, make in (("", bench.vmnet), (", with a server", bench.served)):
        ways = [one for name in ("nothing there", crowd, blocks) for one in make(name)]
        if ways:
            found += _grow(bench, ways, kind, [Target(name, "nothing there", 1.1) for name in (crowd, blocks)])
    return found


def _grow(bench: Bench, ways: Sequence[Vmnet], kind: str, targets: Sequence[Target]) -> list[Table]:
    """Return what one guest takes on three laptops: empty, with many guests, and with many records."""
    create = Table(f"create one guest{kind}", "ms", targets=targets)
    delete = Table(f"delete one guest{kind}", "ms", targets=targets)
    prepare(ways)
    ways[1].create([f"g{number}" for number in range(bench.many)])
    allocate(Path(ways[2].environment["VMNET_STATE_DIR"]), _BLOCKS)

    def guest(way: Vmnet) -> None:
        way.laptop.make_netns("f1")
        _note(create, way.name, way.create(["f1"]))
        _note(delete, way.name, way.delete(["f1"]))
        way.laptop.drop_netns("f1")
        settle(way.laptop)  # and its server has its forks anew, before another's is asked

    bench.each_round([partial(guest, way) for way in ways])
    return [create, delete]


def allocate(state: Path, count: int) -> None:
    """Fill the records in `state` with guests that are down."""
    names = [f"n{number}" for number in range(count)]
    requests = [LeaseRequest(name, "tap", "mapped", None, 1500, 0, 1, None, None) for name in names]
    with Store.open(state, write=True) as store:
        store.allocate(requests, pool=Pool(), created="2026-01-01T00:00:00Z")
        store.set_wish(names, "down")


def rules(bench: Bench) -> list[Table]:
    """How many rules the packets of one guest and of many have to pass."""
    tables = []
    ways = [*bench.vmnet(), *bench.cni("ptp"), *bench.netavark()]
    prepare(ways)
    for count in (1, bench.many):
        table = Table(f"rules and set elements with {count} guests", "in all")
        for way in ways:
            bench.say(f"{way.name}, {count} guests")
            fill(way, count)
            table.add(way.name, _count_rules(way.laptop))
        tables.append(table)
    tables[1].targets = [Target("vmnet", None, tables[0].samples["vmnet"][0])] if "vmnet" in tables[0].samples else []
    return tables


def fill(way: Method, count: int) -> None:
    """Give a way's laptop `count` guests, f1 to f<count>; those that are there already stay."""
    with way.laptop.entered():
        there = {path.name for path in Path("/run/netns").iterdir()}
    names = [name for number in range(1, count + 1) if (name := f"f{number}") not in there]
    if names and not way.makes_netns:
        for name in names:
            way.laptop.make_netns(name)
    if names:
        way.create(names)


def _count_rules(laptop: Laptop) -> int:
    found = json.loads(laptop.output(Command(["nft", "-j", "list", "ruleset"])))["nftables"]
    elements = sum(len(item["set"].get("elem", ())) for item in found if "set" in item)
    elements += sum(len(item["map"].get("elem", ())) for item in found if "map" in item)
    return elements + sum("rule" in item for item in found)


def _note(table: Table, way: str, took: Took) -> None:
    table.add(way, took.wall * 1e3, took.cpu * 1e3)


def path(bench: Bench) -> list[Table]:
    """The data path; see benchmarks/data_path.py."""
    from benchmarks.data_path import measure

    return measure(bench)


def watch(bench: Bench) -> list[Table]:
    """The watcher; see benchmarks/watching.py."""
    from benchmarks.watching import measure

    return measure(bench)


def relay(bench: Bench) -> list[Table]:
    """The relay; see benchmarks/relaying.py."""
    from benchmarks.relaying import measure

    return measure(bench)


ROWS: dict[str, Callable[[Bench], list[Table]]] = {
    "one": one,
    "server": server,
    "veths": veths,
    "taps": taps,
    "growth": growth,
    "path": path,
    "rules": rules,
    "watch": watch,
    "relay": relay,
}


def clean_up(bench: Bench) -> None:
    """Let go of everything."""
    for way in bench.started:
        way.close()
    for laptop in bench.laptops:
        laptop.close()
    shutil.rmtree(bench.folder)
