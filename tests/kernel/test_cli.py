"""The command line as other programs rely on it: JSON, exit codes, dry runs, wishes, and commands inside of guests."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vmnet
from tests.kernel.machine import wait_until
from tests.kernel.net import FORMS, SOURCES, Laptop, Result
from tests.kernel.warm import Warm

Run = Callable[..., Result]
SHAPE: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "kind": str,
    "mode": str,
    "address": str,
    "gateway": str,
    "block": str,
    "shadow": str,
    "guest_address": str,
    "guest_gateway": str,
    "guest_prefix": int,
    "device": str,
    "mac": (str, type(None)),
    "netns": (str, type(None)),
    "hostname": str,
    "published": list,
    "mtu": int,
    "state": str,
    "owner": int,
    "created": str,
}


@pytest.fixture
def run(warm: Warm, laptop: Laptop) -> Run:
    """Run vmnet in the laptop, as `laptop.vmnet` does, without waiting for Python's start."""
    assert wait_until(lambda: "tentative" not in laptop.run("ip", "-6", "addr"))  # or two looks would differ

    def run_(*args: str, check: bool = True) -> Result:
        return warm.vmnet(laptop, *args, check=check)

    return run_


def files_of(laptop: Laptop) -> dict[str, bytes]:
    """Return what is in the folders of state and run, by path; locks are empty files, and may come."""
    folders = [Path(laptop.env[name]) for name in ("VMNET_STATE_DIR", "VMNET_RUN_DIR")]
    found = {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in found.items() if not path.endswith(".lock")}


# What a guest looks like


def check_guest(info: dict[str, Any], block: int, **known: Any) -> None:
    """Check a guest's JSON in all its parts; `block` is the number of its block, `known` what was asked for."""
    assert {key: info[key] for key in known} == known
    assert set(info) >= set(SHAPE)
    for key, kind in SHAPE.items():
        assert isinstance(info[key], kind), (key, info[key])
    low = f"{1 + (block >> 14)}.{block >> 6 & 255}.{4 * block & 255}"
    last = 4 * block & 255
    middle = low.rpartition(".")[0]
    address, gateway = f"127.{middle}.{last + 2}", f"127.{middle}.{last + 1}"
    assert (info["address"], info["gateway"], info["block"]) == (address, gateway, f"127.{low}/30")
    assert info["shadow"] == "247" + address.removeprefix("127")
    own = (info["shadow"], "247" + gateway.removeprefix("127")) if info["mode"] == "mapped" else (address, gateway)
    assert (info["guest_address"], info["guest_gateway"], info["guest_prefix"]) == (*own, 30)
    assert info["device"] == (f"vmn-{info['name']}" if len(info["name"]) <= 11 else info["device"])
    assert (info["mac"] is None) == (info["kind"] == "tun")
    assert info["mac"] is None or re.fullmatch(r"02(:[0-9a-f]{2}){5}", info["mac"])
    assert (info["netns"] is None) == (info["kind"] != "veth")
    assert info["hostname"] == f"{info['name']}.vmnet.internal"
    assert info["published"] == []
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", info["created"])


def test_every_form_of_guest_has_the_same_json_everywhere(laptop: Laptop, run: Run, tap: None) -> None:
    made = []
    for block, (form, options) in enumerate(FORMS.items()):
        kind, mode = form.split("-")
        [info] = run("create", form, *options, "--json").json
        check_guest(info, block, name=form, kind=kind, mode=mode, mtu=1500, owner=0, state="up")
        assert info["netns"] == (form if kind == "veth" else None)
        assert run("show", form, "--json").json == info
        assert run("ip", form).out == f"{info['address']}\n"
        assert run("ip", form, "--json").json == {"address": info["address"]}
        assert info["device"] in laptop.links()
        made.append(info)
    assert run("list", "--json").json == sorted(made, key=lambda info: str(info["name"]))
    table = run("list").out.splitlines()
    assert table[0].split() == ["NAME", "ADDRESS", "KIND", "MODE", "STATE", "HOSTNAME"]
    assert [line.split() for line in table[1:]] == [
        [info[key] for key in ("name", "address", "kind", "mode", "state", "hostname")]
        for info in run("list", "--json").json
    ]
    shown = dict(line.split(maxsplit=1) for line in run("show", "veth-native").out.splitlines())
    veth = run("show", "veth-native", "--json").json
    assert shown == {key: "-" if value in (None, []) else str(value) for key, value in veth.items()}


def test_defaults_of_kind_mode_and_netns(laptop: Laptop, run: Run, tap: None) -> None:
    laptop.run("ip", "netns", "add", "there")
    holder = laptop.start("unshare", "--net", "sh", "-c", "echo $$; read end")
    assert holder.stdout is not None
    path = f"/proc/{holder.stdout.readline().strip()}/ns/net"
    long_name = "a-name-of-sixty-three-characters-" + "x" * 30
    cases: list[tuple[str, list[str], dict[str, Any]]] = [
        ("plain", [], {"kind": "tap", "mode": "mapped"}),
        ("own", ["--kind", "veth"], {"kind": "veth", "mode": "native", "netns": "own"}),
        ("there", ["--netns", "there"], {"kind": "veth", "mode": "native", "netns": "there"}),
        ("new", ["--netns", "made"], {"kind": "veth", "mode": "native", "netns": "made"}),
        ("proc", ["--netns", path], {"kind": "veth", "mode": "native", "netns": path}),
        ("mapped", ["--netns", "m", "--mapped"], {"kind": "veth", "mode": "mapped", "netns": "m"}),
        ("tun", ["--kind", "tun"], {"kind": "tun", "mode": "native"}),
        (long_name, ["--kind", "veth", "--netns", "long"], {"name": long_name}),
    ]
    for block, (name, options, known) in enumerate(cases):
        [info] = run("create", name, *options, "--json").json
        check_guest(info, block, state="up", **known)
        assert info["device"] in laptop.links()
    # A namespace that came with its guest goes with it; others stay.
    assert set(os.listdir(laptop.path("/run/netns"))) == {"there", "own", "made", "m", "long"}
    run("delete", "--all")
    assert os.listdir(laptop.path("/run/netns")) == ["there"]
    assert laptop.path(path).exists()
    holder.communicate("\n")


def test_what_is_asked_for_is_what_the_kernel_has(laptop: Laptop, run: Run, tap: None) -> None:
    options = ["--address", "127.9.0.2", "--mac", "02:AA:00:00:00:01", "--mtu", "1400", "--queues", "2"]
    [info] = run("create", "vm", *options, "--json").json
    check_guest(info, (0x090000 - 0x010000) // 4, mac="02:aa:00:00:00:01", mtu=1400, state="up")
    [link] = json.loads(laptop.run("ip", "-j", "-d", "link", "show", "dev", "vmn-vm"))
    assert link["mtu"] == 1400
    assert link["linkinfo"]["info_data"]["multi_queue"] is True
    [veth] = run("create", "c", "--kind", "veth", "--mac", "02:aa:00:00:00:02", "--mtu", "1300", "--json").json
    [peer] = json.loads(run("exec", "c", "--", "ip", "-j", "link", "show", "dev", "eth0").out)
    assert (peer["address"], peer["mtu"]) == (veth["mac"], veth["mtu"]) == ("02:aa:00:00:00:02", 1300)
    # A veth's is known; what is behind a tap answers for itself.
    assert "02:aa:00:00:00:02" in laptop.run("ip", "neigh", "show", "nud", "permanent", "dev", "vmn-c")
    assert laptop.run("ip", "neigh", "show", "nud", "permanent", "dev", "vmn-vm") == ""


@pytest.mark.root
@pytest.mark.parametrize("kind", ["tap", "tun"])
def test_the_owner_may_open_the_device(laptop: Laptop, run: Run, tap: None, kind: str) -> None:
    [info] = run("create", "vm", "--kind", kind, "--owner", "1234", "--json").json
    assert info["owner"] == 1234
    [link] = json.loads(laptop.run("ip", "-j", "-d", "link", "show", "dev", "vmn-vm"))
    assert link["linkinfo"]["info_data"]["user"] in ("1234", 1234)


def test_the_owner_is_who_called_sudo(laptop: Laptop, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(laptop.env, "SUDO_UID", "1000")
    assert run("create", "a", "--kind", "veth", "--json").json[0]["owner"] == 1000
    assert run("create", "b", "--kind", "veth", "--owner", "root", "--json").json[0]["owner"] == 0
    monkeypatch.setitem(laptop.env, "SUDO_UID", "nobody you know")
    assert run("create", "c", "--kind", "veth", "--json").json[0]["owner"] == 0


def test_several_guests_come_in_the_order_asked_for(laptop: Laptop, run: Run) -> None:
    names = ["zoe", "adam", "mia"]
    made = run("create", *names, "--kind", "veth", "--json").json
    assert [info["name"] for info in made] == names
    for block, info in enumerate(made):
        check_guest(info, block, state="up")
    # Those that exist keep what they have, and their place in the answer.
    again = run("create", "eve", "mia", "zoe", "--kind", "veth", "--json").json
    assert [info["name"] for info in again] == ["eve", "mia", "zoe"]
    assert again[1:] == [made[2], made[0]]
    assert [line.split()[0] for line in run("create", "mia", "adam").out.splitlines()[1:]] == ["mia", "adam"]
    assert [info["name"] for info in run("up", "mia", "adam", "--json").json] == ["mia", "adam"]
    assert [info["name"] for info in run("list", "--json").json] == ["adam", "eve", "mia", "zoe"]


# The same call again


def test_the_same_create_again_changes_nothing_and_another_value_is_a_conflict(laptop: Laptop, run: Run) -> None:
    laptop.run("ip", "netns", "add", "there")
    same = {
        "--kind": "veth",
        "--netns": "there",
        "--address": "127.2.0.2",
        "--mac": "02:00:00:00:00:07",
        "--mtu": "1400",
    }
    same["--owner"] = "7"
    flat = [word for pair in same.items() for word in pair]
    [info] = run("create", "web", *flat, "--native", "--json").json
    before, files = laptop.snapshot(), files_of(laptop)
    for given in ([], ["--native"], *([key, value] for key, value in same.items()), [*flat, "--native"]):
        again = run("create", "web", *given, "--json", "-v")
        assert again.json == [info]
        assert again.err == "", given
    other = {
        "--kind": "tap",
        "--netns": "elsewhere",
        "--address": "127.2.0.6",
        "--mac": "02:00:00:00:00:08",
        "--mtu": "1500",
        "--owner": "8",
        "--queues": "2",
    }
    for key, value in other.items():
        refused = run("create", "web", key, value, check=False)
        assert refused.code == 4, key
        assert "web exists with" in refused.err
        assert value in refused.err
        assert same.get(key, "1") in refused.err
    assert run("create", "web", "--mapped", check=False).code == 4
    # All of them or none: a name that is new does not come either.
    assert run("create", "new", "web", "--kind", "tun", check=False).code == 4
    assert (laptop.snapshot(), files_of(laptop)) == (before, files)


# Dry runs and plans


def dry(run: Run, *args: str) -> list[str]:
    """Run a dry run in each of its forms and return its lines: they agree, also about the exit code."""
    plain = run(*args, "--dry-run", check=False)
    ops = run(*args, "--dry-run", "--json", check=False)
    typed = run(*args, "--dry-run", "-v", check=False)
    lines = plain.out.splitlines()
    assert plain.code == ops.code == typed.code == (10 if lines else 0), plain
    assert [op["text"] for op in ops.json] == lines
    assert [op["command"] for op in ops.json] == (typed.out.removesuffix("\n").split("\n") if lines else []) or any(
        "\n" in op["command"] for op in ops.json
    )
    assert plain.err == ops.err == typed.err == ""
    return lines


def test_a_dry_run_on_a_fresh_host_makes_not_even_a_folder(laptop: Laptop, run: Run, tap: None) -> None:
    before, folders = laptop.snapshot(), sorted(laptop.folder.iterdir())
    carve = dry(run, "carve")
    assert carve[-1] == "- address 127.0.0.1/8 on lo"
    assert dry(run, "up") == carve
    assert run("plan", check=False) == Result(10, "\n".join(carve) + "\n", "")
    assert dry(run, "create", "web", "--kind", "veth")[: len(carve)] == carve
    assert "+ tap vmn-a of uid 0" in dry(run, "create", "a", "b")
    for nothing in (["restore"], ["down"], ["delete", "--all"], ["delete", "web", "--if-exists"]):
        assert dry(run, *nothing) == []
    assert (laptop.snapshot(), sorted(laptop.folder.iterdir())) == (before, folders)


def test_a_dry_run_says_what_the_command_then_does(laptop: Laptop, run: Run, tap: None) -> None:
    run("create", "a", "b", "--kind", "veth")
    before, files = laptop.snapshot(), files_of(laptop)
    for nothing in (["up"], ["up", "a"], ["carve"], ["create", "a", "--kind", "veth"], ["create", "b", "a"]):
        assert dry(run, *nothing) == []
    assert run("plan") == Result(0, "", "")
    assert run("plan", "--json").json == []
    something = (["down"], ["down", "a"], ["delete", "a"], ["delete", "--all"], ["restore"], ["restore", "--purge"])
    for command in (*something, ["create", "c"], ["create", "c", "a"]):
        assert dry(run, *command) != []
    assert "- namespace /run/netns/a" not in dry(run, "down", "a")
    assert "- namespace /run/netns/a" in dry(run, "delete", "a")
    assert (laptop.snapshot(), files_of(laptop)) == (before, files)

    for command in (["create", "c"], ["down", "a"], ["up", "a"], ["delete", "b"], ["restore"], ["up"]):
        said = dry(run, *command)
        typed = run(*command, "--dry-run", "-v", check=False).out
        done = run(*command, "-v")
        # Guests are taken down side by side: what is done is what was said, in another order.
        assert sorted(done.err.splitlines()) == sorted(typed.splitlines()), command
        assert said
        assert command[0] == "delete" or dry(run, *command) == []


def test_plan_says_what_has_drifted_and_what_stands_in_the_way(laptop: Laptop, run: Run) -> None:
    run("create", "a", "b", "c", "--kind", "veth")
    laptop.run("ip", "link", "set", "vmn-a", "down")
    laptop.run("ip", "link", "del", "vmn-b")
    laptop.run("ip", "link", "add", "vmn-b", "type", "bridge")
    drift = run("plan", check=False)
    assert drift.code == 10
    assert "~ device vmn-a: up" in drift.out
    assert "vmn-c" not in drift.out
    assert "vmnet: warning: b: a device vmn-b is there that is not ours" in drift.err
    # What can be done is done, and the rest is an error.
    mended = run("up", check=False)
    assert mended.code == 4
    assert "a device vmn-b is there that is not ours" in mended.err
    assert [info["state"] for info in run("list", "--json").json] == ["up", "degraded", "up"]
    assert run("plan", check=False).code == 4
    laptop.run("ip", "link", "del", "vmn-b")
    run("up")
    assert run("plan").out == ""


def test_the_commands_of_a_dry_run_can_be_typed(
    laptop: Laptop, run: Run, tap: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The hosts file is edited, not written by a command; and so are the files of a dnsmasq, which is left out here.
    monkeypatch.setitem(laptop.env, "VMNET_HOSTS_FILE", "")
    laptop.run("mount", "--bind", "/dev/null", "/usr/sbin/dnsmasq")
    # Whether the host forwarded before decides about a rule; typed by hand, vmnet would find it forwarding.
    laptop.sysctl("ipv4/ip_forward", 1)
    before = laptop.snapshot()
    laptop.run("sh", "-eu", stdin=run("carve", "--dry-run", "-v", check=False).out)

    def done(*args: str) -> tuple[list[str], Result]:
        """Run a command; return what it did, without that it does not know how the host was, and has no dnsmasq."""
        result = run(*args, "-v")
        return [line for line in result.err.splitlines() if not line.startswith("vmnet: warning")], result

    assert done("carve")[0] == []
    laptop.run("ip", "netns", "add", "there")
    guests = {form: list(options) for form, options in FORMS.items()}
    guests |= {"queues": ["--queues", "4"], "odd": ["--netns", "a b;touch x'y"]}
    guests |= {"there": ["--netns", "there", "--mtu", "1400"], "a-name-that-is-too-long": ["--kind", "tun"]}
    for name, options in guests.items():
        script = run("create", name, *options, "--dry-run", "-v", check=False)
        assert script.code == 10
        laptop.run("sh", "-eu", stdin=script.out)
        # The guest is there but for its record: nothing is left to be done.
        steps, made = done("create", name, *options, "--json")
        assert (steps, made.json[0]["state"]) == ([], "up"), name
    assert run("plan").out == ""
    assert not (laptop.folder / "x'y").exists()

    laptop.run("sh", "-eu", stdin=run("down", "there", "--dry-run", "-v", check=False).out)
    assert done("down", "there")[0] == []
    laptop.run("sh", "-eu", stdin=run("restore", "--dry-run", "-v", check=False).out)
    # Namespaces that a hand made are not vmnet's to delete: it found them when the record came.
    for name in os.listdir(laptop.path("/run/netns")):
        laptop.run("ip", "netns", "del", name)
    assert laptop.snapshot() == before
    assert done("restore")[0] == []


def test_each_step_is_shown_as_it_is_done(laptop: Laptop, run: Run) -> None:
    made = run("create", "a", "--kind", "veth", "-v", "--json")
    assert made.json[0]["name"] == "a"
    commands = made.err.splitlines()
    assert "ip addr del 127.0.0.1/8 dev lo" in commands
    assert "ip netns add a && ip -n a link set lo up alias vmnet:a" in commands
    assert "ip link set vmn-a up" in commands
    assert f"editor {laptop.hosts_file}  # the block of vmnet: 127.1.0.2 a.vmnet.internal" in commands
    assert "dnsmasq --conf-file=" in commands[-1]
    gone = run("delete", "a", "-v").err.splitlines()
    assert gone[0] == f"editor {laptop.hosts_file}  # the block of vmnet: 127.1.0.2 goes"
    assert "ip link del vmn-a" in gone[1:]  # the kernel takes longer for that


# Wishes


def states(run: Run) -> dict[str, str]:
    return {info["name"]: info["state"] for info in run("list", "--json").json}


def test_down_is_a_wish_that_holds_until_up(laptop: Laptop, run: Run) -> None:
    run("create", "a", "b", "--kind", "veth")
    assert run("exec", "a", "--", "sh", "-c", "ip link show eth0 >&2 && echo in").out == "in\n"
    assert run("down", "a", "--json").json[0]["state"] == "down"
    assert states(run) == {"a": "down", "b": "up"}
    assert laptop.links() & {"vmn-a", "vmn-b"} == {"vmn-b"}
    assert "a.vmnet.internal" not in laptop.hosts_file.read_text()
    assert "b.vmnet.internal" in laptop.hosts_file.read_text()
    run("down", "a")
    run("up", "b")
    run("carve")
    assert dry(run, "create", "a") == []
    assert run("create", "a", "--json").json[0]["state"] == "down"
    run("create", "c", "--kind", "veth")
    run("delete", "c")
    assert states(run) == {"a": "down", "b": "up"}
    # Its namespace stays, and with it what runs inside.
    assert run("exec", "a", "--", "ip", "-o", "link").out.count("\n") == 1
    assert run("plan", check=False).code == 10
    address = run("ip", "a").out
    run("up", "a")
    assert (states(run), run("ip", "a").out) == ({"a": "up", "b": "up"}, address)
    assert "a.vmnet.internal" in laptop.hosts_file.read_text()


def test_up_and_down_without_a_name_take_the_host_part_along(laptop: Laptop, run: Run) -> None:
    before = laptop.snapshot()
    run("create", "a", "b", "--kind", "veth")
    run("down", "a")
    full = laptop.snapshot()
    run("down")
    assert states(run) == {"a": "down", "b": "down"}
    assert laptop.snapshot() == before
    run("carve")
    assert states(run) == {"a": "down", "b": "down"}
    assert "127.0.0.1/16" in laptop.run("ip", "addr", "show", "dev", "lo")
    run("up")
    assert states(run) == {"a": "up", "b": "up"}
    run("down", "a")
    run("up", "a")
    run("down", "a", "b")
    assert "127.0.0.1/16" in laptop.run("ip", "addr", "show", "dev", "lo")
    run("up", "b")
    assert laptop.snapshot()["ip netns"].split() == full["ip netns"].split()
    assert states(run) == {"a": "down", "b": "up"}


def test_restore_keeps_the_records_unless_they_are_purged(laptop: Laptop, run: Run) -> None:
    before = laptop.snapshot()
    [made] = run("create", "a", "--kind", "veth", "--json").json
    assert run("restore", "--json").json == {"carved": False}
    assert run("show", "a", "--json").json == {**made, "state": "down"}
    assert run("carve", "--json").json == {"carved": True}
    assert run("up", "--json").json == [made]
    run("restore", "--purge")
    assert run("list", "--json").json == []
    assert laptop.snapshot() == before
    run("restore")


def test_delete_is_done_once_and_of_all_or_none(laptop: Laptop, run: Run) -> None:
    run("create", "a", "b", "c", "d", "--kind", "veth")
    assert run("delete", "a", "a", "--json").json == {"deleted": ["a"]}
    assert run("delete", "a", check=False) == Result(
        3, "", "vmnet: there is no guest a\nhint: vmnet list shows those there are\n"
    )
    assert run("delete", "a", "--if-exists", "--json").json == {"deleted": []}
    assert run("delete", "b", "nope", check=False).code == 3
    assert states(run) == {"b": "up", "c": "up", "d": "up"}
    assert run("delete", "b", "nope", "--if-exists", "--json").json == {"deleted": ["b"]}
    assert run("delete", "--all", "--json").json == {"deleted": ["c", "d"]}
    assert run("delete", "--all", "--json").json == {"deleted": []}
    assert (states(run), laptop.links(), os.listdir(laptop.path("/run/netns"))) == ({}, {"lo", "wlan0"}, [])
    assert laptop.hosts_file.read_text().count("\n") == 2


# What is printed, and where


def test_only_data_is_written_to_a_pipe(laptop: Laptop, run: Run) -> None:
    run("create", "a", "--kind", "veth")
    for silent in (["up"], ["up", "a"], ["down", "a"], ["carve"], ["plan"], ["delete", "a"], ["restore"], ["list"]):
        if silent == ["plan"]:
            run("up")
        assert run(*silent) == Result(0, "", ""), silent
    assert run("list", "--json").out == "[]\n"


@pytest.mark.parametrize(
    "args", [["show", "nope"], ["create", "A"], ["create", "a", "--mtu", "x"], ["nope"]], ids=" ".join
)
def test_an_error_is_a_line_a_hint_and_with_json_an_object(laptop: Laptop, run: Run, args: list[str]) -> None:
    plain, structured = run(*args, check=False), run(*args, "--json", check=False)
    assert plain.out == ""
    assert plain.err == structured.err
    lines = plain.err.splitlines()
    assert len(lines) == 2
    error = structured.json["error"]
    assert set(error) == {"code", "message", "hint"}
    assert lines == [f"vmnet: {error['message']}", f"hint: {error['hint']}"]
    assert plain.code == structured.code == error["code"] != 0


def test_version_and_help_need_nothing(laptop: Laptop) -> None:
    env = {"VMNET_CONFIG": "/dev/full", "VMNET_STATE_DIR": "/dev/null/x", "VMNET_RUN_DIR": "/dev/null/x"}
    for args in (["--version"], ["--version", "list"]):
        assert laptop.vmnet(*args, env=env) == Result(0, f"vmnet {vmnet.__version__}\n", "")
    help_ = laptop.vmnet("--help", env=env)
    assert "create" in help_.out
    assert help_.err == ""
    assert laptop.vmnet(check=False, env=env) == Result(2, "", help_.out)


def shell(laptop: Laptop, line: str) -> Result:
    """Run a line of shell in the laptop; $vmnet is the command line."""
    return laptop.execute("bash", "-c", line, env={"vmnet": f"{sys.executable} -m vmnet"})


def test_an_output_that_cannot_be_written_is_told_where_it_can(laptop: Laptop, run: Run) -> None:
    run("create", "a", "--kind", "veth")
    full = "vmnet: the output cannot be written: No space left on device\n"
    for command in ("list", "list --json", "show a", "ip a", "delete a --dry-run", "--version"):
        assert shell(laptop, f"$vmnet {command} >/dev/full") == Result(1, "", full)
    assert shell(laptop, "$vmnet show nope --json >/dev/full").code == 3
    assert shell(laptop, "$vmnet show nope --json 2>/dev/full").json["error"]["code"] == 3
    assert shell(laptop, "$vmnet show nope 2>&-") == Result(3, "", "")
    assert shell(laptop, "$vmnet list >&-") == Result(0, "", "")
    assert shell(laptop, "set -o pipefail; $vmnet list | true").err == ""
    assert shell(laptop, "PYTHONIOENCODING=ascii $vmnet create b --netns größe --dry-run").code == 10


@pytest.mark.root
def test_looking_needs_no_root(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE_DIR", "RUN_DIR", "CONFIG"):
        monkeypatch.setitem(laptop.env, f"VMNET_{name}", f"/run/{name.lower()}")
    let_all_run_python(laptop)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--"]

    def as_user(*args: str) -> Result:
        return laptop.execute(*user, sys.executable, "-m", "vmnet", *args)

    assert as_user("list", "--json") == Result(0, "[]\n", "")
    made = laptop.vmnet("create", "own", "b", "--kind", "veth", "--json").json
    laptop.run("ip", "link", "set", "vmn-b", "down")
    listed = as_user("list", "--json")
    assert listed.err == ""
    assert listed.json == [{**made[1], "state": "degraded"}, made[0]]
    assert as_user("show", "own", "--json").json == made[0]
    assert as_user("ip", "own") == Result(0, f"{made[0]['address']}\n", "")
    assert as_user("show", "nope").code == 3
    before = laptop.snapshot()
    changing = (["create", "x"], ["delete", "own"], ["up"], ["down", "own"], ["carve"], ["restore"], ["plan"])
    for command in (*changing, ["exec", "own", "--", "true"], ["create", "x", "--owner", "7"]):
        refused = as_user(*command)
        assert (refused.code, refused.out) == (6, ""), command
        assert refused.err.splitlines()[1] == "hint: run it with sudo"
        assert "Traceback" not in refused.err
    assert laptop.snapshot() == before
    laptop.path("/run/config").write_text("mtu = 1400\n")
    laptop.path("/run/config").chmod(0o600)
    assert as_user("list") == Result(
        6, "", "vmnet: /run/config cannot be read: Permission denied\nhint: let all read it: chmod a+r\n"
    )


def let_all_run_python(laptop: Laptop) -> None:
    """Open the way to the interpreter and the sources in the laptop's own mounts, where a home folder closes it."""
    for number, path in enumerate((sys.base_prefix, sys.prefix, str(SOURCES))):
        for folder in [*Path(path).parents][::-1]:
            if not laptop.path(str(folder)).stat().st_mode & 1:
                held = f"/run/held{number}"
                laptop.run("mkdir", held)
                laptop.run("mount", "--bind", path, held)
                laptop.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(folder))
                laptop.run("mkdir", "-p", path)
                laptop.run("mount", "--bind", held, path)


# exec


def test_exec_hands_all_through(laptop: Laptop, run: Run) -> None:
    etc = laptop.path("/etc/netns/web")
    etc.mkdir(parents=True)
    (etc / "resolv.conf").write_text("nameserver 127.1.0.1\n")
    (etc / "nowhere-in-etc").write_text("")
    own = laptop.path("/etc/resolv.conf").read_text()
    run("create", "web", "--kind", "veth")
    inside = laptop.vmnet(
        "exec", "web", "--", "sh", "-c", "cat; ip -o -4 addr show eth0; cat /etc/resolv.conf", stdin="hi\n"
    )
    assert inside.out.startswith("hi\n")
    assert "inet 127.1.0.2/30" in inside.out
    assert inside.out.endswith("\nnameserver 127.1.0.1\n")
    assert laptop.path("/etc/resolv.conf").read_text() == own
    assert laptop.vmnet("exec", "web", "--", "ls", "/sys/class/net").out.split() == ["eth0", "lo"]
    for code in (0, 1, 3, 10, 125, 255):
        assert laptop.vmnet(
            "exec", "web", "--", "sh", "-c", f"echo out; echo err >&2; exit {code}", check=False
        ) == Result(code, "out\n", "err\n")
    words = ["a b", "", "$HOME", "*", "--json", "--", "-v", "ä"]
    assert run("exec", "web", "--", "printf", "%s|", *words).out == "a b||$HOME|*|--json|--|-v|ä|"
    assert run("exec", "web", "printf", "%s", "--json").out == "--json"
    assert run("exec", "--", "web", "pwd").out == f"{laptop.folder}\n"
    ignored = ["grep", "SigIgn", "/proc/self/status"]
    assert laptop.vmnet("exec", "web", "--", *ignored).out == laptop.run(*ignored)


def test_exec_becomes_the_command_and_so_gets_its_signals(laptop: Laptop, run: Run) -> None:
    run("create", "web", "--kind", "veth")
    script = "trap 'exit 42' TERM; trap 'exit 43' HUP; echo $$; while :; do sleep 0.01; done"
    for number, code in ((signal.SIGTERM, 42), (signal.SIGHUP, 43), (signal.SIGKILL, 128 + signal.SIGKILL)):
        # The outer shell is there to tell by its exit code how vmnet's process ended.
        line = '"$@" & echo $!; wait $!'
        command = [sys.executable, "-m", "vmnet", "exec", "web", "--", "sh", "-c", script]
        process = laptop.start("bash", "-c", line, "bash", *command)
        assert process.stdout is not None
        pid = process.stdout.readline().strip()
        assert process.stdout.readline().strip() == pid
        laptop.run("kill", f"-{number}", pid)
        process.communicate(timeout=20)
        assert process.returncode == code


def test_exec_says_why_it_cannot(laptop: Laptop, run: Run, tap: None) -> None:
    run("create", "web", "gone", "--kind", "veth")
    run("create", "vm")
    laptop.path("/run/script").write_text("echo no interpreter\n")
    laptop.path("/run/script").chmod(0o755)
    for args, code, words in (
        (["web", "--", "nope"], 127, "nope cannot be run: No such file or directory"),
        (["web", "--", "/etc"], 126, "/etc cannot be run: Permission denied"),
        (["web", "--", "/run/script"], 126, "/run/script cannot be run: Exec format error"),
        (["vm", "--", "true"], 4, "vm is a tap: it is in no network namespace of this host"),
        (["nope", "--", "true", "--json"], 3, "there is no guest nope"),
        (["nope", "true", "--json"], 3, "there is no guest nope"),
        (["NOPE", "--", "true"], 2, "'NOPE' is not a guest name"),
        (["web", "--"], 2, "no command is given"),
        (["web"], 2, "Missing argument"),
    ):
        refused = run("exec", *args, check=False)
        assert (refused.code, refused.out) == (code, ""), args
        assert refused.err.startswith(f"vmnet: {words}")
    laptop.run("ip", "netns", "del", "gone")
    refused = run("exec", "gone", "--", "true", check=False)
    assert (refused.code, refused.err) == (4, "vmnet: gone is down\nhint: vmnet up gone\n")
    run("up", "gone")
    assert run("exec", "gone", "--", "echo", "back").out == "back\n"


# Interrupted


def test_an_interrupted_command_says_so(laptop: Laptop, run: Run) -> None:
    run("create", "a", "--kind", "veth")
    lock = Path(laptop.env["VMNET_RUN_DIR"], "host.lock")
    holder = laptop.start("flock", str(lock), "sh", "-c", "echo locked; read end")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    waiting = subprocess.Popen(
        laptop.command("sh", "-c", f"echo $$ >/run/pid; exec {sys.executable} -m vmnet create b --kind veth --json"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=laptop.env,
    )  # fmt: skip
    blocked = re.compile(rf"-> FLOCK .*:{lock.stat().st_ino} ")  # others on this machine wait for locks, too
    assert wait_until(lambda: bool(blocked.search(Path("/proc/locks").read_text())), 20)
    laptop.run("sh", "-c", "kill -INT $(cat /run/pid)")
    out, err = waiting.communicate(timeout=20)
    assert (waiting.returncode, err) == (130, "vmnet: interrupted\nhint: vmnet up finishes what was begun\n")
    assert json.loads(out)["error"]["code"] == 130
    holder.communicate("\n")
    run("up")
    assert set(states(run).values()) == {"up"}
