"""What the kernel tells a watcher, and whose it is."""

from tests.kernel.net import Laptop
from tests.kernel.warm import Warm
from tests.kernel.watching import Watching, is_healed


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
