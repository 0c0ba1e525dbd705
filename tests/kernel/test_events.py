"""What the kernel tells is read for what it says, and nothing that it could say ends the watcher."""

import os
import struct
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernel.machine import QUIET, TIMEOUT, wait_until
from tests.kernel.net import Laptop
from tests.kernel.warm import Warm
from tests.kernel.watching import Watching, is_healed
from vmnet.linux.events import Events
from vmnet.linux.netlink import Netlink
from vmnet.platform import Heard

KINDS = [16, 17, 20, 21, 24, 25, 28, 29, 36, 37, 44, 45, 80, 81, 88, 89, 100, 101, 2575]


@pytest.fixture
def events(laptop: Laptop) -> Iterator[Events]:
    waiting, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with laptop.entered():
        netlink = Netlink()
        made = Events(netlink, laptop.hosts_file, waiting)
    with made:
        made.expect([])
        yield made
    netlink.close()
    os.close(waiting)
    os.close(waking)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(KINDS), st.binary(max_size=120), st.one_of(st.none(), st.integers(-1, 3)), st.booleans())
def test_whatever_is_told_is_read(events: Events, kind: int, body: bytes, netns: int | None, cut: bool) -> None:
    size = 16 + len(body)
    message = struct.pack("=IHHII", size + 7 * cut, kind, 0, 0, 1) + body
    events._read_route(message, netns)
    events._read_rules(message, None)
    events._read_route(body, netns)


def test_nothing_is_heard_where_nothing_happens(events: Events, laptop: Laptop) -> None:
    assert events.hear(0.1) == Heard()
    laptop.ip("link add other type veth peer name end", "link set other up", "addr add 10.5.0.1/24 dev other")
    assert not events.hear(0.2).anything


def test_what_happens_is_heard(events: Events, laptop: Laptop) -> None:
    laptop.ip("addr add 127.9.0.1/32 dev lo")
    assert events.hear(5).host
    laptop.ip("addr add 10.5.0.1/24 dev wlan0")
    events.hear(0.2)
    laptop.ip("addr del 10.5.0.1/24 dev wlan0")
    assert events.hear(5).addresses == {"10.5.0.1"}
    laptop.run("nft", "add", "table", "ip", "other")
    heard = events.hear(5)
    assert heard.host
    assert heard.programs[0].startswith("nft[")
    laptop.hosts_file.write_text("127.0.0.1 localhost\n")
    assert events.hear(5).names_file
    laptop.ip("link add alike type veth peer name end", "link set alike alias vmnet:alike up")
    assert wait_until(lambda: events.hear(1).marks)


def test_a_signal_or_an_order_ends_the_waiting(laptop: Laptop) -> None:
    waiting, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with laptop.entered():
        netlink = Netlink()
        made = Events(netlink, None, waiting)
    with made:
        os.write(waking, b"x")
        assert made.hear(60) == Heard()
    netlink.close()
    os.close(waiting)
    os.close(waking)


def test_two_that_were_heard_are_one(events: Events) -> None:
    one, other = Heard(names=frozenset("a"), programs=("x[1]",)), Heard(host=True, names=frozenset("b"), lost=True)
    both = one.also(other)
    assert both == Heard(host=True, names=frozenset("ab"), lost=True, programs=("x[1]",))
    assert not Heard(programs=("x[1]",)).anything


def has_looked(watcher: Watching, looks: int) -> bool:
    return watcher.looks() > looks


def test_what_a_guests_ipv6_learns_is_nothing_to_look_at(warm: Warm, laptop: Laptop) -> None:
    warm.vmnet(laptop, "create", "g", "--kind", "veth")
    with Watching(laptop) as watcher:
        for neighbour, looked in (("fd00::9", False), ("10.5.0.9", True)):
            looks = watcher.looks()
            laptop.run("ip", "-n", "g", "neigh", "add", neighbour, "lladdr", "02:00:00:00:00:09", "dev", "eth0")
            assert wait_until(partial(has_looked, watcher, looks), TIMEOUT if looked else QUIET) is looked


def test_a_device_that_was_made_anew_is_watched_like_the_first(warm: Warm, laptop: Laptop) -> None:
    """The records change with what is put right first: whose devices there are is read while this one is away."""
    warm.vmnet(laptop, "create", "g", "--kind", "veth")
    with Watching(laptop):
        for change in (
            "route del unreachable 127.0.0.0/10 table local",
            "link del vmn-g",
            "link set vmn-g group 0",
            "-n g addr flush dev eth0",
        ):
            laptop.run("ip", *change.split())
            assert is_healed(warm, laptop), change
