"""The way to what a forward leads to."""

import asyncio
import errno
import os
import socket
import struct
from contextlib import suppress
from typing import NamedTuple

from vmnet.relay import Forward
from vmnet.relay.floor import ANSWER, Address, Answer, Floor, Mark, numeric

_PATIENCE, _PAUSE = 1.5, 0.5  # seconds for which a target that is down is tried again, and between two tries
# Probes after a minute, and a dead peer is known for it after two (tcp(7)); macOS has the first by another name.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 seconds: close() sends a reset (socket(7))
# Who does not take a connection refuses it; these are from one who took it, and may have said something.
_TOO_LATE = {errno.ECONNRESET, errno.EPIPE}
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


class Reached(NamedTuple):
    """A connection to a target, how it is known to relays, and whether the target has reset it already."""

    stream: socket.socket
    mark: Mark
    is_over: bool = False


class Target:
    """Where a forward leads: the addresses of its host, in the order of getaddrinfo(3)."""

    def __init__(self, forward: Forward, floor: Floor) -> None:
        self._where = forward.target, forward.target_port, KINDS[forward.protocol]
        self._protocol = forward.protocol
        self._floor = floor
        self._asked: asyncio.Future[Answer] | None = None
        self.known = numeric(*self._where)

    async def addresses(self) -> list[Address]:
        """Return the addresses; all who ask meanwhile wait for one answer. Raises OSError or ValueError."""
        if self.known:
            return self.known
        if self._asked is None or self._asked.done():
            self._asked = self._floor.look_up(*self._where)
        async with asyncio.timeout(ANSWER):
            found = await asyncio.shield(self._asked)
        if not isinstance(found, list):
            raise found
        return found

    async def reach(self, hops: int) -> Reached:
        """Return a connection to the target; raises OSError or ValueError when it stays away."""
        end = self._floor.loop.time() + _PATIENCE
        while True:
            try:
                return await self._try_each(hops)
            except (OSError, ValueError):
                if self._floor.loop.time() + _PAUSE > end:
                    raise
            await asyncio.sleep(_PAUSE)

    async def _try_each(self, hops: int) -> Reached:
        failure = OSError(errno.EADDRNOTAVAIL, "")
        for family, address in await self.addresses():
            try:
                async with asyncio.timeout(ANSWER):
                    return await self._connect(family, address, hops)
            except OSError as error:
                failure = error
        raise failure

    async def _connect(self, family: int, address: tuple[str | int, ...], hops: int) -> Reached:
        made, mark = self.call(family, address, hops)
        try:
            await _writable(self._floor.loop, made)
            error = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error in _TOO_LATE:
                return Reached(made, mark, is_over=True)
            _raise(error)
            if _is_to_itself(made):
                _raise(errno.ECONNREFUSED)
        except BaseException:
            close(made, reset=True)
            self._floor.hops.pop(mark, None)
            raise
        return Reached(made, mark)

    def call(self, family: int, address: tuple[str | int, ...], hops: int = 0) -> tuple[socket.socket, Mark]:
        """Return a socket that is on its way to one address, and its mark; raises OSError."""
        made = socket.socket(family, self._where[2])
        try:
            made.setblocking(False)
            if made.type == socket.SOCK_STREAM:
                tune(made)
            code = made.connect_ex(address)
            _raise(0 if code == errno.EINPROGRESS else code)
            if code == 0 and _is_to_itself(made):
                _raise(errno.ECONNREFUSED)
            mark = self._protocol, *made.getsockname()[:2]
        except BaseException:
            made.close()
            raise
        # Before the other end hears of it, which may be a relay of ours.
        self._floor.hops[mark] = hops + 1
        return made, mark


def _raise(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))


def _is_to_itself(made: socket.socket) -> bool:
    """Tell a call that came out where it began: nobody listens on a port, and the kernel gave that to the caller."""
    try:
        return bool(made.getsockname() == made.getpeername())
    except OSError:  # ENOTCONN: it has been reset since
        return False


def _settle(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


async def _writable(loop: asyncio.AbstractEventLoop, made: socket.socket) -> None:
    ready = loop.create_future()
    loop.add_writer(made, _settle, ready)
    try:
        await ready
    finally:
        loop.remove_writer(made)


def tune(stream: socket.socket) -> None:
    """Have nothing held back, and a dead peer noticed; raises OSError."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def close(stream: socket.socket, *, reset: bool) -> None:
    """Close a stream, with all sent and an end, or at once and with a reset."""
    if reset:
        with suppress(OSError):  # it is broken already
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    stream.close()
