"""The two filters on each guest's own device, as classic BPF: no flush of any rules touches them.

Inward they let in what bears the guest's own source alone; outward only what the rules have marked as passed.
A program is a sequence of struct sock_filter (code, jt, jf, k: Documentation/networking/filter.rst); attached
with direct action it returns -1 (go on) or 2 (TC_ACT_SHOT).
"""

import struct
from typing import TypeAlias

from vmnet.model import Kind, Mode

Program: TypeAlias = tuple[tuple[int, int, int, int], ...]

_PASS = (6, 0, 0, 0xFFFFFFFF)
_DROP = (6, 0, 0, 2)
_LOAD_ETHERTYPE = (40, 0, 0, 12)
_LOAD_MARK = (32, 0, 0, 0xFFFFF014)  # SKF_AD_OFF + SKF_AD_MARK
_IPV4, _ARP = 0x0800, 0x0806
_BROADCAST = 0xFFFFFFFF


def ingress(kind: Kind, mode: Mode, source: int) -> Program:
    """Return what the host takes from a guest whose address, in its own spelling, is `source`."""
    if kind == "tun":
        return (
            (48, 0, 0, 0), (84, 0, 0, 240), (21, 0, 5, 64),  # the version is 4
            (32, 0, 0, 12), (21, 0, 3, source),
            (32, 0, 0, 16), (21, 1, 0, _BROADCAST),
            _PASS, _DROP,
        )  # fmt: skip
    if mode == "native":
        # Limited broadcast is checked by the kernel before loopback sources are: after a flush of the rules it
        # would reach a UDP service of the host as if it came from the host itself.
        return (
            _LOAD_ETHERTYPE, (21, 0, 5, _IPV4),
            (32, 0, 0, 26), (21, 0, 3, source),
            (32, 0, 0, 30), (21, 1, 0, _BROADCAST),
            _PASS, _DROP,
        )  # fmt: skip
    # ARP senders are checked because invented ones overflow the neighbour table of the whole machine.
    return (
        _LOAD_ETHERTYPE, (21, 3, 0, _IPV4), (21, 0, 6, _ARP),
        (32, 0, 0, 28), (21, 3, 2, source),
        (32, 0, 0, 26), (21, 1, 0, source), (21, 0, 1, 0),
        _PASS, _DROP,
    )  # fmt: skip


def egress(kind: Kind, mode: Mode, mark: int) -> Program:
    """Return what leaves the host for a guest: what bears the bit `mark`, and ARP for a mapped Ethernet guest."""
    if kind != "tun" and mode == "mapped":
        return (_LOAD_ETHERTYPE, (21, 2, 0, _ARP), _LOAD_MARK, (69, 0, 1, mark), _PASS, _DROP)
    return (_LOAD_MARK, (69, 0, 1, mark), _PASS, _DROP)


def encode(program: Program) -> bytes:
    """Return `program` as the kernel takes it (struct sock_filter: u16, u8, u8, u32)."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def bytecode(program: Program) -> str:
    """Return `program` as tc-bpf(8) takes it after `bytecode`."""
    return f"{len(program)}," + ",".join(" ".join(map(str, instruction)) for instruction in program)
