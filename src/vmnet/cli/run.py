"""A guest for as long as a command runs: made before it, deleted after it, whatever happens in between.

Three processes: the caller's waits for the command, its child becomes the command, and another, the heir, waits for
the end of the first. A file beside the records, locked for as long as the first lives, says that the guest goes with
its run: who gets the lock deletes the guest. That is the run itself at its end; the heir, where the run was killed; and
where both were (or the machine was switched off) the next `run`, the next `up` or the boot.
"""

import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from vmnet.cli.show import Reporter, as_json
from vmnet.engine import Engine, Seen
from vmnet.model import Conflict, KernelRefused, NoSuchGuest, UsageError, VmnetError
from vmnet.platform import Report
from vmnet.settings import Settings
from vmnet.specs import GuestSpec

_PREFIX, _SUFFIX = "run-", ".lock"
_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_HEARD = {*_ENDING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP, signal.SIGCONT, signal.SIGCHLD}
# A terminal sends these to all of the foreground's processes: the command has them already.
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP)
_SI_KERNEL = 0x80  # siginfo's si_code of what no process sent (sigaction(2))
_PR_SET_PDEATHSIG = 1


def run(
    open_engine: Callable[[Report], AbstractContextManager[Engine]],
    engine: Engine,
    spec: GuestSpec,
    command: Sequence[str],
) -> int:
    """Make the guest, run `command` inside it or, where it is in no namespace, beside it, and delete the guest.

    Returns the command's exit code, 128 and the signal's number where one ended it. Raises Conflict where a guest of
    that name is there, and what keeps the guest from being made or the command from being run, the guest deleted.
    """
    argv = command[1:] if command[:1] == ["--"] else command
    if not argv:
        raise UsageError("no command is given", hint=f"vmnet run {spec.name} -- CMD...")
    end_dead_runs(engine)
    with suppress(NoSuchGuest):
        raise Conflict(f"{engine.lease(spec.name).name} exists already", hint="take another name")
    marker = _marker(engine.paths.state, spec.name)
    with _undisturbed(marker.parent):
        lock = _lock(marker, make=True, wait=False)
    if lock is None:
        raise Conflict(f"another run of {spec.name} is not at its end", hint="take another name")
    heir = _fork(lambda: _inherit(open_engine, marker))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        before = _leave_by_signals()
        try:
            [seen] = engine.create_and_look([spec])
        except (VmnetError, OSError):
            marker.unlink()  # what was made of it is undone, and what is there is not ours
            raise
        os.pwrite(lock, seen.lease.created.encode(), 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        environment = _environment(seen, engine.settings)
        return _attend(_start(lambda: _become(engine, seen, environment, argv), before, mask))
    finally:
        _stay(mask)
        try:
            if marker.exists():
                _end(engine, marker, lock)
        finally:
            os.kill(heir, signal.SIGKILL)
            os.waitpid(heir, 0)


def cannot_run(program: str, error: OSError) -> KernelRefused:
    """Return what to raise where `program` cannot be run, its exit code that of shells and of env(1)."""
    refused = KernelRefused(f"{program} cannot be run: {error.strerror}")
    refused.exit_code = 127 if isinstance(error, FileNotFoundError) else 126
    return refused


def end_dead_runs(engine: Engine) -> None:
    """Delete the guests of runs that were killed together with their heirs."""
    engine.platform.need_rights()
    markers = sorted(engine.paths.state.glob(f"{_PREFIX}*{_SUFFIX}"))
    if not markers:
        return
    with _undisturbed(engine.paths.state):
        held = [(marker, _lock(marker, make=False, wait=False)) for marker in markers]
    for marker, lock in held:
        if lock is not None:
            _end(engine, marker, lock)


def _marker(state: Path, name: str) -> Path:
    if not state.is_dir():
        state.mkdir(parents=True, exist_ok=True)
        state.chmod(0o755)
    return state / f"{_PREFIX}{name}{_SUFFIX}"


@contextmanager
def _undisturbed(state: Path) -> Iterator[None]:
    """Hold the folder: a marker that is there, but not locked yet, would look like that of a dead run."""
    handle = os.open(state, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _lock(marker: Path, *, make: bool, wait: bool) -> int | None:
    """Return the marker, locked; None where it is gone, or another process has it and that is not to be waited for."""
    while True:
        try:
            lock = os.open(marker, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)  # its run came to its end in between


def _end(engine: Engine, marker: Path, lock: int) -> None:
    """Delete the guest of a run whose marker is held, unless another one bears its name by now, and the marker."""
    name = marker.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    created = os.pread(lock, 64, 0).decode()
    with suppress(NoSuchGuest):
        if engine.lease(name).created == created or not created:
            engine.delete([name])
    marker.unlink()
    os.close(lock)


def _leave_by_signals() -> dict[signal.Signals, Any]:
    """Have each signal that ends a program raise SystemExit, but for those ignored; return what was to happen before.

    Where SIGCHLD was ignored, nobody would hear how the command ends.
    """
    before = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGCHLD)}
    for number in _ENDING:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return before


def _stay(mask: set[int | signal.Signals]) -> None:
    """Have no signal end this process any more; `mask` is what was blocked before.

    By handlers: what is blocked or ignored stays so in programs that are started, such as dnsmasq.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    for number in (*_ENDING, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _environment(seen: Seen, settings: Settings) -> dict[str, str]:
    """Return what the command is told of its guest; what the guest has not is empty."""
    guest = as_json(seen, settings)
    keys = ("name", "address", "gateway", "guest_address", "guest_gateway", "device", "mac")
    return {f"VMNET_{key.upper()}": guest[key] or "" for key in keys}


def _become(engine: Engine, seen: Seen, environment: Mapping[str, str], argv: Sequence[str]) -> NoReturn:
    os.environ.update(environment)
    try:
        if seen.lease.netns:
            engine.execute(seen.lease.name, argv)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # Python ignores them, and what it starts would do so too
        os.execvp(argv[0], list(argv))
    except OSError as error:
        raise cannot_run(argv[0], error) from None


def _start(
    become: Callable[[], NoReturn], before: Mapping[signal.Signals, Any], mask: set[int | signal.Signals]
) -> int:
    """Return the child that has become the command, or raise why it has not."""
    parent = os.getpid()
    reading, writing = os.pipe()  # the writing end closes as the child becomes another program

    def child() -> None:
        from vmnet.linux.places import call

        call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
        for number, handler in before.items():
            signal.signal(number, handler if handler == signal.SIG_IGN else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            become()
        except VmnetError as error:
            os.write(writing, json.dumps([error.exit_code, error.message, error.hint]).encode())

    pid = _fork(child)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    if told:
        os.waitpid(pid, 0)
        code, message, hint = json.loads(told)
        refused = VmnetError(message, hint=hint)
        refused.exit_code = code
        raise refused
    return pid


def _attend(child: int) -> int:
    """Hand signals on to the child, stop when it stops, and return how it ended."""
    while True:
        heard = signal.sigwaitinfo(_HEARD)
        assert heard is not None
        if heard.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                os.kill(os.getpid(), signal.SIGSTOP)  # so that the shell takes its terminal back
            elif pid:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        elif heard.si_pid != child and not (heard.si_code == _SI_KERNEL and heard.si_signo in _FROM_TERMINAL):
            os.kill(child, heard.si_signo)


def _inherit(open_engine: Callable[[Report], AbstractContextManager[Engine]], marker: Path) -> None:
    """Wait for the end of the run that has `marker`, and do what it has left undone."""
    os.setsid()  # what a terminal or a shell sends to the run is not for its heir
    _stay(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # nobody is to wait for the end of a pipe because of the heir
    lock = _lock(marker, make=False, wait=True)
    if lock is not None:
        with Reporter(verbose=False) as reporter, open_engine(reporter) as engine:
            _end(engine, marker, lock)


def _fork(do: Callable[[], None]) -> int:
    """Return a child that does `do` and nothing else."""
    pid = os.fork()
    if pid:
        return pid
    try:
        do()
    finally:
        os._exit(1)
