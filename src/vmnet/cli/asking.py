"""Have the server do for a user what takes root: the client of the typed protocol, in the user's own process."""

import json
import os
import socket
import sys
from typing import Any, NoReturn

from vmnet import __version__
from vmnet.client import ASK, BEGUN, DIRECT, MAGIC, PATIENCE, connect
from vmnet.members import GROUP, group_id
from vmnet.model import (
    Conflict,
    HostLacks,
    KernelRefused,
    NoSuchGuest,
    NotPermitted,
    PoolExhausted,
    UsageError,
    VmnetError,
)
from vmnet.requests import LARGEST, MOST_NAMES, Answer, Question
from vmnet.settings import Paths

_ANSWERED = 150.0  # seconds; the server gives up before
_KINDS: tuple[type[VmnetError], ...] = (
    KernelRefused, UsageError, NoSuchGuest, Conflict, PoolExhausted, NotPermitted, HostLacks,
)  # fmt: skip


def ask(paths: Paths, *, netns: str | None = None, **fields: Any) -> Answer | None:
    """Return what the server answers to a Question of these fields, None where no server is for this.

    `netns` is a path to a namespace, which is opened here. Raises what the server refuses, as the engine would; and
    NotPermitted for a user who may not ask.
    """
    question = Question(place=str(paths.state), version=__version__, netns=netns is not None, **fields)
    if len(question.names) > MOST_NAMES:
        raise UsageError(f"without root {MOST_NAMES} guests can be named at a time, not {len(question.names)}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        if not _connect(server):
            return None
        handles = [] if netns is None else [_open(netns)]
        try:
            data = _exchange(server, question, handles)
        finally:
            for handle in handles:
                os.close(handle)
    if data in (b"", DIRECT):
        return None
    answer = _decode(data)
    for warning in answer.warnings:
        print(f"vmnet: warning: {warning}", file=sys.stderr)
    for step in answer.steps:
        print(step, file=sys.stderr)
    return answer


def _connect(server: socket.socket) -> bool:
    """Connect to a server of root's; say whether there is one. Raises NotPermitted for a user who may not."""
    server.settimeout(PATIENCE)
    try:
        return connect(server)
    except PermissionError:
        make = "" if group_id() is not None else f"sudo groupadd --system {GROUP}; sudo vmnet hooks install; "
        raise NotPermitted(
            f"this needs root, or membership in the group {GROUP}",
            hint=f"run it with sudo; or {make}sudo usermod -aG {GROUP} USER, and log in anew",
        ) from None
    except OSError:
        return False


def _open(netns: str) -> int:
    path = netns if netns.startswith("/") else f"/run/netns/{netns}"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotPermitted(
            f"there is no network namespace at {path}, and to make one there takes root",
            hint="--netns /proc/PID/ns/net, of a process in a namespace of your own; or run it with sudo",
        ) from None
    except OSError as error:
        raise NotPermitted(f"{path} cannot be opened: {error.strerror}", hint="name a namespace of your own") from None


def _exchange(server: socket.socket, question: Question, handles: list[int]) -> bytes:
    """Send the question, and return all that comes back until the end; nothing from one who does not begin."""
    request = b"\0".join((MAGIC, ASK, question.encode()))
    if len(request) > LARGEST:
        raise UsageError("that is more than can be asked of the server at a time", hint="name fewer guests")
    try:
        socket.send_fds(server, [request], handles)
        first = server.recv(1 << 17)
    except TimeoutError:
        raise KernelRefused(f"the server has not begun after {PATIENCE:g} s", hint="try again") from None
    except OSError:
        return b""
    if first != BEGUN:
        return first
    server.settimeout(_ANSWERED)
    parts = []
    try:
        while part := server.recv(1 << 17):
            parts.append(part)
    except OSError as error:
        _fail(error.strerror or "it says nothing more")
    return b"".join(parts) or _fail("it has said nothing")


def _decode(data: bytes) -> Answer:
    try:
        found = json.loads(data)
    except ValueError:
        _fail("it ended in the middle of its answer")
    if refusal := found.get("error"):
        codes = {kind.exit_code: kind for kind in _KINDS}
        raise codes.get(refusal["code"], KernelRefused)(refusal["message"], hint=refusal["hint"])
    return Answer(**{key: tuple(value) for key, value in found.items()})


def _fail(why: str) -> NoReturn:
    raise KernelRefused(
        f"the server ended before this was done: {why}", hint="the same command again finishes what was begun"
    )
