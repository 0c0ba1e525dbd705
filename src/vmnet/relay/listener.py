"""What a forward of TCP and one of UDP share: a listening socket, and what is wrong."""

import asyncio
import errno
import socket

from vmnet.relay import Forward, shown
from vmnet.relay.floor import CHUNK, HOPS, Floor, look_up, reason
from vmnet.relay.target import KINDS, Target

_AGAIN = 1.0  # seconds until an address or a port that cannot be had is tried again
_BACKLOG = 1024  # connections that wait to be taken; the kernel makes it fewer where it has to
BATCH = 64  # connections or datagrams that are taken before the others' turn
CIRCLE = f"goes round in circles: what it leads to comes back to it, or through more than {HOPS} relays"
_HINTS = {
    errno.EADDRNOTAVAIL: "this host does not have the address",
    errno.EADDRINUSE: "another program has the port",
    errno.EACCES: "this port is for root alone",
}
_SUBJECTS = ("listener", "room", "circle", "target")  # what can be wrong, the worst first


class Relay:
    """One forward: its listening socket, tried again until it can be had, and what is wrong."""

    def __init__(self, forward: Forward, floor: Floor, most: int) -> None:
        self.forward, self.floor, self.target = forward, floor, Target(forward, floor)
        self.problem = ""
        self._problems: dict[str, str] = {}
        self._most = most
        self._listener: socket.socket | None = None
        self._is_taking = False
        self._timer: asyncio.TimerHandle | None = None
        self._look()

    def is_listening(self) -> bool:
        """Say whether the address and the port could be had."""
        return self._listener is not None

    def count(self) -> int:
        """Return how many connections or clients there are."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop listening, and end all that came of it."""
        if self._timer:
            self._timer.cancel()
        if self._listener:
            self._pause()
            self._listener.close()
            self._listener = None
            self.floor.room += 1

    def tell(self, about: str, problem: str) -> None:
        """Say what is wrong about something; nothing is, when `problem` is empty."""
        if self._problems.get(about, "") != problem:
            self._problems[about] = problem
            self.problem = next(
                (f"{self.forward} {self._problems[one]}" for one in _SUBJECTS if self._problems.get(one)), ""
            )

    def tell_target(self, error: OSError | ValueError | None) -> None:
        """Say how the last attempt to reach the target went."""
        if error is None:
            self.tell("target", "")
            return
        where = shown(self.forward.target, self.forward.target_port)
        self.tell("target", f"leads to {where}, which cannot be reached: {reason(error)}")

    def _look(self) -> None:
        self._timer = None
        if self._listener is None:
            self._listen()
        else:
            self._tend()
        if not self._is_taking or self.count():
            self._look_soon()

    def _look_soon(self) -> None:
        if self._timer is None:
            self._timer = self.floor.loop.call_later(_AGAIN, self._look)

    def _tend(self) -> None:
        """Do what is due every second while there are connections or clients, or while nothing can be taken."""
        raise NotImplementedError

    def _hear(self) -> None:
        """Take what has come to the listening socket."""
        raise NotImplementedError

    def _listen(self) -> None:
        try:
            self._listener = _bind(self.forward)
        except OSError as error:
            hint = _HINTS.get(error.errno or 0) or reason(error)
            self.tell("listener", f"cannot be listened on, and is tried again: {hint}")
            return
        self.floor.room -= 1
        self.tell("listener", "")
        self._resume()

    def _pause(self, problem: str = "") -> None:
        if self._listener:
            self.floor.loop.remove_reader(self._listener)
            self._is_taking = False
        if problem:
            self.tell("room", problem)
            self._look_soon()

    def _resume(self) -> None:
        if self._listener and not self._is_taking:
            self._is_taking = True
            self.floor.loop.add_reader(self._listener, self._hear)
            self.tell("room", "")


def _bind(forward: Forward) -> socket.socket:
    """Return a socket that listens on a forward's address and no other; raises OSError."""
    kind = KINDS[forward.protocol]
    [(family, address)] = look_up(forward.address, forward.port, kind, socket.AI_NUMERICHOST)
    made = socket.socket(family, kind)
    try:
        made.setblocking(False)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if forward.protocol == "tcp":
            # Connections of a former listener may linger. (With UDP the option would let two share one port.)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(_BACKLOG)
        else:
            let_large(made)
            made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def let_large(made: socket.socket) -> None:
    """Let datagrams of any size be sent: macOS refuses what is larger than the buffer, 9 KiB at first."""
    if made.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < CHUNK:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK)
