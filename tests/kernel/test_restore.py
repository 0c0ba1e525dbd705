"""restore leaves no trace: the host, and every namespace that was there before, are as they were found.

What is compared is all that the laptop's network shows: links, addresses, routes, rules, neighbours, sysctls, nftables,
tc, the names of namespaces and the hosts file. What others did meanwhile must still be there.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.net import FORMS, Laptop, why_no_tap
from tests.kernel.warm import Warm

NATIVE, MAPPED = "--native", "--mapped"
MASQUERADE = "table ip others { chain post { type nat hook postrouting priority 100; oifname wlan0 masquerade; }; }"


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as made:
        yield made


def inside(laptop: Laptop, name: str) -> dict[str, str]:
    """Return all that a namespace shows that could be changed in it."""
    shown = ["-d link", "addr", "route show table all", "rule", "neigh", "-6 route show table all", "-6 rule"]
    found = {what: laptop.run("ip", "-n", name, *what.split()) for what in shown}
    found["sysctl"] = laptop.run("ip", "netns", "exec", name, "grep", "-rs", "", "/proc/sys/net/ipv4/conf/all")
    # A device that was up once has another queueing discipline for ever.
    return {what: text.replace("qdisc noop ", "qdisc noqueue ") for what, text in found.items()}


# Namespaces that were there before

PREMADE: dict[str, tuple[str, ...]] = {
    "down and bare": (),
    "down with 127.0.0.1/8": ("addr add 127.0.0.1/8 dev lo", "addr add 10.9.9.9/32 dev lo"),
    "down with another": ("addr add 127.0.0.2/8 dev lo", "addr add 127.0.5.5/32 dev lo"),
    "up": ("link set lo up",),
    "many addresses": ("link set lo up", "addr add 127.0.0.2/8 dev lo", "addr add 127.0.5.5/32 dev lo"),
    "shrunk by hand": ("link set lo up", "addr add 127.0.0.1/16 dev lo", "addr del 127.0.0.1/8 dev lo"),
    "with an alias": ("link set lo up alias theirs",),
}
ENDS = ("delete", "restore", "down")
CASES = [(lo, NATIVE, ENDS[number % 3]) for number, lo in enumerate(PREMADE)]
CASES += [("down and bare", MAPPED, "restore"), ("up", MAPPED, "delete"), ("down and bare", NATIVE, "restore")]


@pytest.mark.parametrize(("lo", "mode", "end"), CASES)
def test_a_namespace_that_was_there_is_as_before(lo: str, mode: str, end: str, laptop: Laptop, warm: Warm) -> None:
    laptop.run("ip", "netns", "add", "pre")
    laptop.run("ip", "-n", "pre", "-batch", "-", stdin="\n".join(PREMADE[lo]))
    before = inside(laptop, "pre")
    [info] = warm.vmnet(laptop, "create", "g", "--netns", "pre", mode, "--json").json
    assert laptop.ping(info["address"])
    assert warm.vmnet(laptop, "plan").out == ""
    warm.vmnet(laptop, end, *(["g"] if end != "restore" else []))
    assert inside(laptop, "pre") == before
