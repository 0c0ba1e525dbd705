"""`python -m benchmarks [ROW...] [--rounds N] [--quick] [--json]`: vmnet and its peers, alternating in one run.

Needs root and makes namespaces of its own; see benchmarks/README.md.
"""

import argparse
import json
import os
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from benchmarks.lab import Failed
from benchmarks.report import as_json, lines, matrix
from benchmarks.rows import ROWS, Bench, clean_up

_ROUNDS, _MANY = 20, 1000
_QUICK_ROUNDS, _QUICK_MANY = 5, 100


def main() -> int:
    """Measure the rows asked for, print them, and return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; all without one")
    parser.add_argument("--rounds", type=int, help=f"how often everything is done ({_ROUNDS})")
    parser.add_argument("--many", type=int, help=f"how many guests are many ({_MANY})")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_ROUNDS} rounds, {_QUICK_MANY} are many")
    parser.add_argument("--json", action="store_true", help="print all samples, for a program")
    asked = parser.parse_args()
    for row in asked.rows:
        if row not in ROWS:
            parser.error(f"there is no row {row}: {', '.join(ROWS)}")
    if os.geteuid() != 0:
        parser.error("this needs root: it makes network namespaces")
    found = {}
    for row in asked.rows or ROWS:
        bench = Bench(
            # On a real disk: what is durable has its price there.
            folder=Path(tempfile.mkdtemp(prefix="vmnet-benchmarks-", dir="/var/tmp")),
            rounds=asked.rounds or (_QUICK_ROUNDS if asked.quick else _ROUNDS),
            many=asked.many or (_QUICK_MANY if asked.quick else _MANY),
            say=lambda text: print(f"... {text}", file=sys.stderr, flush=True),
        )
        try:
            tables = ROWS[row](bench)
        except Failed as error:
            print(f"{row}: {error}", file=sys.stderr)
            return 1
        finally:
            clean_up(bench)
        found[row] = [as_json(table) for table in tables]
        for group, members in groupby(tables, lambda table: table.group):
            together = list(members)
            shown = matrix(group, together) if group else [line for one in together for line in lines(one)]
            print("\n".join(shown), file=sys.stderr if asked.json else sys.stdout, flush=True)
    if asked.json:
        print(json.dumps(found))
    return 0


sys.exit(main())
