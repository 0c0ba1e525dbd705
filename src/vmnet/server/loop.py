"""The process that listens: who may ask, what is asked next, and a fork for each that is answered.

It reads what root sends; of anybody else it takes the connection alone, and hands it to a fork. So nothing that
an ordinary user sends, no descriptor of theirs and no silence can hold it up: what they have is so many
connections and so many forks at a time.
"""

import os
import selectors
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

from vmnet import __version__
from vmnet.client import DIRECT, KILLED, MAGIC, RUN, own_code
from vmnet.freshness import Freshness
from vmnet.members import group_id
from vmnet.server.jobs import Order, answer, become, parse_order, prepare
from vmnet.server.listening import Listener, pass_on, passed_socket
from vmnet.server.peers import Peer, Standing, has_account, is_member, peer_of, standing_of
from vmnet.server.spares import LARGEST, Job, LastWord, Spare, end_with_parent, start_spare
from vmnet.settings import Paths
from vmnet.signs import Service

_IDLE = 5.0  # seconds for a client that has connected to say what it wants
_LONGEST_ANSWER = 120.0  # seconds that a fork may take for somebody who is not root
_MOST_CONNECTIONS, _MOST_FORKS = 32, 4  # at a time, of each user but root
_MOST_STRANGERS, _MOST_STRANGE_FORKS = 256, 16  # connections and forks of all users but root
_MOST_FORKS_OF_ROOT = 32  # at a time; more of them would wait for each other's locks
_ORDERS = frozenset({signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGSTOP, signal.SIGCONT})
"""What root's client may have its fork be sent."""
_SPARES = 2  # who makes a guest often wants something of it at once
_SOON = 0.002  # seconds that a client and who waits for it have the processors for themselves
_CALM = 0.03  # seconds without work, after which the last of them is made anew, and those that are done end
_MOST_LEAVING = 4  # forks that are done and wait for that
_NEXT_LOOK = 0.5  # seconds between two looks at what is overdue


@dataclass(frozen=True, slots=True)
class Work:
    """What forks do: a command line of root's, a question of a user's by uid and descriptors, and a rehearsal of both.

    The rehearsal is told whether its process will fork. `busy` is what a user is told who has asked too much already.
    """

    main: Callable[[], None]
    reply: Callable[[bytes, int, list[int]], bytes]
    rehearse: Callable[[bool], None]
    busy: bytes


@dataclass(eq=False)
class _Client:
    """A connection, until it is answered; `since` is when it was accepted, or given to a fork."""

    connection: socket.socket
    peer: Peer
    since: float
    fork: Spare | None = None
    abandoned: bool = False


@dataclass
class Server:
    """Serves until it is told to stop, or `parent` ends that has started it.

    `descriptor` is a socket that is there already.
    """

    paths: Paths
    service: Service
    work: Work
    descriptor: int | None = None
    parent: int | None = None
    _stop: bool = field(init=False, default=False)
    _listener: socket.socket = field(init=False)
    _passed: bool = field(init=False, default=False)
    _selector: selectors.BaseSelector = field(init=False, default_factory=selectors.DefaultSelector)
    _clients: set[_Client] = field(init=False, default_factory=set)
    _waiting: list[_Client] = field(init=False, default_factory=list)
    _spares: list[Spare] = field(init=False, default_factory=list)
    _leaving: list[Spare] = field(init=False, default_factory=list)
    _unended: set[Spare] = field(init=False, default_factory=set)
    _worked: float = field(init=False, default=0.0)
    _own: Standing = field(init=False)
    _code: Freshness = field(init=False, default_factory=partial(Freshness, listens=True))
    _own_code: bytes = field(init=False, default_factory=own_code)

    def serve(self) -> None:
        """Serve until SIGTERM or SIGINT, and until what was begun is done; raises what keeps it from beginning."""
        own = standing_of("self")
        assert own is not None, "/proc is not mounted"
        self._own = own
        with ExitStack() as stack:
            if self.parent is not None:
                end_with_parent(signal.SIGTERM)
                if os.getppid() != self.parent:
                    return  # it ended while this process began
            passed = passed_socket(self.descriptor)
            self._passed = passed is not None
            self._listener = stack.enter_context(passed or Listener(self.paths.run, group_id()))
            self._listener.setblocking(False)
            self._hear_signals(stack)
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self.work.rehearse(True)
            self._have_spares(_SPARES)
            self.service.ready()
            self.service.log("serving", version=__version__, socket=str(self.paths.run))
            while not (self._stop and not self._unfinished()):
                self._turn()
            self.service.log("stopped")

    def _hear_signals(self, stack: ExitStack) -> None:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for end in (reading, writing):
            stack.callback(os.close, end)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        stack.callback(signal.set_wakeup_fd, -1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_stop", True))
        signal.signal(signal.SIGALRM, lambda *_: None)  # for _close_strangers
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # with SIG_IGN nobody could be waited for
        self._selector.register(reading, selectors.EVENT_READ, lambda: os.read(reading, 4096))

    def _forks(self) -> list[_Client]:
        """Return whose work is waited for; what was killed for taking too long may be stuck in the kernel for ever."""
        return [one for one in self._clients if one.fork and not one.abandoned]

    def _unfinished(self) -> set[Spare]:
        """Return the forks that work, or whose last word to a client may not be said yet."""
        stuck = {one.fork for one in self._clients if one.abandoned}
        return self._unended.difference(self._spares, stuck)

    def _turn(self) -> None:
        if self._stop and self._listener.fileno() in self._selector.get_map():
            self._selector.unregister(self._listener)
        is_busy = bool(self._clients) or self._code.due is not None
        if is_busy:
            patience: float | None = _NEXT_LOOK
        elif len(self._spares) < _SPARES or self._leaving:
            patience = _CALM if self._spares else _SOON
        else:
            patience = self.service.patience or None
        for key, _ in self._selector.select(patience):
            if self._selector.get_map().get(key.fd) == key:  # else who came before in this turn has ended it
                key.data()
        self._end_what_is_overdue()
        self._start_anew()
        if not self._forks():  # to make some while others work would slow those down
            quiet = time.monotonic() - self._worked
            if quiet >= _SOON:
                self._dismiss(0 if quiet >= _CALM or self._stop or self._code.due is not None else _MOST_LEAVING)
                self._have_spares(_SPARES if quiet >= _CALM else 1)
        self.service.alive()

    # Who comes

    def _accept(self) -> None:
        """Take in all who have come; those of whom there are too many already are let go again."""
        for _ in range(64):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no descriptors left, or a client that has gone
                self.service.log("not accepted", level="warning", reason=error.strerror or "")
                time.sleep(0.01)
                return
            connection.setblocking(False)
            try:
                self._admit(connection)
            except OSError:
                _close_strangers(connection)

    def _admit(self, connection: socket.socket) -> None:
        peer = peer_of(connection)
        if peer.uid != 0:
            if not (is_member(connection, peer) and has_account(peer.uid) and self._is_near(peer)):
                _close_strangers(connection)
                return
            strangers = Counter(one.peer.uid for one in self._clients if one.peer.uid != 0)
            if strangers[peer.uid] >= _MOST_CONNECTIONS or strangers.total() >= _MOST_STRANGERS:
                connection.send(self.work.busy)
                _close_strangers(connection)
                return
        client = _Client(connection, peer, time.monotonic())
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(client))
        with suppress(BlockingIOError):
            connection.recv(1, socket.MSG_PEEK)
            self._hear(client)  # most have asked by now

    def _is_near(self, peer: Peer) -> bool:
        standing = standing_of(peer.pid)
        return bool(standing and self._own.shares_network(standing))

    def _let_go(self, client: _Client) -> None:
        """Forget a client, and close its connection here."""
        self._clients.discard(client)
        if client in self._waiting:
            self._waiting.remove(client)
        self._close(client)

    def _close(self, client: _Client) -> None:
        if client.connection.fileno() >= 0:
            with suppress(KeyError):
                self._selector.unregister(client.connection)
            _close_strangers(client.connection)

    # What they say

    def _hear(self, client: _Client) -> None:
        if client.fork:
            self._pass_on(client, client.fork)
            return
        # It is read when it is this one's turn; what a user sends, by the fork alone.
        self._selector.unregister(client.connection)
        self._waiting.append(client)
        self._give_turns()

    def _take_order(self, client: _Client) -> None:
        """Read what root asks for, and have it done, or say that it is not for this server.

        A fork makes itself ready for it while this process looks whether it may.
        """
        descriptors: list[int] = []
        try:
            request, descriptors, flags, _ = socket.recv_fds(client.connection, LARGEST, 4)
            order = parse_order(request)
            is_whole = len(descriptors) == 4 and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
            if order and is_whole and order.code == self._own_code:
                fork = self._take_spare()
                fork.give(request, [client.connection.fileno(), *descriptors])
                standing = self._standing_for(client.peer, order)
                if standing:
                    self._selector.register(client.connection, selectors.EVENT_READ, lambda: self._hear(client))
                    self._employ(client, fork)
                    fork.let_go_on(b"%o" % standing.umask)
                    return
                signal.pidfd_send_signal(fork.ended, signal.SIGKILL)
            if request:
                client.connection.send(DIRECT)
            self._let_go(client)
        except OSError:
            self._let_go(client)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _standing_for(self, peer: Peer, order: Order) -> Standing | None:
        """Return the standing of a client whose work this process may do; None: it does it itself."""
        standing = standing_of(peer.pid)
        is_served = (
            standing
            and self._own.serves(standing)
            and Paths.from_environment(order.environment) == self.paths
            and self._code.is_fresh(time.monotonic())
        )
        return standing if is_served else None

    def _give_turns(self) -> None:
        """Have those done who have waited longest, so many of each user at a time."""
        busy = Counter(one.peer.uid for one in self._clients if one.fork)
        for client in list(self._waiting):
            uid = client.peer.uid
            strange = busy.total() - busy[0]
            if busy[uid] >= (_MOST_FORKS if uid else _MOST_FORKS_OF_ROOT) or (uid and strange >= _MOST_STRANGE_FORKS):
                continue
            self._waiting.remove(client)
            if uid == 0:
                self._take_order(client)
            else:
                self._take_question(client)
            busy[uid] += bool(client.fork)

    def _take_question(self, client: _Client) -> None:
        try:
            if self._code.is_fresh(time.monotonic()):
                fork = self._take_spare()
                fork.give(b"%d" % client.peer.uid, [client.connection.fileno()])
                self._employ(client, fork)
                self._close(client)  # the fork has it, and nobody else is to read from it
            else:
                self._let_go(client)
        except OSError:
            self._let_go(client)

    def _take_spare(self) -> Spare:
        """Return the fork that has waited longest; raises OSError."""
        self._have_spares(1, needed=True)
        if not self._spares:
            raise OSError("there is no process to be had")
        return self._spares.pop(0)

    def _employ(self, client: _Client, fork: Spare) -> None:
        """Have a fork work for a client."""
        client.fork, client.since = fork, time.monotonic()
        self._selector.modify(fork.ended, selectors.EVENT_READ, lambda: self._hear_end(client, fork))
        self._selector.register(fork.orders, selectors.EVENT_READ, lambda: self._hear_done(client, fork))

    def _pass_on(self, client: _Client, fork: Spare) -> None:
        """Have a fork get the signals that its client got; one whose client was killed is killed, too."""
        try:
            numbers: bytes | list[int] = client.connection.recv(64)
        except OSError:
            numbers = b""
        if not numbers:
            self._selector.unregister(client.connection)
        for number in numbers or [signal.SIGKILL]:
            if number in _ORDERS or number == signal.SIGKILL:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fork.ended, number)

    # Forks

    def _have_spares(self, wanted: int, *, needed: bool = False) -> None:
        """Have so many forks ready for those who ask next, or for one who is `needed` now."""
        is_new = False
        while len(self._spares) < wanted and self._code.due is None and (needed or not self._stop):
            try:
                spare = start_spare(partial(self.work.rehearse, False), self._do)
            except OSError as error:
                self.service.log("no fork", level="error", reason=error.strerror or "")
                time.sleep(0.1)
                return
            self._spares.append(spare)
            self._unended.add(spare)
            self._selector.register(spare.ended, selectors.EVENT_READ, partial(self._hear_end, None, spare))
            is_new = True
        if is_new and not needed:
            self._rehearse()

    def _rehearse(self) -> None:
        """Admit a client that is for another server: each page that a fork shares is copied at its next change.

        That takes 2 us for each of some 200, which the next client would wait for.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            request = b"\0".join((MAGIC, RUN, b"another's", b"0", b"VMNET_RUN_DIR=/nowhere"))
            socket.send_fds(ours, [request], [ours.fileno()] * 4)
            theirs.setblocking(False)
            self._admit(theirs)
            order = parse_order(request)
            assert order is not None
            self._standing_for(peer_of(ours), order)

    def _do(self, job: Job) -> LastWord:
        """Be the fork: of root's clients all is known, of others the uid."""
        connection, *descriptors = job.descriptors
        client = socket.socket(fileno=connection)
        client.setblocking(True)
        order = parse_order(job.request)
        if order is None:
            answer(client, lambda question, given: self.work.reply(question, int(job.request), given))
            return client.close
        if not prepare(order, descriptors):
            return partial(client.send, DIRECT)
        return partial(client.send, become(client, int(job.go_on(), 8), self.work.main))

    def _hear_done(self, client: _Client, fork: Spare) -> None:
        """Take note that a fork has told its client all, and will end; or that it has ended without a word."""
        self._selector.unregister(fork.orders)
        if fork.is_done():
            self._leaving.append(fork)
            self._selector.modify(fork.ended, selectors.EVENT_READ, partial(self._hear_end, None, fork))
            self._finish(client)

    def _finish(self, client: _Client) -> None:
        self._worked = time.monotonic()
        self._let_go(client)
        self._give_turns()

    def _dismiss(self, kept: int) -> None:
        """Have forks that are done end, but so many: to be taken apart keeps a processor for 2 ms without a break."""
        while len(self._leaving) > kept:
            self._leaving.pop(0).dismiss()

    def _hear_end(self, client: _Client | None, fork: Spare) -> None:
        """Take note of a fork's end; it has told its client how, unless a signal ended it."""
        self._selector.unregister(fork.ended)
        with suppress(KeyError, ValueError):
            self._selector.unregister(fork.orders)
        _, status = os.waitpid(fork.pid, 0)
        fork.forget()
        self._unended.discard(fork)
        if fork in self._leaving:
            self._leaving.remove(fork)
        if fork in self._spares:
            self._spares.remove(fork)
            self.service.log("a fork ended early", level="warning", status=str(os.waitstatus_to_exitcode(status)))
            time.sleep(0.05)
        if client:
            if os.WIFSIGNALED(status) and client.peer.uid == 0:
                with suppress(OSError):
                    client.connection.send(b"%s%d" % (KILLED, os.WTERMSIG(status)))
            self._finish(client)

    def _end_what_is_overdue(self) -> None:
        now = time.monotonic()
        for client in list(self._clients):
            if client.fork is None and client not in self._waiting and now - client.since > _IDLE:
                self._let_go(client)
            elif client.fork and client.peer.uid != 0 and now - client.since > _LONGEST_ANSWER and not client.abandoned:
                client.abandoned = True
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(client.fork.ended, signal.SIGKILL)

    def _start_anew(self) -> None:
        """Become the vmnet that is on the disk once it is all there, and what was begun is done."""
        due, now = self._code.due, time.monotonic()
        if due is None or now < due or self._unfinished() or self._code.is_fresh(now) or self._code.due != due:
            return
        self.service.log("starting anew", reason="vmnet has changed on disk")
        for spare in self._spares:
            signal.pidfd_send_signal(spare.ended, signal.SIGKILL)
            os.waitpid(spare.pid, 0)
            spare.forget()
        if self._passed:
            pass_on(self._listener)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _close_strangers(connection: socket.socket) -> None:
    """Close a connection in which anything may be unread.

    With it go descriptors that were sent and that nobody else has. One of a TCP socket that lingers (SO_LINGER,
    socket(7)) would keep this process waiting, for as long as its owner likes; a signal ends that.
    """
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    try:
        connection.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
