"""How a relay is written."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet.cli.relays import parse_relay
from vmnet.model import UsageError
from vmnet.store import Relay

PORTS = st.integers(1, 65535)
HOSTS = st.one_of(st.ip_addresses().map(str), st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,40}[a-z0-9])?", fullmatch=True))


@given(PORTS, st.sampled_from(["tcp", "udp"]), HOSTS, PORTS)
def test_what_is_shown_is_read_back(port: int, protocol: str, host: str, target: int) -> None:
    relay = Relay(port, protocol, host, target)
    assert parse_relay(str(relay)) == relay


def test_what_is_left_out_is_the_same_port_here_by_tcp() -> None:
    assert parse_relay("80") == Relay(80, "tcp", "127.0.0.1", 80)
    assert parse_relay("53/udp") == Relay(53, "udp", "127.0.0.1", 53)
    assert parse_relay("80:[::1]:8080") == Relay(80, "tcp", "::1", 8080)


@pytest.mark.parametrize(
    "text",
    ["", "0", "65536", "80:", "80:host", "80:host:0", "80:host:x", "80:::1:80", "80/sctp", "-1", "٨٠", "80 ", "a:b:c"],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no relay"):
        parse_relay(text)


@given(st.text(max_size=200))
def test_nothing_but_a_refusal_comes_of_any_text(text: str) -> None:
    with suppress(UsageError):
        relay = parse_relay(text)
        assert 0 < relay.port < 65536 > relay.target_port > 0
