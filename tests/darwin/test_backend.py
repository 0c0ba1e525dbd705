"""The whole of vmnet on a Mac made of fakes: guests are aliases of lo0, each a /32, and nothing else is touched."""

import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.darwin.mac import Mac
from tests.kernel.machine import wait_until
from tests.kernel.warm import Warm
from vmnet.ipam import Pool
from vmnet.store import LeaseRequest, Store

ALL_ONES, CLASS_A, CLASS_C = 0xFFFFFFFF, 0xFF000000, 0xFFFFFF00
FIRST = {"127.0.0.1": CLASS_A}
A, B, C = "127.1.0.2", "127.1.0.6", "127.1.0.10"
GONE = "ifconfig: ioctl (SIOCDIFADDR): Can't assign requested address"
DENIED = "ifconfig: ioctl ({}): permission denied"
NEVER = "3600"
"""An interval within which no test ends."""


def check_calls(mac: Mac) -> None:
    """See that 127.0.0.1 is as it was, and that no call could have meant it."""
    assert mac.aliases()["127.0.0.1"] == CLASS_A
    assert next(iter(mac.aliases())) == "127.0.0.1"
    for _, *words in mac.calls("ifconfig"):
        if words in (["lo0"], ["-a"]):
            continue
        link, verb, address, *rest = words
        assert (link, rest) == ("lo0", ["netmask", "255.255.255.255"])
        assert verb in ("alias", "-alias")
        octets = [int(octet) for octet in address.split(".")]
        assert octets[0] == 127
        assert 1 <= octets[1] <= 63
        assert octets[3] % 4 == 2


@pytest.fixture(autouse=True)
def calls_are_right(mac: Mac) -> Iterator[None]:
    yield
    check_calls(mac)


def changes(mac: Mac) -> list[list[str]]:
    """Return the calls that change something."""
    return [argv for argv in mac.calls("ifconfig") if len(argv) > 2]


def by_hand(mac: Mac, *words: str) -> None:
    """Change lo0 as somebody else does, with no trace among the calls."""
    before = mac.state["calls"]
    assert mac.run("ifconfig", "lo0", *words).code == 0
    mac.set(calls=before)


def states(mac: Mac) -> dict[str, str]:
    return {one["name"]: one["state"] for one in mac.vmnet("list", "--json").json}


def aliases(*addresses: str) -> dict[str, int]:
    return {**FIRST, **dict.fromkeys(addresses, ALL_ONES)}


# What the commands do.


def test_a_guest_is_an_alias_with_a_name(mac: Mac) -> None:
    [made] = mac.vmnet("create", "web", "--json").json
    assert (made["kind"], made["address"], made["device"], made["state"]) == ("alias", A, "lo0", "up")
    nothing = {key for key, value in made.items() if value is None}
    assert nothing == {"mode", "shadow", "guest_address", "guest_gateway", "guest_prefix", "mac", "netns"}
    assert mac.aliases() == aliases(A)
    assert changes(mac) == [["ifconfig", "lo0", "alias", A, "netmask", "255.255.255.255"]]
    assert f"{A}\tweb.vmnet.internal" in mac.hosts_file.read_text()
    assert mac.vmnet("show", "web", "--json").json == made == mac.vmnet("list", "--json").json[0]
    assert mac.vmnet("ip", "web").out == f"{A}\n"
    assert mac.vmnet("create", "web", "--kind", "alias", "--json").json == [made]
    assert len(changes(mac)) == 1
    assert mac.vmnet("delete", "web", "--json").json == {"deleted": ["web"]}
    assert mac.aliases() == FIRST
    assert mac.hosts_file.read_text() == "127.0.0.1 localhost\n"


def test_records_bring_aliases_back(mac: Mac) -> None:
    mac.vmnet("create", "web", "db")
    assert mac.aliases() == aliases(A, B)
    mac.vmnet("down", "db")
    assert (mac.aliases(), states(mac)) == (aliases(A), {"web": "up", "db": "down"})
    mac.vmnet("up", "db")
    assert mac.aliases() == aliases(A, B)
    mac.vmnet("restore")
    assert (mac.aliases(), states(mac)) == (FIRST, {"web": "down", "db": "down"})
    assert "vmnet" not in mac.hosts_file.read_text()
    mac.vmnet("watch", "--once")
    assert mac.aliases() == FIRST
    mac.vmnet("up")
    assert mac.aliases() == aliases(A, B)
    assert "web.vmnet.internal" in mac.hosts_file.read_text()
    mac.vmnet("restore", "--purge")
    assert (mac.aliases(), states(mac)) == (FIRST, {})


def test_a_plan_says_what_up_does_and_changes_nothing(mac: Mac) -> None:
    before = mac.state
    done = mac.vmnet("create", "web", "--dry-run", "-v", check=False)
    assert done.code == 10
    assert f"ifconfig lo0 alias {A} netmask 255.255.255.255" in done.out.splitlines()
    assert mac.state["ifaces"] == before["ifaces"]
    assert states(mac) == {}
    mac.vmnet("create", "web")
    assert mac.vmnet("plan").out == ""
    by_hand(mac, "-alias", A)
    found = mac.vmnet("plan", "--json", check=False)
    assert (found.code, [one["op"] for one in found.json]) == (10, ["AddAlias"])
    for command in ("delete web", "down", "restore"):
        done = mac.vmnet(*command.split(), "--dry-run", check=False)
        assert (done.code, "hosts" in done.out) == (10, True), command
    assert mac.aliases() == FIRST


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("command", ["create web", "up", "watch --once"])
def test_an_alias_with_another_mask_is_made_a_32(command: str, sticky: bool, mac: Mac) -> None:
    if not command.startswith("create"):
        mac.vmnet("create", "web")
        by_hand(mac, "-alias", A)
    by_hand(mac, "alias", A)
    assert mac.aliases()[A] == CLASS_A
    mac.set(sticky_mask=sticky)
    mac.vmnet(*command.split())
    assert mac.aliases() == aliases(A)
    assert states(mac) == {"web": "up"}


def test_a_release_that_shows_spaces_is_read(mac: Mac) -> None:
    mac.set(trailing_space=True)
    mac.vmnet("create", "web")
    assert states(mac) == {"web": "up"}


def test_what_is_not_ours_is_not_touched(mac: Mac) -> None:
    for address in ("127.0.0.5", "127.64.0.2", "10.43.0.10", "192.168.127.12", C):
        by_hand(mac, "alias", address)
    before = mac.aliases()
    mac.vmnet("create", "web", "db")
    mac.vmnet("down", "web")
    mac.vmnet("watch", "--once")
    mac.vmnet("restore", "--purge")
    assert mac.aliases() == before
    assert {argv[3] for argv in changes(mac)} == {A, B}


def test_a_restore_needs_no_records(mac: Mac) -> None:
    others = (("127.0.0.5",), ("127.64.0.2", "netmask", "255.255.255.255"), ("127.1.0.9/32",), (C,))
    for words in others:
        by_hand(mac, "alias", *words)
    before = mac.aliases()
    mac.vmnet("create", "web", "db")
    (mac.folder / "state" / "vmnet.db").write_bytes(b"rubbish" * 1000)
    assert mac.vmnet("restore", "--dry-run", check=False).code == 10
    assert mac.vmnet("restore").err.startswith("vmnet: warning: ")
    assert mac.aliases() == before
    assert mac.hosts_file.read_text() == "127.0.0.1 localhost\n"


def test_guests_have_names_only_where_they_are_wanted(mac: Mac) -> None:
    mac.env["VMNET_HOSTS_FILE"] = ""
    mac.vmnet("create", "web")
    assert mac.hosts_file.read_text() == "127.0.0.1 localhost\n"


def test_there_is_nothing_to_carve(mac: Mac) -> None:
    done = mac.vmnet("carve")
    assert "nothing to carve" in done.out
    assert mac.vmnet("carve", "--json").json == {"carved": False}
    assert mac.vmnet("carve", "--dry-run").out == ""
    assert mac.aliases() == FIRST
    assert changes(mac) == []


# What is refused.


@pytest.mark.parametrize(
    "options",
    ["--kind tap", "--kind veth", "--kind tun", "--netns x", "--native", "--mapped", "--mac 02:00:00:00:00:01",
     "--mtu 1400", "--queues 2", "--kind alias --mtu 1400"],
)  # fmt: skip
def test_what_only_linux_has_is_refused(options: str, mac: Mac) -> None:
    mac.set(uid=501)  # this is so whoever asks
    done = mac.vmnet("create", "web", *options.split(), check=False)
    assert (done.code, done.out) == (2, "")
    assert options.replace("--kind alias ", "").split(" 0")[0].split(" 1")[0].split(" 2")[0].split(" x")[0] in done.err
    assert "here a guest is an alias" in done.err
    assert states(mac) == {}


def test_commands_that_only_linux_has_are_refused(mac: Mac) -> None:
    mac.vmnet("create", "web")
    for command, code in (("run job -- true", 7), ("libvirt status", 7), ("exec web -- true", 4)):
        done = mac.vmnet(*command.split(), check=False)
        assert done.code == code, command
        assert len(done.err.splitlines()) == 2
    assert states(mac) == {"web": "up"}


def test_an_unknown_system_is_refused(mac: Mac) -> None:
    mac.env["VMNET_PLATFORM"] = "plan9"
    done = mac.vmnet("list", check=False)
    assert (done.code, "plan9" in done.err) == (7, True)


def test_freebsd_is_as_macos(mac: Mac) -> None:
    mac.env["VMNET_PLATFORM"] = "freebsd14"
    mac.vmnet("create", "web")
    assert mac.aliases() == aliases(A)


@pytest.mark.parametrize(
    "command",
    [
        "create db",
        "delete web",
        "up",
        "down web",
        "down",
        "plan",
        "restore",
        "carve",
        "watch --once",
        "apply /dev/null",
    ],
)
def test_only_root_may_change_anything(command: str, mac: Mac) -> None:
    mac.vmnet("create", "web")
    by_hand(mac, "-alias", A)
    before = changes(mac)
    mac.set(uid=501)
    done = mac.vmnet(*command.split(), check=False)
    assert (done.code, "root" in done.err) == (6, True)
    assert changes(mac) == before
    assert states(mac) == {"web": "down"}
    assert mac.vmnet("ip", "web").out == f"{A}\n"


def test_root_that_ifconfig_does_not_take_for_root_is_told(mac: Mac) -> None:
    mac.fail("ifconfig lo0 alias", stderr=DENIED.format("SIOCAIFADDR"))
    done = mac.vmnet("create", "web", check=False)
    assert (done.code, "permission denied" in done.err) == (6, True)
    assert (mac.aliases(), states(mac)) == (FIRST, {})


def test_a_file_makes_aliases_and_prunes_its_own(mac: Mac) -> None:
    file = mac.folder / "guests.toml"
    mac.vmnet("create", "own")
    file.write_text("[guest.web]\n[guest.db]\naddress = '127.9.0.2'\n")
    done = mac.vmnet("apply", str(file), "--json").json
    assert [(one["name"], one["kind"], one["state"]) for one in done["guests"]] == [
        ("web", "alias", "up"),
        ("db", "alias", "up"),
    ]
    assert mac.aliases() == aliases(A, B, "127.9.0.2")
    before = changes(mac)
    mac.vmnet("down", "web")
    assert mac.vmnet("apply", str(file), "--dry-run").out == ""
    mac.vmnet("apply", str(file))
    assert (mac.aliases(), states(mac)["web"]) == (aliases(A, "127.9.0.2"), "down")
    assert len(changes(mac)) == len(before) + 1
    file.write_text("[guest.web]\n")
    dry = mac.vmnet("apply", str(file), "--prune", "--dry-run", "-v", check=False)
    assert (dry.code, "ifconfig lo0 -alias 127.9.0.2" in dry.out) == (10, True)
    assert mac.vmnet("apply", str(file), "--prune", "--json").json["deleted"] == ["db"]
    assert (mac.aliases(), states(mac)) == (aliases(A), {"own": "up", "web": "down"})
    done = mac.run(*mac.command_line, "apply", "-", "--prune", stdin="")
    assert (done.code, done.out) == (0, "web is deleted\n")
    assert states(mac) == {"own": "up"}


@pytest.mark.parametrize(
    "line", ["kind = 'tap'", "netns = 'x'", "mode = 'native'", "mac = '02:00:00:00:00:01'", "mtu = 1400", "queues = 2"]
)
def test_what_only_linux_has_is_refused_in_a_file(line: str, mac: Mac) -> None:
    (mac.folder / "guests.toml").write_text(f"[guest.db]\n[guest.web]\n{line}\n")
    done = mac.vmnet("apply", "guests.toml", check=False)
    assert (done.code, done.out, states(mac)) == (2, "", {})
    assert done.err.startswith("vmnet: guests.toml: guest.web: --")
    assert "which only Linux has" in done.err


def test_an_alias_that_goes_meanwhile_is_gone(mac: Mac) -> None:
    mac.vmnet("create", "web")
    mac.fail("ifconfig lo0 -alias", stderr=GONE, partial=True)
    mac.vmnet("delete", "web")
    assert (mac.aliases(), states(mac)) == (FIRST, {})


@pytest.mark.parametrize(
    ("stderr", "code"), [(DENIED.format("SIOCDIFADDR"), 6), ("ifconfig: ioctl (SIOCDIFADDR): Bad file descriptor", 1)]
)
def test_a_removal_that_is_refused_is_not_tolerated(stderr: str, code: int, mac: Mac) -> None:
    mac.vmnet("create", "web", "db")
    mac.fail(f"ifconfig lo0 -alias {A}", stderr=stderr)
    done = mac.vmnet("delete", "web", "db", check=False)
    assert (done.code, stderr in done.err) == (code, True)
    assert mac.aliases() == aliases(A)
    mac.vmnet("up")
    assert (mac.aliases(), states(mac)) == (FIRST, {})


def test_a_guest_that_cannot_be_made_leaves_nothing(mac: Mac) -> None:
    mac.fail(f"ifconfig lo0 alias {B}", stderr="ifconfig: ioctl (SIOCAIFADDR): No buffer space available", partial=True)
    done = mac.vmnet("create", "web", "db", check=False)
    assert (done.code, "No buffer space" in done.err) == (1, True)
    assert (mac.aliases(), states(mac)) == (FIRST, {})


def test_ifconfig_that_hangs_is_not_waited_for(mac: Mac) -> None:
    program = mac.folder / "bin" / "ifconfig"
    text = program.read_text()
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    done = mac.vmnet("create", "web", check=False)
    assert (done.code, "ifconfig lo0 was not done within" in done.err) == (1, True)
    program.write_text(text)
    mac.vmnet("up")
    assert (mac.aliases(), states(mac)) == (FIRST, {})


# The budget.


def test_no_more_aliases_than_the_budget(mac: Mac) -> None:
    (mac.folder / "config.toml").write_text("alias_budget = 2\n")
    mac.vmnet("create", "a")
    mac.vmnet("down", "a")
    done = mac.vmnet("create", "b", "c", check=False)
    assert (done.code, "alias_budget" in done.err, "14.1" in done.err) == (5, True, True)
    assert mac.vmnet("create", "b", "c", "--dry-run", check=False).code == 5
    assert states(mac) == {"a": "down"}
    mac.vmnet("create", "b")
    mac.vmnet("create", "a", "b")
    (mac.folder / "config.toml").write_text("alias_budget = 1\n")
    mac.vmnet("up")
    assert set(states(mac).values()) == {"up"}
    assert mac.vmnet("create", "c", check=False).code == 5


def test_the_budget_is_254(mac: Mac) -> None:
    requests = [LeaseRequest(f"g{number}", "alias", "native", None, 1500, 0, 1, None, None) for number in range(254)]
    with Store.open(mac.folder / "state", write=True) as store:
        store.allocate(requests, pool=Pool(), created="2026-11-21T09:00:00Z")
    done = mac.vmnet("create", "one-more", check=False)
    assert (done.code, "254" in done.err) == (5, True)
    assert changes(mac) == []


def test_two_at_once_do_not_overrun_the_budget(mac: Mac) -> None:
    (mac.folder / "config.toml").write_text("alias_budget = 3\n")
    calls = [mac.begin("create", f"{name}-1", f"{name}-2") for name in "abc"]
    assert sorted(call.wait().code for call in calls) == [0, 5, 5]
    assert len(states(mac)) == 2
    assert len(mac.aliases()) == 3


# Interrupted, and at the same time.


@pytest.mark.parametrize("command", ["create a b c", "delete a b c", "restore", "up"])
@pytest.mark.parametrize("number", [1, 2])
def test_what_is_killed_half_way_is_finished(command: str, number: int, mac: Mac) -> None:
    if not command.startswith("create"):
        mac.vmnet("create", "a", "b", "c")
        if command == "up":
            mac.vmnet("down", "a", "b", "c")
    before = len(changes(mac))
    mac.set(delay_ms=150)
    process = mac.start(*mac.command_line, *command.split())
    assert wait_until(lambda: len(changes(mac)) == before + number, 30)
    process.send_signal(signal.SIGKILL)
    process.wait()
    mac.set(delay_ms=0)
    mac.vmnet(*command.split()[:1], *(["--all"] if command.startswith("delete") else command.split()[1:]))
    up = command.startswith(("create", "up"))
    assert mac.aliases() == (aliases(A, B, C) if up else FIRST)
    assert set(states(mac).values()) == ({"up"} if up else {"down"} if command == "restore" else set())


def test_many_at_once_converge(mac: Mac) -> None:
    mac.vmnet("create", "a", "b")
    commands = ["up", "create a c", "down b", "up", "create c", "watch --once"]
    done = [call.wait() for call in [mac.begin(*command.split()) for command in commands]]
    assert [one.err for one in done] == [""] * len(done)
    mac.vmnet("up")
    assert mac.aliases() == aliases(A, B, C)
    assert set(states(mac).values()) == {"up"}


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["create a", "create b", "create a b", "delete a", "delete b", "up", "up a", "up b", "down a", "down b",
             "down", "restore", "taken away", "another mask"]
        ),
        min_size=1, max_size=5,
    )
)  # fmt: skip
def test_any_sequence_ends_as_it_is_wished(warm: Warm, commands: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, Mac(Path(folder), warm) as mac:
        up: dict[str, bool] = {}
        for command in commands:
            verb, *names = command.split()
            if verb == "taken":
                with mac.changed() as state:
                    there = state["ifaces"]["lo0"]["addrs"]
                    state["ifaces"]["lo0"]["addrs"] = [one for one in there if one.get("mask") != ALL_ONES]
                continue
            if verb == "another":
                with mac.changed() as state:
                    for one in state["ifaces"]["lo0"]["addrs"]:
                        if one.get("mask") == ALL_ONES:
                            one["mask"] = CLASS_C
                continue
            known = [name for name in names if name in up]
            done = mac.vmnet(*command.split(), check=False)
            assert done.code == (3 if verb != "create" and names != known else 0), done.err
            if verb == "create":
                up |= {name: True for name in names if name not in up}
            elif verb == "delete":
                up = {name: wish for name, wish in up.items() if name not in names}
            elif done.code == 0:
                up |= dict.fromkeys(names or up, verb == "up")
        mac.vmnet("watch", "--once")
        listed = {one["name"]: (one["address"], one["state"]) for one in mac.vmnet("list", "--json").json}
        assert {name: state for name, (_, state) in listed.items()} == {
            name: "up" if wish else "down" for name, wish in up.items()
        }
        assert mac.aliases() == aliases(*(address for address, state in listed.values() if state == "up"))
        check_calls(mac)


# The watcher.


def watching(mac: Mac, interval: str = NEVER) -> "Popen[str]":
    """Start a watcher, and return when it has looked once and hears."""
    process = mac.start(*mac.command_line, "watch", "--interval", interval)
    assert wait_until((mac.folder / "run" / "watch.json").exists, 30)
    assert wait_until(lambda: bool(mac.calls("route")), 30)
    return process


def ended(process: "Popen[str]") -> str:
    """End a watcher as a service's is ended, and return its log."""
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate()
    assert process.returncode == 0, log
    return log


@pytest.mark.parametrize("deed", [("-alias", A), ("alias", A, "netmask", "255.0.0.0")])
def test_an_alias_is_put_back_with_no_event_at_all(deed: tuple[str, ...], mac: Mac) -> None:
    mac.vmnet("create", "web")
    watcher = watching(mac, "0.3")
    by_hand(mac, *deed)
    assert wait_until(lambda: mac.aliases() == aliases(A), 30)
    assert mac.vmnet("watch", "--status").code == 0
    log = ended(watcher)
    assert "cause=look" in log
    assert "drift without event" in log


def test_an_alias_is_put_back_by_an_event(mac: Mac) -> None:
    mac.vmnet("create", "web")
    watcher = watching(mac)
    by_hand(mac, "-alias", A)
    mac.set(route_events=["got message of size 148 on Sat Nov 21 22:00:00 2026\nRTM_DELADDR: address being removed"])
    assert wait_until(lambda: mac.aliases() == aliases(A), 30)
    assert "cause=event" in ended(watcher)


def test_the_end_of_what_tells_of_events_is_no_end(mac: Mac) -> None:
    mac.vmnet("create", "web")
    mac.fail("route -n monitor", rc=1, times=99)
    watcher = watching(mac, "0.3")
    by_hand(mac, "-alias", A)
    assert wait_until(lambda: mac.aliases() == aliases(A), 30)
    ended(watcher)


def test_what_is_down_stays_down_under_a_watcher(mac: Mac) -> None:
    mac.vmnet("create", "web", "db")
    watcher = watching(mac, "0.2")
    mac.vmnet("down", "web")
    looks = len(mac.calls("ifconfig"))
    assert wait_until(lambda: len(mac.calls("ifconfig")) > looks + 3, 30)
    assert mac.aliases() == aliases(B)
    mac.vmnet("restore")
    mac.vmnet("up", "db")
    assert mac.aliases() == aliases(B)
    ended(watcher)
    assert mac.aliases() == aliases(B)


# The doctor.


_ALWAYS = ("names of guests", "nothing brings guests back", "nobody puts right")
"""What the doctor finds on each of these machines: its hosts file is its own, and nothing is installed."""


def findings(mac: Mac) -> dict[str, str]:
    done = mac.vmnet("doctor", "--json", check=False)
    found = {one["what"]: one["severity"] for one in done.json}
    assert done.code == (10 if set(found.values()) - {"note"} else 0)
    return {what: severity for what, severity in found.items() if not what.startswith(_ALWAYS)}


def test_the_doctor_misses_the_service(mac: Mac) -> None:
    assert mac.vmnet("doctor", "--json").json == []
    mac.vmnet("create", "web")
    found = {one["what"]: one["fix"] for one in mac.vmnet("doctor", "--json").json}
    assert found["nothing brings guests back at boot"] == "vmnet hooks install"


def test_the_doctor_finds_masks(mac: Mac) -> None:
    mac.vmnet("create", "web")
    assert findings(mac) == {}
    by_hand(mac, "alias", "10.43.0.10")
    [(what, severity)] = findings(mac).items()
    assert ("other programs" in what, severity) == (True, "note")
    by_hand(mac, "-alias", A)
    by_hand(mac, "alias", A)
    assert "error" in findings(mac).values()
    mac.vmnet("watch", "--once")
    assert list(findings(mac)) == [what]


@pytest.mark.parametrize(
    ("darwin", "told"), [("18.7.0", False), ("19.6.0", True), ("23.0.0", True), ("23.1.0", False), ("25.0.0", False)]
)
def test_the_doctor_knows_which_versions_count_every_alias(darwin: str, told: bool, mac: Mac) -> None:
    mac.set(darwin=darwin)
    assert findings(mac) == {}
    mac.vmnet("create", "web")
    assert bool(findings(mac)) == told


# Nothing of Linux.


def test_nothing_of_linux_is_loaded_or_called(mac: Mac) -> None:
    del mac.env["VMNET_PLATFORM"]
    program = [sys.executable, str(Path(__file__).with_name("elsewhere.py"))]
    for command in (
        "create web db", "list", "show web --json", "ip web", "plan", "down web", "up", "watch --once", "doctor --json",
        "carve", "delete db", "restore", "create db --dry-run", "up -v",
    ):  # fmt: skip
        done = mac.run(*program, *command.split())
        assert done.code == (10 if "dry" in command else 0), (command, done)
    assert mac.aliases() == aliases(A)
    watcher = mac.start(*program, "watch", "--interval", "0.2")
    assert wait_until((mac.folder / "run" / "watch.json").exists, 30)
    by_hand(mac, "-alias", A)
    assert wait_until(lambda: mac.aliases() == aliases(A), 30)
    assert "Traceback" not in ended(watcher)
    assert json.loads(mac.run(*program, "list", "--json").out)[0]["state"] == "up"
