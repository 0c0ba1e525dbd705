"""To look at one guest, or at the host part, has the kernel walk over no routes of all guests, and shows the same."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.net import FORMS, Laptop, why_no_tap
from tests.kernel.warm import Warm
from vmnet.linux import hostroutes
from vmnet.linux.hostroutes import forget_host_routes, host_routes, keep_host_routes
from vmnet.linux.netlink import RTM_GETROUTE, Netlink
from vmnet.linux.observe import observe_guests
from vmnet.linux.places import Places
from vmnet.model import Lease
from vmnet.store import Store


class Walks:
    """How often the kernel was asked for all routes of the host by `netlink`."""

    def __init__(self, netlink: Netlink, patch: pytest.MonkeyPatch) -> None:
        self.number = 0
        dump = Netlink.dump

        def count(asked: Netlink, kind: int, body: bytes) -> Iterator[bytes]:
            self.number += asked is netlink and kind == RTM_GETROUTE
            return dump(asked, kind, body)

        patch.setattr(Netlink, "dump", count)


@pytest.fixture
def places(laptop: Laptop) -> Iterator[Places]:
    with laptop.entered():
        made = Places()
        try:
            yield made
        finally:
            forget_host_routes()
            made.close()


# The host part

TELLING = [
    ["route del unreachable 127.0.0.0/10 table local"],
    ["route del unreachable 247.0.0.0/8 metric 4294967295"],
    ["route del local 127.64.0.0/10 table local"],
    ["route add unreachable 127.9.0.0/24 table local proto 127"],
    ["route add local 127.9.0.0/24 dev lo table local proto 127"],
    ["link set lo down"],
    ["link set lo down", "link set lo up"],
    ["addr del 127.0.0.1/16 dev lo"],
    ["addr del 127.0.0.1/16 dev lo", "addr add 127.0.0.1/16 dev lo"],
    ["addr flush dev lo"],
]
TELLING_NOTHING = [
    ["route add unreachable 10.9.0.0/24", "route add local 10.8.0.0/24 dev lo table local"],
    ["link add other type veth peer name end", "link set other up", "addr add 10.5.0.1/24 dev other", "link del other"],
    ["addr add 10.5.0.1/24 dev wlan0", "addr del 10.5.0.1/24 dev wlan0"],
    ["rule add pref 5 lookup 77", "route add 10.9.0.0/24 dev wlan0 table 77"],
]


@pytest.mark.parametrize("lines", TELLING, ids=lambda lines: lines[-1])
def test_a_change_of_the_host_part_is_seen(
    lines: list[str], places: Places, laptop: Laptop, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm.vmnet(laptop, "carve")
    walks = Walks(places.host, monkeypatch)
    keep_host_routes(places.host)
    kept = list(host_routes(places.host))
    assert (len(kept), walks.number) == (5, 2)
    laptop.ip(*lines)
    seen = sorted(host_routes(places.host))
    assert walks.number == 4
    assert seen == sorted(hostroutes._dump(places.host))
    assert seen != sorted(kept) or lines[0] == "link set lo down"  # by which no route of type local goes
    warm.vmnet(laptop, "up")
    assert sorted(host_routes(places.host)) == sorted(kept)


@pytest.mark.parametrize("lines", TELLING_NOTHING, ids=lambda lines: lines[0])
def test_what_others_do_is_no_reason_to_look_again(
    lines: list[str], places: Places, laptop: Laptop, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm.vmnet(laptop, "create", "before", "--kind", "veth")
    keep_host_routes(places.host)
    walks = Walks(places.host, monkeypatch)
    warm.vmnet(laptop, "create", "a", "b", "--kind", "veth")
    warm.vmnet(laptop, "delete", "before")
    laptop.ip(*lines)
    kept = list(host_routes(places.host))
    assert walks.number == 0
    assert kept == hostroutes._dump(places.host)


def test_more_than_can_be_held_is_a_reason_to_look_again(
    places: Places, laptop: Laptop, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm.vmnet(laptop, "carve")
    keep_host_routes(places.host)
    walks = Walks(places.host, monkeypatch)
    spans = [f"127.9.{number % 256}.{number // 256}/32" for number in range(2000)]
    laptop.ip(*(f"route {verb} unreachable {span} table local proto 127" for span in spans for verb in ("add", "del")))
    assert len(host_routes(places.host)) == 5
    assert walks.number == 2


def test_what_was_kept_of_one_network_is_not_said_of_another(places: Places, laptop: Laptop, warm: Warm) -> None:
    warm.vmnet(laptop, "carve")
    keep_host_routes(places.host)
    elsewhere = Netlink()
    assert list(host_routes(elsewhere)) == hostroutes._dump(elsewhere)
    elsewhere.close()


# One guest


def guest(laptop: Laptop, warm: Warm, form: str) -> Lease:
    """Return a guest among others."""
    if not form.startswith("veth") and (reason := why_no_tap()):
        pytest.skip(reason)
    warm.vmnet(laptop, "create", "before", "after", "--kind", "veth")
    warm.vmnet(laptop, "create", "g", *FORMS[form])
    with Store.open(Path(laptop.env["VMNET_STATE_DIR"]), write=False) as store:
        return store.leases(["g"])[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_guest_just_made_looks_the_same_without_a_walk(
    form: str, places: Places, laptop: Laptop, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = guest(laptop, warm, form)
    walks = Walks(places.host, monkeypatch)
    seen = observe_guests(places, [lease], made=["g"])["g"].host
    assert (walks.number, len(seen.routes)) == (0, 3)
    assert observe_guests(places, [lease])["g"].host == seen
    assert walks.number == 1


# Somebody's own come before those of the kernel, which then has its table in two.
RULES = ["rule add pref 10 lookup local", "rule del pref 0", "rule add pref 5 lookup 77"]
LACKING = [
    ["route del {block} dev {device} table local"],
    ["route del {address}/32 dev {device} table local"],
    ["route del {shadow}/32 dev {device} table local"],
    ["route flush dev {device} table local proto 127"],
    ["neigh flush dev {device} nud permanent"],
    ["neigh replace {address} lladdr 02:00:00:00:be:ef dev {device} nud permanent"],
    ["addr flush dev {device}"],
    ["link set {device} down"],
    [*RULES, "route add blackhole 127.1.0.0/24 table 77"],
    [*RULES, "route add 127.1.0.0/24 dev wlan0 table 77"],
]


@pytest.mark.parametrize("lines", LACKING, ids=lambda lines: lines[-1])
def test_what_a_guest_just_made_lacks_is_seen(lines: list[str], places: Places, laptop: Laptop, warm: Warm) -> None:
    lease = guest(laptop, warm, "veth-native")
    address = str(lease.block.address)
    words = {
        "device": lease.device, "block": lease.block.network, "address": address,
        "shadow": address.replace("127.", "247.", 1),
    }  # fmt: skip
    laptop.ip(*(line.format(**words) for line in lines))
    assert observe_guests(places, [lease], made=["g"])["g"].host == observe_guests(places, [lease])["g"].host


# A command

COMMAND = """
import sys
from vmnet.cli.main import _command, rehearse
from vmnet.linux.netlink import RTM_GETROUTE, Netlink
own, dump, walks = Netlink().netns_cookie, Netlink.dump, []
def count(asked, kind, body):
    if kind == RTM_GETROUTE and asked.netns_cookie == own:
        walks.append(body)
    return dump(asked, kind, body)
Netlink.dump = count
if sys.argv.pop(1) == "rehearsed":
    rehearse(False)
walks.clear()
_command(sys.argv[1])(sys.argv[1:], prog_name="vmnet", standalone_mode=False)
print(len(walks), file=sys.stderr)
"""


def test_a_command_that_was_rehearsed_walks_no_routes(laptop: Laptop, warm: Warm) -> None:
    warm.vmnet(laptop, "create", "other", "--kind", "veth")

    def walks(*words: str) -> int:
        done = laptop.execute(sys.executable, "-c", COMMAND, *words)
        assert done.code == 0, done.err
        return int(done.err)

    assert walks("fresh", "create", "a", "--kind", "veth") == 2
    assert walks("rehearsed", "create", "b", "--kind", "veth") == 0
    assert walks("rehearsed", "delete", "b") == 0
    # Of one that is there already nobody knows what else is on it.
    assert walks("rehearsed", "create", "a", "--kind", "veth") == 1
