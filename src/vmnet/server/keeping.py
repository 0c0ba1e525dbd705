"""Have a server where no systemd starts one: whoever keeps watch listens, and starts it when somebody asks first."""

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

from vmnet.members import group_id
from vmnet.model import VmnetError
from vmnet.server.listening import Listener

_MAIN = Path(__file__).parents[1] / "__main__.py"
_SHORT, _PAUSE = 5.0, 5.0  # seconds: one that ends sooner is not started again at once
_PATIENCE = 10.0  # seconds for the server to finish what it has begun
_NOT_ITS_OWN = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # they are about this process (sd_notify(3))


class Keeping:
    """A thread that listens; it ends with `close`, and the server with it."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._stop: tuple[int, int] | None = None
        self._thread: Thread | None = None

    def start(self, log: Callable[..., None]) -> None:
        """Listen from now on; where that cannot be, tell `log`, and commands work without a server."""
        listener = Listener(self._run, group_id())
        try:
            heard = listener.__enter__()
        except VmnetError as error:
            log("no server", level="warning", reason=error.message)
            return
        self._stop = os.pipe2(os.O_CLOEXEC)

        def keep() -> None:
            try:
                self._keep(heard)
            finally:
                listener.__exit__()

        self._thread = Thread(target=keep, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the server, and listen no more."""
        if self._thread and self._stop:
            os.close(self._stop[1])
            self._thread.join()
            os.close(self._stop[0])
            self._thread = None

    def _keep(self, listener: socket.socket) -> None:
        while not self._stops(listener.fileno()):
            started = time.monotonic()
            options = ["--fd", str(listener.fileno()), "--parent", str(os.getpid())]
            argv = [sys.executable, "-I", str(_MAIN), "serve", *options]
            server = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                env={name: value for name, value in os.environ.items() if name not in _NOT_ITS_OWN},
            )
            handle = os.pidfd_open(server.pid)
            stopped = self._stops(handle)
            os.close(handle)
            if stopped:
                server.terminate()
                with suppress(subprocess.TimeoutExpired):
                    server.wait(_PATIENCE)
                server.kill()
            server.wait()
            if not stopped and time.monotonic() - started < _SHORT:
                self._stops(-1, _PAUSE)

    def _stops(self, handle: int, seconds: float | None = None) -> bool:
        """Wait for something at `handle`, or so long; say whether it is the end that came."""
        assert self._stop is not None
        end = self._stop[0]
        wanted = [end] if handle < 0 else [end, handle]
        return end in select.select(wanted, [], [], seconds)[0]
