"""What was measured, as ratios: each round compares programs that ran within the same seconds of the same machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

Samples = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Target:
    """`subject` is to be at most `limit` times `peer` (without a peer: `limit` itself); `least` turns it round."""

    subject: str
    peer: str | None
    limit: float
    least: bool = False

    def __str__(self) -> str:
        return f"{'at least' if self.least else 'at most'} {self.limit:g}" + (f" x {self.peer}" if self.peer else "")


@dataclass(frozen=True, slots=True)
class Range:
    """The median of some values, and how far they reach."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.least)} to {_short(self.most)})"


@dataclass
class Table:
    """One quantity of several ways: `samples` by way, a value a round; `cpu` the same in processor time.

    Tables of one `group` are shown side by side. `alone`: its ways do different things, and are not compared.
    """

    title: str
    unit: str
    samples: Samples = field(default_factory=dict)
    cpu: Samples = field(default_factory=dict)
    targets: Sequence[Target] = ()
    group: str = ""
    alone: bool = False

    def add(self, way: str, value: float, cpu: float | None = None) -> None:
        """Add what a round saw of a way."""
        self.samples.setdefault(way, []).append(value)
        if cpu is not None:
            self.cpu.setdefault(way, []).append(cpu)


def spread(values: Sequence[float]) -> Range:
    """Return median, least and most of `values`, of which there is one at least."""
    return Range(median(values), min(values), max(values))


def ratio(samples: Samples, subject: str, peer: str | None) -> Range | None:
    """Return subject / peer round by round; without a peer the subject itself; None where either was not measured.

    A slow peer runs in the first rounds alone: its median then stands for it in the others.
    """
    own, theirs = samples.get(subject), samples.get(peer) if peer else [1.0]
    if not own or not theirs:
        return None
    filled = [*theirs, *[median(theirs)] * (len(own) - len(theirs))]
    return spread([one / other for one, other in zip(own, filled, strict=False)])


def is_met(target: Target, found: Range) -> bool:
    """Say whether the median is within the target."""
    return found.median >= target.limit if target.least else found.median <= target.limit


def lines(table: Table) -> list[str]:
    """Return a table for a person: a line for each way, then its targets."""
    first = next(iter(table.samples), "")
    head = ["", table.unit, "processor", f"{first} / this", "in processor time"]
    rows = [head]
    for way, values in table.samples.items():
        cells = [way, str(spread(values)), str(spread(table.cpu[way])) if way in table.cpu else ""]
        for samples in (table.samples, table.cpu):
            found = ratio(samples, first, way) if way != first and not table.alone else None
            cells.append(str(found) if found else "")
        rows.append(cells)
    rows = [
        [cell for cell, column in zip(row, zip(*rows[1:], strict=True), strict=True) if any(column)] for row in rows
    ]
    return ["", table.title, *_columns(rows), *_targets([table])]


def matrix(title: str, tables: Sequence[Table]) -> list[str]:
    """Return tables of the same ways side by side, medians alone, then their targets."""
    ways = list(dict.fromkeys(way for table in tables for way in table.samples))
    rows = [["", *(f"{table.title}, {table.unit}" for table in tables)]]
    rows += [[way, *(_short(median(t.samples[way])) if t.samples.get(way) else "-" for t in tables)] for way in ways]
    # Quantities downwards: there are more of them than ways.
    return ["", title, *_columns([list(row) for row in zip(*rows, strict=True)]), *_targets(tables)]


def _targets(tables: Sequence[Table]) -> list[str]:
    found = []
    for table in tables:
        for target in table.targets:
            seen = ratio(table.samples, target.subject, target.peer)
            if seen:
                verdict = "met" if is_met(target, seen) else "MISSED"
                what = f"{table.title}: {target.subject}" if len(tables) > 1 else target.subject
                found.append(f"  {verdict:<6}  {what} {target}: {seen}")
    return found


def as_json(table: Table) -> dict[str, Any]:
    """Return a table for a program."""
    targets = []
    for target in table.targets:
        seen = ratio(table.samples, target.subject, target.peer)
        targets.append(
            {
                "subject": target.subject,
                "peer": target.peer,
                "target": str(target),
                "found": seen.median if seen else None,
                "met": is_met(target, seen) if seen else None,
            }
        )
    return {
        "group": table.group,
        "title": table.title,
        "unit": table.unit,
        "samples": table.samples,
        "processor": table.cpu,
        "targets": targets,
    }


def _short(value: float) -> str:
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
