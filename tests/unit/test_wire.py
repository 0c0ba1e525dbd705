"""Netlink messages: what is built is read back the same, and read the same by pyroute2; nothing makes a parser fall."""

import socket
import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from vmnet.linux import wire
from vmnet.linux.netlink import Failure, attr, nested, parse_attrs, text, u32
from vmnet.linux.usage import local_address
from vmnet.ops import SCOPE_GLOBAL, SCOPE_HOST, SCOPE_LINK, Address, LoAddress, Route

ips = st.integers(0, 2**32 - 1).map(lambda number: socket.inet_ntoa(number.to_bytes(4, "big")))
macs = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":"))
scopes = st.sampled_from([SCOPE_GLOBAL, SCOPE_LINK, SCOPE_HOST])
indexes = st.integers(1, 2**31 - 1)


@st.composite
def networks(draw: st.DrawFn) -> str:
    length = draw(st.integers(0, 32))
    number = draw(st.integers(0, 2**32 - 1)) >> (32 - length) << (32 - length)
    return f"{socket.inet_ntoa(number.to_bytes(4, 'big'))}/{length}"


routes = st.builds(
    Route,
    destination=networks(),
    table=st.integers(1, 255),
    type=st.sampled_from(["unicast", "local", "unreachable", "blackhole", "throw"]),
    device=st.just("dev0"),
    gateway=st.none() | ips,
    source=st.none() | ips,
    scope=scopes,
    metric=st.integers(0, 2**32 - 1),
    onlink=st.booleans(),
)


def decoded(kind: type, body: bytes) -> Any:
    """Return a message as pyroute2 reads it."""
    message = kind(struct.pack("=IHHII", 16 + len(body), 0, 0, 0, 0) + body)
    message.decode()
    return message


@given(routes, indexes)
def test_a_route_reads_back(route: Route, index: int) -> None:
    body = wire.route(route, index)
    assert wire.parse_route(body, {index: "dev0"}) == (127, index, route)
    other = decoded(rtmsg, body)
    target, _, length = route.destination.partition("/")
    assert other["dst_len"] == int(length)
    assert other.get_attr("RTA_DST") == (target if int(length) else None)
    assert other.get_attr("RTA_OIF") == index
    assert other.get_attr("RTA_GATEWAY") == route.gateway
    assert other.get_attr("RTA_PREFSRC") == route.source
    assert (other.get_attr("RTA_PRIORITY") or 0) == route.metric
    assert (other["proto"], other["scope"], other["table"]) == (127, route.scope, route.table)


@given(ips, st.integers(1, 32), scopes, indexes)
def test_an_address_reads_back(ip: str, length: int, scope: int, index: int) -> None:
    body = wire.address(index, Address(f"{ip}/{length}", scope))
    on, address = wire.parse_address(body)
    assert (on, address.value, address.scope) == (index, f"{ip}/{length}", scope)
    other = decoded(ifaddrmsg, body)
    assert (other["prefixlen"], other["index"], other.get_attr("IFA_LOCAL")) == (length, index, ip)


@given(ips, st.integers(1, 32), scopes, st.integers(0, 0xFFFF), st.text("abc:", min_size=1, max_size=8))
def test_an_address_of_lo_is_put_back_with_its_attributes(
    ip: str, length: int, scope: int, flags: int, label: str
) -> None:
    packed = socket.inet_aton(ip)
    attributes = ((1, packed.hex()), (2, packed.hex()), (3, (label.encode() + b"\0").hex()), (11, "01"))
    one = LoAddress(f"{ip}/{length}", scope, flags & ~0x81, attributes)
    assert wire.parse_address(wire.lo_address(one)) == (1, one)


@given(indexes, ips, macs)
def test_a_neighbour_reads_back(index: int, ip: str, mac: str) -> None:
    body = wire.neighbour(index, ip, mac)
    assert wire.parse_neighbour(body) == (index, (ip, mac))
    other = decoded(ndmsg, body)
    assert (other["ifindex"], other.get_attr("NDA_DST"), other.get_attr("NDA_LLADDR")) == (index, ip, mac)


@given(
    indexes, st.sampled_from(["ingress", "egress"]), st.binary(min_size=8, max_size=128).map(lambda b: b[: len(b) & ~7])
)
def test_a_filter_reads_back(index: int, direction: str, program: bytes) -> None:
    found = wire.parse_filter(wire.filter_program(index, direction, program))
    assert found is not None
    assert found.program == program


@given(st.binary(max_size=300))
def test_any_bytes_can_be_read_as_attributes(data: bytes) -> None:
    for payload in parse_attrs(data).values():
        parse_attrs(payload)


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=40), max_size=8))
def test_attributes_read_back(attrs: dict[int, bytes]) -> None:
    inner = [attr(kind, payload) for kind, payload in attrs.items()]
    assert parse_attrs(b"".join(inner)) == attrs
    assert parse_attrs(parse_attrs(nested(5, *inner))[5]) == attrs


def test_strings_end_in_nul_and_numbers_have_32_bits() -> None:
    assert parse_attrs(text(3, "lo") + u32(4, 65536)) == {3: b"lo\0", 4: struct.pack("=I", 65536)}


@given(ips)
def test_socket_addresses_are_read_from_proc(ip: str) -> None:
    packed = socket.inet_aton(ip)
    assert local_address(packed[::-1].hex()) == ip
    assert local_address("0" * 16 + "ffff0000" + packed[::-1].hex()) == ip  # ::ffff:a.b.c.d, word by word
    assert local_address("0" * 24 + "01000000") is None


def test_a_failure_has_the_kernels_own_words() -> None:
    assert str(Failure(0, 17, "")) == "File exists"
    assert str(Failure(0, 22, "Invalid prefix")) == "Invalid argument (Invalid prefix)"
