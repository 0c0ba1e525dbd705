"""The socket that the server listens at: handed over by who started it, or made here."""

import errno
import fcntl
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from vmnet.client import SOCKET
from vmnet.model import Conflict, KernelRefused, NotPermitted

_FIRST_PASSED = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
_BACKLOG = 4096


def passed_socket(descriptor: int | None = None) -> socket.socket | None:
    """Return the socket that systemd has passed (sd_listen_fds(3)), or the one behind `descriptor`; None without."""
    if os.environ.pop("LISTEN_PID", "") == str(os.getpid()) and os.environ.pop("LISTEN_FDS", "") == "1":
        descriptor = _FIRST_PASSED
    if descriptor is None:
        return None
    try:
        os.set_inheritable(descriptor, False)
        passed = socket.socket(fileno=descriptor)
        kind = (passed.family, passed.type, passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise KernelRefused(f"descriptor {descriptor} is no socket: {error.strerror}") from None
    if kind != (socket.AF_UNIX, socket.SOCK_SEQPACKET, 1):
        raise KernelRefused(f"descriptor {descriptor} is no socket of sequenced packets that listens")
    return passed


def pass_on(listener: socket.socket) -> None:
    """Have what this process becomes by execve(2) find the listener, as if systemd had passed it."""
    os.dup2(listener.fileno(), _FIRST_PASSED)
    os.set_inheritable(_FIRST_PASSED, True)  # which dup2 does not do where it is that very one
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")


class Listener:
    """A socket in a folder of root's, made here, and gone with the block."""

    def __init__(self, run: Path, group: int | None) -> None:
        self._run = run
        self._group = group
        self._folder = -1
        self._made: os.stat_result | None = None
        self._lock = -1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)

    def __enter__(self) -> socket.socket:
        try:
            self._folder = _open_folder(self._run)
            self._lock = _take_lock(self._folder, self._run)
            self._bind()
        except OSError as error:
            self._close()
            raise KernelRefused(f"{self._run / SOCKET} cannot be made: {error.strerror}") from None
        except BaseException:
            self._close()
            raise
        return self._socket

    def _bind(self) -> None:
        """Make the socket under another name, and give it its own once it is whole and has its rights."""
        partial = f".{SOCKET}.new"
        with suppress(FileNotFoundError):
            os.unlink(partial, dir_fd=self._folder)
        former = os.umask(0o177)
        try:
            # By the descriptor: whatever happens to the path meanwhile, it is the folder that was looked at.
            self._socket.bind(f"/proc/self/fd/{self._folder}/{partial}")
        finally:
            os.umask(former)
        if self._group is not None:
            os.chown(partial, -1, self._group, dir_fd=self._folder, follow_symlinks=False)
            os.chmod(f"/proc/self/fd/{self._folder}/{partial}", 0o660)
        self._socket.listen(_BACKLOG)
        os.rename(partial, SOCKET, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._made = os.stat(SOCKET, dir_fd=self._folder, follow_symlinks=False)

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            there = os.stat(SOCKET, dir_fd=self._folder, follow_symlinks=False)
            if self._made and os.path.samestat(there, self._made):
                os.unlink(SOCKET, dir_fd=self._folder)
        self._close()

    def _close(self) -> None:
        self._socket.close()
        for handle in (self._folder, self._lock):
            if handle >= 0:
                os.close(handle)


def _open_folder(run: Path) -> int:
    """Open the run folder, made if need be; raises NotPermitted where others than root may change what is in it."""
    run.mkdir(mode=0o755, parents=True, exist_ok=True)
    folder = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(folder)
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(folder)
        raise NotPermitted(
            f"others than root may change what is in {run}: owner {found.st_uid}, mode {found.st_mode & 0o7777:04o}",
            hint=f"chown root {run}; chmod 755 {run}",
        )
    return folder


def _take_lock(folder: int, run: Path) -> int:
    """Return the lock of the one server of this folder; the kernel takes it from a dead one."""
    lock = os.open("server.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise Conflict(f"another server is at work at {run / SOCKET}") from None
    return lock
