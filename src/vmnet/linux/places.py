"""Network namespaces: which one a path leads to, sockets inside of it, making and deleting named ones.

Entering one takes setns(2) of the calling thread and back; a socket opened in between stays inside.
"""

import ctypes
import fcntl
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from vmnet.linux.netlink import RTM_SETLINK, Message, Netlink, netns_cookie, text
from vmnet.linux.wire import IFF_UP, link_header
from vmnet.model import KernelRefused, NetnsId

NAMED = Path("/run/netns")

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
_MS_BIND, _MS_REC, _MS_SHARED = 4096, 16384, 1 << 20
_MNT_DETACH = 2
_NS_GET_USERNS, _NS_GET_NSTYPE, _NS_GET_OWNER_UID = 0xB701, 0xB703, 0xB704  # include/uapi/linux/nsfs.h
_IFLA_IFALIAS = 20
_OWN = "/proc/thread-self/ns/net"
T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library that says -1 when it fails; return what it says, or raise OSError."""
    result: int = getattr(_libc, name)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def setns(fd: int, kind: int) -> None:
    """Enter the namespace behind `fd` (setns(2)); raises OSError."""
    call("setns", fd, kind)


def unshare(kinds: int) -> None:
    """Leave the namespaces of these kinds for new ones (unshare(2)); raises OSError."""
    call("unshare", kinds)


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount (mount(2)); raises OSError."""
    encoded = [value.encode() if value is not None else None for value in (source, target, kind, data)]
    call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def umount(target: str) -> None:
    """Detach what is mounted at `target` (umount2(2), MNT_DETACH); raises OSError."""
    call("umount2", target.encode(), _MNT_DETACH)


@cache
def boot_id() -> str:
    """Return the kernel's name for this boot (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identify(path: str, *, closely: bool = True) -> NetnsId | None:
    """Return which network namespace `path` leads to, or None where it leads to none, or to one of another kind.

    Without `closely`, which takes as long as opening a socket inside, it has no cookie. Raises PermissionError where
    the caller may not look.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
        return None
    own = os.stat(_OWN)
    if found.st_dev != own.st_dev or not stat.S_ISREG(found.st_mode):
        return None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return NetnsId(found.st_dev, found.st_ino, boot_id())
    try:
        found = os.fstat(handle)
        if fcntl.ioctl(handle, _NS_GET_NSTYPE) != CLONE_NEWNET:  # ioctl_ns(2)
            return None
        return NetnsId(found.st_dev, found.st_ino, boot_id(), _cookie(handle) if closely else None)
    finally:
        os.close(handle)


def _cookie(handle: int) -> int | None:
    """Return the cookie of a namespace, if one may ask."""
    home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            setns(handle, CLONE_NEWNET)
        except OSError:
            return None
        try:
            inside = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        finally:
            setns(home, CLONE_NEWNET)
        with inside:
            return netns_cookie(inside)
    finally:
        os.close(home)


def owned_from_here(path: str = _OWN) -> bool:
    """Say whether the user namespace that owns the network namespace at `path` is the caller's, or one below it.

    In any other case the caller's capabilities count for nothing there (ioctl_ns(2), NS_GET_USERNS).
    """
    if not os.path.exists("/proc/self/ns/user"):
        return True  # a kernel without user namespaces says EPERM to everybody
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.close(fcntl.ioctl(handle, _NS_GET_USERNS))
    except PermissionError:
        return False
    finally:
        os.close(handle)
    return True


def is_theirs(handle: int, uid: int) -> bool:
    """Say whether a descriptor is that of a network namespace which a user has all rights over without being root.

    That is one whose user namespace is owned by that uid (user_namespaces(7), "Capabilities"; ioctl_ns(2)). Of
    anything else nothing but its status is looked at.
    """
    found, own = os.fstat(handle), os.stat(_OWN)
    if found.st_dev != own.st_dev or not stat.S_ISREG(found.st_mode):
        return False
    try:
        if fcntl.ioctl(handle, _NS_GET_NSTYPE) != CLONE_NEWNET:
            return False
        users = fcntl.ioctl(handle, _NS_GET_USERNS)
    except OSError:  # that of init, or one above ours; a descriptor that is for nothing (O_PATH)
        return False
    try:
        owner = fcntl.ioctl(users, _NS_GET_OWNER_UID, bytes(4))
        return int.from_bytes(owner, sys.byteorder) == uid
    finally:
        os.close(users)


def find_process(found: NetnsId) -> str | None:
    """Return the way into a network namespace by the process of the lowest number in it, None where there is none."""
    for pid in sorted(int(one) for one in os.listdir("/proc") if one.isdecimal()):
        path = f"/proc/{pid}/ns/net"
        with suppress(OSError):
            there = os.stat(path)
            if (there.st_dev, there.st_ino) == (found.device, found.inode):
                return path
    return None


def is_stub(path: str) -> bool:
    """Say whether `path` is a file to mount a namespace on, with nothing mounted: empty, and among the named ones."""
    try:
        found, folder = os.lstat(path), os.stat(NAMED)
    except OSError:
        return False
    is_empty = stat.S_ISREG(found.st_mode) and found.st_size == 0 and found.st_dev == folder.st_dev
    return is_empty and Path(path).parent == NAMED


class Places:
    """The sockets that a command has opened, by place; the host's is there from the start."""

    def __init__(self) -> None:
        self._home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        self._sockets: dict[str, Netlink] = {"": Netlink()}
        self._handles: dict[str, int] = {}

    def close(self) -> None:
        """Close all sockets and handles."""
        for netlink in self._sockets.values():
            netlink.close()
        for handle in [self._home, *self._handles.values()]:
            os.close(handle)

    def close_guests(self) -> None:
        """Close what is open of guests' namespaces."""
        for place in list(self._handles):
            self.forget(place)

    @property
    def host(self) -> Netlink:
        """The socket in the host's own namespace."""
        return self._sockets[""]

    def forget(self, place: str) -> None:
        """Close what is open for `place`."""
        if place in self._handles:
            self._sockets.pop(place).close()
            os.close(self._handles.pop(place))

    def open(self, place: str, expected: NetnsId | None = None) -> Netlink:
        """Return a socket in the namespace at `place`; the same one each time.

        Raises OSError where there is no way in, and ProcessLookupError where it is not the `expected` one: what is
        checked is what was opened, so a path that changes meanwhile leads nowhere else.
        """
        if place not in self._sockets:
            handle = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(handle)
            if expected and (found.st_dev, found.st_ino) != (expected.device, expected.inode):
                os.close(handle)
                raise ProcessLookupError(f"{place} is another network namespace")
            try:
                self._sockets[place] = self._within(handle, Netlink)
            except OSError:
                os.close(handle)
                raise
            self._handles[place] = handle
        return self._sockets[place]

    def handle(self, place: str) -> int:
        """Return the descriptor of a place that is open."""
        return self._handles[place]

    def _within(self, handle: int, do: Callable[[], T]) -> T:
        setns(handle, CLONE_NEWNET)
        try:
            return do()
        finally:
            self._go_home()

    def _go_home(self) -> None:
        try:
            setns(self._home, CLONE_NEWNET)
        except OSError as error:
            # In a guest's namespace whatever came next would hit the wrong host: nothing may come next.
            sys.exit(f"vmnet: the way back into the host's network namespace is barred: {error.strerror}")

    def make(self, path: str, alias: str) -> None:
        """Make a namespace at `path`, its lo up and marked with `alias` before the path leads to it.

        Raises KernelRefused where something is there already.
        """
        _share_named()
        unshare(CLONE_NEWNET)
        try:
            handle = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
            netlink = Netlink()
        finally:
            self._go_home()
        header = link_header(index=1, flags=IFF_UP, change=IFF_UP)
        failures = netlink.send([Message(RTM_SETLINK, 0, header + text(_IFLA_IFALIAS, alias))])
        try:
            if failures:
                raise KernelRefused(f"lo of a new namespace cannot be set up: {failures[0]}")
            try:
                os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
            except FileExistsError:
                # A run that was killed here leaves such a file behind.
                if not is_stub(path):
                    raise KernelRefused(f"{path} came into being meanwhile") from None
            mount(f"/proc/self/fd/{handle}", path, None, _MS_BIND)
        except (OSError, KernelRefused):
            netlink.close()
            os.close(handle)
            raise
        self._sockets[path] = netlink
        self._handles[path] = handle

    def delete(self, path: str) -> None:
        """Take away the namespace at `path`: the way to it, and itself once nothing runs in it any more."""
        self.forget(path)
        with suppress(OSError):
            umount(path)
        Path(path).unlink(missing_ok=True)


def _share_named() -> None:
    """Make /run/netns what ip-netns(8) makes of it: mounts in it show in all mount namespaces that share it."""
    NAMED.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        # Not recursively: what is mounted in a shared mount is shared anyhow, and may be a thousand namespaces.
        mount("", str(NAMED), None, _MS_SHARED)
    except OSError:
        mount(str(NAMED), str(NAMED), None, _MS_BIND | _MS_REC)
        mount("", str(NAMED), None, _MS_SHARED | _MS_REC)


@contextmanager
def entered(path: str) -> Iterator[None]:
    """Run the body in the network namespace at `path`; raises OSError."""
    home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(there, CLONE_NEWNET)
        yield
    finally:
        setns(home, CLONE_NEWNET)
        os.close(there)
        os.close(home)
