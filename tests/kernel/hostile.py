"""What an ordinary user can do to a socket, told line by line on stdin; it imports nothing but the standard library."""

import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

SERVER = "/run/vmnet/server.sock"
_O_PATH = 0o10000000
_held: list[socket.socket] = []
_listening: list[socket.socket] = []


def main() -> None:
    """Do one thing a line, and say on one line what came of it."""
    for line in sys.stdin:
        words = json.loads(line)
        print(json.dumps(_DEEDS[words.pop("deed")](**words)), flush=True)


def _connect(patience: float = 10.0) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(patience)
    made.connect(SERVER)
    return made


def _descriptor(kind: str) -> int:
    if kind == "pipe":
        return os.pipe()[0]
    if kind == "socket":
        return _connect().detach()
    if kind == "path":
        return os.open("/", _O_PATH)
    if kind == "deleted":
        return os.memfd_create("deleted")
    if kind == "file":
        return os.open("/run/hosts", os.O_RDONLY)
    return os.open(kind, os.O_RDONLY)


def _receive(connection: socket.socket) -> str:
    parts = []
    try:
        while part := connection.recv(1 << 17):
            parts.append(part)
    except OSError as error:
        parts.append(f"<{type(error).__name__}>".encode())
    return b"".join(parts).hex()


def _send(data: str, kinds: Sequence[str], patience: float) -> str:
    try:
        with _connect(patience) as connection:
            handles = [_descriptor(kind) for kind in kinds]
            try:
                socket.send_fds(connection, [bytes.fromhex(data)], handles)
            finally:
                for handle in handles:
                    os.close(handle)
            return _receive(connection)
    except OSError as error:
        return f"<{error}>".encode().hex()


def _crowd(count: int, data: str) -> dict[str, int]:
    """Connect so often, say `data` on each connection if there is any, and stay; return how many were let in."""
    for _ in range(count):
        try:
            connection = _connect()
            if data:
                connection.send(bytes.fromhex(data))
        except OSError:
            continue
        connection.setblocking(False)
        _held.append(connection)
    time.sleep(0.5)
    return {"let in": sum(map(_is_open, _held))}


def _is_open(connection: socket.socket) -> bool:
    """Say whether nothing has come, and no end."""
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _leave() -> int:
    for connection in _held:
        connection.close()
    gone = len(_held)
    _held.clear()
    return gone


def _die(data: str, after: float) -> int:
    """Have a child ask, and die so long after it; return its wait status."""
    pid = os.fork()
    if pid == 0:
        connection = _connect()
        connection.send(bytes.fromhex(data))
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _come_and_go(times: int) -> int:
    """Connect and end at once, as often as that; return how often there was somebody."""
    met = 0
    for _ in range(times):
        pid = os.fork()
        if pid == 0:
            try:
                _connect()
            except OSError:
                os._exit(1)
            os._exit(0)
        met += os.waitpid(pid, 0)[1] == 0
    return met


def _linger(seconds: int) -> int:
    """Leave on a connection too many a socket that does not end before its data has been taken, which never is."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    for _ in range(8):
        sender = socket.create_connection(listener.getsockname())
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
        sender.setblocking(False)
        try:
            while sender.send(bytes(1 << 16)):
                pass
        except BlockingIOError:
            pass
        connection = _connect()
        with suppress(OSError):
            socket.send_fds(connection, [b"x"], [sender.fileno()])
        sender.close()
        _held.append(connection)
    _listening.append(listener)
    return len(_held)


def _never_read(data: str) -> bool:
    """Ask, and never read the answer."""
    connection = _connect()
    connection.send(bytes.fromhex(data))
    _held.append(connection)
    return True


def _in_pieces(pieces: Sequence[str]) -> str:
    """Send a question in pieces."""
    with _connect() as connection:
        try:
            for piece in pieces:
                connection.send(bytes.fromhex(piece))
                time.sleep(0.05)
        except OSError:
            pass
        return _receive(connection)


def _spoil() -> list[str]:
    """Try to change what is at the socket's place; return what could be done."""
    done = []
    deeds: dict[str, Any] = {
        "unlink": lambda: os.unlink(SERVER),
        "rename": lambda: os.rename(SERVER, SERVER + ".old"),
        "link": lambda: os.symlink("/tmp", "/run/vmnet/server.sock.new"),
        "hidden": lambda: os.symlink("/tmp", "/run/vmnet/.server.sock.new"),
        "bind": lambda: socket.socket(socket.AF_UNIX).bind("/run/vmnet/other.sock"),
        "chmod": lambda: os.chmod(SERVER, 0o777),
        "folder": lambda: os.rename("/run/vmnet", "/run/vmnet.old"),
        "lock": lambda: os.open("/run/vmnet/server.lock", os.O_RDWR),
    }
    for name, deed in deeds.items():
        try:
            deed()
        except OSError:
            continue
        done.append(name)
    return done


_DEEDS: dict[str, Any] = {
    "send": _send,
    "crowd": _crowd,
    "leave": _leave,
    "die": _die,
    "never read": _never_read,
    "in pieces": _in_pieces,
    "come and go": _come_and_go,
    "linger": _linger,
    "spoil": _spoil,
}
