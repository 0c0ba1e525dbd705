"""One machine made of a network namespace: its sockets, its programs, its echo servers, its raw frames.

`net.py` says how machines become a laptop, a LAN and the internet, and how a test uses them.
"""

import ctypes
import errno
import fcntl
import json
import os
import selectors
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol

ECHO_PORT = 7
TIMEOUT = 3.0
QUIET = 0.25
"""Seconds to wait for an answer that must not come; every such test has a twin whose answer does come."""

_CLONE_NEWNET = 0x40000000
_SOL_PACKET = 263  # linux/socket.h
_PACKET_IGNORE_OUTGOING = 23  # linux/if_packet.h
_ETH_P_ALL = 3
_IP_PKTINFO, _IP_MTU_DISCOVER, _IP_RECVERR, _IP_MTU = 8, 10, 11, 14  # linux/in.h
_IP_PMTUDISC_DO = 2
_ICMP_ECHO, _ICMP_ECHOREPLY, _ICMP_TIME_EXCEEDED = 8, 0, 11
_TUNSETIFF = 0x400454CA
_SIOCGIFFLAGS, _IFF_RUNNING = 0x8913, 0x40
_IFF_TUN, _IFF_TAP, _IFF_NO_PI = 1, 2, 0x1000

_libc = ctypes.CDLL(None, use_errno=True)


class Owner(Protocol):
    """What a machine needs of the lab it belongs to."""

    loop: "Loop"

    def at_exit(self, close: Callable[[], object], /) -> object:
        """Have `close` called when the lab ends."""


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def new_namespace() -> int:
    """Make an empty network namespace and return the descriptor that holds it."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(_CLONE_NEWNET), "unshare")
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _check(_libc.setns(home, _CLONE_NEWNET), "setns home")
    finally:
        os.close(home)
    return fd


def wait_until(met: Callable[[], bool], seconds: float = TIMEOUT) -> bool:
    """Look until `met()` is true or the time is up; return what the last look said."""
    end = time.monotonic() + seconds
    while not met():
        if time.monotonic() > end:
            return met()
        time.sleep(0.005)
    return True


def somebody_waits_for(lock: Path) -> bool:
    """Say whether a process waits for a lock on that file that another one has."""
    waiting = f":{lock.stat().st_ino} "  # "1: -> FLOCK  ADVISORY  WRITE 708 00:1f:4711 0 EOF", proc(5)
    return any("->" in line and waiting in line for line in Path("/proc/locks").read_text().splitlines())


def answered(asked: Iterable[tuple["Machine", str, int]], wait: float = TIMEOUT) -> set[tuple[str, str, int]]:
    """Ask many at once, by TCP and UDP: return those of (machine, address, port) that have an answer of either kind.

    A refusal is an answer too. Returns as soon as all have answered both ways, or after `wait` seconds.
    """
    found: set[tuple[str, str, int]] = set()
    with selectors.DefaultSelector() as poll, ExitStack() as sockets:
        for machine, address, port in asked:
            for kind, event in ((socket.SOCK_STREAM, selectors.EVENT_WRITE), (socket.SOCK_DGRAM, selectors.EVENT_READ)):
                client = sockets.enter_context(machine.socket(socket.AF_INET, kind))
                client.setblocking(False)
                if client.connect_ex((address, port)) in (0, errno.EINPROGRESS):
                    with suppress(OSError):
                        poll.register(client, event, (machine.name, address, port))
                        if kind == socket.SOCK_DGRAM:
                            client.send(b"hello")
        end = time.monotonic() + wait
        while poll.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in poll.select(left):
                poll.unregister(key.fileobj)
                client = key.fileobj  # type: ignore[assignment]
                if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (0, errno.ECONNREFUSED):
                    found.add(key.data)
    return found


class Loop:
    """One thread that calls back when a descriptor can be read: the servers and the VMs' wires of a lab."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def watch(self, fd: int, ready: Callable[[], object]) -> None:
        with self._lock:
            self._selector.register(fd, selectors.EVENT_READ, ready)

    def forget(self, fd: int) -> None:
        with self._lock:
            self._selector.unregister(fd)

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        self._selector.close()

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(timeout=0.02):
                key.data()


class Service:
    """An echo server, TCP and UDP, on one port; `peers` and `received` say whom and what it heard, in order."""

    def __init__(self, machine: "Machine", port: int, address: str) -> None:
        self.port = port
        self.peers: list[str] = []
        self.received: list[bytes] = []
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._loop = machine.lab.loop
        self._tcp = machine.socket(family, socket.SOCK_STREAM)
        self._tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._udp = machine.socket(family, socket.SOCK_DGRAM)
        for listener in (self._tcp, self._udp):
            listener.setblocking(False)
            listener.bind((address, port))
        if family == socket.AF_INET:
            self._udp.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self._tcp.listen()
        self._loop.watch(self._tcp.fileno(), self._accept)
        self._loop.watch(self._udp.fileno(), self._datagram)

    def _note(self, peer: str, data: bytes) -> None:
        self.peers.append(peer.removeprefix("::ffff:"))
        self.received.append(data)

    def _datagram(self) -> None:
        try:
            data, ancillary, _, sender = self._udp.recvmsg(65535, socket.CMSG_SPACE(12))
            self._note(sender[0], data)
            self._udp.sendmsg([data], [(level, kind, _from_here(info)) for level, kind, info in ancillary], 0, sender)
        except OSError:
            return  # an ICMP error for an earlier answer, or an answer that cannot be sent: no echo then

    def _accept(self) -> None:
        connection, peer = self._tcp.accept()
        connection.setblocking(False)
        self._loop.watch(connection.fileno(), lambda: self._stream(connection, peer[0]))

    def _stream(self, connection: socket.socket, peer: str) -> None:
        try:
            data = connection.recv(1 << 16)
            if data:
                self._note(peer, data)
                connection.settimeout(TIMEOUT)
                connection.sendall(_http(peer) if data.startswith(b"GET ") else data)
                connection.setblocking(False)
            if data and not data.startswith(b"GET "):
                return
        except OSError:
            pass  # reset by the peer
        self._loop.forget(connection.fileno())
        connection.close()


def _from_here(info: bytes) -> bytes:
    """Return the in_pktinfo (ip(7)) that makes an answer leave from the address that was asked."""
    return bytes(4) + info[4:8] + bytes(4)


def _http(peer: str) -> bytes:
    body = f"{peer}\n".encode()
    return b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Sniffer:
    """A socket that hears what comes by; `Machine.sniff` and `Machine.hear` say what that is."""

    def __init__(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._socket = listener

    def frames(self) -> list[bytes]:
        """Return what came since the last call."""
        return drain(self._socket)

    def close(self) -> None:
        self._socket.close()


def drain(receiver: socket.socket) -> list[bytes]:
    """Return all that waits in a socket that does not block."""
    packets = []
    while True:
        try:
            packets.append(receiver.recv(65535))
        except BlockingIOError:
            return packets
        except OSError:
            continue  # a pending error (the device went down) is told once


class Machine:
    """A network namespace, held by the descriptor `fd`; `address` is how the others of the lab know it."""

    def __init__(self, lab: Owner, name: str, fd: int, address: str = "") -> None:
        self.lab = lab
        self.name = name
        self.fd = fd
        self.address = address

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread, and the processes it starts, live in the machine's network for a while."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(self.fd, _CLONE_NEWNET), f"setns to {self.name}")
            try:
                yield
            finally:
                _check(_libc.setns(home, _CLONE_NEWNET), "setns home")
        finally:
            os.close(home)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Return a socket that lives in the machine, closed with the lab at the latest."""
        with self.entered():
            made = socket.socket(family, kind, protocol)
        self.lab.at_exit(made.close)
        return made

    def run(self, *argv: str, check: bool = True, stdin: str | None = None) -> str:
        """Run a program inside and return what it printed; with `check` its failure fails the test."""
        with self.entered():
            done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{self.name}: {' '.join(argv)}: {done.stdout}{done.stderr}"
        return done.stdout

    def ip(self, *lines: str, check: bool = True) -> str:
        """Run lines of iproute2's ip, all of them in one process; with `check` the first that fails fails the test."""
        with self.entered():
            force = [] if check else ["-force"]
            done = subprocess.run(
                ["ip", *force, "-batch", "-"], input="\n".join(lines), capture_output=True, text=True, check=False
            )
        assert not check or done.returncode == 0, f"{self.name}: ip {lines}: {done.stderr}"
        return done.stdout

    def sysctl(self, key: str, value: object = None) -> str:
        """Return a sysctl below net (`ipv4/conf/all/rp_filter`, slashes), after setting it if `value` is given."""
        with self.entered():
            path = Path("/proc/sys/net", key)
            if value is not None:
                path.write_text(f"{value}\n")
            return path.read_text().strip()

    def links(self) -> set[str]:
        """Return the names of the machine's devices."""
        with self.entered():
            return {name for _, name in socket.if_nameindex()}

    def await_link(self, device: str) -> None:
        """Wait until a device sends: after its carrier comes the kernel may take a second to give it its queue."""
        probe = self.socket(socket.AF_INET, socket.SOCK_DGRAM)
        request = struct.pack("16s16x", device.encode())

        def running() -> bool:
            return bool(struct.unpack_from("H", fcntl.ioctl(probe, _SIOCGIFFLAGS, request), 16)[0] & _IFF_RUNNING)

        assert wait_until(running), f"{self.name}: {device} has no carrier"

    def mac(self, device: str) -> str:
        """Return the hardware address of a device."""
        return str(json.loads(self.run("ip", "-j", "link", "show", "dev", device))[0]["address"])

    def serve(self, port: int = ECHO_PORT, address: str = "0.0.0.0") -> Service:
        """Start an echo server on `address`, TCP and UDP."""
        return Service(self, port, address)

    def tcp(
        self, address: str, port: int = ECHO_PORT, payload: bytes = b"hello", *, source: str = "", wait: float = TIMEOUT
    ) -> bytes:
        """Connect, send, and return as much as was sent; `OSError` (a timeout is one) when that does not happen."""
        with self.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(wait)
            if source:
                client.bind((source, 0))
            client.connect((address, port))
            answer = b""
            # In turns: where buffers are small, two ends that only send wait for each other.
            for start in range(0, len(payload), 1 << 16):
                turn = payload[start : start + (1 << 16)]
                client.sendall(turn)
                while len(answer) < start + len(turn) and (more := client.recv(1 << 16)):
                    answer += more
            return answer

    def http(self, address: str, port: int = ECHO_PORT) -> str:
        """GET / and return the body: the client's address as the server saw it."""
        with self.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(TIMEOUT)
            client.connect((address, port))
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = b""
            while more := client.recv(1 << 16):
                answer += more
            return answer.partition(b"\r\n\r\n")[2].decode().strip()

    def udp(
        self, address: str, port: int = ECHO_PORT, payload: bytes = b"hello", *, source: str = "", wait: float = TIMEOUT
    ) -> bytes:
        """Send a datagram and return the answer; `OSError` when there is none."""
        with self.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(wait)
            if source:
                client.bind((source, 0))
            client.connect((address, port))
            client.send(payload)
            return client.recv(65535)

    def reaches(self, address: str, port: int = ECHO_PORT, *, wait: float = TIMEOUT) -> set[str]:
        """Return which of "tcp", "udp" and "ping" get an answer from `address`; `wait=QUIET` when none should."""
        found = {"ping"} if self.ping(address, wait=wait) else set()
        for name, ask in (("tcp", self.tcp), ("udp", self.udp)):
            try:
                found |= {name} if ask(address, port, wait=wait) else set()
            except OSError:
                continue
        return found

    def ping(self, address: str, *, size: int = 56, wait: float = TIMEOUT) -> bool:
        """Tell whether an echo request is answered, by the address it went to."""
        answer = self._echo(address, ttl=64, data=os.urandom(size), wait=wait)
        return answer is not None and answer == (_ICMP_ECHOREPLY, address)

    def trace(self, address: str, protocol: Literal["udp", "icmp"] = "udp", hops: int = 8) -> list[str]:
        """Return the addresses on the way to `address`, "*" for silence, as traceroute finds them."""
        way: list[str] = []
        while len(way) < hops and address not in way:
            way.append((self._udp_hop if protocol == "udp" else self._icmp_hop)(address, len(way) + 1))
        return way

    def _icmp_hop(self, address: str, ttl: int) -> str:
        answer = self._echo(address, ttl=ttl, data=b"trace", wait=1.0)
        return answer[1] if answer else "*"

    def _udp_hop(self, address: str, ttl: int) -> str:
        with self.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            # The kernel hands out only errors whose quoted header is this very socket's: that is what is tested.
            probe.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
            probe.connect((address, 33434 + ttl))
            probe.send(b"trace")
            poll = selectors.DefaultSelector()
            poll.register(probe, selectors.EVENT_READ)
            if not poll.select(1.0):
                return "*"
            _, ancillary, _, _ = probe.recvmsg(512, 512, socket.MSG_ERRQUEUE)
            # struct sock_extended_err (linux/errqueue.h), 16 bytes, then the sockaddr_in of who complained.
            return next(socket.inet_ntoa(data[20:24]) for level, kind, data in ancillary if kind == _IP_RECVERR)

    def _echo(self, address: str, *, ttl: int, data: bytes, wait: float) -> tuple[int, str] | None:
        """Send an echo request and return the type and sender of what comes back for it."""
        with self.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as probe:
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            head = os.urandom(4)
            request = struct.pack("!BBH", _ICMP_ECHO, 0, checksum(struct.pack("!BBH", 8, 0, 0) + head + data)) + head
            end = time.monotonic() + wait
            try:
                probe.sendto(request + data, (address, 0))
                while (left := end - time.monotonic()) > 0:
                    probe.settimeout(left)
                    packet, sender = probe.recvfrom(65535)
                    answer = packet[(packet[0] & 15) * 4 :]
                    if answer[0] == _ICMP_ECHOREPLY and answer[4:] == head + data:
                        return _ICMP_ECHOREPLY, str(sender[0])
                    quoted = answer[8:]
                    if answer[0] not in (_ICMP_ECHO, _ICMP_ECHOREPLY) and quoted[24:28] == head:
                        # An error counts only if it quotes what was sent, to where it was sent.
                        return (answer[0], str(sender[0])) if quoted[16:20] == socket.inet_aton(address) else None
            except OSError:
                return None
        return None

    def path_mtu(self, address: str, port: int = ECHO_PORT) -> int:
        """Send datagrams that may not be fragmented until the kernel knows the path's MTU; return it, in bytes."""
        with self.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
            probe.connect((address, port))

            def mtu() -> int:
                return int(probe.getsockopt(socket.IPPROTO_IP, _IP_MTU))

            first = mtu()
            try:
                probe.send(bytes(first - 28))
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
            wait_until(lambda: mtu() < first, 1.0)
            return mtu()

    def open_device(self, name: str, kind: str) -> int:
        """Open a tap or tun of the machine, made now unless it persists; return its descriptor, closed with the lab."""
        flags = (_IFF_TAP if kind == "tap" else _IFF_TUN) | _IFF_NO_PI
        with self.entered():
            # The namespace that counts is the one in which the file is opened, not the one of the ioctl.
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self.lab.at_exit(lambda: os.close(fd))
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        return fd

    def send(self, device: str, *frames: bytes) -> None:
        """Put frames on a device as they are."""
        with self.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind((device, 0))
            for frame in frames:
                sender.send(frame)

    def sniff(self, device: str = "", *, kind: int = _ETH_P_ALL, both_ways: bool = False) -> Sniffer:
        """Start to record the frames that arrive on a device (on all of them without one).

        Of every `kind` (an EtherType) they are heard before any filter sees them, of one kind after those of tc.
        """
        listener = self.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
        if not both_ways:
            listener.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        if device:
            listener.bind((device, kind))
        return Sniffer(listener)

    def hear(self, protocol: int, version: Literal[4, 6] = 4) -> Sniffer:
        """Start to record the packets of an IP protocol that the machine takes for its own, after its input filters."""
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        return Sniffer(self.socket(family, socket.SOCK_RAW, protocol))


def checksum(data: bytes) -> int:
    """Return the internet checksum (RFC 1071) of `data`."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
