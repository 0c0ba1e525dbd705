"""Decide which blocks there are to give: arithmetic on block numbers, with netaddr's types at the edges.

An extent (lo, hi) stands for the blocks lo, lo + 1, ... hi - 1. A list of extents is sorted, and no two of them
overlap or touch. Everything here is pure; the records themselves are `store`'s.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from netaddr import AddrFormatError, IPAddress, IPNetwork

from vmnet.model import (
    BLOCK_SIZE,
    HOST_PART,
    LOOPBACK,
    POOL_BLOCKS,
    POOL_FIRST,
    POOL_SPAN,
    Block,
    Conflict,
    UsageError,
    block_of,
)

Extent: TypeAlias = tuple[int, int]


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Return the same blocks as a sorted list of extents that neither overlap nor touch; empty ones go."""
    merged: list[Extent] = []
    for lo, hi in sorted(extents):
        if lo >= hi:
            continue
        if merged and lo <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
        else:
            merged.append((lo, hi))
    return merged


def subtract(extents: Sequence[Extent], taken: Iterable[Extent]) -> list[Extent]:
    """Return what of the sorted `extents` lies in none of the sorted `taken`; neither overlaps itself."""
    rest: list[Extent] = []
    holes = iter(taken)
    hole = next(holes, None)
    for lo, hi in extents:
        start = lo
        while hole is not None and hole[0] < hi:
            if hole[0] > start:
                rest.append((start, hole[0]))
            start = max(start, hole[1])
            if hole[1] >= hi:
                break
            hole = next(holes, None)
        if start < hi:
            rest.append((start, hi))
    return rest


def runs(blocks: Iterable[int]) -> Iterator[Extent]:
    """Yield the extents that rising block numbers make up."""
    lo = hi = -1
    for block in blocks:
        if block != hi:
            if lo != hi:
                yield lo, hi
            lo = block
        hi = block + 1
    if lo != hi:
        yield lo, hi


def blocks_within(first: int, last: int) -> Extent:
    """Return the blocks all of whose addresses lie in first..last (numbers in host order, both included)."""
    return max((first - POOL_FIRST + BLOCK_SIZE - 1) // BLOCK_SIZE, 0), (last + 1 - POOL_FIRST) // BLOCK_SIZE


def blocks_touching(first: int, last: int) -> Extent:
    """Return the blocks any of whose addresses lies in first..last (numbers in host order, both included)."""
    return max((first - POOL_FIRST) // BLOCK_SIZE, 0), min((last - POOL_FIRST) // BLOCK_SIZE + 1, POOL_BLOCKS)


def parse_network(text: str) -> IPNetwork:
    """Return the IPv4 network that `text` names (127.5.0.0/16, or one address); raise `UsageError` naming it."""
    try:
        network = IPNetwork(text)
    except (AddrFormatError, ValueError):
        raise UsageError(f"{text!r} is not a network", hint="write it as 127.5.0.0/16, or as one address") from None
    if network.version != 4 or network.ip != network.network:
        meant = f"; {network.cidr} is the network" if network.version == 4 else ""
        raise UsageError(f"{text!r} is not an IPv4 network{meant}", hint="write it as 127.5.0.0/16, or as one address")
    return network


@dataclass(frozen=True)
class Pool:
    """The blocks that may be given out: those that lie wholly in `networks` and hold no address of `reserved`.

    The host part, 127.0.0.0/16, is never among them. Raises `UsageError` for a network that lies outside 127.0.0.0/10
    or inside the host part, and for a reserved one outside 127.0.0.0/8.
    """

    networks: tuple[IPNetwork, ...] = (POOL_SPAN,)
    reserved: tuple[IPNetwork, ...] = ()

    def __post_init__(self) -> None:
        for network in self.networks:
            if network not in POOL_SPAN or network in HOST_PART:
                raise UsageError(
                    f"{network} cannot be in the pool",
                    hint="the pool is made of networks in 127.1.0.0 to 127.63.255.255",
                )
        for network in self.reserved:
            if network not in LOOPBACK:
                raise UsageError(f"{network} cannot be reserved", hint=f"what is reserved lies in {LOOPBACK}")

    @classmethod
    def parse(cls, networks: Sequence[str], reserved: Sequence[str] = ()) -> "Pool":
        """Return the pool that settings describe; no networks: all of 127.1.0.0 to 127.63.255.255."""
        spans = tuple(parse_network(text) for text in networks) or (POOL_SPAN,)
        return cls(spans, tuple(parse_network(text) for text in reserved))

    @cached_property
    def whole(self) -> tuple[Extent, ...]:
        """The extents of `networks`, reserved blocks included."""
        # Addresses are joined before they are cut into blocks: two /31 make a block, neither of them does alone.
        spans = merge((network.first, network.last + 1) for network in self.networks)
        return tuple(merge(blocks_within(lo, hi - 1) for lo, hi in spans))

    @cached_property
    def extents(self) -> tuple[Extent, ...]:
        """The extents that may be given out."""
        reserved = merge(blocks_touching(network.first, network.last) for network in self.reserved)
        return tuple(subtract(self.whole, reserved))

    @cached_property
    def definition(self) -> str:
        """The pool as text, equal for two pools exactly if their extents are."""
        return " ".join(f"{lo}-{hi}" for lo, hi in self.extents)

    def block_at(self, address: IPAddress) -> Block:
        """Return the block whose guest has `address`.

        Raises `UsageError` if the address lies outside the pool or is not the third of a /30, `Conflict` if the
        settings reserve it.
        """
        block = block_of(address)
        if not holds(self.whole, block.number):
            spans = ", ".join(str(network) for network in self.networks)
            raise UsageError(f"{address} is not in the pool", hint=f"the settings make the pool of {spans}")
        if address != block.address:
            raise UsageError(
                f"{address} is not an address for a guest",
                hint=f"a guest has the third address of a /30: here {block.address}",
            )
        for network in self.reserved:
            if network.first < block.first + BLOCK_SIZE and network.last >= block.first:
                raise Conflict(f"{address} is reserved: the settings reserve {network}", hint="ask for another address")
        return block


def holds(extents: Iterable[Extent], block: int) -> bool:
    """Say whether `block` is in one of `extents`."""
    return any(lo <= block < hi for lo, hi in extents)


def guest_mac(block: Block) -> str:
    """Return the MAC of the guest in `block`: 02:76 and the four bytes of its address, so unique and stable.

    02 marks it as locally administered and unicast (IEEE 802, section 8.2).
    """
    return _mac(block.first + 2)


def gateway_mac(block: Block) -> str:
    """Return the MAC of the host's side of `block`: 02:76 and the four bytes of the gateway's address."""
    return _mac(block.first + 1)


def _mac(address: int) -> str:
    return "02:76:" + address.to_bytes(4, "big").hex(":")
