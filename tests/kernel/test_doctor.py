"""`vmnet doctor`: nothing is found on a laptop that is well; each thing that is broken is, and its fix mends it."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.dns import Upstream
from tests.kernel.machine import wait_until
from tests.kernel.net import Guest, Lab, Laptop, Result, forms_here, need_own_etc
from tests.kernel.test_cli import let_all_run_python
from tests.kernel.warm import Warm

NATIVE_PORT = 12754
FIXED = 20.0
"""Seconds within which what a fix begins has come to its end."""


class Clinic:
    """A laptop whose programs read the very hosts file that vmnet keeps, and which has no server for names."""

    def __init__(self, laptop: Laptop, warm: Warm) -> None:
        need_own_etc()
        self.laptop, self._warm = laptop, warm
        laptop.path("/etc/nsswitch.conf").write_text("hosts: files dns\n")
        laptop.env["VMNET_HOSTS_FILE"] = "/etc/hosts"
        self.resolvers("127.0.0.53")
        # Fixes call the program by its name.
        laptop.run("mount", "-t", "tmpfs", "tmpfs", "/usr/local/sbin")
        program = laptop.path("/usr/local/sbin/vmnet")
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vmnet "$@"\n')
        program.chmod(0o755)
        laptop.env["PATH"] = f"/usr/local/sbin:{laptop.env['PATH']}"

    def resolvers(self, *servers: str) -> None:
        """Write the host's resolv.conf."""
        path = self.laptop.path("/etc/resolv.conf")
        path.unlink(missing_ok=True)
        path.write_text("options timeout:1 attempts:1\n" + "".join(f"nameserver {one}\n" for one in servers))

    def create(self) -> list[Guest]:
        """Create and boot a guest of each form."""
        return [self.laptop.guest(form, *options) for form, options in forms_here().items()]

    def ask(self, *command: str) -> Result:
        """Run `vmnet doctor`."""
        return self._warm.vmnet(self.laptop, "doctor", *command, check=False)

    def findings(self) -> list[dict[str, Any]]:
        """Return what is found, notes left out."""
        done = self.ask("--json")
        found = [one for one in done.json if one["severity"] != "note"]
        assert done.code == (10 if found else 0), done.err
        return found

    def notes(self) -> dict[str, dict[str, Any]]:
        """Return notes by what they say."""
        return {one["what"]: one for one in self.ask("--json").json if one["severity"] == "note"}

    def finds(self, what: str, evidence: str) -> str:
        """Assert that this is found, and return its fix."""
        found = self.findings()
        fixes = [one["fix"] for one in found if what in one["what"] and evidence in one["evidence"]]
        assert fixes, found
        return str(fixes[0])

    def is_mended_by(self, fix: str) -> None:
        """Do what is told, and assert that nothing is found after that."""
        self.laptop.run("sh", "-c", fix)
        assert wait_until(lambda: not self.findings(), FIXED), self.findings()


@pytest.fixture
def clinic(laptop: Laptop, warm: Warm) -> Clinic:
    return Clinic(laptop, warm)


@pytest.fixture
def guests(clinic: Clinic) -> list[Guest]:
    return clinic.create()


def test_nothing_is_wrong_where_nothing_is(clinic: Clinic) -> None:
    assert clinic.findings() == []


def test_nothing_is_wrong_with_guests_of_all_forms(clinic: Clinic, guests: list[Guest]) -> None:
    assert clinic.findings() == []
    assert set(clinic.notes()) >= {"programs that ask for names by wire do not find guests"}
    clinic.laptop.vmnet("down", guests[0].name)
    assert clinic.findings() == []
    clinic.laptop.vmnet("restore")
    assert clinic.findings() == []


def test_it_changes_nothing(clinic: Clinic, guests: list[Guest], settled: None) -> None:
    clinic.laptop.ip("link del vmn-veth-native")
    before = clinic.laptop.snapshot()
    clinic.findings()
    assert clinic.laptop.snapshot() == before


WALL = """nft -f - <<END
table ip wall { chain c { type filter hook output priority 0; udp dport 12753 drop; }; }
END"""
BREAKS: dict[str, tuple[str, str, str]] = {
    "a device": ("ip link del vmn-veth-native", "not as recorded", "vmn-veth-native"),
    "the rules": ("nft flush ruleset", "not as recorded", "rules"),
    "the carve": ("ip addr add 127.0.0.1/8 dev lo", "not as recorded", "127.0.0.1/8"),
    "the fence": ("ip route del unreachable 127.0.0.0/10 table local", "not as recorded", "127.0.0.0/10"),
    "the hosts file": ("echo 127.0.0.1 localhost >/etc/hosts", "find guests by name", "veth-native.vmnet.internal"),
    "another address": (
        "echo 127.1.9.9 veth-native.vmnet.internal >>/etc/hosts", "find guests by name", "127.1.9.9",
    ),
    "nsswitch": ("echo hosts: dns >/etc/nsswitch.conf", "find guests by name", "veth-mapped.vmnet.internal"),
    "the keeper": ("kill -KILL $(cut -d' ' -f1 $VMNET_RUN_DIR/dns/keeper.pid)", "keeps DHCP and DNS", "gone"),
    "all of dnsmasq": (
        "kill -KILL $(cut -d' ' -f1 $VMNET_RUN_DIR/dns/keeper.pid); kill -KILL $(cat $VMNET_RUN_DIR/dns/native.pid)",
        "keeps DHCP and DNS", "gone",
    ),
    "a dnsmasq that hangs": (
        "kill -STOP $(cat $VMNET_RUN_DIR/dns/native.pid)", "(native) does not answer", "by TCP: no answer within",
    ),
    "a wall before it": (WALL, "(mapped) does not answer", "by UDP"),
    "route_localnet": ("sysctl -w net.ipv4.conf.all.route_localnet=1", "127.0.0.1", "all/route_localnet is 1"),
    "route_localnet of a device": (
        "sysctl -w net.ipv4.conf.wlan0.route_localnet=1", "behind wlan0", "wlan0/route_localnet is 1",
    ),
}  # fmt: skip
NOT_COMMANDS = {
    "another address": "sed -i /127.1.9.9/d /etc/hosts",
    "nsswitch": "echo hosts: files dns >/etc/nsswitch.conf",
    "a wall before it": "nft delete table ip wall",
}
"""What a person does on what the fix says: it is no command, or another program is to blame."""


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_found_and_mended(clinic: Clinic, guests: list[Guest], name: str) -> None:
    breaks, what, evidence = BREAKS[name]
    clinic.laptop.run("sh", "-c", breaks)
    fix = clinic.finds(what, evidence)
    clinic.is_mended_by(NOT_COMMANDS.get(name, fix))


def test_a_port_that_is_taken(clinic: Clinic) -> None:
    with clinic.laptop.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", NATIVE_PORT))
        clinic.laptop.vmnet("create", "web", "--kind", "veth")
        fix = clinic.finds("dnsmasq (native) does not start", "in use")
    assert "dns_port" in fix
    assert wait_until(lambda: not clinic.findings(), 60)


def test_without_dnsmasq(clinic: Clinic) -> None:
    program = Path(clinic.laptop.run("sh", "-c", "readlink -f $(command -v dnsmasq)").strip())
    clinic.laptop.vmnet("create", "web", "--kind", "veth")
    clinic.laptop.run("mkdir", "/run/up", "/run/work")
    layers = f"lowerdir={program.parent},upperdir=/run/up,workdir=/run/work"
    clinic.laptop.run("mount", "-t", "overlay", "overlay", "-o", layers, str(program.parent))
    clinic.laptop.run("rm", str(program))
    assert "apt-get install dnsmasq-base" in clinic.finds("no DHCP and no names", "missing")


def test_somebody_elses_device(clinic: Clinic) -> None:
    clinic.laptop.vmnet("create", "web", "--kind", "veth")
    clinic.laptop.ip("link del vmn-web", "link add vmn-web type bridge")
    assert clinic.finds("cannot be as recorded", "vmn-web") != ""


def test_records_that_cannot_be_read(clinic: Clinic) -> None:
    clinic.laptop.vmnet("create", "web", "--kind", "veth")
    for file in Path(clinic.laptop.env["VMNET_STATE_DIR"]).glob("*.db"):
        file.write_bytes(b"no database at all, by any means")
    clinic.finds("cannot look", "records")


def test_programs_that_ask_by_wire(clinic: Clinic, lab: Lab) -> None:
    """Of a server that is not on this host nothing is asked: names are nobody's business."""
    what = "programs that ask for names by wire do not find guests"
    clinic.laptop.vmnet("create", "web", "--kind", "veth")
    assert "Connection refused" in clinic.notes()[what]["evidence"]
    upstream = Upstream(lab.lan, "192.168.77.1", "198.18.0.9")
    clinic.resolvers("192.168.77.1")
    assert "192.168.77.1, which is not on this host" in clinic.notes()[what]["evidence"]
    assert upstream.heard == []
    Upstream(clinic.laptop, "127.0.0.53", "127.1.0.2")
    clinic.resolvers("127.0.0.53")
    assert what not in clinic.notes()
    Upstream(clinic.laptop, "127.0.0.55", "198.18.0.9")
    clinic.resolvers("127.0.0.55")
    clinic.finds("sent elsewhere", "127.0.0.55 says to web.vmnet.internal: 198.18.0.9")


def test_nothing_waits_longer_than_its_limit(clinic: Clinic, guests: list[Guest]) -> None:
    with clinic.laptop.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.53", 53))
        clinic.laptop.path("/etc/hosts").write_text("127.0.0.1 localhost\n")
        clinic.laptop.path("/etc/resolv.conf").write_text("nameserver 127.0.0.53\n")
        for name in ("mapped", "native"):
            clinic.laptop.run("sh", "-c", f"kill -STOP $(cat $VMNET_RUN_DIR/dns/{name}.pid)")
        found = clinic.findings()
    # By itself the C library takes 10 s for each.
    [library] = [one for one in found if one["what"] == "programs do not find guests by name"]
    assert "no answer within 2 s" in library["evidence"]
    for one in found:
        if one["fix"].startswith("kill"):
            clinic.laptop.run("sh", "-c", one["fix"])
    clinic.laptop.vmnet("watch", "--once")
    assert wait_until(lambda: not clinic.findings(), FIXED)


def test_a_person_reads_it_too(clinic: Clinic, guests: list[Guest]) -> None:
    clinic.laptop.ip("link del vmn-veth-native")
    done = clinic.ask()
    assert done.code == 10
    assert done.out.startswith("error: guests or the host part are not as recorded\n  seen: ")
    assert "\n  fix: vmnet watch --once\n" in done.out


def test_others_than_root_see_what_they_can(
    clinic: Clinic, guests: list[Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    laptop = clinic.laptop
    laptop.vmnet("restore")
    for name in ("STATE_DIR", "RUN_DIR", "CONFIG"):
        monkeypatch.setitem(laptop.env, f"VMNET_{name}", f"/run/{name.lower()}")
    let_all_run_python(laptop)
    laptop.vmnet("create", "own", "--kind", "veth")
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--")
    nobody = (*user, sys.executable, "-m", "vmnet", "doctor", "--json")
    well = laptop.execute(*nobody)
    assert (well.code, well.err) == (0, ""), well.out
    assert "not all could be seen" in {one["what"] for one in well.json}
    laptop.ip("link del vmn-own")
    laptop.run("sh", "-c", "kill -STOP $(cat $VMNET_RUN_DIR/dns/native.pid)")
    ill = laptop.execute(*nobody)
    assert ill.code == 10
    assert {"guests or the host part are not as recorded", "dnsmasq (native) does not answer as it should"} <= {
        one["what"] for one in ill.json
    }


def test_many_guests(clinic: Clinic) -> None:
    clinic.laptop.vmnet("create", *(f"g{number}" for number in range(40)), "--kind", "veth")
    assert clinic.findings() == []
    clinic.laptop.vmnet("delete", "--all")


def test_forwarding_that_nobody_needs(clinic: Clinic) -> None:
    def noted() -> bool:
        return "neighbours on the LAN can use this host as a router" in clinic.notes()

    clinic.laptop.sysctl("ipv4/ip_forward", 1)
    assert noted()
    clinic.laptop.run(
        "nft", "-f", "-", stdin="table ip t { chain c { type nat hook postrouting priority 100; masquerade; }; }"
    )
    assert not noted()
    clinic.laptop.run("nft", "flush", "ruleset")
    clinic.laptop.sysctl("ipv4/ip_forward", 0)
    clinic.laptop.vmnet("create", "web", "--kind", "veth")
    assert not noted()


def test_a_watcher_and_a_service(clinic: Clinic, vmnet: Callable[..., Result]) -> None:
    vmnet("create", "web", "--kind", "veth")
    clinic.laptop.start("vmnet", "watch")
    assert wait_until(lambda: "nobody puts right what others undo" not in clinic.notes(), FIXED)
    assert "nothing brings guests back at boot" in clinic.notes()
    assert clinic.findings() == []
    slow = "commands take a tenth of a second, and members of group vmnet need root"
    assert slow not in clinic.notes()
    clinic.laptop.path(f"{clinic.laptop.env['VMNET_RUN_DIR']}/server.sock").unlink()
    assert "start it again" in clinic.notes()[slow]["fix"]
    clinic.laptop.run("kill", str(vmnet("watch", "--status", "--json").json["pid"]))
    assert wait_until(lambda: "nobody puts right what others undo" in clinic.notes(), FIXED)
