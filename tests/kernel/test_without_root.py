"""Users without root: what they may do with guests of their own, and that nothing they do harms anybody else."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernel.machine import wait_until
from tests.kernel.net import Laptop
from tests.kernel.stuck import stuck_file, why_no_fuse
from tests.kernel.test_server import descriptors, host_locked, kill_server, pid_of_server, processes
from tests.kernel.users import Hostile, User, let_users_in, memory
from vmnet import __version__
from vmnet.client import ASK, MAGIC

pytestmark = pytest.mark.root

OURS = {"place": "/run/state", "version": __version__}


def question(**fields: Any) -> bytes:
    """Return a question as it is sent."""
    return b"\0".join((MAGIC, ASK, json.dumps({**OURS, **fields}).encode()))


def state(pid: int) -> str:
    """Return the letter that proc_pid_stat(5) has for what a process does: `D`, it waits and no signal ends that."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def alice(laptop: Laptop, tap: None) -> User:
    let_users_in(laptop)
    return User(laptop, 4201)


@pytest.fixture
def bob(laptop: Laptop, alice: User) -> User:
    return User(laptop, 4202)


@pytest.fixture
def mallory(laptop: Laptop, alice: User, bob: User) -> Iterator[Hostile]:
    """Bob's, who has something of his own to lose, too: what others have must be as it was in the end."""
    alice.vmnet("create", "alices")
    laptop.vmnet("create", "roots", "--kind", "veth")
    before = laptop.vmnet("list", "--json").json
    pid = pid_of_server(laptop)
    handles, size = descriptors(pid), memory(pid)
    with Hostile(bob) as hostile:
        yield hostile
    assert wait_until(lambda: descriptors(pid) <= handles + 4, 20)
    assert memory(pid) < size * 1.5
    assert [one for one in laptop.vmnet("list", "--json").json if one["owner"] != 4202] == before
    assert laptop.is_served()
    assert alice.vmnet("create", "more").code == 0
    assert wait_until(lambda: len(processes(laptop)) <= 3, 20), "a fork is left"


# What they may


def test_a_user_makes_sees_and_deletes_guests_of_their_own(laptop: Laptop, alice: User) -> None:
    laptop.vmnet("create", "roots")
    shown = alice.vmnet("create", "mine", "--mtu", "1400", "--mac", "02:00:00:00:00:07", "-v")
    assert shown.out.splitlines()[1].split()[:2] == ["mine", "127.1.0.6"]
    assert any("vmn-mine" in line for line in shown.err.splitlines())
    [info] = [one for one in alice.vmnet("list", "--json").json if one["name"] == "mine"]
    assert (info["owner"], info["state"], info["mtu"], info["kind"]) == (4201, "up", 1400, "tap")
    assert alice.vmnet("show", "mine", "--json").json == info == laptop.vmnet("show", "mine", "--json").json
    assert alice.vmnet("ip", "mine").out == "127.1.0.6\n"
    assert alice.vmnet("create", "mine", "--json").json == [info]
    assert alice.vmnet("create", "mine", "--mtu", "1500", check=False).code == 4
    [link] = json.loads(laptop.run("ip", "-j", "-d", "link", "show", "dev", "vmn-mine"))
    assert link["linkinfo"]["info_data"]["user"] in ("u4201", "4201", 4201)
    assert alice.vmnet("down", "mine", "--dry-run", check=False).code == 10
    assert alice.vmnet("down", "mine", "--json").json == [{**info, "state": "down"}]
    assert "vmn-mine" not in laptop.links()
    assert alice.vmnet("up", "mine", "--json").json == [info]
    assert alice.vmnet("create", "a", "b", "--kind", "tun", "--json").json[1]["mode"] == "native"
    assert alice.vmnet("delete", "mine", "--json").json == {"deleted": ["mine"]}
    assert alice.vmnet("delete", "mine", check=False).code == 3
    assert alice.vmnet("delete", "mine", "--if-exists").code == 0
    assert alice.vmnet("delete", "--all", "--json").json == {"deleted": ["a", "b"]}
    assert [one["name"] for one in laptop.vmnet("list", "--json").json] == ["roots"]


def test_a_namespace_of_theirs_is_handed_over(laptop: Laptop, alice: User, bob: User) -> None:
    holder = alice.start("unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo $$; read end")
    assert holder.stdout is not None
    path = f"/proc/{holder.stdout.readline().strip()}/ns/net"
    [made] = alice.vmnet("create", "web", "--netns", path, "--json").json
    assert (made["netns"], made["kind"], made["mode"], made["state"]) == (path, "veth", "native", "up")
    assert alice.vmnet("create", "web", "--netns", path, "--json").json == [made]
    assert made["address"] in laptop.run("nsenter", f"--net={path}", "ip", "addr")
    assert laptop.vmnet("plan").out == ""
    assert alice.vmnet("list", "--json").json == [made]  # who may not look inside asks the server
    refused = bob.vmnet("create", "other", "--netns", path, check=False)
    assert (refused.code, "cannot be opened" in refused.err) == (6, True)
    holder.communicate("\n")
    assert wait_until(lambda: laptop.vmnet("list", "--json").json[0]["state"] == "down", 10)
    alice.vmnet("delete", "web")


def test_what_is_root_is_roots(laptop: Laptop, alice: User, bob: User) -> None:
    laptop.vmnet("create", "roots")
    laptop.run("ip", "netns", "add", "there")
    alice.vmnet("create", "alices")
    before = laptop.snapshot(), laptop.vmnet("list", "--json").json
    refused = [
        ["delete", "roots"], ["down", "roots"], ["up", "roots"], ["create", "roots"], ["create", "new", "roots"],
        ["delete", "alices", "roots"], ["down", "alices", "roots", "--dry-run"], ["create", "x", "--owner", "0"],
        ["up"], ["down"], ["carve"], ["restore"], ["restore", "--purge"], ["plan"], ["create", "v", "--kind", "veth"],
        ["create", "v", "--netns", "there"], ["create", "v", "--netns", "missing"],
        ["create", "v", "--netns", "/dev/null"], ["create", "v", "--netns", "/proc/self/ns/net"],
        ["create", "v", "--netns", "/proc/self/ns/user"],
        ["exec", "roots", "--", "true"], ["relay", "alices", "80"], ["apply", "/dev/null", "--prune"], ["serve"],
    ]  # fmt: skip
    for call in refused:
        done = alice.vmnet(*call, check=False)
        assert done.code == 6, (call, done)
        assert done.err.startswith("vmnet: "), call
        assert "Traceback" not in done.err
    for verb in ("delete", "down", "up", "create"):
        assert bob.vmnet(verb, "alices", check=False).code == 6
    assert bob.vmnet("delete", "--all", "--json").json == {"deleted": []}
    assert (laptop.snapshot(), laptop.vmnet("list", "--json").json) == before


def test_who_is_no_member_is_told_how_to_become_one(laptop: Laptop, alice: User) -> None:
    stranger = User(laptop, 4203, member=False)
    refused = stranger.vmnet("create", "web", check=False)
    assert refused.code == 6
    assert "membership in the group vmnet" in refused.err
    assert stranger.vmnet("list", check=False).code == 0


def test_a_host_that_is_down_stays_down(laptop: Laptop, alice: User) -> None:
    alice.vmnet("create", "mine")
    laptop.vmnet("down")
    for call in (["create", "web"], ["up", "mine"]):
        refused = alice.vmnet(*call, check=False)
        assert (refused.code, "not carved" in refused.err) == (6, True)
    assert laptop.vmnet("plan", check=False).code == 10
    alice.vmnet("delete", "mine")


def test_a_user_has_so_many_guests_and_no_more(laptop: Laptop, alice: User, bob: User) -> None:
    laptop.path("/etc/vmnet.toml").write_text("user_guests = 2\n")
    alice.vmnet("create", "a", "b")
    refused = alice.vmnet("create", "c", "--json", check=False)
    assert refused.code == 5
    assert "user_guests" in refused.json["error"]["message"]
    assert bob.vmnet("create", "c").code == 0
    laptop.vmnet("create", "d", "--owner", "4201")
    alice.vmnet("delete", "a", "b", "d")
    assert alice.vmnet("create", "a").code == 0


def test_another_state_folder_is_not_asked_for(laptop: Laptop, alice: User) -> None:
    laptop.run("install", "-d", "-o", "4201", "/run/alices")
    for other in ({"VMNET_STATE_DIR": "/run/alices"}, {"VMNET_RUN_DIR": "/run/alices"}):
        refused = alice.vmnet("create", "web", check=False, env=other)
        assert (refused.code, "needs root" in refused.err) == (6, True)
    assert laptop.vmnet("list", "--json").json == []


# What they try


BYTES = st.binary(max_size=200)
FIELDS = st.dictionaries(
    st.sampled_from(["verb", "names", "place", "version", "kind", "mode", "mtu", "netns", "every", "x"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8)
        | st.sampled_from(["create", "delete", "roots"]),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    ),
    max_size=6,
)  # fmt: skip
KINDS = st.lists(
    st.sampled_from(
        ["pipe", "socket", "path", "deleted", "file", "/dev/null", "/dev/zero", "/", "/proc/self/ns/net",
         "/proc/self/ns/user", "/proc/self/ns/mnt", "/proc/self/mem"]
    ),
    max_size=4,
)  # fmt: skip


def test_whatever_is_sent_harms_nobody(laptop: Laptop, mallory: Hostile, capfd: pytest.CaptureFixture[str]) -> None:
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(
        BYTES | BYTES.map(lambda rest: MAGIC + b"\0" + ASK + b"\0" + rest) | FIELDS.map(lambda one: question(**one)),
        KINDS,
    )
    def send(data: bytes, kinds: list[str]) -> None:
        said = mallory.send(data or b"\0", *kinds).removeprefix(b"b")
        assert not said or said == b"d" or b'"guests"' in said or json.loads(said)["error"]["code"] in range(1, 8)

    send()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "socket", "path", "deleted", "file", "/dev/null", "/", "/proc/self/ns/user",
                                  "/proc/self/ns/net", "/run/netns/roots"])  # fmt: skip
def test_a_descriptor_of_another_kind_is_no_namespace(mallory: Hostile, kind: str) -> None:
    said = mallory.send(question(verb="create", names=["v"], netns=True), kind)
    assert json.loads(said.removeprefix(b"b"))["error"]["code"] == 6
    said = mallory.send(question(verb="create", names=["v"], netns=True))
    assert json.loads(said.removeprefix(b"b"))["error"]["code"] == 2
    said = mallory.send(question(verb="create", names=["v"]), kind)
    assert json.loads(said.removeprefix(b"b"))["error"]["code"] == 2
    assert mallory.send(question(verb="create", names=["v"], netns=True), *[kind] * 20) in (
        b"",
        b"<ConnectionResetError>",
    )


def test_a_crowd_of_connections_keeps_nobody_else_out(laptop: Laptop, alice: User, mallory: Hostile) -> None:
    assert mallory.do("crowd", count=1000, data="") == {"let in": 32}
    assert laptop.is_served()
    assert alice.vmnet("list").code == 0
    assert alice.vmnet("create", "now").code == 0
    alice.vmnet("delete", "now")
    time.sleep(6)
    assert mallory.do("crowd", count=1, data="") == {"let in": 1}  # those that said nothing were let go
    mallory.do("leave")


def test_a_crowd_of_questions_waits_for_its_turn(laptop: Laptop, alice: User, mallory: Hostile) -> None:
    with host_locked(laptop):
        assert mallory.do("crowd", count=300, data=question(verb="create", names=["bobs"]).hex())["let in"] <= 32
        assert len(processes(laptop)) <= 1 + 4 + 2 + 1  # the server, four forks of his, two that wait
        assert laptop.is_served()
        assert mallory.do("leave") <= 300
    assert wait_until(lambda: len(processes(laptop)) <= 3, 20)
    User(laptop, 4202).vmnet("delete", "bobs", "--if-exists")


@pytest.mark.parametrize("after", [0.0, 0.002, 0.01, 0.03])
def test_one_that_dies_while_it_asks(laptop: Laptop, mallory: Hostile, after: float) -> None:
    for number in range(5):
        name = f"d{number}"
        assert mallory.do("die", data=question(verb="create", names=[name]).hex(), after=after) == signal.SIGKILL
        assert wait_until(lambda: len(processes(laptop)) <= 3, 20)
        # It was made, or it was not: in no case is anything half there.
        assert laptop.vmnet("plan").out == ""
    User(laptop, 4202).vmnet("delete", "--all")


def test_one_that_never_reads_its_answer(laptop: Laptop, mallory: Hostile) -> None:
    names = [f"n{number}" for number in range(60)]
    mallory.send(question(verb="create", names=names))
    for _ in range(8):
        mallory.do("never read", data=question(verb="look", names=[], every=True).hex())
    assert laptop.is_served()
    assert wait_until(lambda: len(processes(laptop)) <= 3, 30)
    mallory.do("leave")
    User(laptop, 4202).vmnet("delete", "--all")


def test_ends_at_once_are_taken_note_of(laptop: Laptop, mallory: Hostile) -> None:
    pid = pid_of_server(laptop)
    assert mallory.do("come and go", times=600) > 500
    assert pid_of_server(laptop) == pid


def test_a_socket_that_lingers_keeps_nobody_waiting(laptop: Laptop, mallory: Hostile) -> None:
    laptop.run("ip", "link", "set", "lo", "up")
    mallory.do("crowd", count=32, data="")
    mallory.do("linger", seconds=60)
    command = laptop.start(*laptop.call, "list")
    assert command.communicate(timeout=20)[1] == ""
    mallory.do("leave")


def test_a_fork_that_cannot_be_killed_is_given_up(laptop: Laptop, alice: User, bob: User) -> None:
    if reason := why_no_fuse():
        pytest.skip(reason)
    kill_server(laptop)
    python, *_, main = laptop.client
    hurried = "from vmnet.server import loop; loop._LONGEST_ANSWER = 1.0; from vmnet.cli import main; main()"
    code = f"import sys; sys.path.insert(0, sys.argv.pop(1).removesuffix('/vmnet/__main__.py')); {hurried}"
    server = laptop.start(python, "-c", code, main, "serve")
    assert server.stderr
    assert "serving" in server.stderr.readline()
    with stuck_file(laptop, "/run/stuck") as path, Hostile(bob) as hostile:
        said = hostile.send(question(verb="create", names=["v"], netns=True), path, patience=3.0)
        assert said == b"b<TimeoutError>"
        [stuck] = [pid for pid in processes(laptop) if state(pid) == "D"]
        assert alice.vmnet("create", "mine").code == 0
        assert laptop.is_served()
        os.kill(pid_of_server(laptop), signal.SIGTERM)
        assert server.wait(10) == 0
        assert state(stuck) == "D"
    assert wait_until(lambda: not processes(laptop), 5)
    assert [one["name"] for one in laptop.vmnet("list", "--json").json] == ["mine"]


def test_who_has_no_account_is_nobody(laptop: Laptop, alice: User) -> None:
    subordinate = User(laptop, 100_000)
    refused = subordinate.vmnet("create", "web", check=False)
    assert (refused.code, "needs root" in refused.err) == (6, True)


def test_half_a_question_is_none(mallory: Hostile) -> None:
    whole = question(verb="create", names=["v"])
    said = bytes.fromhex(mallory.do("in pieces", pieces=[whole[:20].hex(), whole[20:].hex()]))
    assert said.startswith(b'b{"error": {"code": 2')
    assert mallory.send(whole[:-1]).startswith(b'b{"error": {"code": 2')


def test_the_place_of_the_socket_is_roots(laptop: Laptop, mallory: Hostile) -> None:
    assert mallory.do("spoil") == []


def test_no_user_is_given_roots_way(laptop: Laptop, mallory: Hostile) -> None:
    order = b"\0".join((MAGIC, b"run", b"1:2:3", b"2", b"delete", b"roots", b"PATH=/bin"))
    assert mallory.send(order, "/dev/null", "/dev/null", "/dev/null", "/") in (b"", b"<ConnectionResetError>")


def test_a_server_that_dies_at_it_is_told(laptop: Laptop, alice: User) -> None:
    with host_locked(laptop):
        before = set(processes(laptop))
        command = alice.start(*laptop.call, "create", "mine")
        assert wait_until(lambda: len(set(processes(laptop)) - before) >= 2, 10)
        time.sleep(0.5)
        for pid in [pid_of_server(laptop)]:
            os.kill(pid, signal.SIGKILL)
        out, err = command.communicate(timeout=20)
        assert command.returncode == 1, (out, err)
        assert err.startswith("vmnet: the server ended before this was done")
        assert wait_until(lambda: not processes(laptop), 5)
    laptop.start_server()
    laptop.vmnet("up")
    assert alice.vmnet("create", "mine", "--json").json[0]["state"] == "up"
    assert Path("/proc", str(pid_of_server(laptop))).exists()
