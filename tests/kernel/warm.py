"""A vmnet that has started already: each call is a fork of a process that has all of it imported.

`Warm.vmnet(laptop, ...)` does what `laptop.vmnet(...)` does, with the same main() in the same namespaces, in a tenth
of the time, which tests that make hundreds of calls live on. `start()` returns at once, for many at the same time;
`strace` has strace watch the call, and kill it where it is told to. Any other place will do as well; one without
namespaces of its own, such as the Mac of tests/darwin, needs no root.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from tests.kernel.net import SOURCES, Laptop, Result

_CHECKOUT = Path(__file__).parents[2]
_ATTACHED = b"attached"
_KILLED = 128
"""A process that a signal ended is told as a shell tells it: 128 and the signal's number."""

_libc = ctypes.CDLL(None, use_errno=True)


class Place(Protocol):
    """Where the command line runs: which namespaces it enters, and its folder and environment there."""

    folder: Path
    env: dict[str, str]

    @property
    def namespaces(self) -> Sequence[str]: ...


class Call:
    """A call under way."""

    def __init__(self, line: str, out: socket.socket, err: socket.socket, status: socket.socket) -> None:
        self._line = line
        self._ends = (out, err, status)

    def wait(self) -> Result:
        """Return how it ended."""
        out, err, status = (_drain(end) for end in self._ends)
        assert status, f"{self._line} was not run: {err}"
        return Result(int(status), out, err)


class Program:
    """A program under way: the client of a server's."""

    def __init__(self, laptop: Laptop, args: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        argv = laptop.command(*laptop.call, *args)
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=laptop.env
        )

    def wait(self) -> Result:
        """Return how it ended."""
        out, err = self._process.communicate()
        code = self._process.returncode
        return Result(code if code >= 0 else _KILLED - code, out, err)


class Warm:
    """The process that is forked; a context manager that ends it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.kernel.warm", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=_CHECKOUT,
                env={**os.environ, "PYTHONPATH": f"{SOURCES}:{_CHECKOUT}"},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, place: Place, *args: str, strace: Sequence[str] = ()) -> "Call | Program":
        """Start the command line there, watched by strace with those options if there are any.

        Where a server is, it is the client that is started, unless strace is to see what is done.
        """
        if isinstance(place, Laptop) and place.server and not strace:
            return Program(place, args)
        request = {
            "namespaces": place.namespaces,
            "folder": str(place.folder),
            "env": place.env,
            "args": args,
            "strace": strace,
        }
        pairs = [socket.socketpair() for _ in range(3)]
        socket.send_fds(self._socket, [json.dumps(request).encode()], [theirs.fileno() for _, theirs in pairs])
        for _, theirs in pairs:
            theirs.close()
        return Call(f"vmnet {' '.join(args)}", *(ours for ours, _ in pairs))

    def vmnet(self, place: Place, *args: str, check: bool = True, strace: Sequence[str] = ()) -> Result:
        """Run the command line there; with `check` another exit code than 0 fails the test."""
        result = self.start(place, *args, strace=strace).wait()
        assert not check or result.code == 0, f"vmnet {' '.join(args)}: {result.code}\n{result.out}{result.err}"
        return result


def _drain(end: socket.socket) -> str:
    with end, end.makefile("rb") as file:
        return file.read().decode()


def _serve(requests: socket.socket) -> None:
    """Fork for each request, until the other end is closed."""
    import pyroute2  # noqa: F401 -- what the slow first carve loads

    import vmnet.cli.main
    import vmnet.linux.usage  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, fds, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not data:
            return
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _enter_and_run(json.loads(data), *fds)
        for fd in fds:
            os.close(fd)


def _enter_and_run(request: dict[str, Any], out: int, err: int, status: int) -> None:
    # All are opened before one is entered: what /proc leads to is then the place's own.
    for fd in [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in request["namespaces"]]:
        if _libc.setns(fd, 0) != 0:
            raise OSError(ctypes.get_errno(), "setns into the place")
        os.close(fd)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.set_inheritable(status, False)
    # Twice: the first child is the first process inside, and can attach strace to the second.
    code = _wait(_fork(lambda: _supervise(request)))
    os.write(status, str(code).encode())
    os._exit(0)


def _supervise(request: dict[str, Any]) -> int:
    if not request["strace"]:
        return _wait(_fork(lambda: _main(request["args"])))

    def stop_and_run() -> int:
        os.kill(os.getpid(), signal.SIGSTOP)
        return _main(request["args"])

    pid = _fork(stop_and_run)
    os.waitpid(pid, os.WUNTRACED)
    with subprocess.Popen(
        ["strace", *request["strace"], "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as tracer:
        assert tracer.stderr is not None
        if not any(_ATTACHED in line for line in tracer.stderr):
            os.kill(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGCONT)
        code = _wait(pid)
        tracer.terminate()  # it lets go of what goes on
        tracer.stderr.read()
    return code


def _main(args: Sequence[str]) -> int:
    from vmnet.cli.main import main

    sys.argv = ["vmnet", *args]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        return int(end.code or 0)
    return 0


def _fork(run: Any) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = run()
        except BaseException:  # noqa: BLE001 -- as the interpreter does at the end of a program
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def _wait(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else _KILLED - code


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
