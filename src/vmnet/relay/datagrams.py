"""UDP: each client has a socket of its own to the target, so that answers find back."""

import asyncio
import errno
import socket
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field

from vmnet.relay import Forward
from vmnet.relay.floor import HOPS, Address, Floor, Mark, reason
from vmnet.relay.listener import BATCH, CIRCLE, Relay, let_large

_WAITING = 16  # datagrams of a client that are kept while its target's name is looked up


@dataclass(slots=True)
class _Client:
    """Who sends datagrams, and `way`, the socket by which the target knows this one; without it, what waits for it."""

    sender: tuple[str | int, ...]
    used: float
    way: socket.socket | None = None
    mark: Mark | None = None
    waiting: list[bytes] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    turn: int = 0


class Datagrams(Relay):
    """A forward of UDP."""

    def __init__(self, forward: Forward, floor: Floor, most: int, idle: float) -> None:
        self._idle = idle
        self._turn = 0  # of the target's addresses
        # By address and port, the longest unused first.
        self._clients: OrderedDict[tuple[str | int, ...], _Client] = OrderedDict()
        super().__init__(forward, floor, most)

    def count(self) -> int:
        return len(self._clients)

    def close(self) -> None:
        super().close()
        for client in tuple(self._clients.values()):
            self._forget(client)

    def _tend(self) -> None:
        long_ago = self.floor.loop.time() - self._idle
        while self._clients and (oldest := next(iter(self._clients.values()))).used < long_ago:
            self._forget(oldest)
        self._resume()

    def _hear(self) -> None:
        assert self._listener
        for _ in range(BATCH):
            try:
                count, sender = self._listener.recvfrom_into(self.floor.view)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._pause(f"cannot take datagrams, and tries again: {reason(error)}")
                return
            self._pass_on(sender, self.floor.view[:count])

    def _pass_on(self, sender: tuple[str | int, ...], data: memoryview) -> None:
        # Twice: the first attempt may be told what became of the datagram before it (udp(7)).
        for _ in range(2):
            client = self._clients.get(sender) or self._admit(sender)
            if client is None:
                return
            self._use(client)
            if client.way is None:
                if len(client.waiting) < _WAITING:
                    client.waiting.append(bytes(data))
                return
            try:
                client.way.send(data)
            except (BlockingIOError, InterruptedError):
                return  # as with any queue that is full
            except OSError as error:
                self._fail(client, error)
            else:
                return

    def _use(self, client: _Client) -> None:
        client.used = self.floor.loop.time()
        self._clients.move_to_end(client.sender)

    def _admit(self, sender: tuple[str | int, ...]) -> _Client | None:
        """Return a new client, for whom the oldest may have to go; None where there is no way on."""
        hops = self.floor.hops.get(("udp", *sender[:2]), 0)
        if hops >= HOPS:
            self.tell("circle", CIRCLE)
            return None
        self.tell("circle", "")
        if self._clients and (len(self._clients) >= self._most or self.floor.room < 1):
            self._forget(next(iter(self._clients.values())))
        client = _Client(sender, self.floor.loop.time())
        if self.target.known:
            try:
                self._connect(client, self.target.known, hops)
            except OSError as error:
                self.tell_target(error)
                return None
        else:
            client.task = self.floor.loop.create_task(self._find(client, hops))
        self.floor.room -= 1
        self._clients[sender] = client
        self._look_soon()
        return client

    async def _find(self, client: _Client, hops: int) -> None:
        try:
            self._connect(client, await self.target.addresses(), hops)
        except (OSError, ValueError) as error:
            self.tell_target(error)
            self._forget(client)
            return
        waiting, client.waiting = client.waiting, []
        for data in waiting:
            self._pass_on(client.sender, memoryview(data))

    def _connect(self, client: _Client, addresses: list[Address], hops: int) -> None:
        failure = OSError(errno.EADDRNOTAVAIL, "")
        client.turn = self._turn
        first = self._turn % max(1, len(addresses))
        for family, address in addresses[first:] + addresses[:first]:
            try:
                client.way, client.mark = self.target.call(family, address, hops)
            except OSError as error:
                failure = error
                continue
            let_large(client.way)
            self.floor.loop.add_reader(client.way, self._answer, client)
            return
        raise failure

    def _answer(self, client: _Client) -> None:
        assert client.way
        assert self._listener
        for _ in range(BATCH):
            try:
                count = client.way.recv_into(self.floor.view)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._fail(client, error)
                return
            self.tell_target(None)
            self._use(client)
            with suppress(OSError):  # it is lost, as datagrams may be
                self._listener.sendto(self.floor.view[:count], client.sender)

    def _fail(self, client: _Client, error: OSError) -> None:
        """Hear that the target does not take a client's datagrams: with the next one its next address has its turn."""
        self.tell_target(error)
        if client.turn == self._turn:
            self._turn += 1
        self._forget(client)

    def _forget(self, client: _Client) -> None:
        if self._clients.pop(client.sender, None) is None:
            return
        self.floor.room += 1
        if client.task:
            client.task.cancel()
        if client.way:
            self.floor.loop.remove_reader(client.way)
            client.way.close()
        if client.mark:
            self.floor.hops.pop(client.mark, None)
