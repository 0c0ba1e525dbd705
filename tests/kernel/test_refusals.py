"""Bad words and bad hosts: one clear sentence, the right exit code, and nothing changed, lost or left behind."""

import fcntl
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.machine import wait_until
from tests.kernel.net import Laptop, Result
from tests.kernel.warm import Warm
from vmnet.store import Store

Run = Callable[..., Result]


def settle(laptop: Laptop) -> None:
    """Wait for what a new device still does by itself, so that two looks do not differ by that."""
    assert wait_until(lambda: not re.search("tentative|LOWERLAYERDOWN", laptop.run("ip", "addr")))


@pytest.fixture
def run(warm: Warm, laptop: Laptop) -> Run:
    """Run vmnet in the laptop, as `laptop.vmnet` does, without waiting for Python's start."""
    settle(laptop)

    def run_(*args: str, check: bool = True, strace: tuple[str, ...] = ()) -> Result:
        return warm.vmnet(laptop, *args, check=check, strace=strace)

    return run_


def is_refused(result: Result, code: int, *words: str) -> None:
    """Check a refusal: its exit code, one sentence that has `words` in it, at most one hint, and no data."""
    shown = result.err if len(result.err) < 3000 else result.err[:3000]
    assert (result.code, result.out) == (code, ""), shown
    lines = [line for line in result.err.splitlines() if not line.startswith("vmnet: warning: ")]
    assert lines, "nothing is said"
    assert lines[0].startswith("vmnet: "), shown
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), shown
    assert all(word in lines[0] for word in words), shown
    assert result.err.replace("\n", " ").isprintable()
    assert len(result.err) < 4000


def state_folder(laptop: Laptop) -> Path:
    return Path(laptop.env["VMNET_STATE_DIR"])


def records(laptop: Laptop) -> tuple[Any, ...]:
    """Return what is recorded: all leases, and whether the host part is to be up."""
    with Store.open(state_folder(laptop), write=False) as store:
        host = store.host()
        return store.leases(), host is not None and host.wish == "up"


def survey(laptop: Laptop) -> list[str]:
    """Return what there is in the laptop's network, as `Laptop.snapshot` does, but in one go."""
    shown = (
        "-d link",
        "addr",
        "route show table all",
        "-6 route show table all",
        "rule",
        "neigh show nud permanent",
        "netns",
    )
    lines = "; ".join(f"ip {words}" for words in shown)
    conf = "grep -r . /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf /proc/sys/net/ipv4/ip_forward 2>&1"
    return laptop.run("sh", "-c", f"{lines}; tc qdisc; nft list ruleset; {conf}; cat {laptop.hosts_file}").splitlines()


@contextmanager
def unchanged(laptop: Laptop) -> Iterator[None]:
    """Check that the block leaves the laptop's network and the records as they are."""
    before, recorded = survey(laptop), records(laptop)
    yield
    assert survey(laptop) == before
    assert records(laptop) == recorded


# Bad words

NAMES = [
    "", " ", "-", "A", "a_b", "a b", "..", "../a", "a/b", "a;b", "$(id)", "`id`", "'", '"', "a\nb", "\x1b[2J",
    "größe", "\udcff", "a\tb", "x" * 64, "x" * 65536, "--",
]  # fmt: skip
NAMESPACES = [
    "", ".", "..", "a/b", "../a", "a\nb", "\x1b[2J", "\udcff", "x" * 256, "ä" * 128, "/run/netns/..",
    "/" + "x" * 5000, "/a\nb",
]  # fmt: skip
NO_NAMESPACES = [
    "/", "/nope", "/run/netns", "/run/netns/", "/run/netns/a/b", "/run/netns/../a", "/run/netns-a/b", "/etc/passwd",
    "/etc", "/proc/self/ns/mnt", "/proc/99999999/ns/net",
]  # fmt: skip
ADDRESSES = [
    "", "x", "127.1.0", "127.1.0.2/30", "127.001.0.2", "0x7f010002", "2130771970", "1２7.1.0.2", " 127.1.0.2",
    "127.1.0.2;", "x" * 65536,
]  # fmt: skip
OUTSIDE = [
    "10.0.0.2", "127.0.0.2", "127.0.255.254", "127.64.0.2", "126.255.255.254", "247.1.0.6", "0.0.0.0",
    "255.255.255.255", "::1",
]  # fmt: skip
MACS = [
    "", "x", "02:00:00:00:00", "02:00:00:00:00:00:01", "01:00:5e:00:00:01", "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff",
    "02-00-00-00-00-01", "2:0:0:0:0:1", "0200.0000.0001", "02:00:00:00:00:0g", "x" * 65536,
]  # fmt: skip
NUMBERS = ["-1", "0", "", "1e3", "0x5dc", "x", "1500;", "99999999999999999999", "x" * 65536]
OWNERS = ["", "no-such-user", "-1", "4294967295", "99999999999", "root\n", "٣", "9" * 5000, "x" * 65536]

BAD: list[tuple[int, list[str], str]] = [
    *[(2, ["create", "--", name], "is not a guest name") for name in NAMES],
    *[(2, [command, "A"], "'A' is not a guest name") for command in ("delete", "show", "ip", "up", "down")],
    *[(2, [command, "a;b", "x"], "'a;b' is not a guest name") for command in ("delete", "up", "exec")],
    *[(3, [command, "nope"], "there is no guest nope") for command in ("delete", "show", "ip", "up", "down")],
    *[(3, [command, "web", "nope"], "there is no guest nope") for command in ("delete", "up", "down")],
    *[(2, ["create", "new", "--netns", netns], "names no network namespace") for netns in NAMESPACES],
    *[(4, ["create", "new", "--netns", path], f"there is no network namespace at {path}") for path in NO_NAMESPACES],
    (4, ["create", "new", "--netns", "/proc/self/ns/net"], "is the host's own network namespace"),
    *[(2, ["create", "new", "--address", address], "is not an IP address") for address in ADDRESSES],
    *[(2, ["create", "new", "--address", address], f"{address} is not in the pool") for address in OUTSIDE],
    *[(2, ["create", "new", "--address", f"127.9.0.{last}"], "is not an address for a guest") for last in (0, 1, 3, 4)],
    (4, ["create", "new", "--address", "127.1.0.2"], "127.1.0.2 is held by web"),
    *[(2, ["create", "new", "--mac", mac], "is not the MAC of one device") for mac in MACS],
    *[(2, ["create", "new", "--mtu", number], "--mtu") for number in [*NUMBERS, "575", "65536"]],
    *[(2, ["create", "new", "--queues", number], "--queues") for number in [*NUMBERS, "257"]],
    *[(2, ["create", "new", "--owner", owner], "there is no user") for owner in OWNERS],
    *[(2, ["create", "new", "--kind", kind], "Invalid value for '--kind'") for kind in ("", "bridge", "TAP")],
    (2, ["create", "new", "--native"], "a tap is always mapped"),
    (2, ["create", "new", "--kind", "tap", "--native"], "a tap is always mapped"),
    (2, ["create", "new", "--kind", "veth", "--native", "--mapped"], "--native and --mapped exclude each other"),
    (2, ["create", "new", "--kind", "tap", "--netns", "there"], "a tap is in no network namespace"),
    (2, ["create", "new", "--kind", "tun", "--netns", "there"], "a tun is in no network namespace"),
    (2, ["create", "new", "--kind", "tun", "--mac", "02:00:00:00:00:01"], "a tun has no MAC"),
    (2, ["create", "new", "--kind", "veth", "--queues", "2"], "a veth has one queue"),
    (2, ["create", "new", "--kind", "tun", "--queues", "2"], "a tun has one queue"),
    (2, ["create", "a", "b", "--address", "127.9.0.2"], "--address is for one guest, not for 2"),
    (2, ["create", "a", "b", "--mac", "02:00:00:00:00:01"], "--mac is for one guest, not for 2"),
    (2, ["create", "a", "b", "c", "--netns", "there"], "--netns is for one guest, not for 3"),
    (2, ["create", "new", "new"], "new is named twice"),
    (2, ["create"], "Missing argument"),
    (2, ["create", "new", "--adress", "127.9.0.2"], "No such option"),
    (2, ["create", "new", "--mtu"], "requires an argument"),
    (2, ["delete"], "give names or --all"),
    (2, ["delete", "web", "--all"], "give names or --all"),
    (2, ["delete", "--if-exists"], "give names or --all"),
    (2, ["list", "web"], "unexpected extra argument"),
    (2, ["restore", "--prune"], "No such option"),
    (2, ["x" * 65536], "No such command"),
    (2, ["\x1b[2J"], r"No such command '\x1b[2J'"),
]  # fmt: skip


def test_bad_words_are_refused_by_name_and_change_nothing(laptop: Laptop, run: Run) -> None:
    run("create", "web", "--kind", "veth")
    told = set()
    with unchanged(laptop):
        for code, args, words in BAD:
            is_refused(run(*args, check=False), code, words)
            if words not in told and args[0] != "exec" and "--" not in args and args[-1] != "--mtu":
                error = run(*args, "--json", check=False).json["error"]
                assert (error["code"], words in error["message"]) == (code, True), args
            told.add(words)
    assert set(laptop.links()) == {"lo", "wlan0", "vmn-web"}


def test_bad_words_leave_a_fresh_host_alone(laptop: Laptop, run: Run) -> None:
    with unchanged(laptop):
        for args in (
            ["create", "A"],
            ["create", "a", "--address", "10.0.0.1"],
            ["create", "a", "--address", "127.1.0.1"],
            ["create", "a", "--netns", "/nope"],
            ["create", "a", "--native"],
            ["up", "nope"],
            ["delete", "nope"],
        ):
            is_refused(run(*args, check=False), 3 if "nope" in args else 4 if "/nope" in args else 2)


BAD_SETTINGS = [
    (b'domian = "x"', "there is no setting 'domian'"),
    (b"mtu = 70000", "mtu = 70000 is not a number from 576 to 65535"),
    (b"mtu =", "is not TOML"),
    (b"\xff", "is not TOML"),
    (b'pool = ["10.0.0.0/8"]', "pool: 10.0.0.0/8 cannot be in the pool"),
    (b'reserved = ["127.1.0.1/8"]', "reserved: '127.1.0.1/8' is not an IPv4 network"),
]


def test_bad_settings_are_named_by_every_command(laptop: Laptop, run: Run) -> None:
    run("create", "web", "--kind", "veth")
    config = Path(laptop.env["VMNET_CONFIG"])
    with unchanged(laptop):
        for content, words in BAD_SETTINGS:
            config.write_bytes(content)
            is_refused(run("list", check=False), 2, str(config), words)
        for args in (
            ["create", "a"],
            ["delete", "web"],
            ["ip", "web"],
            ["up"],
            ["down"],
            ["restore"],
            ["plan"],
            ["carve"],
        ):
            is_refused(run(*args, check=False), 2, str(config))
        config.unlink()
        config.mkdir()
        is_refused(run("list", check=False), 2, f"{config} cannot be read: Is a directory")
        config.rmdir()
    assert run("plan").out == ""


def test_an_exhausted_pool_says_so(laptop: Laptop, run: Run) -> None:
    Path(laptop.env["VMNET_CONFIG"]).write_text('pool = ["127.1.0.0/29"]\nreserved = ["127.1.0.1"]\n')
    run("create", "a", "--kind", "veth")
    with unchanged(laptop):
        is_refused(run("create", "b", "--kind", "veth", check=False), 5, "the pool has 0 free blocks")
        is_refused(
            run("create", "b", "--kind", "veth", "--address", "127.1.0.2", check=False), 4, "127.1.0.2 is reserved"
        )
    assert run("ip", "a").out == "127.1.0.6\n"


# Rights


def test_root_of_another_user_namespace_is_not_root_here(laptop: Laptop, run: Run) -> None:
    def elsewhere(*args: str) -> Result:
        return laptop.execute("unshare", "--user", "--map-root-user", sys.executable, "-m", "vmnet", *args)

    [made] = run("create", "web", "--kind", "veth", "--json").json
    with unchanged(laptop):
        assert elsewhere("list", "--json").json == [made]
        assert elsewhere("ip", "web").out == f"{made['address']}\n"
        for args in (["create", "a"], ["up"], ["restore"], ["exec", "web", "--", "true"]):
            is_refused(elsewhere(*args), 6, "CAP_NET_ADMIN", "over this network namespace")


def test_root_without_the_capabilities_is_not_enough(laptop: Laptop, run: Run) -> None:
    run("create", "web", "--kind", "veth")
    for capability in ("net_admin", "sys_admin"):
        less = ["setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}", sys.executable, "-m", "vmnet"]
        with unchanged(laptop):
            is_refused(laptop.execute(*less, "create", "a"), 6, "CAP_NET_ADMIN and CAP_SYS_ADMIN")
        assert laptop.execute(*less, "ip", "web").code == 0


def test_records_of_another_host_namespace_are_not_touched(laptop: Laptop, run: Run) -> None:
    run("create", "web", "--kind", "veth")
    with unchanged(laptop):
        for args in (
            ["list"],
            ["ip", "web"],
            ["create", "a"],
            ["up"],
            ["delete", "web"],
            ["restore"],
            ["restore", "--purge"],
        ):
            elsewhere = laptop.execute("unshare", "--net", sys.executable, "-m", "vmnet", *args)
            is_refused(elsewhere, 4, f"the records in {state_folder(laptop)} belong to another network namespace")
            assert "VMNET_STATE_DIR" in elsewhere.err
    assert run("plan").out == ""


# What a host may lack


@contextmanager
def without(laptop: Laptop, path: str) -> Iterator[None]:
    """Hide a file or folder in the laptop's own mounts."""
    if laptop.path(path).is_dir():
        laptop.run("mount", "-t", "tmpfs", "tmpfs", path)
    else:
        laptop.run("mount", "--bind", "/dev/null", path)
    yield
    laptop.run("umount", path)


def test_without_nft_nothing_begins_and_looking_still_works(laptop: Laptop, run: Run) -> None:
    nft = os.path.realpath(shutil.which("nft", path="/usr/sbin:/usr/bin:/sbin:/bin") or "")
    with unchanged(laptop), without(laptop, nft):
        for args in (["create", "web", "--kind", "veth"], ["carve"], ["up"], ["plan"], ["create", "web", "--dry-run"]):
            refused = run(*args, check=False)
            is_refused(refused, 7, "the program nft is missing")
            assert "apt-get install nftables" in refused.err
    [made] = run("create", "web", "--kind", "veth", "--json").json
    with unchanged(laptop), without(laptop, nft):
        is_refused(run("create", "more", "--kind", "veth", check=False), 7, "nft is missing")
        is_refused(run("up", check=False), 7, "nft is missing")
        listed = run("list", "--json")
        assert listed.json == [{**made, "state": "degraded"}]
        assert listed.err == "vmnet: warning: the program nft is missing: the host part cannot be seen whole\n"
        assert run("ip", "web") == Result(0, "127.1.0.2\n", "")
    assert run("show", "web", "--json").json == made


def test_without_tun_a_tap_is_refused_and_a_veth_is_not(laptop: Laptop, run: Run, tap: None) -> None:
    with unchanged(laptop), without(laptop, "/dev/net"):
        for kind in ("tap", "tun"):
            refused = run("create", "vm", "--kind", kind, check=False)
            is_refused(refused, 7, "/dev/net/tun is missing")
            assert "modprobe tun" in refused.err
    run("create", "web", "--kind", "veth")
    with unchanged(laptop), without(laptop, "/dev/net"):
        is_refused(run("create", "vm", "more", check=False), 7, "/dev/net/tun is missing")
    run("create", "vm")


SYNPROXY = "table ip vmnet { chain raw { tcp flags syn synproxy mss 1400; }; }\n"
# Ask a real kernel for something that it lacks, in place of what vmnet asks for: it refuses in its own way.
LACKING = {
    "veth": (
        "wire.veth_peer = lambda *a, _=wire.veth_peer: _(*a).replace(b'veth', b'vexx')",
        (7, "the kernel lacks veth (CONFIG_VETH)"),
    ),
    "clsact": (
        "wire.clsact = lambda *a, _=wire.clsact: _(*a).replace(b'clsact', b'nosuch')",
        (7, "the kernel lacks clsact (CONFIG_NET_SCH_INGRESS)"),
    ),
    "bpf": (
        "wire.filter_program = lambda *a, _=wire.filter_program: _(*a).replace(b'bpf', b'bpx')",
        (7, "the kernel lacks BPF filters of tc (CONFIG_NET_CLS_BPF)"),
    ),
    # A program that does not end in a return is none: the kernel's own check refuses it.
    "program": (
        "wire.filter_program = lambda *a, _=wire.filter_program: _(*a).replace(bytes([6, 0, 0, 0, 2]), bytes(5))",
        (1, "the kernel refused `tc filter replace dev vmn-web"),
    ),
    # synproxy is for input and forward alone: every kernel refuses it in prerouting.
    "nft": (
        f"rules.render = lambda *a, _=rules.render, **k: _(*a, **k) + {SYNPROXY!r}",
        (7, "the kernel lacks a feature that the ruleset needs"),
    ),
}
DRIVER = "import sys; from vmnet import rules; from vmnet.linux import wire; {}; from vmnet.cli import main; main()"


@pytest.mark.parametrize("feature", LACKING)
def test_what_the_kernel_lacks_is_told_and_nothing_stays(laptop: Laptop, run: Run, feature: str) -> None:
    patch, (code, words) = LACKING[feature]

    def lacking(*args: str) -> Result:
        return laptop.execute(sys.executable, "-c", DRIVER.format(patch), *args)

    with unchanged(laptop):
        is_refused(lacking("create", "web", "--kind", "veth"), code, words)
    run("create", "a", "--kind", "veth")
    if feature != "nft":
        with unchanged(laptop):
            is_refused(lacking("create", "web", "more", "--kind", "veth"), code, words)
    assert run("list", "--json").json[0]["state"] == "up"


def test_a_value_that_only_the_kernel_refuses_is_told_in_its_words(laptop: Laptop, run: Run, tap: None) -> None:
    with unchanged(laptop):
        refused = run("create", "vm", "--mtu", "65535", check=False)
        is_refused(refused, 1, "the kernel refused `ip link set vmn-vm", "mtu greater than device maximum")


# What is traced, which error each call gets in its turn, what is said then, the kind of guest, and how many calls are
# passed over for speed.
FAULTS = {
    "sendto": (["-e", "trace=sendto"], "ENOBUFS", "No buffer space available", "veth", 6),
    "recvfrom": (["-e", "trace=recvfrom"], "ENOMEM", "Cannot allocate memory", "veth", 6),
    "unshare": (["-e", "trace=unshare"], "ENOSPC", "No space left on device", "veth", 1),
    "mount": (["-e", "trace=mount"], "EPERM", "Operation not permitted", "veth", 1),
    "tun": (["-e", "trace=openat,ioctl", "-P", "/dev/net/tun"], "EIO", "Input/output error", "tap", 1),
}


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize("fault", FAULTS)
def test_no_call_that_fails_leaves_anything_half_done(
    laptop: Laptop, run: Run, tap: None, request: pytest.FixtureRequest, fault: str
) -> None:
    """Let one system call after the other of a first create fail: all or nothing is there, and it is said."""
    traced, error, words, kind, step = FAULTS[fault]
    before, log = survey(laptop), laptop.folder / "calls"
    said, done = "", Result(0, "", "")
    for number in range(1, 1000, 1 if request.config.getoption("--long") else step):
        calls = traced[1].removeprefix("trace=")
        inject = ("-o", str(log), *traced, "-e", f"inject={calls}:error={error}:when={number}")
        done = run("create", "web", "--kind", kind, check=False, strace=inject)
        if "(INJECTED)" not in log.read_text():
            break
        if done.code:
            said += done.err
            is_refused(done, 1, words)
        if records(laptop)[0]:
            # Where it failed all was done, and only looked at: the next look finds nothing to do.
            assert run("plan", check=False) == Result(0, "", ""), number
            run("delete", "web")
            run("restore")
        assert survey(laptop) == before, number
    assert said
    assert done.code == 0
    # What was refused is said as a command, where it was one.
    assert fault not in ("sendto", "tun") or "the kernel refused `ip " in said


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_a_tun_that_may_not_be_used_is_a_right_that_is_missing(laptop: Laptop, run: Run, tap: None) -> None:
    denied = ("-o", "/dev/null", "-e", "trace=openat", "-P", "/dev/net/tun", "-e", "inject=openat:error=EPERM")
    with unchanged(laptop):
        is_refused(run("create", "vm", check=False, strace=denied), 6, "/dev/net/tun may not be used: Operation not")


# Namespaces that come and go


def test_a_namespace_that_is_gone_is_told_and_an_own_one_made_anew(laptop: Laptop, run: Run) -> None:
    laptop.run("ip", "netns", "add", "there")
    run("create", "own", "--kind", "veth")
    run("create", "guest", "--netns", "there")
    run("create", "last", "--kind", "veth")
    laptop.run("ip", "netns", "del", "there")
    laptop.run("ip", "netns", "del", "own")
    assert wait_until(lambda: not laptop.links() & {"vmn-own", "vmn-guest"})
    is_refused(run("exec", "guest", "--", "true", check=False), 4, "guest is down")
    is_refused(run("up", check=False), 4, "the network namespace /run/netns/there of guest is gone")
    assert {info["name"]: info["state"] for info in run("list", "--json").json} == {
        "own": "up",
        "guest": "down",
        "last": "up",
    }
    is_refused(
        run("create", "guest", "--netns", "there", check=False), 4, "there is no network namespace at /run/netns/there"
    )
    is_refused(run("create", "guest", check=False), 4, "the network namespace /run/netns/there of guest is gone")
    # Who made it makes it anew, and asks for the same guest again.
    laptop.run("ip", "netns", "add", "there")
    is_refused(
        run("up", check=False), 4, "/run/netns/there is another network namespace than the one recorded for guest"
    )
    assert run("create", "guest", "--netns", "there", "--json").json[0]["state"] == "up"
    assert run("plan").out == ""
    run("delete", "--all")
    assert os.listdir(laptop.path("/run/netns")) == ["there"]


def test_a_stranger_on_the_recorded_path_is_never_entered(laptop: Laptop, run: Run) -> None:
    run("create", "own", "--kind", "veth")
    # This process's path leads to another namespace each time it is told to.
    mover = laptop.start(
        sys.executable, "-c",
        "import os, sys, ctypes\nwhile True:\n ctypes.CDLL(None).unshare(0x40000000)\n"
        " print(os.getpid(), flush=True)\n sys.stdin.readline() or sys.exit()",
    )  # fmt: skip
    assert mover.stdin is not None
    assert mover.stdout is not None
    path = f"/proc/{mover.stdout.readline().strip()}/ns/net"
    run("create", "pid", "--netns", path)
    mover.stdin.write("\n")
    mover.stdin.flush()
    mover.stdout.readline()
    laptop.run("ip", "netns", "del", "own")
    laptop.run("ip", "netns", "add", "own")
    assert wait_until(lambda: not laptop.links() & {"vmn-own", "vmn-pid"})

    def strangers() -> list[str]:
        look = "ip addr; ip route show table all; ip neigh; sysctl net.ipv4.conf.lo"
        return [laptop.run("nsenter", f"--net={place}", "sh", "-c", look) for place in (path, "/run/netns/own")]

    before = strangers()
    for name in ("own", "pid"):
        is_refused(run("up", name, check=False), 4, "is another network namespace than the one recorded", name)
        is_refused(run("exec", name, "--", "ip", "link", "add", "x", "type", "bridge", check=False), 4, name)
        is_refused(run("create", name, check=False), 4, "is another network namespace")
    assert [info["state"] for info in run("list", "--json").json] == ["down", "down"]
    is_refused(run("up", check=False), 4, "is another network namespace")
    run("down")
    run("delete", "--all")
    run("restore")
    assert strangers() == before
    mover.communicate("")


def test_a_namespace_that_goes_while_its_guest_is_made(laptop: Laptop, run: Run, warm: Warm) -> None:
    run("create", "first", "--kind", "veth")
    laptop.run("ip", "netns", "add", "there")
    lock = os.open(Path(laptop.env["VMNET_RUN_DIR"], "guests.lock"), os.O_RDWR)
    fcntl.lockf(lock, fcntl.LOCK_EX)
    call = warm.start(laptop, "create", "guest", "--netns", "there")
    assert wait_until(lambda: len(records(laptop)[0]) == 2, 20), "the record comes first"
    laptop.run("ip", "netns", "del", "there")
    os.close(lock)
    is_refused(call.wait(), 4, "the network namespace /run/netns/there of guest is gone")
    assert [lease.name for lease in records(laptop)[0]] == ["first"]
    assert laptop.links() == {"lo", "wlan0", "vmn-first"}
    assert run("plan").out == ""


def test_a_namespace_with_a_device_of_the_name_is_left_alone(laptop: Laptop, run: Run) -> None:
    laptop.run("ip", "netns", "add", "there")
    laptop.run("ip", "-n", "there", "link", "add", "eth0", "type", "bridge")
    inside = laptop.run("ip", "-n", "there", "addr")
    with unchanged(laptop):
        is_refused(
            run("create", "web", "--netns", "there", check=False), 4, "/run/netns/there already has a device eth0"
        )
    assert laptop.run("ip", "-n", "there", "addr") == inside


# Others on this host


def test_a_device_of_somebody_else_is_left_alone(laptop: Laptop, run: Run, tap: None) -> None:
    laptop.run("ip", "link", "add", "vmn-web", "type", "bridge")
    laptop.run("ip", "link", "add", "br-other", "group", "32001", "type", "bridge")
    laptop.run("ip", "tuntap", "add", "vmn-vm", "mode", "tap")
    with unchanged(laptop):
        for kind in ("veth", "tap", "tun"):
            is_refused(
                run("create", "web", "--kind", kind, check=False), 4, "a device vmn-web is there that is not ours"
            )
        is_refused(run("create", "vm", "more", check=False), 4, "a device vmn-vm is there that is not ours")
    with unchanged(laptop):
        run("create", "other", "--kind", "veth")
        run("up")
        run("down")
        run("up")
        run("delete", "--all")
        run("restore")
    # One that comes while the guest is down is found at up.
    run("create", "late", "--kind", "veth")
    run("down", "late")
    laptop.run("ip", "link", "add", "vmn-late", "type", "bridge")
    with unchanged(laptop):
        is_refused(run("create", "next", "late", "--kind", "tap", check=False), 4)
    is_refused(run("up", "late", check=False), 4, "a device vmn-late is there that is not ours")
    run("delete", "late")
    run("restore")
    assert laptop.links() == {"lo", "wlan0", "vmn-web", "br-other", "vmn-vm", "vmn-late"}


@pytest.mark.parametrize("use", ["route", "address"])
def test_somebody_elses_part_of_the_shadow_stops_the_first_carve(laptop: Laptop, run: Run, use: str) -> None:
    laptop.ip("link add other type veth peer name end", "link set end up", "link set other up")
    if use == "route":
        laptop.run("ip", "route", "add", "247.5.0.0/16", "dev", "other")
    else:
        laptop.run("ip", "addr", "add", "247.5.0.1/16", "dev", "other")
    settle(laptop)
    with unchanged(laptop):
        for args in (["create", "web", "--kind", "veth"], ["carve"], ["up"], ["plan"], ["carve", "--dry-run"]):
            refused = run(*args, check=False)
            is_refused(refused, 4, "247.5.0.0/16", "other")
            assert "`shadow`" in refused.err
        run("restore")
    Path(laptop.env["VMNET_CONFIG"]).write_text("shadow = 246\n")
    assert run("create", "web", "--kind", "veth", "--json").json[0]["shadow"] == "246.1.0.2"


# Disks and records


@contextmanager
def small_disk(laptop: Laptop, monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[str]:
    """Put the folder of an environment variable on a disk of its own of 300 kB, which only the laptop sees."""
    laptop.run("mkdir", "/run/disk")
    laptop.run("mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", "/run/disk")
    monkeypatch.setitem(laptop.env, name, "/run/disk/own")
    yield "/run/disk"


def fill(laptop: Laptop) -> None:
    laptop.run("sh", "-c", "head -c 1M /dev/zero >/run/disk/full", check=False)


@pytest.mark.parametrize("folder", ["STATE", "RUN"])
def test_a_full_disk_is_told_and_costs_nothing(
    laptop: Laptop, run: Run, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    before = laptop.snapshot()
    with small_disk(laptop, monkeypatch, f"VMNET_{folder}_DIR") as disk:
        fill(laptop)
        is_refused(
            run("create", "web", "--kind", "veth", check=False),
            1,
            f"{disk}/own/",
            "full" if folder == "STATE" else "space",
        )
        assert run("list", "--json").json == []
        assert laptop.snapshot() == before
        laptop.run("rm", "-r", f"{disk}/full")
        [made] = run("create", "web", "--kind", "veth", "--json").json
        fill(laptop)
        # The records have room in their file for some; with the folder of run alone, nothing more is needed.
        done, known = Result(0, "", ""), (survey(laptop), records(laptop))
        for number in range(20):
            known = survey(laptop), records(laptop)
            done = run("create", *(f"n{number}-{one}" for one in range(20)), "--kind", "veth", check=False)
            if done.code or folder == "RUN":
                break
        if folder == "RUN":
            assert done.code == 0
        else:
            is_refused(done, 1, f"{disk}/own/vmnet.db", "full")
            assert (survey(laptop), records(laptop)) == known
        assert run("show", "web", "--json").json == made
        run("restore")
        assert laptop.snapshot() == before
        laptop.run("rm", f"{disk}/full")
        run("up")
        assert run("show", "web", "--json").json == made


@pytest.mark.root
def test_a_read_only_disk_is_told_and_restore_does_without(
    laptop: Laptop, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = laptop.snapshot()
    with small_disk(laptop, monkeypatch, "VMNET_STATE_DIR") as disk:
        laptop.run("mount", "-o", "remount,ro", disk)
        is_refused(run("create", "web", "--kind", "veth", check=False), 1, f"{disk}/own")
        assert run("list", "--json").json == []
        laptop.run("mount", "-o", "remount,rw", disk)
        [made] = run("create", "web", "--kind", "veth", "--json").json
        # Over itself: dnsmasq has a file there open, and goes on writing to it.
        laptop.run("mount", "--bind", disk, disk)
        laptop.run("mount", "-o", "remount,bind,ro", disk)
        full = laptop.snapshot()
        for args in (["create", "a"], ["delete", "web"], ["up"], ["down", "web"], ["carve"]):
            refused = run(*args, check=False)
            is_refused(refused, 1, f"{disk}/own/vmnet.db")
            assert f"findmnt --target {disk}/own" in refused.err
        assert run("show", "web", "--json").json == made
        assert run("plan").out == ""
        assert run("exec", "web", "--", "echo", "in").out == "in\n"
        assert laptop.snapshot() == full
        restored = run("restore")
        assert "the host is put back, and the records stay as they are" in restored.err
        assert laptop.snapshot() == before
        is_refused(run("restore", "--purge", check=False), 1, f"{disk}/own/vmnet.db")
        laptop.run("mount", "-o", "remount,rw", disk)
        run("up")
        assert run("show", "web", "--json").json == made


def newer(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def not_ours(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE cookies (name TEXT)")
    db.close()


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILT: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "noise": (lambda path: path.write_bytes(os.urandom(8192)), 4, "file is not a database"),
    "text": (lambda path: path.write_text("web 127.1.0.2\n" * 1000), 4, "file is not a database"),
    "cut": (lambda path: os.truncate(path, 10_000), 4, "malformed"),
    "newer": (newer, 4, "was written by a newer vmnet: schema 99"),
    "not-ours": (not_ours, 4, "not one of vmnet's"),
    "folder": (as_folder, 1, "vmnet.db"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_records_that_cannot_be_read_are_told_kept_and_not_needed_by_restore(
    laptop: Laptop, run: Run, how: str
) -> None:
    spoil, code, words = SPOILT[how]
    before = laptop.snapshot()
    run("create", "web", "other", "--kind", "veth")
    path = state_folder(laptop) / "vmnet.db"
    path.with_name("vmnet.db-journal").unlink(missing_ok=True)
    good = path.read_bytes()
    spoil(path)
    spoilt = path.read_bytes() if path.is_file() else None
    full = laptop.snapshot()
    for args in (
        ["list"],
        ["ip", "web"],
        ["create", "a", "--kind", "veth"],
        ["up"],
        ["delete", "web"],
        ["down"],
        ["plan"],
    ):
        if args != ["down"]:
            is_refused(run(*args, check=False), code, words)
    assert laptop.snapshot() == full
    restored = run("restore")
    assert words in restored.err
    assert laptop.snapshot() == before
    assert (path.read_bytes() if path.is_file() else None) == spoilt
    if path.is_dir():
        path.rmdir()
    # With a backup in its place all is there again.
    path.write_bytes(good)
    run("up")
    assert [info["state"] for info in run("list", "--json").json] == ["up", "up"]


@pytest.mark.parametrize("name", ["VMNET_STATE_DIR", "VMNET_RUN_DIR"])
def test_a_folder_that_cannot_be_one_is_named(
    laptop: Laptop, run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(laptop.env, name, "/dev/null/own")
    before = laptop.snapshot()
    is_refused(run("create", "web", "--kind", "veth", check=False), 1, "/dev/null/own", "Not a directory")
    assert laptop.snapshot() == before
