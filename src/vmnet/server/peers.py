"""Who is at the other end of a connection, as the kernel tells it, and what of them a server must share."""

import grp
import os
import socket
import struct
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

GROUP = "vmnet"
"""The group whose members may have guests of their own without root."""
_SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h; unix(7)
_NAMESPACES = ("net", "mnt", "pid", "user")
_PEER_LIMIT = 65536 * 4  # bytes: NGROUPS_MAX groups


class Peer(NamedTuple):
    """The process that connected, its effective uid and gid at that time (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Return who connected; raises OSError."""
    return Peer(*struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


def group_id() -> int | None:
    """Return the gid of the group `vmnet`, None where there is none."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


def is_member(connection: socket.socket, peer: Peer) -> bool:
    """Say whether who connected was in the group `vmnet` then."""
    gid = group_id()
    if gid is None or peer.gid == gid:
        return gid is not None
    groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _PEER_LIMIT)
    return gid in struct.unpack(f"{len(groups) // 4}I", groups)


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
    except OSError:
        return None

    def value(name: bytes) -> bytes:
        return status.partition(b"\n%s:\t" % name)[2].partition(b"\n")[0]

    return Standing(
        tuple((one.st_dev, one.st_ino) for one in found),
        tuple(value(b"Uid").split()),
        int(value(b"CapEff"), 16),
        int(value(b"Umask"), 8),
    )
