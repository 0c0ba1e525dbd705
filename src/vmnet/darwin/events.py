"""Hear that something has changed: by `route -n monitor`, a process of its own, whatever it says.

Routing sockets of macOS lose events and fall silent, so nothing is made of what a line says, nor of there being none:
the watcher looks at every interval anyway.
"""

import os
import select
import subprocess
from collections.abc import Sequence
from contextlib import suppress

from vmnet.darwin.programs import environment, find
from vmnet.model import HostLacks, Lease
from vmnet.platform import Heard

_CHUNK = 1 << 16


class Monitor:
    """The process, until it ends or is closed; `wakeup` ends a wait."""

    def __init__(self, wakeup: int) -> None:
        self._wakeup = wakeup
        self._names: frozenset[str] = frozenset()
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(HostLacks, OSError):
            self._process = subprocess.Popen(
                [find("route"), "-n", "monitor"],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )

    def expect(self, leases: Sequence[Lease]) -> None:
        """Know the guests."""
        self._names = frozenset(lease.name for lease in leases)

    def attend(self, process: int | None) -> None:
        """Know the process that answers guests: there is none."""

    def hear(self, timeout: float) -> Heard:
        """Wait so many seconds for a line, and return that any guest may have changed."""
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        pipe = self._process.stdout if self._process else None
        if pipe:
            poll.register(pipe, select.POLLIN)
        ready = {handle for handle, _ in poll.poll(max(0.0, timeout) * 1000)}
        if pipe is None or pipe.fileno() not in ready:
            return Heard()
        if os.read(pipe.fileno(), _CHUNK):
            return Heard(names=self._names)
        self.close()
        return Heard(lost=True)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process and process.stdout:
            process.stdout.close()
            process.kill()
            process.wait()
