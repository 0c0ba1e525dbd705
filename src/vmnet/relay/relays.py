"""The thread that relays, and what others tell it and are told by it."""

import asyncio
import errno
import os
import threading
from collections.abc import Collection

from vmnet.relay import Forward
from vmnet.relay.datagrams import Datagrams
from vmnet.relay.floor import Floor
from vmnet.relay.listener import Relay
from vmnet.relay.streams import Streams

UDP_IDLE = 60.0  # seconds without a datagram after which a client is forgotten
MOST = 4096  # TCP connections, or UDP clients, of one forward
_END = 5.0  # seconds that closing may take


class Relays:
    """Relays what it is told to, in a thread of its own, which starts with the first forward.

    Every method may be called from any thread, and returns at once but for `close`. `udp_idle` is in seconds, `most`
    the number of connections, or UDP clients, that one forward has at a time.
    """

    def __init__(self, *, udp_idle: float = UDP_IDLE, most: int = MOST) -> None:
        self._udp_idle, self._most = udp_idle, most
        self._lock = threading.Lock()
        self._wanted: frozenset[Forward] = frozenset()
        self._floor: Floor | None = None
        self._thread: threading.Thread | None = None
        # Replaced by the thread, never changed: others read it.
        self._relays: dict[Forward, Relay] = {}
        self._is_closed = False

    def want(self, forwards: Collection[Forward]) -> None:
        """Relay these and no others: what is new is listened for, what is gone ends, the rest goes on untouched.

        Of two that listen on the same, one is relayed and the other one is among the problems. Raises OSError while
        the process has no descriptors or threads left for it.
        """
        wanted = frozenset(forwards)
        with self._lock:
            if self._is_closed or wanted == self._wanted:
                return
            if self._floor is None:
                self._floor, self._thread = self._start()
            self._wanted = wanted
            self._floor.loop.call_soon_threadsafe(self._change, self._floor, wanted)

    def problems(self) -> dict[Forward, str]:
        """Return what is wrong now: a sentence for each forward that does not work."""
        wanted, relays = self._wanted, self._relays
        return {one: relay.problem for one, relay in relays.items() if one in wanted and relay.problem}

    def counts(self) -> dict[Forward, int]:
        """Return the forwards that are listened for, each with how many connections or UDP clients it has now."""
        wanted, relays = self._wanted, self._relays
        return {one: relay.count() for one, relay in relays.items() if one in wanted and relay.is_listening()}

    def close(self) -> None:
        """End all connections and the thread, in five seconds at most; what is wanted afterwards is not heard.

        A name server that does not answer can keep a thread waiting for it (getaddrinfo cannot be stopped); such a
        thread holds nothing else, and does not keep the process from ending.
        """
        with self._lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
        if thread and self._floor:
            self._floor.loop.call_soon_threadsafe(self._floor.loop.stop)
            thread.join(_END)

    def _start(self) -> tuple[Floor, threading.Thread]:
        floor = Floor(asyncio.new_event_loop())
        thread = threading.Thread(target=self._run, args=(floor,), name="relay", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            floor.loop.close()
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        return floor, thread

    def _change(self, floor: Floor, wanted: frozenset[Forward]) -> None:
        kept = {one: relay for one, relay in self._relays.items() if one in wanted}
        for one in self._relays.keys() - wanted:
            self._relays[one].close()
        for one in sorted(wanted - kept.keys()):
            if one.protocol == "tcp":
                kept[one] = Streams(one, floor, self._most)
            else:
                kept[one] = Datagrams(one, floor, self._most, self._udp_idle)
        self._relays = kept

    def _run(self, floor: Floor) -> None:
        loop = floor.loop
        try:
            loop.run_forever()
        finally:
            for relay in self._relays.values():
                relay.close()
            self._relays = {}
            loop.run_until_complete(_end_others())
            floor.end_lookups(_END / 2)
            loop.close()


async def _end_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others)
