"""Hear from libvirt which domains there are, for the watcher: by a process that may hang or die instead of it.

Nothing here ever waits. Without libvirt-python or a libvirtd nothing is heard, and a libvirtd that has ended or hangs
is tried again, ever more seldom.
"""

import json
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from vmnet.libvirt.ask import SYSTEM, client

# Of libvirtd, and of the daemon for qemu alone (libvirt's "daemons" page).
_SOCKETS = ("libvirt/libvirt-sock-ro", "libvirt/virtqemud-sock-ro")
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 600.0  # seconds
_CHUNK = 1 << 16


class Listening:
    """The process that listens, while it is wanted; `wakeup` is written to when there is something to hear."""

    def __init__(self, wakeup: int, *, run: Path = Path("/run")) -> None:
        self._wakeup = wakeup
        self._run = run
        self._process: subprocess.Popen[bytes] | None = None
        self._partial = b""
        self._pause, self._again = _FIRST_PAUSE, 0.0

    def hear(self, *, wanted: bool) -> frozenset[str] | None:
        """Return the UUIDs of all domains that libvirt has, None where nothing new was heard; never waits."""
        if not wanted:
            self.close()
            return None
        there = self._read(self._process) if self._process else None
        if self._process is None:
            self._start()
        return there

    def close(self) -> None:
        """End the process."""
        process, self._process, self._partial = self._process, None, b""
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with suppress(OSError):
                    pipe.close()
        process.kill()
        process.wait()

    def _start(self) -> None:
        now = time.monotonic()
        if now < self._again or not any((self._run / name).exists() for name in _SOCKETS):
            return
        self._again = now + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        try:
            process = subprocess.Popen(
                client("listen", SYSTEM, str(self._wakeup)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(self._wakeup,),
                bufsize=0,
            )
        except OSError:
            return
        assert process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        self._process = process

    def _read(self, process: subprocess.Popen[bytes]) -> frozenset[str] | None:
        assert process.stdout
        ended = False
        with suppress(BlockingIOError):
            while True:
                data = os.read(process.stdout.fileno(), _CHUNK)
                if not data:
                    ended = True
                    break
                self._partial += data
        *lines, self._partial = self._partial.split(b"\n")
        if ended:
            self.close()
        with suppress(ValueError, IndexError, TypeError):
            there = frozenset(json.loads(lines[-1]))
            self._pause = _FIRST_PAUSE
            return there
        return None
