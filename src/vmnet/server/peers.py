"""Who is at the other end of a connection, as the kernel tells it, and what of them a server must share."""

import errno
import os
import pwd
import socket
import struct
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from vmnet.members import group_id

_SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h; unix(7)
_NAMESPACES = ("net", "mnt", "pid", "user")
_LARGEST_OPTION = 1024  # bytes: the largest option that Python reads, here of 256 groups


class Peer(NamedTuple):
    """The process that connected, its effective uid and gid at that time (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Return who connected; raises OSError."""
    return Peer(*struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


def has_account(uid: int) -> bool:
    """Say whether a user is known by name: who has subordinate uids (subuid(5)) is one user, not sixty thousand."""
    try:
        return bool(pwd.getpwuid(uid))
    except KeyError:
        return False


def is_member(connection: socket.socket, peer: Peer) -> bool:
    """Say whether who connected was in the group `vmnet` then."""
    gid = group_id()
    if gid is None or peer.gid == gid:
        return gid is not None
    try:
        groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _LARGEST_OPTION)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        return gid in _groups_of(peer.pid)
    return gid in struct.unpack(f"{len(groups) // 4}I", groups)


def _groups_of(pid: int) -> set[int]:
    """Return the groups of a process that is in more of them than Python reads by getsockopt(2)."""
    with open(f"/proc/{pid}/status", "rb") as file:
        return {int(one) for one in _value(file.read(), b"Groups").split()}


@cache
def _namespaces() -> tuple[str, ...]:
    """Return the kinds of namespaces that this kernel has, that of the network first."""
    return tuple(one for one in _NAMESPACES if os.path.exists(f"/proc/self/ns/{one}"))


@dataclass(frozen=True, slots=True)
class Standing:
    """What a process has that decides what its command does: namespaces, root folder, who it is, and its rights."""

    places: tuple[tuple[int, int], ...]
    uids: tuple[bytes, ...]
    capabilities: int
    umask: int

    def serves(self, other: "Standing") -> bool:
        """Say whether this process may do the other's work: in the same places, as root itself, with no more rights."""
        return self.places == other.places and set(other.uids) == {b"0"} and not self.capabilities & ~other.capabilities

    def shares_network(self, other: "Standing") -> bool:
        """Say whether both are in one network namespace."""
        return self.places[0] == other.places[0]


def standing_of(pid: int | str) -> Standing | None:
    """Return the standing of a process, None for one that is not seen from here or has ended."""
    places = [f"/proc/{pid}/ns/{one}" for one in _namespaces()] + [f"/proc/{pid}/root"]
    try:
        found = [os.stat(place) for place in places]
        with open(f"/proc/{pid}/status", "rb") as file:
            status = file.read()
        return Standing(
            tuple((one.st_dev, one.st_ino) for one in found),
            tuple(_value(status, b"Uid").split()),
            int(_value(status, b"CapEff"), 16),
            int(_value(status, b"Umask"), 8),  # a process that is ending has none
        )
    except (OSError, ValueError):
        return None


def _value(status: bytes, name: bytes) -> bytes:
    """Return what a line of /proc/PID/status says (proc(5))."""
    return status.partition(b"\n%s:\t" % name)[2].partition(b"\n")[0]
