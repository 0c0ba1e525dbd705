"""Run a watcher that has lost a sense, for tests: python -m tests.kernel.senseless SENSE --interval SECONDS

deaf: no event ever comes. dead: a socket of it is none any more, after each time that it was opened. asleep: deaf,
and its wall clock is as many seconds ahead as the file `ahead` in the current folder says, as after a suspend.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmnet import watch
from vmnet.cli import watch as program
from vmnet.cli.main import _open_engine
from vmnet.engine import Engine
from vmnet.model import Lease
from vmnet.platform import EventSource, Heard
from vmnet.settings import Paths
from vmnet.truces import Truces


class Deaf:
    """Hears nothing; a signal or a tenth of a second ends the waiting."""

    def expect(self, leases: Sequence[Lease]) -> None:
        """Expect nothing."""

    def attend(self, process: int | None) -> None:
        if process is not None:
            os.close(process)

    def hear(self, timeout: float) -> Heard:
        """Hear nothing for a while."""
        time.sleep(min(max(timeout, 0), 0.1))
        return Heard()

    def close(self) -> None:
        """Close nothing."""


class Dying:
    """Hears as it should, until its first socket is none any more."""

    def __init__(self, real: EventSource) -> None:
        self._real = real
        self._calls = 0

    def expect(self, leases: Sequence[Lease]) -> None:
        """Expect what the real one does."""
        self._real.expect(leases)

    def attend(self, process: int | None) -> None:
        self._real.attend(process)

    def hear(self, timeout: float) -> Heard:
        """Hear, but lose a socket after a few times."""
        self._calls += 1
        if self._calls == 4:
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), next(iter(self._real._readers)), inheritable=False)  # type: ignore[attr-defined]
        return self._real.hear(timeout)

    def close(self) -> None:
        """Close the real one, as far as it is open."""
        self._real.close()


def _ahead() -> watch.Clocks:
    try:
        ahead = float(Path("ahead").read_text())
    except (FileNotFoundError, ValueError):
        ahead = 0.0
    return watch.Clocks(time.time() + ahead, time.monotonic())


def _deaf(engine: Engine, wakeup: int) -> EventSource:
    return Deaf()


def _dying(engine: Engine, wakeup: int) -> EventSource:
    return Dying(watch.open_events(engine, wakeup))


def main() -> None:
    """Run it until it is told to end."""
    sense, _, interval = sys.argv[1:4]
    senses: dict[str, dict[str, Any]] = {
        "deaf": {"open_events": _deaf, "truces": Truces(10**6)},
        "dead": {"open_events": _dying},
        "asleep": {"open_events": _deaf, "clocks": _ahead},
    }
    program.run(
        _open_engine, Paths.from_environment(), interval=float(interval), metrics=None, as_json=False, **senses[sense]
    )


if __name__ == "__main__":
    main()
