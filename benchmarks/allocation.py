"""Measure the records: what allocating, releasing and looking up cost at each fill, and with 16 processes at once.

    python benchmarks/allocation.py [--rounds 500] [--folder DIR]

All fills take turns in every round, together with a bare transaction (the same two rows written by plain SQL with the
same settings), so that what else the machine does falls on all alike: trust the ratios. DIR must be on the disk that is
meant; it gets about 500 MB, which go again.
"""

import argparse
import multiprocessing
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from vmnet.ipam import Pool
from vmnet.store import LeaseRequest, Store

FILLS = [0, 10_000, 100_000, 1_000_000]
BURST = 10  # measures in a row of one store: commands find its pages in memory, not those of four others
POOL = Pool()
NOW = "2026-11-21T09:00:00Z"


def ask(name: str) -> LeaseRequest:
    return LeaseRequest(name, "tap", "mapped", None, 1500, 0, 1, None, None)


def microseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


class Filled:
    """A store with so many leases; a measure leaves as many as there were."""

    def __init__(self, folder: Path, fill: int) -> None:
        self.store = Store.open(folder / str(fill), write=True)
        self.fill = fill
        self.made = 0
        self.set_synced(False)
        for start in range(0, fill, 10_000):
            self.store.allocate([ask(f"f{n}") for n in range(start, start + 10_000)], pool=POOL, created=NOW)

    def set_synced(self, synced: bool) -> None:
        # The store has no switch for it: nobody but a benchmark wants records that are not durable.
        assert self.store._db is not None
        self.store._db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'OFF'}")

    def measure(self) -> dict[str, float]:
        self.made += 1
        requests, names = [ask(f"b{self.made}")], [f"b{self.made}"]
        known = f"f{self.made * 7919 % self.fill}" if self.fill else names[0]
        return {
            "allocate": microseconds(lambda: self.store.allocate(requests, pool=POOL, created=NOW)),
            "look up": microseconds(lambda: self.store.lease(known)),
            "release": microseconds(lambda: self.store.release(names, freed=0.0)),
        }


class Bare:
    """The same two rows by plain SQL: what SQLite, its journal and the disk take by themselves."""

    def __init__(self, folder: Path) -> None:
        self.db = sqlite3.connect(folder / "bare.db", isolation_level=None)
        self.db.execute("PRAGMA journal_mode = PERSIST")
        self.db.execute("CREATE TABLE lease (block INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)")
        self.db.execute("CREATE TABLE unused (hi INTEGER PRIMARY KEY, lo INTEGER NOT NULL)")
        self.db.execute("INSERT INTO unused VALUES (1032192, 0)")

    def set_synced(self, synced: bool) -> None:
        self.db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'OFF'}")

    def allocate(self) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        lo, hi = self.db.execute("SELECT lo, hi FROM unused ORDER BY hi LIMIT 1").fetchone()
        self.db.execute("UPDATE unused SET lo = ? WHERE hi = ?", (lo + 1, hi))
        self.db.execute("INSERT INTO lease VALUES (?, ?)", (lo, f"b{lo}"))
        self.db.execute("COMMIT")

    def measure(self) -> dict[str, float]:
        return {"bare transaction": microseconds(self.allocate)}


def measure_fills(folder: Path, rounds: int) -> None:
    bare, stores = Bare(folder), [Filled(folder, fill) for fill in FILLS]
    measured: list[Bare | Filled] = [bare, *stores]
    print(f"{'median us (ratio to empty)':<30}" + "".join(f"{fill:>16,}" for fill in FILLS))
    for synced, words in ((False, "not synced"), (True, "durable")):
        os.sync()  # or the first syncs would pay for what was written before
        times: dict[str, list[list[float]]] = {}
        for store in measured:
            store.set_synced(synced)
        for _ in range(rounds // BURST):
            for index, store in enumerate(measured):
                for _ in range(BURST):
                    for name, took in store.measure().items():
                        times.setdefault(name, [[] for _ in range(1 + len(stores))])[index].append(took)
        for name, columns in times.items():
            medians = [statistics.median(column) for column in columns if column]
            print(f"{f'{name}, {words}':<30}" + "".join(f"{m:>9.0f} ({m / medians[0]:.2f})" for m in medians))
    bulk = [ask(f"bulk{n}") for n in range(10_000)]
    for filled in stores:
        filled.set_synced(True)
        os.sync()
        took = microseconds(partial(filled.store.allocate, bulk, pool=POOL, created=NOW))
        print(f"10,000 names in one call, {filled.fill:,} there: {took / len(bulk):.1f} us each, durable")
        filled.store.close()


def allocate_many(folder: Path, worker: int, count: int, ready: Barrier, results: "SimpleQueue[list[float]]") -> None:
    with Store.open(folder, write=True) as store:
        ready.wait()
        results.put(
            [
                microseconds(partial(store.allocate, [ask(f"{worker}-{n}")], pool=POOL, created=NOW))
                for n in range(count)
            ]
        )


def measure_processes(folder: Path, processes: int = 16, count: int = 100) -> None:
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(processes + 1), context.SimpleQueue()
    workers = [
        context.Process(target=allocate_many, args=(folder / "many", worker, count, ready, results))
        for worker in range(processes)
    ]
    for process in workers:
        process.start()
    ready.wait()
    begin = time.perf_counter()
    waits = [wait for _ in workers for wait in results.get()]
    seconds = time.perf_counter() - begin
    for process in workers:
        process.join()
    with Store.open(folder / "many", write=False) as store:
        blocks = {lease.block for lease in store.leases()}
    print(
        f"{processes} processes, {count} durable allocations each: {len(waits) / seconds:.0f} a second,"
        f" longest wait {max(waits) / 1000:.0f} ms, {len(waits) - len(blocks)} blocks given twice"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="vmnet-allocation-") as folder:
        measure_processes(Path(folder))
        measure_fills(Path(folder), options.rounds)


if __name__ == "__main__":
    main()
