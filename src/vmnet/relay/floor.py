"""What all relays stand on: the loop, the buffer, the room for descriptors, the names of other hosts."""

import asyncio
import os
import resource
import socket
import threading
from contextlib import suppress
from typing import TypeAlias

CHUNK = 1 << 16  # bytes that are moved at once; no datagram is longer
HOPS = 8  # relays that one connection may go through before it counts as going round in circles
ANSWER = 5.0  # seconds that a name server, or one address of a target, has to answer
_DESCRIPTORS = 65_536  # no more than these are of use; a few programs, started from here, would close each of them
_OPEN_MAX = 10_240  # what macOS allows when it allows no more (setrlimit(2), sys/syslimits.h)
_SPARED = 128  # descriptors left to the rest of the process

Address: TypeAlias = tuple[socket.AddressFamily, tuple[str | int, ...]]
Mark: TypeAlias = tuple[str | int, ...]
Answer: TypeAlias = list[Address] | OSError | ValueError


class Floor:
    """What all relays stand on: the loop, the buffer, the room for descriptors."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.view = memoryview(bytearray(CHUNK))
        self.room = _find_room()
        # How many relays came before, by protocol and own address of the sockets that lead on.
        self.hops: dict[Mark, int] = {}
        self._lookups: set[threading.Thread] = set()

    def look_up(self, host: str, port: int, kind: socket.SocketKind) -> "asyncio.Future[Answer]":
        """Ask for the addresses of a name, in a thread: there is no other way that all of the host's sources know."""
        answer: asyncio.Future[Answer] = self.loop.create_future()

        def tell(found: Answer) -> None:
            self._lookups.discard(thread)
            answer.set_result(found)

        def ask() -> None:
            found: Answer
            try:
                found = look_up(host, port, kind)
            except (OSError, ValueError) as error:  # UnicodeError: it cannot be a name
                found = error
            with suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(tell, found)

        thread = threading.Thread(target=ask, name=f"look up {host}", daemon=True)
        self._lookups.add(thread)
        thread.start()
        return answer

    def end_lookups(self, patience: float) -> None:
        """Wait for the lookups under way, for so many seconds."""
        end = self.loop.time() + patience
        for thread in self._lookups:
            thread.join(max(0.0, end - self.loop.time()))


def _find_room() -> int:
    """Return how many descriptors there may be, after asking for as many as are of use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (_DESCRIPTORS, _OPEN_MAX):
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft == resource.RLIM_INFINITY or soft >= most:
            break
        # On macOS this may be more than the system has for a process, whatever the hard limit says.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return max(2, (_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft) - _SPARED)


def numeric(host: str, port: int, kind: socket.SocketKind) -> list[Address]:
    """Return what an address says, at once; nothing when it is a name."""
    with suppress(OSError, ValueError):
        return look_up(host, port, kind, socket.AI_NUMERICHOST)
    return []


def look_up(host: str, port: int, kind: socket.SocketKind, flags: int = 0) -> list[Address]:
    """Return the addresses of a host in the order of getaddrinfo(3); raises OSError, and ValueError for no name."""
    found = socket.getaddrinfo(host, port, type=kind, flags=flags)
    # Without IPv6 in Python itself an address may be (int, bytes), which no connect() takes.
    return [(family, address) for family, _, _, _, address in found if isinstance(address[0], str)]


def reason(error: OSError | ValueError) -> str:
    """Return what an error says, in words that go on a sentence."""
    if isinstance(error, TimeoutError) and not error.errno:
        return f"no answer within {ANSWER:g} seconds"
    if isinstance(error, ValueError):
        return "that cannot be a name"
    return error.strerror or os.strerror(error.errno or 0)
