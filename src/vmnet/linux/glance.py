"""Tell at little cost whether anything of ours has changed: digests of what the kernel shows, not decoded.

Two digests that are equal mean that a look would see the same; two that differ mean that it is worth a look.
"""

import hashlib
import os
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import TypeAlias

from vmnet.linux import iptables, nft, wire
from vmnet.linux.hostroutes import host_routes
from vmnet.linux.netlink import (
    NETLINK_NETFILTER,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTM_GETTFILTER,
    Message,
    Netlink,
    u32,
)
from vmnet.linux.observe import leads_out, sysctl
from vmnet.linux.places import NAMED, Places
from vmnet.model import LIBVIRT_BRIDGE, Lease
from vmnet.ops import ROUTE_PROTOCOL
from vmnet.plan import ALIAS_PREFIX, PEER_NAME
from vmnet.platform import Glance

_LO = 1
_MARKED = ALIAS_PREFIX.encode()
_IFLA_STATS, _IFLA_STATS64 = 7, 23
_NUD_PERMANENT = 0x80
# A neighbour's header, address and MAC; what follows tells its age. A learnt one comes and goes by itself.
_NEIGHBOUR_SIZE = 12 + 8 + 12
_INDEX = struct.Struct("=4xI")

_Digest: TypeAlias = hashlib.blake2b

# The headers of the tables of 64 and of 32 bits: their sizes depend on the kernel.
_counters = [(b"\0", b"\0")]


def _begin() -> _Digest:
    return hashlib.blake2b(digest_size=16)


def glance(places: Places, leases: Sequence[Lease], insides: Sequence[Lease]) -> Glance:
    """Return what the kernel shows of the host part, of guests, and inside of the namespaces of some of them."""
    host, guests = _begin(), _begin()
    libvirt = any(lease.maker == "libvirt" for lease in leases)
    ours = _add_links(places.host, {lease.device for lease in leases}, host, guests, libvirt=libvirt)
    # Aliases are addresses of lo.
    _add_tables(places.host, {*ours, _LO} if any(lease.kind == "alias" for lease in leases) else ours, host, guests)
    with suppress(OSError):
        guests.update(repr(sorted(os.listdir(NAMED))).encode())
    return Glance(_finish_host(places, host), guests.digest(), _glance_insides(places, insides))


def _add_links(
    netlink: Netlink, devices: Collection[str], host: _Digest, guests: _Digest, *, libvirt: bool
) -> set[int]:
    """Add what devices show to the digests; return the indexes of those that are ours."""
    ours = set()
    bridges = []
    port = _port_of(netlink, LIBVIRT_BRIDGE) if libvirt else b""
    for body in netlink.dump(RTM_GETLINK, wire.link_query()):
        index = _INDEX.unpack_from(body)[0]
        if index == _LO:
            host.update(_without_counters(body))
        elif _MARKED in body or wire.parse_name(body) in devices:
            ours.add(index)
            guests.update(_without_counters(body))
        elif port and port in body:
            guests.update(wire.parse_name(body).encode())
        elif wire.BRIDGE in body:
            host.update(wire.parse_name(body).encode())  # the rest of it tells of its timers
            bridges.append(index)
    host.update(bytes(leads_out(netlink, index) for index in bridges))
    return ours


def _port_of(netlink: Netlink, bridge: str) -> bytes:
    """Return what stands in an RTM_NEWLINK of a port of that bridge, nothing where there is none."""
    body = netlink.get(Message(RTM_GETLINK, 0, wire.link_query(bridge)))
    return u32(wire.IFLA_MASTER, _INDEX.unpack_from(body)[0]) if body else b""


def _add_tables(netlink: Netlink, ours: Collection[int], host: _Digest, guests: _Digest) -> None:
    """Add addresses, routes, neighbours and filters to the digests."""
    for body in netlink.dump(RTM_GETADDR, wire.address_query()):
        index = _INDEX.unpack_from(body)[0]
        if index == _LO:
            host.update(body)
        if index in ours:
            guests.update(body)
    for body in netlink.dump(RTM_GETROUTE, wire.route_query(ROUTE_PROTOCOL)):
        guests.update(body)
    for body in netlink.dump(RTM_GETNEIGH, wire.neighbour_query()):
        if _INDEX.unpack_from(body)[0] in ours:
            guests.update(_settled(body))
    for index in ours:
        for direction in ("ingress", "egress"):
            for body in netlink.dump(RTM_GETTFILTER, wire.filter_query(index, direction)):
                guests.update(body)


def _finish_host(places: Places, digest: _Digest) -> bytes | None:
    for body in host_routes(places.host):
        digest.update(body)
    digest.update(b"%d" % sysctl("net.ipv4.ip_forward"))
    netfilter = Netlink(NETLINK_NETFILTER)
    try:
        generation = nft.generation(netfilter)
    finally:
        netfilter.close()
    if generation is None or iptables.has_legacy_filter():
        return None  # the older iptables has no such number
    digest.update(generation)
    return digest.digest()


def _without_counters(body: bytes) -> bytes:
    """Return an RTM_NEWLINK without its two tables of counters, which stand one behind the other.

    They are looked for by the headers that they had last: to walk over thirty attributes takes longer than all else.
    """
    headers = _counters[0]
    start = body.find(headers[0])
    middle = start + int.from_bytes(headers[0][:2], "little")
    if start < 0 or body[middle : middle + 4] != headers[1]:
        places = {kind: place for place, kind in _attributes(body)}
        if not {_IFLA_STATS, _IFLA_STATS64} <= places.keys():
            return body
        start, middle = places[_IFLA_STATS64], places[_IFLA_STATS]
        _counters[0] = headers = (body[start : start + 4], body[middle : middle + 4])
    return body[:start] + body[middle + int.from_bytes(headers[1][:2], "little") :]


def _attributes(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield position and kind of each attribute of an RTM_NEWLINK."""
    position = 16
    while position + 4 <= len(body):
        size, kind = struct.unpack_from("=HH", body, position)
        yield position, kind
        position += max(4, size + 3 & ~3)


def _settled(neighbour: bytes) -> bytes:
    state = int.from_bytes(neighbour[8:10], "little")
    return neighbour[:_NEIGHBOUR_SIZE] if state & _NUD_PERMANENT else b""


def _glance_insides(places: Places, leases: Sequence[Lease]) -> bytes:
    digest = _begin()
    for lease in leases:
        if lease.netns is None:
            continue
        digest.update(lease.name.encode())
        try:
            netlink = places.open(lease.netns.path, None)
            found = os.fstat(places.handle(lease.netns.path))
        except OSError as error:
            digest.update(b"%d" % (error.errno or 0))
            continue
        digest.update(b"%d:%d" % (found.st_dev, found.st_ino))
        for body in _inside(netlink):
            digest.update(body)
        places.forget(lease.netns.path)
    return digest.digest()


def _inside(netlink: Netlink) -> Iterator[bytes]:
    for name in (PEER_NAME, "lo"):
        yield _without_counters(netlink.get(Message(RTM_GETLINK, 0, wire.link_query(name))) or b"")
    yield from netlink.dump(RTM_GETADDR, wire.address_query())
    yield from netlink.dump(RTM_GETROUTE, wire.route_query())
    for body in netlink.dump(RTM_GETNEIGH, wire.neighbour_query()):
        yield _settled(body)
