"""The fakes do what the commands of a Mac do: their output, messages and exit codes, as recorded or read in the source.

Apple's network_cmds (ifconfig, netstat, route), xnu (in.c), launchd and pfctl are what is meant.
"""

import plistlib
import re
from pathlib import Path
from typing import Any

import pytest

from tests.darwin.fakes.state import DEFAULTS
from tests.darwin.mac import FAKES, Mac
from tests.kernel.machine import wait_until
from tests.kernel.net import Result
from tests.kernel.warm import Warm

SAMPLES = Path(__file__).parents[1] / "unit" / "darwin"
ALL_ONES, CLASS_A, CLASS_B, CLASS_C = 0xFFFFFFFF, 0xFF000000, 0xFFFF0000, 0xFFFFFF00
ADDRESS = "127.1.0.2"
FIRST = {"127.0.0.1": CLASS_A}
ADD = ("alias", ADDRESS, "netmask", "255.255.255.255")
SILENT = Result(0, "", "")
IN_THE_WAY = "ifconfig: ioctl (SIOCDIFADDR): Can't assign requested address"
ALTQ = "No ALTQ support in kernel\nALTQ related functions disabled\n"


def spelled_out(value: object) -> str | None:
    """Return words as the name of a case; None leaves it to pytest."""
    return " ".join(value) if isinstance(value, list | tuple) else None


def lo0(mac: Mac, *words: str) -> Result:
    return mac.run("ifconfig", "lo0", *words)


def refused(err: str, code: int = 1) -> Result:
    return Result(code, "", f"{err}\n")


# What is shown.


@pytest.mark.parametrize("words", [["lo0"], ["lo0", "inet"], ["lo0", "inet6"]])
def test_a_stock_lo0_is_shown(words: list[str], mac: Mac) -> None:
    lines = (SAMPLES / "lo0-stock.txt").read_text().splitlines(keepends=True)
    family = words[1] if len(words) > 1 else None
    kept = [line for line in lines[2:] if family is None or line.startswith(f"\t{family} ")]
    assert mac.run("ifconfig", *words) == Result(0, "".join([*lines[:2], *kept]), "")


@pytest.mark.parametrize("words", [[], ["-a"]])
def test_every_interface_is_shown(words: list[str], mac: Mac) -> None:
    shown = mac.run("ifconfig", *words)
    each = [mac.run("ifconfig", name).out for name in ("lo0", "en0", "utun0")]
    assert shown == Result(0, "".join(each), "")
    assert "\tether 02:" in each[1]
    assert "\tinet 192.168.77.2 netmask 0xffffff00 broadcast 192.168.77.255\n" in each[1]
    assert "\tmedia: autoselect\n\tstatus: active\n" in each[1]
    assert "\tinet 100.64.0.9 --> 100.64.0.1 netmask 0xffffffff\n" in each[2]


def test_names_are_listed(mac: Mac) -> None:
    assert mac.run("ifconfig", "-l") == Result(0, "lo0 en0 utun0\n", "")
    with mac.changed() as state:
        state["ifaces"]["utun0"]["addrs"] = []
    assert mac.run("ifconfig", "-l", "inet") == Result(0, "lo0 en0\n", "")


def test_aliases_follow_what_is_there(mac: Mac) -> None:
    for address in ("127.0.0.2", "172.30.0.1", "192.168.127.12"):
        assert lo0(mac, "alias", address) == SILENT
    assert lo0(mac).out == (SAMPLES / "lo0-classful.txt").read_text()


def test_older_releases_put_a_space_after_addresses(mac: Mac) -> None:
    mac.set(trailing_space=True)
    lines = lo0(mac).out.splitlines()
    assert [line for line in lines if line.endswith(" ")] == [line for line in lines if line.startswith("\tinet")]
    assert len([line for line in lines if line.endswith(" ")]) == 3


@pytest.mark.parametrize("words", [["-z"], ["-a", "lo0"], ["-a", "inet", "inet"]])
def test_what_it_does_not_know_gets_the_usage(words: list[str], mac: Mac) -> None:
    said = mac.run("ifconfig", *words)
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("usage: ifconfig interface address_family")


@pytest.mark.parametrize("words", [[], ["inet"], ["alias", ADDRESS]])
def test_an_interface_that_does_not_exist(words: list[str], mac: Mac) -> None:
    assert mac.run("ifconfig", "nope0", *words) == refused("ifconfig: interface nope0 does not exist")


# What is changed: the words after `ifconfig lo0`, and the aliases beside 127.0.0.1 before and after.


@pytest.mark.parametrize(
    ("words", "mask"),
    [
        (["alias", ADDRESS, "netmask", "255.255.255.255"], ALL_ONES),
        (["alias", ADDRESS, "netmask", "0xffffffff"], ALL_ONES),
        (["inet", "alias", ADDRESS, "netmask", "255.255.255.255"], ALL_ONES),
        (["add", ADDRESS, "netmask", "255.255.255.255"], ALL_ONES),
        ([ADDRESS, "alias", "netmask", "255.255.255.255"], ALL_ONES),
        (["netmask", "255.255.255.255", "alias", ADDRESS], ALL_ONES),
        (["alias", f"{ADDRESS}/32"], ALL_ONES),
        (["alias", f"{ADDRESS}/0"], 0),
        (["alias", f"{ADDRESS}/12"], 0xFFF00000),
        (["alias", ADDRESS], CLASS_A),
        (["alias", ADDRESS, "255.255.255.255"], CLASS_A),
        (["alias", ADDRESS, "broadcast", "127.255.255.255"], CLASS_A),
        (["alias", ADDRESS, "netmask", "32"], 32),
        (["up", "alias", ADDRESS], CLASS_A),
    ],
    ids=spelled_out,
)
def test_an_address_is_added(words: list[str], mask: int, mac: Mac) -> None:
    assert lo0(mac, *words) == SILENT
    assert mac.aliases() == {**FIRST, ADDRESS: mask}
    assert f"\tinet {ADDRESS} netmask {mask:#x}\n" in lo0(mac).out


@pytest.mark.parametrize(
    ("address", "mask"),
    [
        ("10.0.0.1", CLASS_A),
        ("127.255.255.254", CLASS_A),
        ("128.0.0.1", CLASS_B),
        ("172.30.0.1", CLASS_B),
        ("191.255.0.1", CLASS_B),
        ("192.0.0.1", CLASS_C),
        ("247.1.0.2", CLASS_C),
    ],
)
def test_a_mask_that_is_not_given_is_that_of_the_class(address: str, mask: int, mac: Mac) -> None:
    lo0(mac, "alias", address)
    assert mac.aliases() == {**FIRST, address: mask}


@pytest.mark.parametrize(
    ("spelled", "address"),
    [
        ("127.1", "127.0.0.1"),
        ("127.1.5", "127.1.0.5"),
        ("2130771970", "127.1.0.2"),
        ("127.010.0.2", "127.8.0.2"),
        ("0x7f.1.0.2", "127.1.0.2"),
        ("0x7f010002/32", "127.1.0.2"),
    ],
)
def test_addresses_are_spelled_as_inet_aton_has_it(spelled: str, address: str, mac: Mac) -> None:
    assert lo0(mac, "alias", spelled, "netmask", "255.255.255.255") == SILENT
    assert mac.aliases() == {**FIRST, address: ALL_ONES}


@pytest.mark.parametrize(
    ("before", "words", "after", "sticky"),
    [
        (CLASS_A, ADD, ALL_ONES, CLASS_A),
        (ALL_ONES, ("alias", ADDRESS, "netmask", "255.0.0.0"), CLASS_A, ALL_ONES),
        (ALL_ONES, ("alias", ADDRESS), ALL_ONES, ALL_ONES),
        (ALL_ONES, ("alias", ADDRESS, "255.0.0.0"), ALL_ONES, ALL_ONES),
        (CLASS_A, ("alias", f"{ADDRESS}/32"), ALL_ONES, CLASS_A),
    ],
)
@pytest.mark.parametrize("is_sticky", [False, True])
def test_an_address_that_is_there_keeps_its_place(
    before: int, words: tuple[str, ...], after: int, sticky: int, is_sticky: bool, mac: Mac
) -> None:
    lo0(mac, "alias", ADDRESS, "netmask", hex(before))
    lo0(mac, "alias", "127.1.0.6", "netmask", "255.255.255.255")
    mac.set(sticky_mask=is_sticky)
    assert lo0(mac, *words) == SILENT
    expected = {**FIRST, ADDRESS: sticky if is_sticky else after, "127.1.0.6": ALL_ONES}
    assert list(mac.aliases().items()) == list(expected.items())


def test_a_mask_that_sticks_is_new_after_a_removal(mac: Mac) -> None:
    mac.set(sticky_mask=True)
    lo0(mac, "alias", ADDRESS)
    lo0(mac, "-alias", ADDRESS)
    lo0(mac, *ADD)
    assert mac.aliases() == {**FIRST, ADDRESS: ALL_ONES}


@pytest.mark.parametrize(
    "words",
    [
        ["-alias", ADDRESS],
        ["inet", "-alias", ADDRESS],
        ["delete", ADDRESS],
        ["remove", ADDRESS],
        [ADDRESS, "delete"],
        [ADDRESS, "remove"],
        [ADDRESS, "-alias"],
        ["-alias", ADDRESS, "netmask", "255.0.0.0"],
        ["-alias", f"{ADDRESS}/8"],
    ],
    ids=spelled_out,
)
def test_an_address_is_removed(words: list[str], mac: Mac) -> None:
    lo0(mac, *ADD)
    assert lo0(mac, *words) == SILENT
    assert mac.aliases() == FIRST
    assert lo0(mac, *words) == refused(IN_THE_WAY)
    assert mac.aliases() == FIRST


@pytest.mark.parametrize("words", [["-alias"], ["delete"], ["-alias", "netmask", "255.255.255.255"]], ids=spelled_out)
def test_a_removal_without_an_address_takes_the_first(words: list[str], mac: Mac) -> None:
    lo0(mac, *ADD)
    assert lo0(mac, *words) == SILENT
    assert mac.aliases() == {ADDRESS: ALL_ONES}
    assert lo0(mac, *words) == SILENT
    assert mac.aliases() == {}
    assert lo0(mac, *words) == refused(IN_THE_WAY)


@pytest.mark.parametrize("words", [[ADDRESS, "netmask", "255.255.255.255"], [f"{ADDRESS}/32"]], ids=spelled_out)
def test_an_address_without_alias_takes_the_place_of_the_first(words: list[str], mac: Mac) -> None:
    assert lo0(mac, *words) == SILENT
    assert mac.aliases() == {ADDRESS: ALL_ONES}
    with mac.changed() as state:
        state["ifaces"]["lo0"]["addrs"] = []
    assert lo0(mac, *words) == SILENT  # there is no first one, and nothing is said of that
    assert mac.aliases() == {ADDRESS: ALL_ONES}


def test_a_word_too_much_is_an_address(mac: Mac) -> None:
    assert lo0(mac, "alias", ADDRESS, "mask", "255.255.255.255") == refused("ifconfig: mask: bad value")
    assert lo0(mac, "ailas", ADDRESS) == refused("ifconfig: ailas: bad value")
    assert mac.aliases() == FIRST


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["alias", "web"], "web: bad value"),
        (["alias", "127.1.0.256"], "127.1.0.256: bad value"),
        (["alias", "::1"], "::1: bad value"),
        (["alias", f"{ADDRESS}/33"], f"{ADDRESS}/33: bad value"),
        (["alias", f"{ADDRESS}/"], f"{ADDRESS}/: bad value"),
        (["alias", f"{ADDRESS}/-1"], f"{ADDRESS}/-1: bad value"),
        (["-alias", f"{ADDRESS}/33"], f"{ADDRESS}/33: bad value"),
        (["alias", ADDRESS, "netmask", "all"], "all: bad value"),
        (["alias", ADDRESS, "broadcast", "all"], "all: bad value"),
        (["alias", ADDRESS, "netmask"], "'netmask' requires argument"),
        (["alias", ADDRESS, "broadcast"], "'broadcast' requires argument"),
        (["alias", "0.0.0.0", "netmask", "255.255.255.255"], "ioctl (SIOCAIFADDR): Invalid argument"),
        (["alias", "255.255.255.255", "netmask", "255.255.255.255"], "ioctl (SIOCAIFADDR): Invalid argument"),
        (["alias", "224.0.0.0/32"], "ioctl (SIOCAIFADDR): Invalid argument"),
        (["alias", "239.255.255.255/32"], "ioctl (SIOCAIFADDR): Invalid argument"),
        (["alias", "netmask", "255.255.255.255"], "ioctl (SIOCAIFADDR): Invalid argument"),
        (["-alias", "127.1.0.9"], "ioctl (SIOCDIFADDR): Can't assign requested address"),
    ],
    ids=spelled_out,
)
def test_what_is_refused_changes_nothing(words: list[str], why: str, mac: Mac) -> None:
    before = mac.state["ifaces"]
    assert lo0(mac, *words) == refused(f"ifconfig: {why}")
    assert mac.state["ifaces"] == before


def test_an_invalid_address_without_alias_still_takes_the_first_away(mac: Mac) -> None:
    assert lo0(mac, "0.0.0.0", "netmask", "255.255.255.255") == refused(
        "ifconfig: ioctl (SIOCAIFADDR): Invalid argument"
    )
    assert mac.aliases() == {}


def test_inet6_is_shown_and_not_changed(mac: Mac) -> None:
    assert lo0(mac, "inet6", "alias", "fd00::1") == refused("fake: inet6 not modelled")


def test_an_interface_is_set_up_and_down(mac: Mac) -> None:
    assert lo0(mac, "down") == SILENT
    assert lo0(mac).out.startswith("lo0: flags=8048<LOOPBACK,RUNNING,MULTICAST> mtu 16384\n")
    assert lo0(mac, "up") == SILENT
    assert lo0(mac).out == (SAMPLES / "lo0-stock.txt").read_text()


# Who may.


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (ADD, "ioctl (SIOCAIFADDR): permission denied"),
        (("alias", "0.0.0.0"), "ioctl (SIOCAIFADDR): permission denied"),
        (("-alias", "127.0.0.1"), "ioctl (SIOCDIFADDR): permission denied"),
        (("-alias", "127.1.0.9"), "ioctl (SIOCDIFADDR): permission denied"),
        ((ADDRESS, "netmask", "255.255.255.255"), "ioctl (SIOCDIFADDR): permission denied"),
        (("up",), "up: permission denied"),
        ((*ADD, "up"), "up: permission denied"),
        (("up", *ADD), "up: permission denied"),
        (("down",), "down: permission denied"),
        (("alias", "web"), "web: bad value"),
    ],
    ids=spelled_out,
)
def test_only_root_may_change_it(words: tuple[str, ...], why: str, mac: Mac) -> None:
    mac.set(uid=501)
    before = mac.state["ifaces"]
    assert lo0(mac, *words) == refused(f"ifconfig: {why}")
    assert mac.state["ifaces"] == before
    assert lo0(mac).code == 0


@pytest.mark.parametrize(
    "options", [[], ["-n"], ["-n", "--"], ["-u", "root"], ["-nu", "root", "-E"], ["--non-interactive"], ["LANG=C"]]
)
def test_sudo_makes_root_of_anybody(options: list[str], mac: Mac) -> None:
    mac.set(uid=501)
    assert mac.run("sudo", *options, "ifconfig", "lo0", *ADD) == SILENT
    assert mac.aliases() == {**FIRST, ADDRESS: ALL_ONES}
    assert mac.calls() == [["sudo", *options, "ifconfig", "lo0", *ADD], ["ifconfig", "lo0", *ADD]]
    assert mac.run("id", "-u").out == "501\n"


def test_who_is_made_root_can_be_told(mac: Mac) -> None:
    mac.set(uid=501)
    told = mac.run("sudo", "COLOUR=blue", "sh", "-c", 'id -u; sudo id -u; echo "$SUDO_UID $COLOUR"; exit 7')
    assert told == Result(7, "0\n0\n501 blue\n", "")


def test_sudo_needs_something_to_run(mac: Mac) -> None:
    assert mac.run("sudo", "-n").err.startswith("usage: sudo")
    assert mac.run("sudo", "no-such-program") == refused("sudo: no-such-program: command not found")


# How it can be made to behave.


def test_every_call_is_written_down(mac: Mac) -> None:
    lo0(mac, *ADD)
    lo0(mac, "-alias")
    mac.run("uname", "-s")
    mac.run("ifconfig", "nope0", "two words", "")
    assert mac.calls() == [
        ["ifconfig", "lo0", *ADD],
        ["ifconfig", "lo0", "-alias"],
        ["uname", "-s"],
        ["ifconfig", "nope0", "two words", ""],
    ]
    assert mac.calls("uname") == [["uname", "-s"]]


@pytest.mark.parametrize("partial", [False, True])
def test_a_fault_is_used_up(partial: bool, mac: Mac) -> None:
    mac.fail(r"^ifconfig lo0 alias .*\.2 ", stderr="ifconfig: no", rc=3, times=2, partial=partial)
    assert lo0(mac, "alias", "127.1.0.6", "netmask", "255.255.255.255") == SILENT
    for _ in range(2):
        assert lo0(mac, *ADD) == refused("ifconfig: no", 3)
        assert (ADDRESS in mac.aliases()) == partial
    assert lo0(mac, *ADD) == SILENT
    assert ADDRESS in mac.aliases()
    assert len(mac.calls()) == 4


def test_the_first_fault_that_is_left_is_used(mac: Mac) -> None:
    mac.fail("lo0", rc=2)
    mac.fail("ifconfig", rc=3)
    mac.fail("sw_vers", stderr="Killed: 9", rc=137)
    assert [lo0(mac).code for _ in range(3)] == [2, 3, 0]
    assert mac.run("sw_vers", "-productVersion") == refused("Killed: 9", 137)


def test_two_dozen_at_once_lose_nothing(mac: Mac) -> None:
    wanted = [f"127.1.0.{4 * number + 2}" for number in range(24)]
    calls = [mac.start("ifconfig", "lo0", "alias", one, "netmask", "255.255.255.255") for one in wanted]
    assert [call.wait() for call in calls] == [0] * 24
    assert mac.aliases() == {**FIRST, **dict.fromkeys(wanted, ALL_ONES)}
    assert sorted(call[3] for call in mac.calls()) == sorted(wanted)


def test_a_command_that_waits_holds_up_nobody_and_can_be_killed(mac: Mac) -> None:
    mac.set(delay_ms=60_000)
    slow = mac.start("ifconfig", "lo0", *ADD)
    assert wait_until(lambda: mac.calls() == [["ifconfig", "lo0", *ADD]])
    mac.set(delay_ms=0)
    assert lo0(mac, "alias", "127.1.0.6/32") == SILENT
    slow.kill()
    slow.wait()
    assert mac.aliases() == {**FIRST, "127.1.0.6": ALL_ONES}


def test_a_state_that_names_little_is_a_stock_mac_otherwise(mac: Mac) -> None:
    Path(mac.env["FAKE_MAC_STATE"]).write_text('{"uid": 501}')
    assert mac.run("id", "-u").out == "501\n"
    assert mac.state == {**DEFAULTS, "uid": 501, "calls": [["id", "-u"]]}


# The companions.


def test_routes_follow_the_aliases(mac: Mac) -> None:
    lo0(mac, *ADD)
    sample = (SAMPLES / "netstat-rn.txt").read_text()
    *_, default, _, localhost = sample.splitlines(keepends=True)
    ours = default.replace("172.16.0.1  ", "192.168.77.1").replace("en7", "en0")
    expected = sample.replace(default, ours) + localhost.replace("127.0.0.1", ADDRESS)
    for words in (["-rn"], ["-rn", "-f", "inet"]):
        assert mac.run("netstat", *words) == Result(0, expected, "")
    with mac.changed() as state:
        state["ifaces"] = {"lo0": {**state["ifaces"]["lo0"], "addrs": []}}
    assert mac.run("netstat", "-rn").out == "".join(sample.splitlines(keepends=True)[:4])


def test_statistics_are_shown(mac: Mac) -> None:
    assert "dropped due to full socket buffers" in mac.run("netstat", "-s", "-p", "udp").out
    assert "packets" in mac.run("netstat", "-w", "1").out


def test_the_way_of_an_address_is_told(mac: Mac) -> None:
    assert mac.run("route", "-n", "get", "127.0.64.1") == Result(0, (SAMPLES / "route-get.txt").read_text(), "")
    lo0(mac, "alias", "127.0.64.1/32")
    found = mac.run("route", "-n", "get", "127.0.64.1").out
    assert re.findall(r"(\S+|route to): (.*)", found) == [
        ("route to", "127.0.64.1"),
        ("destination", "127.0.64.1"),
        ("interface", "lo0"),
        ("flags", "<UP,HOST,DONE,LOCAL>"),
    ]
    assert "  interface: en0\n" in mac.run("route", "-n", "get", "198.51.100.2").out
    with mac.changed() as state:
        del state["ifaces"]["en0"]
    assert mac.run("route", "-n", "get", "198.51.100.2") == refused("route: writing to routing socket: not in table")
    assert mac.run("route", "-n", "get", "web") == refused("route: bad address: web", 68)


def test_a_monitor_is_silent_until_there_are_events(mac: Mac) -> None:
    monitor = mac.start("route", "-n", "monitor")
    assert monitor.stdout is not None
    assert wait_until(lambda: mac.calls() == [["route", "-n", "monitor"]])
    mac.set(route_events=["RTM_DELADDR: address being removed from iface: len 108"])
    assert monitor.stdout.readline() == "RTM_DELADDR: address being removed from iface: len 108\n"
    with mac.changed() as state:
        state["route_events"].append("RTM_NEWADDR: address being added to iface: len 108")
    assert monitor.stdout.readline() == "RTM_NEWADDR: address being added to iface: len 108\n"
    assert monitor.poll() is None
    monitor.stdout.close()
    assert monitor.wait(60) == 0  # nobody reads it any more


def plist(mac: Mac, content: dict[str, Any] | bytes) -> str:
    path = mac.folder / "daemon.plist"
    path.write_bytes(content if isinstance(content, bytes) else plistlib.dumps(content))
    return str(path)


def test_a_daemon_is_loaded_and_unloaded(mac: Mac) -> None:
    path = plist(mac, {"Label": "internal.vmnet", "RunAtLoad": True})
    target = "system/internal.vmnet"
    absent = refused('Could not find service "internal.vmnet" in domain for system', 113)
    assert mac.run("launchctl", "print", target) == absent
    assert mac.run("launchctl", "bootout", target) == refused("Boot-out failed: 3: No such process", 3)
    assert mac.run("launchctl", "bootstrap", "system", path) == SILENT
    assert mac.run("launchctl", "bootstrap", "system", path) == refused("Bootstrap failed: 5: Input/output error", 5)
    assert f"\tpath = {path}\n" in mac.run("launchctl", "print", target).out
    mac.set(uid=501)
    assert mac.run("launchctl", "bootout", target).code == 1
    assert mac.run("launchctl", "bootstrap", "system", path).code == 1
    assert mac.run("launchctl", "print", target).code == 0
    mac.set(uid=0)
    assert mac.run("launchctl", "bootout", target) == SILENT
    assert mac.run("launchctl", "print", target) == absent


@pytest.mark.parametrize(
    "content",
    [{"RunAtLoad": True}, {"Label": 3}, b"", b"<plist>", b"no plist", b"<plist><array/></plist>", b"bplist00"],
)
def test_what_is_no_daemon_is_not_loaded(content: dict[str, Any] | bytes, mac: Mac) -> None:
    failed = refused("Bootstrap failed: 5: Input/output error", 5)
    assert mac.run("launchctl", "bootstrap", "system", plist(mac, content)) == failed
    assert mac.run("launchctl", "bootstrap", "system", "/no/such.plist") == failed
    assert mac.state["services"] == {}


def test_pf_counts_who_holds_it_on(mac: Mac) -> None:
    assert mac.run("pfctl", "-s", "info") == Result(0, "Status: Disabled\n", ALTQ)
    tokens = []
    for _ in range(2):
        held = mac.run("pfctl", "-E")
        assert (held.code, held.out) == (0, "")
        found = re.fullmatch(re.escape(f"{ALTQ}pf enabled\nToken : ") + r"(\d+)\n", held.err)
        assert found
        tokens.append(found[1])
    assert len(set(tokens)) == 2
    assert mac.run("pfctl", "-X", tokens[0]) == Result(0, "", ALTQ)
    assert mac.run("pfctl", "-s", "info").out.startswith("Status: Enabled")
    assert mac.run("pfctl", "-X", tokens[1]) == Result(0, "", f"{ALTQ}pf disabled\n")
    assert mac.run("pfctl", "-X", tokens[1]).code == 1
    assert not mac.state["pf"]["enabled"]


def test_pf_is_switched_on_once(mac: Mac) -> None:
    assert mac.run("pfctl", "-e") == Result(0, "", f"{ALTQ}pf enabled\n")
    assert mac.run("pfctl", "-e") == refused(f"{ALTQ}pfctl: pf already enabled")
    assert mac.run("pfctl", "-d") == Result(0, "", f"{ALTQ}pf disabled\n")


def test_rules_of_an_anchor_are_kept_and_flushed(mac: Mac) -> None:
    rules = "rdr pass on lo0 inet proto tcp from any to 127.1.0.2 port 80 -> 127.1.0.2 port 8080\n"
    assert mac.run("pfctl", "-a", "vmnet", "-f", "-", stdin=rules) == Result(0, "", ALTQ)
    assert mac.state["pf"]["anchors"] == {"vmnet": rules}
    assert mac.run("pfctl", "-a", "vmnet", "-s", "rules") == Result(0, rules, ALTQ)
    assert mac.run("pfctl", "-a", "vmnet", "-F", "all").code == 0
    assert mac.state["pf"]["anchors"] == {}
    mac.set(uid=501)
    assert mac.run("pfctl", "-s", "info") == refused("pfctl: /dev/pf: Permission denied")


@pytest.mark.parametrize(
    ("darwin", "version"),
    [("17.7.0", "10.13.7"), ("19.6.0", "10.15.6"), ("20.1.0", "11.1"), ("23.0.0", "14.0"), ("23.1.0", "14.1"),
     ("24.6.0", "15.6"), ("25.0.0", "26.0")],
)  # fmt: skip
def test_versions_are_told(darwin: str, version: str, mac: Mac) -> None:
    mac.set(darwin=darwin)
    assert mac.run("sw_vers", "-productVersion") == Result(0, f"{version}\n", "")
    assert mac.run("uname", "-r") == Result(0, f"{darwin}\n", "")
    assert mac.run("uname", "-s") == Result(0, "Darwin\n", "")


@pytest.mark.parametrize("name", sorted(path.stem for path in FAKES.glob("*.py") if path.stem != "state"))
def test_what_is_not_modelled_is_said(name: str, mac: Mac) -> None:
    said = mac.run(name, "--no-such-option")
    assert (said.code != 0, said.out, said.err != "") == (True, "", True)
    assert mac.calls() == [[name, "--no-such-option"]]


# The machine itself.


def test_the_command_line_runs_there(mac: Mac) -> None:
    cold = mac.run(*mac.command_line, "--version")
    assert mac.vmnet("--version") == cold == mac.begin("--version").wait()
    assert cold.code == 0
    assert mac.vmnet("create", "-", check=False).code == 2


def test_nothing_of_a_test_is_left_running(tmp_path: Path, warm: Warm) -> None:
    with Mac(tmp_path, warm) as mac:
        monitor = mac.start("route", "-n", "monitor")
        assert wait_until(lambda: bool(mac.calls()))
    assert monitor.returncode is not None


def test_programs_need_no_settings_of_python(mac: Mac) -> None:
    mac.env = {"FAKE_MAC_STATE": mac.env["FAKE_MAC_STATE"], "PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere"}
    assert mac.run(str(mac.folder / "bin" / "uname"), "-s") == Result(0, "Darwin\n", "")
