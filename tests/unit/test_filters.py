"""The filters, run by a machine of twenty lines: what they let through is what the words say, for any frame."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet import filters
from vmnet.filters import Program
from vmnet.model import Kind, Mode

PASS, DROP = 0xFFFFFFFF, 2
SOURCE, MARK = 0xF7010002, 0x08000000
BROADCAST = 0xFFFFFFFF
ETHERNET: list[tuple[Kind, Mode]] = [("tap", "mapped"), ("veth", "mapped"), ("veth", "native")]
ALL: list[tuple[Kind, Mode]] = [*ETHERNET, ("tun", "mapped"), ("tun", "native")]

words = st.sampled_from([SOURCE, SOURCE + 1, 0, BROADCAST, 0x7F000001]) | st.integers(0, 2**32 - 1)
ethertypes = st.sampled_from([0x0800, 0x0806, 0x86DD, 0x8100, 0x88A8]) | st.integers(0, 0xFFFF)


def run(program: Program, packet: bytes, mark: int = 0) -> int:
    """Return what a classic BPF program says of a packet; a load beyond its end says 0, as in the kernel."""
    accumulator, position = 0, 0
    while True:
        code, if_true, if_false, k = program[position]
        position += 1
        if code == 6:
            return k
        if code in (0x20, 0x28, 0x30):
            size = {0x20: 4, 0x28: 2, 0x30: 1}[code]
            if k == 0xFFFFF014:
                accumulator = mark
            elif k + size > len(packet):
                return 0
            else:
                accumulator = int.from_bytes(packet[k : k + size], "big")
        elif code == 0x54:
            accumulator &= k
        elif code == 0x15:
            position += if_true if accumulator == k else if_false
        elif code == 0x45:
            position += if_true if accumulator & k else if_false
        else:
            raise AssertionError(code)


def ip(source: int, target: int) -> bytes:
    return struct.pack("!BBHHHBBHII", 0x45, 0, 20, 0, 0, 64, 17, 0, source, target)


def frame(ethertype: int, payload: bytes) -> bytes:
    return b"\x02" * 12 + struct.pack("!H", ethertype) + payload


def arp(sender: int) -> bytes:
    return struct.pack("!HHBBH6sI6sI", 1, 0x800, 6, 4, 1, b"\x02" * 6, sender, b"\0" * 6, SOURCE - 1)


@given(st.sampled_from(ETHERNET), words, words)
def test_a_guest_sends_from_its_own_address_only(kind: tuple[Kind, Mode], source: int, target: int) -> None:
    verdict = run(filters.ingress(*kind, SOURCE), frame(0x0800, ip(source, target)))
    native = kind[1] == "native"
    allowed = (source == SOURCE and not (native and target == BROADCAST)) or (source == 0 and not native)
    assert verdict == (PASS if allowed else DROP)


@given(st.sampled_from(ETHERNET), words)
def test_a_mapped_guest_asks_by_arp_in_its_own_name_only(kind: tuple[Kind, Mode], sender: int) -> None:
    verdict = run(filters.ingress(*kind, SOURCE), frame(0x0806, arp(sender)))
    assert verdict == (PASS if kind[1] == "mapped" and sender in (SOURCE, 0) else DROP)


@given(st.sampled_from(ETHERNET), ethertypes.filter(lambda one: one not in (0x0800, 0x0806)), st.binary(max_size=80))
def test_nothing_but_ipv4_and_arp_comes_in(kind: tuple[Kind, Mode], ethertype: int, payload: bytes) -> None:
    assert run(filters.ingress(*kind, SOURCE), frame(ethertype, payload)) == DROP


@given(st.sampled_from(["native", "mapped"]), st.integers(0, 15), words, words)
def test_a_tun_takes_ipv4_from_its_own_address_only(mode: Mode, version: int, source: int, target: int) -> None:
    packet = bytearray(ip(source, target))
    packet[0] = version << 4 | 5
    allowed = version == 4 and source == SOURCE and target != BROADCAST
    assert run(filters.ingress("tun", mode, SOURCE), bytes(packet)) == (PASS if allowed else DROP)


@given(st.sampled_from(ALL), st.binary(max_size=60))
def test_a_short_frame_never_passes_by_accident(kind: tuple[Kind, Mode], data: bytes) -> None:
    verdict = run(filters.ingress(*kind, SOURCE), data)
    if verdict == PASS:
        assert len(data) >= (20 if kind[0] == "tun" else 30)


@given(st.sampled_from(ALL), ethertypes, st.integers(0, 2**32 - 1), st.binary(min_size=20, max_size=60))
def test_only_what_the_rules_have_marked_reaches_a_guest(
    kind: tuple[Kind, Mode], ethertype: int, mark: int, payload: bytes
) -> None:
    packet = payload if kind[0] == "tun" else frame(ethertype, payload)
    is_arp = kind[0] != "tun" and kind[1] == "mapped" and ethertype == 0x0806
    verdict = run(filters.egress(*kind, MARK), packet, mark)
    assert verdict == (PASS if mark & MARK or is_arp else DROP)


@pytest.mark.parametrize(("kind", "mode"), ALL)
def test_programs_are_spelled_for_the_kernel_and_for_tc(kind: Kind, mode: Mode) -> None:
    program = filters.ingress(kind, mode, SOURCE)
    raw = filters.encode(program)
    assert [struct.unpack_from("=HBBI", raw, 8 * i) for i in range(len(program))] == list(program)
    count, *spelled = filters.bytecode(program).split(",")
    assert int(count) == len(program) == len(spelled)
    assert [tuple(map(int, one.split())) for one in spelled] == list(program)
