"""Forks that wait for work: what a fork costs, and each first touch of a page, is paid before anybody asks."""

import ctypes
import gc
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, TypeAlias

LARGEST = 1 << 18
"""Bytes of the largest message; the kernel lets none through that is larger (net.core.wmem_default, socket(7))."""
_MOST_DESCRIPTORS = 5
_DONE = b"d"
_LONGEST_WORD = 64  # bytes
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


LastWord: TypeAlias = Callable[[], object]
"""What lets a client know that its work is done."""


class Job(NamedTuple):
    """What a fork is given to do: for root a request, for anybody else nothing but the connection to read it from.

    `go_on` waits for what `let_go_on` says.
    """

    request: bytes
    descriptors: list[int]
    go_on: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Spare:
    """A fork that waits for its job; `ended` is a pidfd (pidfd_open(2))."""

    pid: int
    ended: int
    orders: socket.socket

    def give(self, request: bytes, descriptors: list[int]) -> None:
        """Have it do a job; raises OSError where it has ended. What can be read of `orders` then is that it is done."""
        socket.send_fds(self.orders, [request], descriptors)

    def let_go_on(self, word: bytes) -> None:
        """Have it go on where it waits to be told; raises OSError where it has ended."""
        self.orders.send(word)

    def is_done(self) -> bool:
        """Read what it says of its job: whether that is done, or it has ended before."""
        try:
            return bool(self.orders.recv(1))
        except OSError:
            return False

    def dismiss(self) -> None:
        """Have one that is done end."""
        self.orders.close()

    def forget(self) -> None:
        """Close what is open of it."""
        self.orders.close()
        os.close(self.ended)


def start_spare(rehearse: Callable[[], None], work: Callable[[Job], LastWord]) -> Spare:
    """Fork, and return the fork, which rehearses, waits for a job, does it and ends; with this process at the latest.

    It has no descriptor of this process's but 0, 1 and 2. It says that the job is done, and ends when it is dismissed.
    Raises OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid:
        theirs.close()
        try:
            return Spare(pid, os.pidfd_open(pid), ours)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ours.close()
            raise
    try:
        _be_a_spare(theirs, parent, rehearse, work)
    finally:
        os._exit(1)


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the thread that has started it ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def _be_a_spare(
    orders: socket.socket, parent: int, rehearse: Callable[[], None], work: Callable[[Job], LastWord]
) -> NoReturn:
    gc.disable()  # to look through what the parent has would copy its pages; what is made here goes with the process
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until there is somebody to be told of it
    own = orders.fileno()
    os.closerange(3, own)
    os.closerange(own + 1, os.sysconf("SC_OPEN_MAX"))
    os.setsid()
    # Whoever asked is told that the server has ended: then nothing must go on behind their back.
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    with suppress(Exception):  # whatever it is, the job itself will say so
        rehearse()
    request, descriptors, flags, _ = socket.recv_fds(orders, LARGEST, _MOST_DESCRIPTORS)
    if not (request or descriptors) or flags & socket.MSG_CTRUNC:
        os._exit(0)
    say_last_word = work(Job(request, descriptors, lambda: orders.recv(_LONGEST_WORD)))
    with suppress(OSError):
        orders.send(_DONE)  # first, or the client's end would be heard of before
    with suppress(OSError):
        say_last_word()
    with suppress(OSError):
        orders.recv(1)
    os._exit(0)
