"""What the engine sees of Linux: one object that observes, applies, and knows namespaces."""

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from netaddr import IPNetwork

from vmnet.linux import enter, nft, observe
from vmnet.linux.apply import apply
from vmnet.linux.hostroutes import keep_host_routes
from vmnet.linux.places import NAMED, Places, boot_id, identify, owned_from_here
from vmnet.linux.ruleset import Ruleset
from vmnet.model import Lease, NetnsId, NotPermitted
from vmnet.ops import DelLink, DelNetns, Op
from vmnet.plan import HOST, Found, GuestView, HostView, Use, plan_left
from vmnet.platform import EventSource, Glance, Loopback, Refusal, Resolver

_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21


class LinuxPlatform:
    """Linux by rtnetlink, nft and /proc; all of it in the network namespace of the caller."""

    loopback = "lo"
    carves = True

    def __init__(self, kept: Path | None = None) -> None:
        """Open what is needed; what was seen of rules may be kept in the folder `kept`."""
        self._places = Places()
        self._ruleset = Ruleset(kept)
        self.privileged = has_rights()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._places.close()
        self._ruleset.close()

    def need_rights(self) -> None:
        """Raise NotPermitted unless the caller may change the network."""
        if not self.privileged:
            raise NotPermitted(
                "this needs root: CAP_NET_ADMIN and CAP_SYS_ADMIN, over this network namespace, are missing",
                hint="run it with sudo",
            )

    def here(self) -> NetnsId:
        """Return which network namespace is the host's."""
        own = os.stat("/proc/thread-self/ns/net")
        return NetnsId(own.st_dev, own.st_ino, boot_id())

    def identify(self, path: str) -> NetnsId | None:
        """Return which network namespace `path` leads to, or None where it leads to none."""
        return identify(path)

    def netns_path(self, name: str) -> str:
        """Return where a named network namespace is to be found."""
        return str(NAMED / name)

    def observe_guests(
        self, leases: Sequence[Lease], *, for_removal: bool = False, made: Collection[str] = ()
    ) -> dict[str, GuestView]:
        """Return what the kernel shows of each lease's guest; see observe.observe_guests."""
        return observe.observe_guests(self._places, leases, for_removal=for_removal, made=made)

    def glance(self, leases: Sequence[Lease], insides: Sequence[Lease]) -> Glance:
        """Return digests of the host part, of guests, and of the namespaces of some of them; see glance.glance."""
        from vmnet.linux.glance import glance

        return glance(self._places, leases, insides)

    def observe_host(self) -> HostView:
        """Return the host part; without rights, without any rules."""
        if not self.privileged:
            return observe.observe_host(self._places.host, None)
        return observe.observe_host(self._places.host, *self._ruleset.look())

    def expected_listing(self, text: str, cache: Path) -> str | None:
        """Return how the ruleset `text` is listed, or None where the caller may not see rules."""
        return nft.expected_listing(text, cache) if self.privileged else None

    def addresses(self) -> frozenset[str]:
        """Return all IPv4 addresses of the host."""
        return observe.addresses(self._places.host)

    def look_at_loopback(self) -> Loopback:
        """Return that of lo, which is part of what the carve keeps, there is no more to see."""
        return Loopback((), "")

    def look_around(self) -> Found:
        """Return how the host is before anything of it is changed."""
        view = observe.observe_host(self._places.host, None)
        return Found(
            lo=view.lo,
            ip_forward=view.ip_forward,
            accept_redirects=observe.sysctl("net.ipv4.conf.all.accept_redirects"),
            forwarding=observe.forwarding_by_device(),
        )

    def find_uses(self, shadow: IPNetwork, hosts: Path | None) -> list[Use]:
        """Return who else uses addresses of the pool or of the shadow."""
        from vmnet.linux import usage

        return usage.find_uses(shadow, hosts)

    def forwards_for_others(self) -> bool:
        """Say whether somebody else needs this host to forward."""
        from vmnet.linux import usage

        return usage.forwards_for_others()

    def is_open(self, device: str) -> bool:
        """Say whether a program has a tap open: only then it has a carrier."""
        try:
            return Path("/sys/class/net", device, "carrier").read_text().strip() == "1"
        except OSError:
            return False

    def orphans(self, names: Sequence[str]) -> list[Op]:
        """Return the ops that take away what bears our marks for a guest that is not among `names`."""
        links = observe.orphan_links(self._places.host, names)
        veths = [link for link in links if link.kind == "veth"]
        ops = [op for path, inside in observe.orphan_insides(self._places, veths) for op in plan_left(path, inside)]
        ops += [DelLink(HOST, link.name, link.ifindex) for link in links]
        return ops + [DelNetns(path) for path in observe.orphan_netns(self._places, names)]

    def lookalikes(self) -> list[Op]:
        """Return nothing: all that is ours bears our marks."""
        return []

    def apply(
        self, lists: Sequence[Sequence[Op]], done: Callable[[Op], None], meanwhile: Callable[[], None]
    ) -> list[Refusal]:
        """Carry out lists of ops that do not depend on each other; return what was refused.

        `meanwhile` is called while the kernel deletes devices.
        """
        return apply(self._places, lists, done, meanwhile)

    def listen(self, file: Path | None, wakeup: int) -> EventSource:
        """Return what hears of changes, to `file` too; see events.Events."""
        from vmnet.linux.events import Events

        return Events(self._places.host, file, wakeup)

    def keep(self) -> None:
        """Keep what takes long to see, and changes seldom, for the next platform of this process; it must not fork."""
        keep_host_routes(self._places.host)

    def close_places(self) -> None:
        """Close what is open of guests' namespaces."""
        self._places.close_guests()

    def execute(self, path: str, expected: NetnsId | None, argv: Sequence[str], resolver: Resolver) -> NoReturn:
        """Become `argv` inside the namespace at `path`; see enter.execute."""
        enter.execute(path, expected, argv, resolver)


def has_rights() -> bool:
    """Say whether the caller may change the network."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
            held = all(effective >> capability & 1 for capability in (_CAP_NET_ADMIN, _CAP_SYS_ADMIN))
            return held and owned_from_here()
    return False
