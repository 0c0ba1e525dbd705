"""Programs that ask by wire find guests, whoever answers them on this host: the real answerers, from Debian systems.

The server of the LAN gives every name an address and remembers what it was asked for: whatever of ours it hears of has
left the host.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernel.dns import NOERROR, NXDOMAIN, Answer, Upstream, ask
from tests.kernel.machine import wait_until
from tests.kernel.neighbours import PATIENCE, Scene, network_manager, resolved
from tests.kernel.net import Lab, Result
from tests.kernel.test_hooks import hooks, program
from tests.kernel.warm import Warm
from tests.system.roots import Rooted, debian_root

__all__ = ["hooks", "program"]

pytestmark = pytest.mark.root

ROUTER, ELSEWHERE = "192.168.77.1", "198.18.0.9"
WORLD = "www.example.org"
PROGRAMS = ("dbus", "dnsmasq", "iproute2", "libpam-systemd", "network-manager", "procps", "systemd", "systemd-resolved")
NEWER = ("dbus", "iproute2", "libpam-systemd", "procps", "systemd", "systemd-resolved")


def resolv_conf(scene: Scene, text: str) -> None:
    """Write a file in place of the link to that of systemd-resolved."""
    assert scene.debian
    scene.debian.path("/etc/resolv.conf").unlink()
    scene.etc("resolv.conf", text)


def network_manager_dns(scene: Scene) -> Upstream:
    """Start NetworkManager, which starts a dnsmasq of its own, and give it a LAN of its own."""
    scene.etc("NetworkManager/conf.d/dns.conf", "[main]\ndns=dnsmasq\nrc-manager=file\n")
    resolv_conf(scene, "")
    network_manager(scene)
    router = scene.lab.plug("eth9", "10.9.0.0/24", default=False)
    upstream = Upstream(router, "10.9.0.1", ELSEWHERE)
    lan = ("con-name", "lan", "type", "ethernet", "ifname", "eth9", "ipv6.method", "disabled")
    addresses = ("ipv4.method", "manual", "ipv4.addresses", "10.9.0.2/24", "ipv4.dns", "10.9.0.1")
    scene.debian_run("nmcli", "connection", "add", *lan, *addresses)
    scene.debian_run("nmcli", "connection", "up", "lan")
    return upstream


def dnsmasq(scene: Scene) -> Upstream:
    """Start the system's dnsmasq, as its package does."""
    scene.etc("dnsmasq.d/upstream.conf", f"server={ROUTER}\nstop-dns-rebind\nbogus-priv\n")
    resolv_conf(scene, "nameserver 127.0.0.1\n")
    scene.debian_run("service", "dnsmasq", "start")
    return Upstream(scene.lab.lan, ROUTER, ELSEWHERE)


def systemd_resolved(scene: Scene) -> Upstream:
    """Start systemd-resolved, which answers at its stub."""
    scene.etc("systemd/resolved.conf", f"[Resolve]\nDNS={ROUTER}\nMulticastDNS=no\nLLMNR=no\n")
    resolved(scene)
    return Upstream(scene.lab.lan, ROUTER, ELSEWHERE)


@dataclass(frozen=True)
class Answerer:
    """Who answers the host's programs by wire: how it starts, where it listens, and the part of `hooks` for it."""

    name: str
    start: Callable[[Scene], Upstream]
    server: str
    part: str
    packages: tuple[str, ...] = PROGRAMS
    release: str = ""


ANSWERERS = [
    Answerer("NetworkManager", network_manager_dns, "127.0.0.1", "networkmanager-dns"),
    Answerer("dnsmasq", dnsmasq, "127.0.0.1", "dnsmasq"),
    Answerer("systemd-resolved", systemd_resolved, "127.0.0.53", "resolved", NEWER, "sid"),
]
OLDER_RESOLVED = Answerer("systemd-resolved", systemd_resolved, "127.0.0.53", "")


def root_of(answerer: Answerer) -> Path:
    """Return the Debian system that it comes from; sid is not whole on every day."""
    if not answerer.release:
        return debian_root("names", answerer.packages)
    try:
        return debian_root(f"names-{answerer.release}", answerer.packages, release=answerer.release)
    except RuntimeError as error:
        pytest.skip(f"no {answerer.release}: {str(error).splitlines()[-1]}")


class Host:
    """A host with one of them, and a LAN whose server knows all names."""

    def __init__(self, warm: Warm, lab: Lab, answerer: Answerer) -> None:
        self._lab, self._answerer = lab, answerer
        self.scene = scene = Scene(warm, lab)
        self.laptop = laptop = lab.laptop
        scene.debian = debian = Rooted(laptop, root_of(answerer))
        # The Debian system's /etc in place of the laptop's, and its programs.
        laptop.run("mount", "-t", "tmpfs", "tmpfs", "/usr/local/sbin")
        for word in ("NetworkManager", "nmcli", "service", "resolvectl"):
            path = laptop.path(f"/usr/local/sbin/{word}")
            path.write_text(f'#!/bin/sh\nexec chroot {debian._inside} {word} "$@"\n')
            path.chmod(0o755)
        laptop.run("mount", "--bind", f"{debian._inside}/etc", "/etc")
        scene.etc("hosts", "127.0.0.1 localhost\n")
        laptop.env["VMNET_HOSTS_FILE"] = "/etc/hosts"
        self.upstream = answerer.start(scene)
        assert wait_until(lambda: self.finds(WORLD, ELSEWHERE), PATIENCE)

    def ask(self, name: str, kind: str = "A", *, tcp: bool = False) -> Answer:
        """Ask by wire, as programs of the host do."""
        return ask(self.laptop, self._answerer.server, name, kind, tcp=tcp)

    def finds(self, name: str, *addresses: str) -> bool:
        """Say whether a name has those addresses now."""
        with suppress(OSError):
            return self.ask(name) == Answer(NOERROR if addresses else NXDOMAIN, addresses)
        return False

    def fixes(self) -> list[str]:
        """Return what `vmnet doctor` says to do for programs that ask by wire."""
        found = self.scene.vmnet("doctor", "--json", check=False).json
        return [one["fix"] for one in found if "by wire" in one["what"]]

    def leaked(self) -> set[str]:
        """Return what of ours the LAN was asked for."""
        return {name for name in self.upstream.heard if name.endswith(("vmnet.internal", ".127.in-addr.arpa"))}


@pytest.fixture
def host(warm: Warm, lab: Lab, request: pytest.FixtureRequest) -> Host:
    return Host(warm, lab, getattr(request, "param", ANSWERERS[0]))


each = pytest.mark.parametrize(
    ("host", "part"), [pytest.param(one, one.part, id=one.name) for one in ANSWERERS], indirect=["host"]
)


@each
def test_with_its_part_guests_are_found_by_wire_at_once(host: Host, part: str, hooks: Callable[..., Result]) -> None:
    scene = host.scene
    before = scene.laptop.run("sh", "-c", "find /etc | sort")
    assert host.ask("gone.vmnet.internal").values == (ELSEWHERE,)
    assert host.leaked() == {"gone.vmnet.internal"}

    scene.create()
    if part != "resolved":  # which finds guests in the hosts file
        assert set(host.fixes()) == {f"vmnet hooks install {part}"}
    done = hooks("install", part)
    assert done.err == ""
    hear(host, part)
    assert wait_until(lambda: host.fixes() == [], PATIENCE), host.fixes()
    host.upstream.heard.clear()
    native, mapped = scene.guests
    for guest in (native, mapped):
        for tcp in (False, True):
            assert host.ask(f"{guest.name}.vmnet.internal", tcp=tcp) == Answer(NOERROR, (guest.address,))
        assert host.ask(f"{guest.name}.vmnet.internal", "AAAA") == Answer(NOERROR)
        reverse = ".".join(reversed(guest.address.split("."))) + ".in-addr.arpa"
        assert host.ask(reverse, "PTR").values == (f"{guest.name}.vmnet.internal",)
    for name in ("gone.vmnet.internal", "vmnet.internal"):
        assert host.ask(name).values == ()
    [new] = scene.vmnet("create", "new", "--kind", "veth", "--json").json
    assert host.finds("new.vmnet.internal", new["address"])
    # Of what the hosts file had when it was read, systemd-resolved sees within two seconds that it has gone.
    scene.vmnet("down", "mapped")
    scene.vmnet("delete", "new")
    for name in ("mapped", "new"):
        assert wait_until(lambda name=name: host.finds(f"{name}.vmnet.internal"), PATIENCE)  # type: ignore[misc]
    scene.vmnet("up", "mapped")
    assert host.finds("mapped.vmnet.internal", mapped.address)
    assert host.leaked() == set()

    # Ours asks whoever answers the host, who asks ours. systemd-resolved asks twice where it is told too little.
    host.upstream.heard.clear()
    for guest in (native, mapped):
        assert ask(guest, guest.guest_gateway, f"{guest.name}.example.org").values == (ELSEWHERE,)
        assert ask(guest, guest.guest_gateway, "gone.vmnet.internal").code == NXDOMAIN
    assert set(host.upstream.heard) == {"mapped.example.org", "native.example.org"}
    assert len(host.upstream.heard) <= 4

    # Where ours has ended, nobody is asked in its place.
    scene.vmnet("restore")
    assert wait_until(lambda: not host.finds("native.vmnet.internal", native.address), PATIENCE)
    assert host.leaked() == set()
    assert host.ask(WORLD).values == (ELSEWHERE,)

    assert hooks("uninstall").err == ""
    hear(host, part)
    assert host.ask("gone.vmnet.internal").values == (ELSEWHERE,)
    assert scene.laptop.run("sh", "-c", "find /etc | sort") == before


def hear(host: Host, part: str) -> None:
    """Have it hear of its file, where only a service manager would tell; wait until it answers."""
    if part == "resolved":
        host.scene.debian_run("pkill", "-HUP", "-x", "systemd-resolve")
    wait_until(lambda: host.finds(WORLD, ELSEWHERE), PATIENCE)


@pytest.mark.parametrize("host", [OLDER_RESOLVED], ids=["252"], indirect=True)
def test_a_resolved_without_delegates_has_the_hosts_file(host: Host, hooks: Callable[..., Result]) -> None:
    """Names that are not there go out, which the part for newer ones mends."""
    assert not next(one for one in hooks("status", "--json").json if one["part"] == "resolved")["found"]
    host.scene.create()
    for guest in host.scene.guests:
        assert wait_until(lambda guest=guest: host.finds(f"{guest.name}.vmnet.internal", guest.address), PATIENCE)  # type: ignore[misc]
        assert host.ask(f"{guest.name}.vmnet.internal", "AAAA") == Answer(NOERROR)
    host.scene.vmnet("delete", "mapped")
    assert wait_until(lambda: host.finds("mapped.vmnet.internal", ELSEWHERE), PATIENCE)


def test_other_settings_make_the_files_outdated(host: Host, hooks: Callable[..., Result]) -> None:
    def states() -> set[str]:
        parts = hooks("status", "--json").json
        names = {"networkmanager-dns", "dnsmasq", "resolved"}
        return {file["state"] for one in parts if one["part"] in names for file in one["files"]}

    hooks("install", "networkmanager-dns", "dnsmasq", "resolved")
    assert states() == {"current"}
    Path(host.laptop.env["VMNET_CONFIG"]).write_text('domain = "lab.example"\ndns_port = 23456\n')
    assert states() == {"outdated"}
    host.scene.create()
    hooks("install", "networkmanager-dns", "dnsmasq", "resolved")
    assert states() == {"current"}
    hear(host, "networkmanager-dns")
    assert host.finds("native.lab.example", host.scene.guests[0].address)
    assert host.ask("native.vmnet.internal").values == (ELSEWHERE,)
