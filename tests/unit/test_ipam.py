"""The arithmetic of blocks: extents are checked against plain sets, pools against netaddr's own sets."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from netaddr import IPAddress, IPNetwork, IPSet

from vmnet.ipam import (
    Extent,
    Pool,
    blocks_touching,
    blocks_within,
    gateway_mac,
    guest_mac,
    merge,
    parse_network,
    runs,
    subtract,
)
from vmnet.model import HOST_PART, POOL_BLOCKS, POOL_FIRST, Block, Conflict, UsageError

extents = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)))
# Networks of all lengths within 127.0.240.0 to 127.1.15.255: across the border of the host part, and whole in it.
networks = st.builds(
    lambda address, length: IPNetwork((0x7F00F000 + address, length)).cidr, st.integers(0, 0x1FFF), st.integers(20, 32)
)


def blocks_of(some: list[Extent] | tuple[Extent, ...]) -> set[int]:
    return {block for lo, hi in some for block in range(lo, hi)}


def is_tidy(some: list[Extent] | tuple[Extent, ...]) -> bool:
    return all(lo < hi for lo, hi in some) and all(a[1] < b[0] for a, b in itertools.pairwise(some))


@given(extents)
def test_merge_keeps_the_blocks_and_tidies_them(some: list[Extent]) -> None:
    merged = merge(some)
    assert is_tidy(merged)
    assert blocks_of(merged) == blocks_of(some)


@given(extents, extents)
def test_subtract_is_the_difference_of_sets(some: list[Extent], taken: list[Extent]) -> None:
    rest = subtract(merge(some), merge(taken))
    assert is_tidy(rest)
    assert blocks_of(rest) == blocks_of(some) - blocks_of(taken)


@given(st.sets(st.integers(0, 60)))
def test_runs_are_the_same_blocks_as_extents(blocks: set[int]) -> None:
    found = list(runs(sorted(blocks)))
    assert is_tidy(found)
    assert blocks_of(found) == blocks


def test_the_default_pool_is_all_of_127_1_to_127_63() -> None:
    assert Pool().extents == ((0, POOL_BLOCKS),)
    assert Pool.parse([]).extents == ((0, POOL_BLOCKS),)
    assert Block(0).address == IPAddress("127.1.0.2")
    assert Block(POOL_BLOCKS - 1).network == IPNetwork("127.63.255.252/30")


@settings(deadline=None)
@given(st.lists(networks, max_size=4), st.lists(networks, max_size=4))
def test_a_block_is_in_the_pool_only_if_it_lies_wholly_within_it(
    ours: list[IPNetwork], others: list[IPNetwork]
) -> None:
    pool = Pool(tuple(network for network in ours if network not in HOST_PART), tuple(others))
    free = IPSet(ours) - IPSet([HOST_PART]) - IPSet(others)
    assert is_tidy(pool.extents)
    assert blocks_of(pool.extents) == {number for number in range(1024) if Block(number).network in free}


def test_half_blocks_side_by_side_make_a_block() -> None:
    assert Pool.parse(["127.1.0.0/31", "127.1.0.2/31"]).extents == ((0, 1),)
    assert Pool.parse(["127.1.0.0/31", "127.1.0.6/31"]).extents == ()


def test_the_host_part_is_cut_off_a_pool_that_reaches_into_it() -> None:
    assert Pool.parse(["127.0.0.0/15"]).extents == ((0, 16384),)


def test_one_reserved_address_takes_its_whole_block() -> None:
    assert Pool.parse(["127.1.0.0/28"], ["127.1.0.7"]).extents == ((0, 1), (2, 4))


def test_pools_of_the_same_blocks_have_the_same_definition() -> None:
    assert Pool.parse(["127.1.0.0/16"]).definition == Pool.parse(["127.1.0.0/17", "127.1.128.0/17"]).definition
    assert Pool.parse(["127.1.0.0/16"]).definition != Pool.parse(["127.1.0.0/16"], ["127.1.9.9"]).definition


@pytest.mark.parametrize(
    "text", ["", "127", "127.1", "10.0.0.0/8", "::1", "127.1.0.5/24", "127.1.0.0/33", " 127.1.0.0/16", "127.0.0.0/16",
             "127.0.7.0/24", "127.64.0.0/10", "127.0.0.0/8", "127.1.0.0/0", "a/b", "127.1.0.0-127.1.0.9"]
)  # fmt: skip
def test_what_cannot_be_a_pool_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        Pool.parse([text])
    assert text in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("text", ["10.0.0.0/8", "::1/128", "127.1.0.5/24", "128.0.0.0/8", "x"])
def test_what_cannot_be_reserved_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Pool.parse([], [text])


def test_reserving_beyond_the_pool_changes_nothing() -> None:
    assert Pool.parse([], ["127.0.0.0/16", "127.64.0.0/10"]).extents == Pool().extents


def test_a_network_is_read_as_written() -> None:
    assert parse_network("127.5.0.0/16") == IPNetwork("127.5.0.0/16")
    assert parse_network("127.5.0.1") == IPNetwork("127.5.0.1/32")


def test_the_network_that_was_meant_is_named() -> None:
    with pytest.raises(UsageError, match=r"127\.1\.0\.0/24 is the network"):
        parse_network("127.1.0.5/24")


def test_an_address_leads_to_its_block() -> None:
    pool = Pool.parse(["127.1.0.0/16"], ["127.1.0.9"])
    assert pool.block_at(IPAddress("127.1.0.6")) == Block(1)
    with pytest.raises(Conflict, match=r"127\.1\.0\.9/32"):
        pool.block_at(IPAddress("127.1.0.10"))


@pytest.mark.parametrize("text", ["127.1.0.0", "127.1.0.1", "127.1.0.3"])
def test_only_the_third_address_of_a_block_is_for_a_guest(text: str) -> None:
    with pytest.raises(UsageError, match=text) as refused:
        Pool().block_at(IPAddress(text))
    assert "127.1.0.2" in refused.value.hint


@pytest.mark.parametrize("text", ["127.0.0.2", "127.2.0.2", "127.64.0.2", "10.0.0.2", "126.255.255.254", "::2"])
def test_an_address_outside_the_pool_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Pool.parse(["127.1.0.0/16"]).block_at(IPAddress(text))


def test_macs_spell_out_the_addresses() -> None:
    assert guest_mac(Block(0)) == "02:76:7f:01:00:02"
    assert gateway_mac(Block(0)) == "02:76:7f:01:00:01"
    assert guest_mac(Block(POOL_BLOCKS - 1)) == "02:76:7f:3f:ff:fe"


@given(st.integers(0, POOL_BLOCKS * 4 - 1), st.integers(0, 40))
def test_a_range_touches_no_fewer_blocks_than_it_holds(first: int, length: int) -> None:
    last = min(first + length, POOL_BLOCKS * 4 - 1)
    touching = {address // 4 for address in range(first, last + 1)}
    within = {block for block in touching if first <= block * 4 and block * 4 + 3 <= last}
    assert blocks_of([blocks_touching(POOL_FIRST + first, POOL_FIRST + last)]) == touching
    assert blocks_of([blocks_within(POOL_FIRST + first, POOL_FIRST + last)]) == within


@pytest.mark.parametrize(
    ("first", "last"), [("10.0.0.0", "10.0.0.9"), ("127.0.0.1", "127.0.0.1"), ("200.0.0.0", "201.0.0.0")]
)
def test_a_range_beyond_the_pool_touches_no_block(first: str, last: str) -> None:
    assert blocks_of([blocks_touching(int(IPAddress(first)), int(IPAddress(last)))]) == set()
