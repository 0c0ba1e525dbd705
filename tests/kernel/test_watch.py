"""The watcher keeps what is recorded, for weeks: by events, without any, and beside whatever else is at work."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.kernel.drifts import ALL, DEVICE, HOST, INSIDE, OPENED, VETH, Drift, Scene
from tests.kernel.machine import wait_until
from tests.kernel.net import FORMS, SOURCES, Lab, Laptop, why_no_tap
from tests.kernel.warm import Warm
from tests.kernel.watching import Watching, is_healed, state_of

OFTEN = 0.2
# What the kernel tells nobody of when it changes: sysctls other than rp_filter and forwarding, who may open a tap.
SILENT = ("route_localnet", "accept_local", "IPv6", "another owner", "multicast on inside")


def _skip_unless_possible(form: str) -> None:
    if form in OPENED and (reason := why_no_tap()):
        pytest.skip(reason)


def _deeds(form: str) -> list[Drift]:
    """Return what can be done to such a guest; to the host with the first form alone."""
    host, inside = HOST if form == ALL[0] else (), INSIDE if form in VETH else ()
    return [drift for drift in (*host, *DEVICE, *inside) if form in drift.forms]


def _unhealed(scene: Scene, deeds: list[Drift]) -> list[str]:
    """Do one thing after the other, and return those that were not put right."""
    left = []
    for drift in deeds:
        if scene.form in OPENED:
            scene.alive.boot(scene.info)  # an earlier deed may have ended its VM
        drift.do(scene)
        if not is_healed(scene.warm, scene.laptop):
            left.append(drift.name)
            scene.vmnet("up")
    return left


@pytest.mark.parametrize("form", ALL)
def test_each_drift_is_healed_without_any_event(form: str, warm: Warm, lab: Lab) -> None:
    _skip_unless_possible(form)
    scene = Scene(warm, lab, form)
    with Watching(lab.laptop, interval=OFTEN, sense="deaf"):
        assert _unhealed(scene, _deeds(form)) == []
    scene.heals()


@pytest.mark.parametrize("form", ALL)
def test_all_drift_at_once_is_healed_without_any_event(form: str, warm: Warm, lab: Lab) -> None:
    _skip_unless_possible(form)
    scene = Scene(warm, lab, form)
    with Watching(lab.laptop, interval=OFTEN, sense="deaf"):
        scene.do_all()
        assert is_healed(warm, lab.laptop)
    scene.heals()


@pytest.mark.parametrize("form", ALL)
def test_each_drift_that_the_kernel_tells_of_is_healed_by_its_event(form: str, warm: Warm, lab: Lab) -> None:
    _skip_unless_possible(form)
    scene = Scene(warm, lab, form)
    deeds = [drift for drift in _deeds(form) if not drift.name.startswith(SILENT)]
    left = []
    # A new one for a few deeds each: more of one kind in a minute are a fight, and left alone.
    for start in range(0, len(deeds), 4):
        with Watching(lab.laptop) as watcher:
            left += _unhealed(scene, deeds[start : start + 4])
            assert watcher.counts()["unannounced_total"] == 0
    assert left == []
    scene.heals()


def _three(laptop: Laptop, warm: Warm) -> None:
    for name in ("a", "b", "c"):
        warm.vmnet(laptop, "create", name, "--kind", "veth")


@pytest.mark.parametrize("sense", ["deaf", None])
def test_the_records_replaced_by_an_older_backup(sense: str | None, warm: Warm, laptop: Laptop) -> None:
    """What they do not know goes, what they know comes."""
    _three(laptop, warm)
    records = laptop.folder / "state/vmnet.db"
    backup = records.read_bytes()
    warm.vmnet(laptop, "create", "d", "--kind", "veth")
    warm.vmnet(laptop, "delete", "b")
    with Watching(laptop, interval=OFTEN, sense=sense):
        other = records.with_suffix(".new")
        other.write_bytes(backup)
        other.replace(records)
        assert wait_until(lambda: {"vmn-a", "vmn-b", "vmn-c"} == {d for d in laptop.links() if "vmn" in d}, 20)
        assert is_healed(warm, laptop)
    assert sorted(info["name"] for info in warm.vmnet(laptop, "list", "--json").json) == ["a", "b", "c"]
    assert not laptop.path("/run/netns/d").exists()


def test_the_hosts_file_is_looked_at_where_the_kernel_shows_nothing_new(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    with Watching(laptop, interval=0.1, sense="deaf") as watcher:
        assert wait_until(lambda: watcher.looks() > 10, 60)  # by then all is known to be clean
        was = laptop.hosts_file.read_text()
        laptop.hosts_file.write_text(was.partition("# BEGIN")[0])
        assert wait_until(lambda: laptop.hosts_file.read_text() == was, 20)


def test_what_is_to_be_down_stays_down(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    with Watching(laptop, interval=OFTEN) as watcher:
        warm.vmnet(laptop, "down", "b")
        start = watcher.looks()
        assert wait_until(lambda: watcher.looks() > start + 5, 60)
        assert state_of(warm, laptop, "b")["state"] == "down"
        assert "vmn-b" not in laptop.links()
        warm.vmnet(laptop, "down")
        start = watcher.looks()
        assert wait_until(lambda: watcher.looks() > start + 5, 60)
        assert not [device for device in laptop.links() if device.startswith("vmn-")]
        assert "127.0.0.1/8" in laptop.run("ip", "addr", "show", "lo")
        # Beside the commands it may have been the one to write the names.
        assert [line for line in watcher.changes() if "~ names of" not in line and "~ DHCP and DNS" not in line] == []
        warm.vmnet(laptop, "up")
    assert is_healed(warm, laptop)


def test_once_is_what_boot_does(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    warm.vmnet(laptop, "down", "b")
    laptop.run("nft", "flush", "ruleset")
    laptop.ip("link del vmn-a")
    warm.vmnet(laptop, "watch", "--once")
    assert {name: state_of(warm, laptop, name)["state"] for name in "abc"} == {"a": "up", "b": "down", "c": "up"}
    warm.vmnet(laptop, "down")
    warm.vmnet(laptop, "watch", "--once")
    assert not [device for device in laptop.links() if device.startswith("vmn-")]


def test_nothing_is_made_where_nothing_is_recorded(warm: Warm, laptop: Laptop) -> None:
    before = laptop.snapshot()
    with Watching(laptop, interval=OFTEN) as watcher:
        assert wait_until(lambda: watcher.looks() > 3, 60)
    warm.vmnet(laptop, "watch", "--once")
    assert laptop.snapshot() == before
    assert not (laptop.folder / "state").exists()


def test_a_guest_made_while_it_watches_is_watched(warm: Warm, laptop: Laptop) -> None:
    with Watching(laptop) as watcher:
        _three(laptop, warm)
        laptop.ip("link set vmn-b mtu 1400")
        assert is_healed(warm, laptop)
        laptop.ip("link del vmn-c")
        assert is_healed(warm, laptop)
        warm.vmnet(laptop, "delete", "--all")
        assert watcher.counts()["unannounced_total"] == 0


def test_a_quiet_watcher_does_and_says_nothing(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    laptop.vmnet("create", "t") if why_no_tap() is None else None
    before = laptop.snapshot()
    with Watching(laptop, interval=0.1) as watcher:
        assert wait_until(lambda: watcher.looks() > 30, 60)
        assert watcher.log().count("\n") == 1
        assert watcher.counts()["changes_total"] == 0
        assert watcher.metrics()["guests"] >= 3
    assert laptop.snapshot() == before


def test_a_change_is_logged_with_its_cause_and_who_did_it(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    with Watching(laptop) as watcher:
        laptop.run("nft", "flush", "ruleset")
        watcher.wait_for("changed")
        assert is_healed(warm, laptop)
        lines = watcher.changes()
        assert all(line.startswith("vmnet: changed cause=event by=nft[") for line in lines)
        assert [line.partition("] ")[2] for line in lines] == [
            'op="~ nftables table ip vmnet"', 'op="- connections of guests without our rules"',
        ]  # fmt: skip
    with Watching(laptop, interval=OFTEN, sense="deaf") as watcher:
        laptop.ip("link set vmn-a mtu 1400")
        watcher.wait_for("drift without event")
        assert is_healed(warm, laptop)
        [line] = watcher.changes()
        assert line == 'vmnet: changed cause=look op="~ device vmn-a: mtu 1500"'
        assert watcher.counts()["unannounced_total"] == 1
        assert watcher.counts()["opened_total"] == 2


def test_the_log_as_json(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    with Watching(laptop, "--json") as watcher:
        laptop.ip("link set vmn-a mtu 1400")
        watcher.wait_for("changed")
    lines = [json.loads(line) for line in watcher.log().splitlines()]
    assert [line["event"] for line in lines] == ["watching", "changed", "stopped"]
    assert lines[1]["op"] == "~ device vmn-a: mtu 1500"
    assert lines[1]["cause"] == "event"


# Events that are lost, sockets that die, a machine that was asleep


def test_what_answers_guests_comes_back_as_soon_as_it_ends(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    pid = Path(laptop.env["VMNET_RUN_DIR"], "dns", "keeper.pid")
    with Watching(laptop, interval=3600) as watcher:
        for _ in range(3):
            before = pid.read_text()
            laptop.run("kill", "-KILL", before.split()[0])
            assert wait_until(lambda: pid.read_text() != before, 60)  # noqa: B023
            assert is_healed(warm, laptop)
        assert all("cause=event" in line for line in watcher.changes())


def test_events_that_were_lost_are_made_up_for(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    with Watching(laptop) as watcher:
        watcher.signal(signal.SIGSTOP)
        laptop.ip(*(f"link set vmn-a alias vmnet:a{'x' * (number % 200)}" for number in range(4000)))
        laptop.ip("link set vmn-a alias vmnet:a", "link set vmn-c mtu 1400")
        watcher.signal(signal.SIGCONT)
        assert is_healed(warm, laptop)
        assert watcher.counts()["lost_total"] > 0


def test_a_storm_of_events_costs_a_few_looks_and_no_memory(warm: Warm, laptop: Laptop) -> None:
    """Ten thousand events, half of them of our own devices."""
    _three(laptop, warm)
    with Watching(laptop) as watcher:
        laptop.ip("link set vmn-b mtu 1400")
        assert is_healed(warm, laptop)
        looks, memory, began = watcher.looks(), watcher.memory(), time.monotonic()
        laptop.ip(
            "link add busy type veth peer name busy2",
            *(f"addr {verb} 10.9.{number >> 8}.{number & 255}/32 dev {device}"
              for number in range(1250) for device in ("busy", "busy2") for verb in ("add", "del")),
            *(f"link set vmn-c txqueuelen {1000 + number % 2}" for number in range(5000)),
        )  # fmt: skip
        seconds = time.monotonic() - began
        laptop.ip("link set vmn-b mtu 1400")
        assert is_healed(warm, laptop)
        # Ever more seldom, up to one look in 0.6 s; and one for what each of them changed.
        assert watcher.looks() - looks <= 14 + 4 * seconds
        assert watcher.memory() - memory < 8 << 20
        assert watcher.counts()["unannounced_total"] == 0


def test_sockets_that_die_are_opened_anew(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    with Watching(laptop, sense="dead") as watcher:
        for mtu in range(1400, 1404):
            laptop.ip(f"link set vmn-a mtu {mtu}")
            assert is_healed(warm, laptop)
        watcher.wait_for("events reopened")
        assert watcher.counts()["opened_total"] > 1


def test_a_resume_is_seen_by_the_clocks(warm: Warm, laptop: Laptop) -> None:
    """An hour passes on the wall while the machine sleeps."""
    _three(laptop, warm)
    with Watching(laptop, sense="asleep") as watcher:
        laptop.ip("link set vmn-a mtu 1400")
        start = watcher.looks()
        time.sleep(0.5)
        assert watcher.looks() == start
        (laptop.folder / "ahead").write_text("3600")
        assert is_healed(warm, laptop)
        watcher.wait_for("looking anew cause=resume")
        watcher.wait_for("changed cause=resume")
        assert watcher.counts()["opened_total"] == 2
        start = watcher.looks()
        (laptop.folder / "ahead").write_text("3601")  # as a clock is set right
        time.sleep(0.5)
        assert watcher.looks() == start


def test_a_hangup_has_it_look_at_once(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    with Watching(laptop) as watcher:
        laptop.sysctl("ipv4/conf/vmn-a/accept_local", 1)
        time.sleep(0.3)
        assert laptop.sysctl("ipv4/conf/vmn-a/accept_local") == "1"
        watcher.signal(signal.SIGHUP)
        assert is_healed(warm, laptop)
        watcher.wait_for("cause=order")


# Others at work


def test_two_watchers_do_not_fight_and_one_takes_over(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    with Watching(laptop) as first, Watching(laptop) as second:
        second.wait_for("standing by")
        laptop.ip("link del vmn-b")
        assert is_healed(warm, laptop)
        assert second.changes() == []
        with Watching(laptop) as third:
            third.wait_for("standing by")
        assert warm.vmnet(laptop, "watch", "--status", "--json").json["pid"] == first.pid
        first.kill()
        second.wait_for("watching")
        laptop.ip("link del vmn-b")
        assert is_healed(warm, laptop)
        assert second.changes()


def test_commands_at_the_same_time_lose_nothing(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    with Watching(laptop, interval=0.1) as watcher:
        calls = []
        for round_ in range(4):
            calls += [warm.start(laptop, "create", f"{name}{round_}", "--kind", "veth") for name in "xyz"]
            calls += [warm.start(laptop, "down", "a"), warm.start(laptop, "up", "b")]
            for call in calls:
                assert call.wait().code == 0
            calls = [warm.start(laptop, "delete", f"x{round_}"), warm.start(laptop, "up", "a")]
            laptop.ip("link set vmn-b mtu 1400")
        for call in calls:
            assert call.wait().code == 0
        assert is_healed(warm, laptop)
        names = {"a", "b", "c", *(f"{name}{round_}" for name in "yz" for round_ in range(4))}
        assert {info["name"] for info in warm.vmnet(laptop, "list", "--json").json} == names
        assert {info["state"] for info in warm.vmnet(laptop, "list", "--json").json} == {"up"}
        assert watcher.metrics()["wrong"] == 0


FIGHTER = "while :; do ip link set vmn-a mtu 1400; sleep 0.05; done"


def test_who_undoes_it_again_and_again_is_named_and_left_alone(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    with Watching(laptop, interval=0.5) as watcher:
        fighter = laptop.start("sh", "-c", FIGHTER)
        try:
            watcher.wait_for("left alone")
            changes, looks = len(watcher.changes()), watcher.looks()
            assert changes == 6
            assert wait_until(lambda: watcher.looks() > looks + 4, 60)
            assert len(watcher.changes()) == changes
        finally:
            fighter.terminate()
            fighter.wait()
        [line] = [line for line in watcher.log().splitlines() if "left alone" in line]
        assert 'op="~ device vmn-a: mtu 1500"' in line
        assert "seconds=60" in line
        assert watcher.metrics()["left_alone"] == 1
        # All else is kept as before.
        laptop.ip("link set vmn-b mtu 1400")
        assert wait_until(lambda: state_of(warm, laptop, "b")["state"] == "up", 20)
        status = warm.vmnet(laptop, "watch", "--status").out
        assert "left alone: ~ device vmn-a: mtu 1500" in status


def test_what_stays_wrong_is_said_once(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    laptop.run("ip", "netns", "del", "a")
    laptop.run("ip", "netns", "add", "a")
    with Watching(laptop, interval=0.1) as watcher:
        watcher.wait_for("another network namespace")
        looks = watcher.looks()
        laptop.ip("link set vmn-b mtu 1400")
        assert wait_until(lambda: state_of(warm, laptop, "b")["state"] == "up", 20)
        assert wait_until(lambda: watcher.looks() > looks + 10, 60)
        assert watcher.log().count("another network namespace") == 1
        assert watcher.metrics()["wrong"] == 1
        assert "wrong: a: " in warm.vmnet(laptop, "watch", "--status").out
        warm.vmnet(laptop, "delete", "a")
        assert wait_until(lambda: watcher.metrics()["wrong"] == 0)


# What it is told and tells


def test_other_settings_count_from_the_next_look(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    with Watching(laptop, interval=OFTEN) as watcher:
        (laptop.folder / "config.toml").write_text('domain = "lab.internal"\n')
        assert wait_until(lambda: "a.lab.internal" in laptop.hosts_file.read_text(), 20)
        (laptop.folder / "config.toml").write_text("domain = 5\n")
        watcher.wait_for("domain = 5 is not a domain")
        laptop.ip("link set vmn-a mtu 1400")
        (laptop.folder / "config.toml").unlink()
        assert is_healed(warm, laptop)
        assert "a.vmnet.internal" in laptop.hosts_file.read_text()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Another vmnet, whose files can be changed."""
    shutil.copytree(SOURCES / "vmnet", tmp_path / "other/vmnet", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "other"


def test_a_new_version_takes_over_under_running_guests(copy: Path, warm: Warm, lab: Lab) -> None:
    laptop = lab.laptop
    guest = laptop.guest("web", *FORMS["veth-native"])
    guest.serve()
    lab.internet.serve()
    open_ones = []
    for machine, address in ((laptop, guest.address), (guest, lab.internet.address)):
        client = machine.socket(socket.AF_INET, socket.SOCK_STREAM)
        client.settimeout(10)
        client.connect((address, 7))
        open_ones.append(client)
    rules = copy / "vmnet/templates/nftables.nft"
    with Watching(laptop, interval=0.3, sources=copy) as watcher:
        text = rules.read_text().replace("\tchain no_address {", "\tchain newer {\n\t}\n\tchain no_address {")
        rules.write_text(text)
        watcher.wait_for("starting anew")
        assert wait_until(lambda: "chain newer" in laptop.run("nft", "list", "table", "ip", "vmnet"), 20)
        for client in open_ones:
            client.sendall(b"still")
            assert client.recv(10) == b"still"
        assert guest.tcp(lab.internet.address, payload=b"new") == b"new"


def test_an_older_version_leaves_newer_records_alone(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    script = "import sqlite3,sys; db=sqlite3.connect(sys.argv[1]); db.execute('PRAGMA user_version = 999'); db.commit()"
    with Watching(laptop, interval=OFTEN) as watcher:
        laptop.run("python3", "-c", script, str(laptop.folder / "state/vmnet.db"))
        watcher.wait_for("wrong")
        laptop.ip("link set vmn-a mtu 1400")
        start = watcher.looks()
        assert wait_until(lambda: watcher.looks() > start + 3, 60)
        assert "mtu 1400" in laptop.run("ip", "link", "show", "vmn-a")
        assert watcher.log().count("wrong") == 1
    assert warm.vmnet(laptop, "watch", check=False).code == 4
    assert warm.vmnet(laptop, "up", check=False).code == 4
    warm.vmnet(laptop, "restore")
    assert not [device for device in laptop.links() if device.startswith("vmn-")]


def test_it_tells_systemd_that_it_is_ready_and_alive(warm: Warm, laptop: Laptop) -> None:
    _three(laptop, warm)
    path = laptop.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notes:
        notes.bind(os.fspath(path))
        notes.settimeout(20)
        env = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "1000000"}
        with Watching(laptop, env=env) as watcher:
            assert notes.recv(100) == b"READY=1"
            assert [notes.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            assert watcher.looks() < 4


def test_the_status(warm: Warm, laptop: Laptop) -> None:
    none = warm.vmnet(laptop, "watch", "--status", check=False)
    assert (none.code, none.out.startswith("no watcher")) == (10, True)
    assert warm.vmnet(laptop, "watch", "--status", "--json", check=False).json == {"pid": None}
    _three(laptop, warm)
    with Watching(laptop) as watcher:
        said = warm.vmnet(laptop, "watch", "--status", "--json").json
        assert said["pid"] == watcher.pid
        assert (said["guests"], said["wrong"], said["left_alone"]) == (3, [], [])
        assert "watching as process" in warm.vmnet(laptop, "watch", "--status").out
        watcher.kill()
        assert wait_until(lambda: warm.vmnet(laptop, "watch", "--status", check=False).code == 10)
    with Watching(laptop):
        assert warm.vmnet(laptop, "watch", "--status").code == 0
    assert warm.vmnet(laptop, "watch", "--status", check=False).code == 10


@pytest.mark.parametrize("option", [("--interval", "0"), ("--interval", "-1"), ("--interval", "soon")])
def test_an_interval_must_make_sense(option: tuple[str, str], warm: Warm, laptop: Laptop) -> None:
    assert warm.vmnet(laptop, "watch", *option, check=False).code == 2


def test_only_root_can_watch(laptop: Laptop) -> None:
    less = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-m", "vmnet"]
    refused = laptop.execute(*less, "watch")
    assert refused.code == 6
    assert "CAP_NET_ADMIN" in refused.err


def test_records_of_another_host_are_not_watched(warm: Warm, lab: Lab) -> None:
    _three(lab.laptop, warm)
    result = lab.laptop.execute("unshare", "--net", sys.executable, "-m", "vmnet", "watch")
    assert result.code == 4, result
    assert "another network namespace" in result.err


def test_a_lan_that_is_in_the_way_of_the_first_carve_is_waited_out(warm: Warm, laptop: Laptop) -> None:
    """Booted in a LAN of 127.1.x.x, vmnet refuses; what is in its way is nothing that a look at vmnet's own shows."""
    warm.vmnet(laptop, "create", "g", "--kind", "veth")
    (laptop.folder / "run/found.json").unlink()
    laptop.ip("addr add 127.1.0.77/24 dev wlan0", "route del unreachable 127.0.0.0/10 table local")
    with Watching(laptop, interval=OFTEN) as watcher:
        watcher.wait_for("127.1.0.0/24: an address of wlan0")
        looks = watcher.looks()
        assert wait_until(lambda: watcher.looks() > looks + 2)
        laptop.ip("addr del 127.1.0.77/24 dev wlan0")
        assert is_healed(warm, laptop, 8)
