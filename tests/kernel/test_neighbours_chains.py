"""Rules of ours in chains that other firewalls offer: they come, are missed, come again, and go."""

import re
import sys

import pytest

from tests.kernel.machine import wait_until
from tests.kernel.net import Lab, Laptop
from tests.kernel.warm import Warm
from tests.kernel.watching import NEVER, Watching

FOUND = 10
PATIENCE = 15.0
PROGRAMS = ("iptables-nft", "iptables-legacy")
THEIRS = (
    "*filter\n:DOCKER-USER - [0:0]\n:FORWARD DROP [0:0]\n-A FORWARD -j DOCKER-USER\n-A DOCKER-USER -j RETURN\nCOMMIT\n"
)


@pytest.fixture(params=PROGRAMS)
def program(laptop: Laptop, request: pytest.FixtureRequest) -> str:
    """Docker's chain, in each kind of iptables."""
    name = str(request.param)
    if laptop.execute(f"{name}-restore", stdin=THEIRS).code:
        pytest.skip(f"needs {name}, and a kernel that has its tables")
    return name


def chain(laptop: Laptop, program: str) -> list[str]:
    return laptop.run(program, "-S", "DOCKER-USER").splitlines()[1:]


def test_all_that_somebody_does_to_them_is_drift(laptop: Laptop, warm: Warm, program: str) -> None:
    theirs = chain(laptop, program)
    warm.vmnet(laptop, "carve")
    right = chain(laptop, program)
    assert right[-1:] == theirs
    assert len(right) > len(theirs)
    for deed in (
        ["-F", "DOCKER-USER"],
        ["-D", "DOCKER-USER", "1"],
        ["-D", "DOCKER-USER", "3"],
        ["-A", "DOCKER-USER", "-i", "vmn-+", "-m", "comment", "--comment", "vmnet", "-j", "DROP"],
        ["-R", "DOCKER-USER", "1", "-o", "vmn-+", "-m", "comment", "--comment", "vmnet", "-j", "DROP"],
    ):
        laptop.run(program, *deed)
        plan = warm.vmnet(laptop, "plan", check=False)
        assert plan.code == FOUND
        assert f"DOCKER-USER of {program}" in plan.out
        warm.vmnet(laptop, "up")
        assert [rule for rule in chain(laptop, program) if "vmnet" in rule] == right[:-1]
        assert warm.vmnet(laptop, "plan").out == ""


def test_rules_of_others_stay_where_they_are(laptop: Laptop, warm: Warm, program: str) -> None:
    """Also before ours, where whoever wants to restrict guests puts them, and with a comment that names us."""
    comment = ["-m", "comment", "--comment", "not vmnet at all"]
    warm.vmnet(laptop, "carve")
    laptop.run(program, "-I", "DOCKER-USER", "-i", "vmn-+", "-d", "10.0.0.0/8", *comment, "-j", "DROP")
    laptop.run(
        program, "-I", "DOCKER-USER", "4", "-i", "wlan0", "-m", "comment", "--comment", "vmnet-like", "-j", "DROP"
    )
    before = chain(laptop, program)
    assert warm.vmnet(laptop, "plan").out == ""
    warm.vmnet(laptop, "up")
    assert chain(laptop, program) == before
    warm.vmnet(laptop, "restore")
    left = chain(laptop, program)
    assert [rule.rpartition(" ")[2] for rule in left] == ["DROP", "DROP", "RETURN"]


def test_a_bridge_that_comes_is_closed_and_one_that_goes_is_forgotten(laptop: Laptop, warm: Warm, program: str) -> None:
    warm.vmnet(laptop, "carve")
    laptop.ip("link add mynet type bridge", "link add br-1a2b3c type bridge")
    assert warm.vmnet(laptop, "plan", check=False).code == FOUND
    warm.vmnet(laptop, "up")
    [rule] = [rule for rule in chain(laptop, program) if " mynet " in rule]
    assert rule.endswith("-j RETURN")
    laptop.ip("link set mynet up", "addr add 10.77.0.2/24 dev mynet", "route replace default via 10.77.0.1 dev mynet")
    warm.vmnet(laptop, "up")
    assert not [rule for rule in chain(laptop, program) if " mynet " in rule]
    laptop.ip("link del mynet")
    assert warm.vmnet(laptop, "plan").out == ""


LEADS_OUT = {
    "a default route": (["route add default via 10.77.0.1 dev mine metric 5"], ["route del default dev mine"]),
    "one of another table": (["route add default via 10.77.0.1 dev mine table 77"], ["route flush table 77"]),
    "one over two": (
        ["route add default metric 5 nexthop via 10.77.0.1 dev mine nexthop via 192.168.77.1 dev wlan0"],
        ["route del default metric 5"],
    ),
    "one of a nexthop": (
        ["nexthop add id 7 via 10.77.0.1 dev mine", "route add default nhid 7 metric 5"], ["nexthop del id 7"],
    ),
}  # fmt: skip
# Cards that a namespace can have; many kernels have no such kinds.
LEADS_OUT |= {
    kind: ([f"link add {words} type {kind} {more}", "link set card master mine"], ["link del card"])
    for kind, words, more in (("vlan", "link wlan0 name card", "id 7"), ("bond", "card", ""))
}


@pytest.mark.parametrize("sense", [None, "deaf"], ids=["by event", "without events"])
def test_a_bridge_that_leads_out_is_opened_by_itself_and_closed_again(
    laptop: Laptop, warm: Warm, sense: str | None
) -> None:
    laptop.run("iptables-nft-restore", stdin=THEIRS)
    laptop.ip("link add mine type bridge", "link set mine up", "addr add 10.77.0.2/24 dev mine")
    warm.vmnet(laptop, "carve")

    def is_closed() -> bool:
        return any(" mine " in rule for rule in chain(laptop, "iptables-nft"))

    assert is_closed()
    for name, (open_it, close_it) in LEADS_OUT.items():
        if name in ("vlan", "bond") and laptop.execute("ip", *open_it[0].split()).code:
            continue
        laptop.ip("link del card", check=False)
        # A new one each time: what is undone again and again it would leave alone.
        with Watching(laptop, interval=NEVER if sense is None else 0.5, sense=sense):
            laptop.ip(*open_it)
            assert wait_until(lambda: not is_closed(), PATIENCE), name
            laptop.ip(*close_it)
            assert wait_until(is_closed, PATIENCE), name


def test_a_chain_that_comes_later_is_found_by_the_next_look(laptop: Laptop, warm: Warm) -> None:
    warm.vmnet(laptop, "carve")
    for name in PROGRAMS:
        if laptop.execute(f"{name}-restore", stdin=THEIRS).code == 0:
            assert f"DOCKER-USER of {name}" in warm.vmnet(laptop, "plan", check=False).out
    warm.vmnet(laptop, "up")
    assert warm.vmnet(laptop, "plan").out == ""


def test_a_dry_run_prints_what_a_person_could_type(laptop: Laptop, warm: Warm, program: str) -> None:
    shown = warm.vmnet(laptop, "carve", "--dry-run", "-v", check=False).out
    assert chain(laptop, program) == ["-A DOCKER-USER -j RETURN"]
    start = shown.index(f"{program}-restore")
    command = shown[start : shown.index("END\n", start + len(program) + 40)] + "END\n"
    laptop.run("sh", "-ec", command)
    typed = chain(laptop, program)
    warm.vmnet(laptop, "carve")
    assert chain(laptop, program) == typed


PUT = """
import sys
from vmnet.linux import iptables
from vmnet.ops import PutRules
program, old, new = sys.argv[1:]
iptables.put(PutRules(program, "DOCKER-USER", tuple(old.split(",")) if old else (), (new,)))
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("-i gone -m comment --comment vmnet -j DROP", "-j ACCEPT", ""),
        ("", "-m nonsense -j ACCEPT", "refused our rules in DOCKER-USER"),
    ],
    ids=["stale", "wrong"],
)
def test_a_plan_that_others_have_overtaken_is_left_and_a_wrong_one_is_refused(
    laptop: Laptop, program: str, old: str, new: str, said: str
) -> None:
    before = chain(laptop, program)
    done = laptop.execute(sys.executable, "-c", PUT, program, old, new)
    assert said in done.err
    assert (done.code == 0) == (not said)
    assert chain(laptop, program) == before


def test_commands_and_a_firewall_that_reloads_all_the_time_come_to_an_end(
    laptop: Laptop, warm: Warm, program: str
) -> None:
    warm.vmnet(laptop, "create", "web", "--kind", "veth")
    reload = f"for i in $(seq 60); do {program} -F DOCKER-USER; {program} -A DOCKER-USER -j RETURN; done"
    reloading = laptop.start("sh", "-c", reload)
    while reloading.poll() is None:
        done = warm.vmnet(laptop, "up", check=False)
        assert done.code in (0, 1)
        assert done.code == 0 or "does not stay as it is set" in done.err
    warm.vmnet(laptop, "up")
    assert warm.vmnet(laptop, "plan").out == ""


def test_without_such_chains_no_program_is_started(lab: Lab, warm: Warm) -> None:
    """Each command looks: on most hosts that must cost next to nothing."""
    laptop = lab.laptop
    warm.vmnet(laptop, "carve")

    def programs() -> set[str]:
        trace = laptop.folder / "trace"
        warm.vmnet(laptop, "plan", check=False, strace=["-f", "-e", "trace=execve", "-o", str(trace)])
        return set(re.findall(r'execve\("[^"]*/([^"/]+)"', trace.read_text()))

    laptop.run("nft", "add", "table", "ip", "somebodys")
    assert programs() == {"nft"}
    assert programs() == set()  # nothing has changed since
    laptop.run("iptables-nft-restore", stdin=THEIRS)
    assert programs() == {"nft", "iptables-nft-save"}
    assert programs() == set()
