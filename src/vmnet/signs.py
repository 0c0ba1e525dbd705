"""What a watcher shows to others: its log, a file of its state, metrics, and signs of life to whoever runs it."""

import json
import os
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmnet import __version__
from vmnet.ondisk import replace

_PRIORITIES = {"info": 6, "warning": 4, "error": 3}  # syslog(3)
# What is counted, and how Prometheus is told (its text format, version 0.0.4); those with causes bear a label.
_HELP = {
    "looks_total": "Looks at the kernel.",
    "changes_total": "Steps that put right what differed from the records.",
    "unannounced_total": "Steps that put right what no event had told of.",
    "lost_total": "Times that the kernel said that events were lost.",
    "opened_total": "Times that the sockets to the kernel were opened.",
    "fights_total": "Times that a step was left alone because somebody undid it again and again.",
}


class Service:
    """The log on stderr, and the notes to systemd of a service of Type=notify (sd_notify(3))."""

    def __init__(self, *, as_json: bool = False) -> None:
        self._json = as_json
        self._prefix = "JOURNAL_STREAM" in os.environ and not as_json
        self._socket = os.environ.get("NOTIFY_SOCKET", "")
        self._patience = int(os.environ.get("WATCHDOG_USEC") or 0) / 4e6
        self._spoke = 0.0

    @property
    def patience(self) -> float:
        """In how many seconds at the latest a sign of life is due, 0 for never."""
        return self._patience

    def ready(self) -> None:
        """Say that the service is up."""
        self._notify("READY=1")

    def alive(self) -> None:
        """Give a sign of life, if one is due."""
        now = time.monotonic()
        if self._patience and now - self._spoke >= self._patience:
            self._spoke = now
            self._notify("WATCHDOG=1")

    def log(self, event: str, *, level: str = "info", **fields: str) -> None:
        """Write one line: what, and its circumstances as key=value."""
        if self._json:
            line = json.dumps({"time": time.time(), "level": level, "event": event, **fields})
        else:
            line = " ".join([f"vmnet: {event}", *(f"{key}={_quoted(value)}" for key, value in fields.items())])
        with suppress(OSError):
            sys.stderr.write(f"<{_PRIORITIES[level]}>{line}\n" if self._prefix else f"{line}\n")
            sys.stderr.flush()

    def _notify(self, text: str) -> None:
        if not self._socket:
            return
        address = "\0" + self._socket[1:] if self._socket.startswith("@") else self._socket
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(address)
            sender.send(text.encode(), socket.MSG_DONTWAIT)


def _quoted(value: str) -> str:
    return value if value and value.isprintable() and not set(value) & set(' "=') else json.dumps(value)


class Signs:
    """The counters of a watcher, and the two files in the folder `run` that show them."""

    def __init__(self, run: Path, metrics: Path | None, interval: float) -> None:
        self._status = run / "watch.json"
        self._metrics = metrics or run / "vmnet.prom"
        self._since = time.time()
        self._interval = interval
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, what: str, cause: str = "", times: int = 1) -> None:
        """Count something that happened."""
        self._counts[what, cause] += times

    def show(self, guests: int, held: list[str], wrong: list[str]) -> None:
        """Write both files; where that cannot be, nobody can look."""
        status = {
            "pid": os.getpid(),
            "version": __version__,
            "since": self._since,
            "looked": time.time(),
            "interval": self._interval,
            "guests": guests,
            "counts": {what: self._sum(what) for what in _HELP},
            "left_alone": held,
            "wrong": wrong,
        }
        with suppress(OSError):
            replace(self._status, json.dumps(status))
        with suppress(OSError):
            replace(self._metrics, self._as_metrics(guests, len(held), len(wrong)))

    def _sum(self, what: str) -> int:
        return sum(times for (name, _), times in self._counts.items() if name == what)

    def _as_metrics(self, guests: int, held: int, wrong: int) -> str:
        lines = []
        for what, text in _HELP.items():
            lines += [f"# HELP vmnet_watch_{what} {text}", f"# TYPE vmnet_watch_{what} counter"]
            causes = {cause: times for (name, cause), times in sorted(self._counts.items()) if name == what}
            for cause, times in (causes or {"": 0}).items():
                label = f'{{cause="{cause}"}}' if cause else ""
                lines.append(f"vmnet_watch_{what}{label} {times}")
        gauges = {
            "looked_timestamp_seconds": ("When the kernel was last looked at.", f"{time.time():.3f}"),
            "start_timestamp_seconds": ("When the watcher started.", f"{self._since:.3f}"),
            "guests": ("Guests that are recorded.", str(guests)),
            "left_alone": ("Steps that are left alone at present.", str(held)),
            "wrong": ("Things that stay wrong.", str(wrong)),
        }
        for what, (text, value) in gauges.items():
            lines += [f"# HELP vmnet_watch_{what} {text}", f"# TYPE vmnet_watch_{what} gauge"]
            lines.append(f"vmnet_watch_{what} {value}")
        return "\n".join(lines) + "\n"

    def stop(self) -> None:
        """Take both files away: nobody is at work any more."""
        for file in (self._status, self._metrics):
            with suppress(OSError):
                file.unlink()


def read_status(run: Path) -> dict[str, Any] | None:
    """Return what a watcher last wrote of itself, None where none is at work."""
    try:
        status: dict[str, Any] = json.loads((run / "watch.json").read_text())
        with suppress(PermissionError):  # it is there, and another user's
            os.kill(status["pid"], 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return status
