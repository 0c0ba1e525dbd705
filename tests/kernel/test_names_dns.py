"""Guests ask their gateway for names: each other's in their own spelling, and the world's as the host would."""

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.kernel.dns import NOERROR, NXDOMAIN, REFUSED, Answer, Upstream, ask
from tests.kernel.machine import QUIET, Machine, wait_until
from tests.kernel.net import CLIENT, Guest, Lab, Laptop, forms_here, need_own_etc

WORLD = "www.example.org"
DOMAIN = "vmnet.internal"
FOLLOWED = 5.0
"""Seconds within which a change of the host's resolvers is followed."""


def resolvers(laptop: Laptop, *servers: str) -> None:
    """Write the host's resolv.conf in place."""
    laptop.path("/etc/resolv.conf").write_text("".join(f"nameserver {server}\n" for server in servers))


def finds(guest: Guest, name: str, address: str) -> bool:
    """Say whether a guest comes to find that address, within the time that the host's resolvers have to be followed."""

    def found() -> bool:
        with suppress(OSError):
            return ask(guest, guest.guest_gateway, name, wait=0.5).values == (address,)
        return False

    return wait_until(found, FOLLOWED)


def is_answered(machine: Machine, server: str, name: str, port: int) -> bool:
    """Say whether a question of a machine's has any answer, by UDP or TCP."""
    for tcp in (False, True):
        with suppress(OSError):
            ask(machine, server, name, port=port, tcp=tcp, wait=QUIET)
            return True
    return False


@pytest.fixture
def guests(laptop: Laptop) -> list[Guest]:
    """One guest of each form, on a host that asks nobody."""
    need_own_etc()
    path = laptop.path("/etc/resolv.conf")
    path.unlink(missing_ok=True)
    path.write_text("")
    return [laptop.guest(form, *options) for form, options in forms_here().items()]


def test_guests_know_each_other_in_their_own_spelling(guests: list[Guest]) -> None:
    for guest in guests:
        for other in guests:
            for name in (other.name, f"{other.name}.{DOMAIN}"):
                for tcp in (False, True):
                    assert ask(guest, guest.guest_gateway, name, tcp=tcp) == Answer(NOERROR, (guest.knows(other),))
                assert ask(guest, guest.guest_gateway, name, "AAAA") == Answer(NOERROR)


def test_an_address_of_a_guest_has_its_name(guests: list[Guest]) -> None:
    for guest in guests:
        for other in guests:
            reverse = ".".join(reversed(guest.knows(other).split("."))) + ".in-addr.arpa"
            assert ask(guest, guest.guest_gateway, reverse, "PTR").values == (f"{other.name}.{DOMAIN}",)


def test_what_is_ours_is_never_asked_upstream(laptop: Laptop, guests: list[Guest], lab: Lab) -> None:
    upstream = Upstream(lab.lan, "192.168.77.1", "203.0.113.9")
    resolvers(laptop, "192.168.77.1")
    guest = guests[0]
    assert finds(guest, WORLD, "203.0.113.9")
    asked = [f"gone.{DOMAIN}", DOMAIN, "gone", "9.9.1.127.in-addr.arpa", "9.9.1.247.in-addr.arpa", guest.name]
    for one in guests:
        for name in asked:
            for kind in ("A", "AAAA"):
                assert ask(one, one.guest_gateway, name, kind).code in (NOERROR, NXDOMAIN)
    assert set(upstream.heard) == {WORLD}


@pytest.mark.parametrize("how", ["in place", "by rename", "by symlink", "behind a symlink"])
def test_guests_ask_whom_the_host_asks_now(laptop: Laptop, guests: list[Guest], lab: Lab, how: str) -> None:
    lab.lan.ip("addr add 192.168.77.53/24 dev lan0")
    Upstream(lab.lan, "192.168.77.1", "203.0.113.1")
    Upstream(lab.lan, "192.168.77.53", "203.0.113.53")
    path, target = laptop.path("/etc/resolv.conf"), laptop.path("/run/resolv.conf")
    if how == "behind a symlink":
        target.write_text("nameserver 192.168.77.1\n")
        path.unlink()
        path.symlink_to("../run/resolv.conf")
    else:
        resolvers(laptop, "192.168.77.1")

    assert all(finds(guest, WORLD, "203.0.113.1") for guest in guests)
    if how == "in place":
        resolvers(laptop, "192.168.77.53")
    elif how == "behind a symlink":
        new = target.with_suffix(".new")
        new.write_text("nameserver 192.168.77.53\n")
        new.rename(target)
    elif how == "by rename":
        new = path.with_suffix(".new")
        new.write_text("nameserver 192.168.77.53\n")
        new.rename(path)
    else:
        target.write_text("nameserver 192.168.77.53\n")
        os.utime(target, (1, 1))
        path.unlink()
        path.symlink_to("../run/resolv.conf")
    assert all(finds(guest, WORLD, "203.0.113.53") for guest in guests)


def test_guests_ask_a_stub_on_the_host(laptop: Laptop, guests: list[Guest]) -> None:
    """As systemd-resolved has it, at an address of the host part."""
    Upstream(laptop, "127.0.0.53", "203.0.113.7")
    resolvers(laptop, "127.0.0.53")
    for guest in guests:
        assert finds(guest, WORLD, "203.0.113.7")


@pytest.mark.parametrize("state", ["dead", "none", "no file"])
def test_names_of_guests_need_nobody_upstream(laptop: Laptop, guests: list[Guest], state: str) -> None:
    if state == "dead":
        resolvers(laptop, "192.168.77.99")
    elif state == "no file":
        laptop.path("/etc/resolv.conf").unlink()
    end = time.monotonic() + 3
    while time.monotonic() < end:  # before and after the keeper has looked
        for guest in guests:
            assert ask(guest, guest.guest_gateway, guests[0].name, wait=1).values == (guest.knows(guests[0]),)
            assert ask(guest, guest.guest_gateway, f"{guests[0].name}.{DOMAIN}", "AAAA", wait=1) == Answer(NOERROR)
        time.sleep(0.2)
    if state != "dead":
        assert ask(guests[0], guests[0].guest_gateway, WORLD).code == REFUSED


def test_a_move_to_another_lan_needs_nothing_in_the_guest(laptop: Laptop, guests: list[Guest], lab: Lab) -> None:
    Upstream(lab.lan, "192.168.77.1", "203.0.113.1")
    resolvers(laptop, "192.168.77.1")
    guest = guests[0]
    assert finds(guest, WORLD, "203.0.113.1")
    laptop.unplug("wlan0")
    cafe = lab.plug("eth9", "10.9.0.0/24")
    Upstream(cafe, "10.9.0.1", "203.0.113.2")
    resolvers(laptop, "10.9.0.1")
    for guest in guests:
        assert finds(guest, WORLD, "203.0.113.2")


def test_nobody_else_is_answered(laptop: Laptop, guests: list[Guest], lab: Lab) -> None:
    """Not the LAN at any address of the host, and not for what dnsmasq says of itself."""
    lab.lan.ip("route add 247.0.0.0/8 via 192.168.77.2")
    for address in ("192.168.77.2", guests[0].shadow, "247.1.0.1"):
        for port in (53, 12753, 12754):
            assert not is_answered(lab.lan, address, guests[0].name, port)
    for guest in guests:
        assert ask(guest, guest.guest_gateway, "version.bind", "TXT", chaos=True).values == ()
    # Without our rules the door is shut by dnsmasq itself.
    laptop.run("nft", "flush", "ruleset")
    for port in (12753, 12754):
        assert not is_answered(lab.lan, "192.168.77.2", guests[0].name, port)


def test_a_new_name_is_known_at_once_and_a_deleted_one_is_not(laptop: Laptop, guests: list[Guest]) -> None:
    laptop.vmnet("create", "new", "--kind", "veth")
    assert wait_until(lambda: all(ask(one, one.guest_gateway, "new").code == NOERROR for one in guests))
    laptop.vmnet("delete", "new")
    assert wait_until(lambda: all(ask(one, one.guest_gateway, "new").code == NXDOMAIN for one in guests))


def test_whatever_the_umask_dnsmasq_may_read_it(laptop: Laptop, guests: list[Guest]) -> None:
    for words in ("create late late3 --kind veth", "delete late"):
        laptop.run("sh", "-c", f'umask 077; exec "$@" {words}', "sh", *CLIENT)
    folder = Path(laptop.env["VMNET_RUN_DIR"], "dns")
    assert [one for one in folder.glob("*/*") if one.stat().st_mode & 0o777 != 0o644] == []
    late = laptop.guest("late2", "--kind", "veth")
    for guest in guests:
        assert finds(guest, f"late2.{DOMAIN}", guest.knows(late))
        assert finds(guest, f"{guests[0].name}.{DOMAIN}", guest.knows(guests[0]))
        assert ask(guest, guest.guest_gateway, f"late.{DOMAIN}").code == NXDOMAIN


def test_one_guest_more_costs_one_file_of_each_spelling(laptop: Laptop) -> None:
    """Whoever has a thousand guests pays for the sixty-four that may be in that file."""
    folder = Path(laptop.env["VMNET_RUN_DIR"], "dns")

    def tables() -> dict[str, int]:
        return {f"{one.parent.name}/{one.name}": one.stat().st_ino for one in folder.glob("*/*")}

    laptop.vmnet("create", *(f"n{number}" for number in range(65)), "--kind", "veth")
    before, pids = tables(), [(folder / f"{name}.pid").read_text() for name in ("mapped", "native")]
    assert sorted(before) == ["mapped/247.1.0", "mapped/247.1.1", "native/127.1.0", "native/127.1.1"]
    laptop.vmnet("create", "late", "--kind", "veth")
    after = tables()
    assert sorted(name for name in after if after[name] != before[name]) == ["mapped/247.1.1", "native/127.1.1"]
    laptop.vmnet("delete", "late", "n64")
    assert sorted(tables()) == ["mapped/247.1.0", "native/127.1.0"]
    assert laptop.vmnet("plan").out == ""
    assert pids == [(folder / f"{name}.pid").read_text() for name in ("mapped", "native")]


@pytest.mark.parametrize("wrong", ["changed", "gone", "one more", "a line that is none"])
def test_a_table_that_somebody_changed_is_put_right(laptop: Laptop, guests: list[Guest], wrong: str) -> None:
    folder = Path(laptop.env["VMNET_RUN_DIR"], "dns", "native")
    [table] = folder.iterdir()
    text = table.read_text()
    match wrong:
        case "changed":
            table.write_text("127.9.9.2 other.vmnet.internal other\n")
        case "gone":
            table.unlink()
        case "one more":
            (folder / "127.9.9").write_text("127.9.9.2 other.vmnet.internal other\n")
        case "a line that is none":
            table.write_text(f"nonsense\n{text}")
    assert laptop.vmnet("plan", check=False).code == 10
    laptop.vmnet("up")
    assert [(one.name, one.read_text()) for one in folder.iterdir()] == [(table.name, text)]
    assert finds(guests[-1], guests[0].name, guests[-1].knows(guests[0]))
    assert ask(guests[-1], guests[-1].guest_gateway, f"other.{DOMAIN}").code == NXDOMAIN


def test_restore_ends_it_and_leaves_nothing(laptop: Laptop, guests: list[Guest]) -> None:
    assert laptop.run("pgrep", "-x", "dnsmasq")
    laptop.vmnet("restore")
    assert laptop.run("pgrep", "dnsmasq", check=False) == ""
    assert laptop.run("pgrep", "-f", "dnsmasq.keeper", check=False) == ""
    assert not Path(laptop.env["VMNET_RUN_DIR"], "dns").exists()
    assert laptop.run("ss", "-Hlntu", "sport = 67 or sport = 12753 or sport = 12754") == ""
