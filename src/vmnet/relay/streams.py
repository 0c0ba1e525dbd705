"""TCP: bytes go from socket to socket through one buffer that all connections share.

What a slow reader does not take yet is kept, at most `CHUNK` bytes for each direction, and its writer is not read from
meanwhile. (Measured beside the same with asyncio's protocols, which is as quick and holds more, and with its streams,
which take twice the processor time.)
"""

import errno
import socket
from contextlib import suppress

from vmnet.relay import Forward
from vmnet.relay.floor import HOPS, Floor, Mark, reason
from vmnet.relay.listener import BATCH, CIRCLE, Relay
from vmnet.relay.target import close, tune

# Of the connection that was to be accepted, not of the listener (accept(2)).
_PASSING = {
    errno.ECONNABORTED, errno.ENETDOWN, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.EOPNOTSUPP, errno.ENETUNREACH,
}  # fmt: skip


class Streams(Relay):
    """A forward of TCP."""

    def __init__(self, forward: Forward, floor: Floor, most: int) -> None:
        self._connections: set[_Connection] = set()
        super().__init__(forward, floor, most)

    def count(self) -> int:
        return len(self._connections)

    def close(self) -> None:
        super().close()
        for one in tuple(self._connections):
            one.stop()

    def forget(self, connection: "_Connection") -> None:
        """Hear that a connection has ended."""
        self._connections.discard(connection)
        self._resume_if_room()

    def _resume_if_room(self) -> None:
        if not self._is_taking and self._lack() is None:
            self._resume()

    def _lack(self) -> str | None:
        if len(self._connections) >= self._most:
            return f"has {self._most} connections, and no more at a time: others wait"
        return "waits for connections to end: the process has no file descriptors left" if self.floor.room < 2 else None

    def _tend(self) -> None:
        for one in tuple(self._connections):
            one.look()
        self._resume_if_room()

    def _hear(self) -> None:
        assert self._listener
        for _ in range(BATCH):
            if lack := self._lack():
                return self._pause(lack)
            try:
                client, peer = self._listener.accept()
            except OSError as error:
                if error.errno in _PASSING:
                    continue
                if not isinstance(error, (BlockingIOError, InterruptedError)):
                    self._pause(f"cannot take connections, and tries again: {reason(error)}")
                return None
            self._take(client, self.floor.hops.get(("tcp", *peer[:2]), 0))
        return None

    def _take(self, client: socket.socket, hops: int) -> None:
        try:
            client.setblocking(False)
            tune(client)
        except OSError:  # macOS: it has been reset already
            client.close()
            return
        if hops >= HOPS:
            close(client, reset=True)
            self.tell("circle", CIRCLE)
            return
        self.tell("circle", "")
        self._connections.add(_Connection(self, client, hops))
        self._look_soon()


class _Connection:
    """A client's stream and, once it is reached, the target's."""

    def __init__(self, relay: Streams, client: socket.socket, hops: int) -> None:
        self.floor = relay.floor
        self._relay = relay
        self._sockets = [client]
        self._ways: list[_Way] = []
        self._mark: Mark | None = None
        self.floor.room -= 2
        self._task = self.floor.loop.create_task(self._open(client, hops))

    async def _open(self, client: socket.socket, hops: int) -> None:
        try:
            target, self._mark, is_over = await self._relay.target.reach(hops)
        except (OSError, ValueError) as error:
            self._relay.tell_target(error)
            self.end(reset=True)
            return
        self._relay.tell_target(None)
        self._sockets.append(target)
        self._ways = [_Way(self, client, target), _Way(self, target, client)]
        if is_over:
            self.fail()

    def stop(self) -> None:
        """End the connection from outside, whatever it is at."""
        self._task.cancel()
        self.end(reset=True)

    def look(self) -> None:
        """End the connection if a side is dead: an end that is not read from at the moment tells nothing by itself."""
        if any(one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for one in self._sockets):
            self.fail()
            self._task.cancel()

    def finish(self) -> None:
        """Hear that one way has come to its end: with the second all is said."""
        if all(way.is_done for way in self._ways):
            self.end(reset=False)

    def fail(self) -> None:
        """Pass a reset on, after what was sent before it: a server may have answered and then reset."""
        for way in self._ways:
            with suppress(OSError):
                way.drain()
        self.end(reset=True)

    def end(self, *, reset: bool) -> None:
        """Let go of both sides."""
        if not self._sockets:
            return
        sockets, self._sockets, self._ways = self._sockets, [], []
        for one in sockets:
            self.floor.loop.remove_reader(one)
            self.floor.loop.remove_writer(one)
            close(one, reset=reset)
        if self._mark:
            self.floor.hops.pop(self._mark, None)
        self.floor.room += 2
        self._relay.forget(self)


class _Way:
    """One direction of a connection: what `source` says, its end included, `sink` hears at its own pace."""

    __slots__ = ("_connection", "_loop", "_rest", "_sink", "_source", "_view", "is_done")

    def __init__(self, connection: _Connection, source: socket.socket, sink: socket.socket) -> None:
        self.is_done = False
        self._connection, self._source, self._sink = connection, source, sink
        self._loop, self._view = connection.floor.loop, connection.floor.view
        self._rest: memoryview | None = None
        self._loop.add_reader(source, self._read)

    def _read(self) -> None:
        try:
            self._move()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._connection.fail()

    def _write(self) -> None:
        assert self._rest
        try:
            self._rest = self._rest[self._send(self._rest) :]
        except OSError:
            self._connection.fail()
            return
        if not self._rest:
            self._rest = None
            self._loop.remove_writer(self._sink)
            self._loop.add_reader(self._source, self._read)

    def _move(self) -> None:
        count = self._source.recv_into(self._view)
        if count == 0:
            self._loop.remove_reader(self._source)
            self._sink.shutdown(socket.SHUT_WR)
            self.is_done = True
            self._connection.finish()
            return
        sent = self._send(self._view[:count])
        if sent < count:
            self._loop.remove_reader(self._source)
            self._loop.add_writer(self._sink, self._write)
            self._rest = memoryview(bytes(self._view[sent:count]))

    def drain(self) -> None:
        """Pass on what came before a reset, as far as it is taken at once; raises OSError where a side is broken.

        An end is not passed on: after a reset was told of once, the kernel tells of an end.
        """
        for _ in range(BATCH):
            if self._rest or self.is_done or not (count := self._source.recv_into(self._view)):
                return
            if self._send(self._view[:count]) < count:
                return

    def _send(self, data: memoryview) -> int:
        try:
            return self._sink.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
