"""What a fork does for a client: for root it becomes the client, for anybody else it answers a question."""

import io
import locale
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from vmnet.client import ASK, BEGUN, DIRECT, EXITED, MAGIC, RUN

_CHUNK = 1 << 16  # bytes of an answer in one message
_SOCKET_MESSAGE = 1 << 16
_PATIENCE = 5.0  # seconds for a question to be there, and for an answer to be taken


@dataclass(frozen=True, slots=True)
class Order:
    """A command line of root's, with its environment; `code` tells the client's vmnet from others."""

    code: bytes
    words: tuple[str, ...]
    environment: Mapping[str, str]


def parse_order(request: bytes) -> Order | None:
    """Return the command line in a request of the form of vmnet.client, None for one of another form."""
    magic, _, rest = request.partition(b"\0")
    kind, _, rest = rest.partition(b"\0")
    code, _, rest = rest.partition(b"\0")
    count, _, rest = rest.partition(b"\0")
    if (magic, kind) != (MAGIC, RUN) or not count.isdigit() or len(count) > 6:
        return None
    fields = rest.split(b"\0")
    if len(fields) < int(count):
        return None
    words = tuple(map(os.fsdecode, fields[: int(count)]))
    pairs = [one.partition(b"=") for one in fields[int(count) :] if one]
    return Order(code, words, {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs if name})


def parse_question(request: bytes) -> bytes | None:
    """Return the question in a request, None for one of another form."""
    magic, _, rest = request.partition(b"\0")
    kind, _, rest = rest.partition(b"\0")
    return rest if (magic, kind) == (MAGIC, ASK) else None


def prepare(order: Order, descriptors: Sequence[int]) -> bool:
    """Take what is a client's own, and use none of it: who that is may not be known yet. Say whether it can be had.

    `descriptors` are its 0, 1, 2 and current folder.
    """
    try:
        for number, descriptor in enumerate(descriptors[:3]):
            os.dup2(descriptor, number)
        os.fchdir(descriptors[3])
    except OSError:  # its folder is closed to root (NFS, FUSE), though it has been there before
        return False
    for descriptor in descriptors:
        os.close(descriptor)
    for name in os.environ.keys() - order.environment.keys():
        del os.environ[name]
    for name, value in order.environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    sys.argv = ["vmnet", *order.words]
    return True


def become(client: socket.socket, umask: int, main: Callable[[], None]) -> bytes:
    """Run the command line that was prepared as the client's own process would; return how it ended, for the client.

    Nothing is begun for a client that has gone: that raises OSError.
    """
    client.send(BEGUN)
    os.umask(umask)
    _open_streams()
    code = _exit_code(main)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number in range(3):
        os.dup2(null, number)  # who reads what was written sees its end now, not when this process is all taken apart
    return b"%s%d" % (EXITED, code)


def _open_streams() -> None:
    """Have text written as the client's locale has it: what Python does at its start (PEP 538, PEP 540)."""
    with suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "")
    is_plain = locale.setlocale(locale.LC_CTYPE) in ("C", "POSIX")
    encoding = "utf-8" if is_plain else locale.nl_langinfo(locale.CODESET)
    errors = "surrogateescape" if is_plain else "strict"
    sys.stdin = open(0, encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
    raw = io.FileIO(2, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=True
    )


def _exit_code(main: Callable[[], None]) -> int:
    """Run `main` as the interpreter runs a program, and return the exit code."""
    code: int | str | None = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        main()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # and the server tells how it ended
    except BaseException:  # noqa: BLE001 -- the interpreter shows it at the end of a program
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120  # what Python exits with (Py_FinalizeEx)
    return (code or 0) & 0xFF


def answer(client: socket.socket, reply: Callable[[bytes, list[int]], bytes]) -> None:
    """Read one question from a client, and send what `reply` says to it, in as many messages as it takes.

    An empty reply is told as one that is not for this server.
    """
    client.settimeout(_PATIENCE)
    try:
        request, descriptors, flags, _ = socket.recv_fds(client, _SOCKET_MESSAGE, 2)
    except OSError:
        return
    question = parse_question(request)
    if question is None or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        return
    with suppress(OSError):
        client.send(BEGUN)
        text = reply(question, descriptors) or DIRECT
        for start in range(0, len(text), _CHUNK):
            client.send(text[start : start + _CHUNK])
