"""The watcher as a program: signals, how it tells of itself, and what it told last."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from vmnet.cli.relays import Relaying
from vmnet.cli.show import say
from vmnet.libvirt.listen import Listening
from vmnet.settings import Paths, backend
from vmnet.signs import Service, read_status
from vmnet.systemd import is_in_hosts_netns, systemd_runs
from vmnet.watch import OpenEngine, Orders, Serving, Watcher

NOT_RUNNING = 10


def run(
    open_engine: OpenEngine, paths: Paths, *, interval: float, metrics: Path | None, as_json: bool, **others: Any
) -> None:
    """Keep watch until SIGTERM or SIGINT; SIGHUP has it look at once; `others` is for the watcher."""
    reading, writing = os.pipe()  # macOS has no pipe2
    for end in (reading, writing):
        os.set_blocking(end, False)
    orders = Orders(reading)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number, order in ((signal.SIGTERM, "stop"), (signal.SIGINT, "stop"), (signal.SIGHUP, "look")):
        signal.signal(number, lambda *_, order=order: setattr(orders, order, True))
    service = Service(as_json=as_json)
    Watcher(
        open_engine, service, paths.run, orders, interval=interval, metrics=metrics, domains=Listening(writing),
        relaying=Relaying(), serving=_serving(paths), **others,
    ).watch()  # fmt: skip


def _serving(paths: Paths) -> Serving | None:
    """Return who has a server at hand where systemd does not, which has one by a unit of its own."""
    if backend() != "linux" or (systemd_runs() and is_in_hosts_netns()):
        return None
    from vmnet.server.keeping import Keeping

    return Keeping(paths.run)


def show_status(run: Path, *, as_json: bool) -> int:
    """Print what the watcher last told of itself; return the exit code."""
    status = read_status(run)
    if as_json:
        say(json.dumps(status or {"pid": None}))
    elif status is None:
        say("no watcher is at work; vmnet watch, or the service that vmnet hooks install sets up, is one")
    else:
        _print_status(status)
    return 0 if status else NOT_RUNNING


def _print_status(status: dict[str, Any]) -> None:
    now = time.time()
    counts = status["counts"]
    say(f"watching as process {status['pid']} (vmnet {status['version']}) for {_span(now - status['since'])}")
    say(f"looked {_span(now - status['looked'])} ago, {counts['looks_total']} times, at {status['guests']} guests")
    say(
        f"put right: {counts['changes_total']}, of which no event told: {counts['unannounced_total']};"
        f" events lost: {counts['lost_total']}"
    )
    for word, lines in (("left alone", status["left_alone"]), ("wrong", status["wrong"])):
        for line in lines:
            say(f"{word}: {line}")


def _span(seconds: float) -> str:
    """Return a span of time as a person says it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"
