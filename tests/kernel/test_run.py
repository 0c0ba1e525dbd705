"""`vmnet run`: a guest that is there while its command runs, and gone after it, however that comes about."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.kernel.machine import wait_until
from tests.kernel.net import FORMS, Laptop, Result, why_no_tap
from tests.kernel.warm import Warm

Run = Callable[..., Result]
VMNET = [sys.executable, "-m", "vmnet"]
PATIENCE = 30.0
FIFTY = 50
SERVER = """
import os, socket
with socket.create_server(("", 3000)) as server:
    while True:
        with server.accept()[0] as caller:
            caller.sendall(f"{os.environ['VMNET_NAME']} {os.getppid()}".encode())
"""
ASK_BY_NAME = """
import socket, sys, time
def ask(name):
    for _ in range(600):  # a server that has an address may not listen yet
        try:
            with socket.create_connection((name, 3000), 10) as server:
                return server.getpeername()[0], server.recv(100).decode()
        except OSError:
            time.sleep(0.1)
for name in sys.argv[1:]:
    print(*ask(name))
"""


@pytest.fixture
def run(warm: Warm, laptop: Laptop) -> Run:
    """Run vmnet in the laptop without waiting for Python's start."""

    def run_(*args: str, check: bool = True) -> Result:
        return warm.vmnet(laptop, *args, check=check)

    return run_


def start(laptop: Laptop, *command: str, options: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    return laptop.start(*VMNET, "run", "web", *options, "--", *command)


def line(process: "subprocess.Popen[str]") -> str:
    """Return the next line that a process says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: "subprocess.Popen[str]", last: str = "") -> tuple[int, str, str]:
    out, err = process.communicate(last, timeout=PATIENCE)
    return process.returncode, out, err


def is_clean(laptop: Laptop, run: Run) -> bool:
    """Say whether no guest is left, and nothing of a run beside the records."""
    return run("list", "--json").json == [] and "web" not in laptop.run("ip", "netns") and not markers(laptop)


def markers(laptop: Laptop) -> list[Path]:
    return list(Path(laptop.env["VMNET_STATE_DIR"]).glob("run-*"))


# What the command gets, and what it gives back


def test_the_command_runs_in_a_guest_that_is_gone_after_it(laptop: Laptop, run: Run) -> None:
    run("run", "first", "--", "true")  # with the first guest come its servers of names
    before = laptop.snapshot()
    done = run("run", "web", "--", "sh", "-c", "ip -o -4 addr show eth0; echo err >&2; exit 7", check=False)
    assert (done.code, done.err) == (7, "err\n")
    assert re.fullmatch(r"\d+: eth0 +inet 127\.1\.0\.6/30 .*\n", done.out)
    assert laptop.snapshot() == before
    assert is_clean(laptop, run)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["true"], 0, ""),
        (["sh", "-c", "exit 130"], 130, ""),
        (["sh", "-c", "exit 255"], 255, ""),
        (["sh", "-c", "kill -KILL $$"], 137, ""),
        (["sh", "-c", "kill -TERM $$"], 143, ""),
        (["sh", "-c", "kill -INT $$"], 130, ""),
        (["nope"], 127, "vmnet: nope cannot be run: No such file or directory\n"),
        (["/etc"], 126, "vmnet: /etc cannot be run: Permission denied\n"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("kind", ["veth", "tap"])
def test_the_exit_code_is_that_of_the_command(
    laptop: Laptop, run: Run, kind: str, words: list[str], code: int, says: str
) -> None:
    if kind == "tap" and (reason := why_no_tap()):
        pytest.skip(reason)
    assert run("run", "web", "--kind", kind, "--", *words, check=False) == Result(code, "", says)
    assert is_clean(laptop, run)


@pytest.mark.parametrize("form", FORMS)
def test_the_command_is_told_what_show_tells_of_its_guest(laptop: Laptop, run: Run, form: str) -> None:
    if not form.startswith("veth") and (reason := why_no_tap()):
        pytest.skip(reason)
    script = "import json, os; print(json.dumps(dict(os.environ))); input()"
    laptop.env["VMNET_MAC"] = "of another guest"
    process = start(laptop, "python3", "-c", script, options=FORMS[form])
    told = json.loads(line(process))
    shown = run("show", "web", "--json").json
    for key in ("name", "address", "gateway", "guest_address", "guest_gateway", "device", "mac"):
        assert told[f"VMNET_{key.upper()}"] == (shown[key] or ""), key
    assert shown["state"] == "up"
    assert end(process, "\n")[0] == 0
    assert is_clean(laptop, run)


def test_what_the_command_reads_and_writes_is_not_touched(laptop: Laptop, run: Run) -> None:
    data = bytes(range(256)) * 4096
    passed = subprocess.run(
        laptop.command(*VMNET, "run", "web", "--", "cat"),
        input=data, capture_output=True, check=True, env=laptop.env,
    )  # fmt: skip
    assert passed.stdout == data
    assert passed.stderr == b""
    words = ["a b", "", "$HOME", "*", "--json", "--", "-v", "ä"]
    assert run("run", "web", "--", "printf", "%s|", *words).out == "a b||$HOME|*|--json|--|-v|ä|"
    assert run("run", "--", "web", "pwd").out == f"{laptop.folder}\n"
    # Descriptors, and what is ignored and blocked, are those of any command that the same shell starts.
    probe = "exec 5>&1; ls /proc/self/fd | tr '\\n' ' '; grep -e SigIgn -e SigBlk /proc/self/status; echo 5 >&5"
    shell = ["env", "--ignore-signal=HUP,CHLD", "sh", "-c", 'exec 4>&1; exec "$@"', "sh"]
    plain = laptop.execute(*shell, "sh", "-c", probe)
    assert "4 5" in plain.out
    assert laptop.execute(*shell, *VMNET, "run", "web", "--", "sh", "-c", probe) == plain


def test_a_tap_runs_its_command_outside(laptop: Laptop, run: Run, tap: None) -> None:
    process = start(laptop, "sh", "-c", "ls /sys/class/net/$VMNET_DEVICE/address; read end", options=("--kind", "tap"))
    assert line(process) == "/sys/class/net/vmn-web/address"
    vm = laptop.boot(run("show", "web", "--json").json)
    vm.serve()
    assert laptop.tcp(vm.address, payload=b"hi") == b"hi"
    assert end(process, "\n")[0] == 0
    assert "vmn-web" not in laptop.links()


def test_other_commands_may_go_in_too(laptop: Laptop, run: Run) -> None:
    process = start(laptop, "sh", "-c", "echo in; read end")
    assert line(process) == "in"
    assert (
        run("exec", "web", "--", "cat", "/sys/class/net/eth0/address").out
        == run("show", "web", "--json").json["mac"] + "\n"
    )
    assert end(process, "\n")[0] == 0


def test_what_the_command_leaves_running_has_no_network_any_more(laptop: Laptop, run: Run) -> None:
    left = run("run", "web", "--", "sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!; cat /proc/net/dev").out
    pid, devices = left.split("\n", 1)
    assert "eth0" in devices
    devices = laptop.path(f"/proc/{pid}/net/dev").read_text()
    assert "lo:" in devices
    assert "eth0" not in devices
    assert is_clean(laptop, run)


# When there is no guest to be made


def test_a_guest_that_is_there_stays_as_it_is(laptop: Laptop, run: Run, settled: None) -> None:
    run("create", "web", "--kind", "veth")
    before, listed = laptop.snapshot(), run("list", "--json").out
    for args in (["web"], ["web", "--kind", "tun"]):
        refused = run("run", *args, "--", "echo", "in", check=False)
        assert refused == Result(4, "", "vmnet: web exists already\nhint: take another name\n")
    assert run("run", "web", "--dry-run", "--", "true", check=False).code == 4
    assert laptop.snapshot() == before
    assert run("list", "--json").out == listed
    assert not markers(laptop)


def test_of_two_at_once_one_has_the_name(laptop: Laptop, warm: Warm, run: Run) -> None:
    first = start(laptop, "sh", "-c", "echo in; read end")
    assert line(first) == "in"
    calls = [warm.start(laptop, "run", "web", "--", "echo", "in") for _ in range(4)]
    for call in calls:
        refused = call.wait()
        assert (refused.code, refused.out) == (4, "")
    assert run("show", "web", "--json").json["state"] == "up"
    assert end(first, "\n")[0] == 0
    codes = sorted(call.wait().code for call in [warm.start(laptop, "run", "web", "--", "true") for _ in range(4)])
    assert set(codes) <= {0, 4}
    assert 0 in codes
    assert is_clean(laptop, run)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["web", "--address", "127.1.0.2"], 4, "127.1.0.2"),
        (["web", "--queues", "2"], 2, "a veth has one queue"),
        (["web", "--kind", "tap", "--native"], 2, "a tap is always mapped"),
        (["web", "--native", "--mapped"], 2, "--native and --mapped exclude each other"),
        (["WEB"], 2, "'WEB' is not a guest name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_made_does_not_run(laptop: Laptop, run: Run, args: list[str], code: int, words: str) -> None:
    run("create", "other", "--kind", "veth")
    refused = run("run", *args, "--", "echo", "in", check=False)
    assert (refused.code, refused.out) == (code, "")
    assert words in refused.err
    assert [guest["name"] for guest in run("list", "--json").json] == ["other"]
    assert not markers(laptop)


def test_no_command_is_a_wrong_call(laptop: Laptop, run: Run) -> None:
    for args in (["web"], ["web", "--"], ["web", "--mtu", "1400"]):
        assert run("run", *args, check=False).code == 2
    assert run("list", "--json").json == []


def test_a_dry_run_says_what_would_be_made(laptop: Laptop, run: Run) -> None:
    said = run("run", "web", "--dry-run", "--", "echo", "in", check=False)
    assert said.code == 10
    assert "+ veth vmn-web, its peer eth0 in /run/netns/web" in said.out
    assert is_clean(laptop, run)


# Signals and the terminal


COUNT = """
import os, signal, sys
heard = []
for name in sys.argv[1:]:
    signal.signal(getattr(signal, "SIG" + name), lambda number, _: heard.append(signal.Signals(number).name[3:]))
print(os.getppid(), flush=True)
input()
print(*heard)
"""


def test_signals_are_handed_on_once(laptop: Laptop, run: Run) -> None:
    names = ["HUP", "INT", "QUIT", "USR1", "USR2", "TERM"]  # by number, as Python tells of those that come at once
    process = start(laptop, "python3", "-c", COUNT, *names)
    runner = line(process)
    for name in names:
        laptop.run("kill", f"-{name}", runner)
        assert wait_until(lambda: not pending(laptop, runner), PATIENCE)
    code, out, err = end(process, "\n")
    assert (code, err) == (0, "")
    assert out.split() == names
    assert is_clean(laptop, run)


def pending(laptop: Laptop, pid: str) -> int:
    status = laptop.path(f"/proc/{pid}/status").read_text()
    return sum(int(value, 16) for value in re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", status))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_ends_the_command_ends_the_run(laptop: Laptop, run: Run, number: signal.Signals) -> None:
    process = start(laptop, "sh", "-c", "echo $PPID; exec sleep 1000")
    laptop.run("kill", f"-{number}", line(process))
    assert end(process)[0] == 128 + number
    assert is_clean(laptop, run)


def test_a_command_that_stays_keeps_its_guest(laptop: Laptop, run: Run) -> None:
    process = start(laptop, "python3", "-c", COUNT, "TERM")
    laptop.run("kill", "-TERM", line(process))
    assert run("show", "web", "--json").json["state"] == "up"
    assert end(process, "\n")[:2] == (0, "TERM\n")


def test_a_run_stopped_while_it_waits_for_others_leaves_nothing(laptop: Laptop, run: Run) -> None:
    run("carve")
    held = laptop.start("flock", str(Path(laptop.env["VMNET_RUN_DIR"], "host.lock")), "sh", "-c", "echo held; read end")
    assert line(held) == "held"
    for number in (signal.SIGINT, signal.SIGTERM):
        process = laptop.start("sh", "-c", 'echo $$; exec "$@"', "sh", *VMNET, "run", "web", "--", "echo", "in")
        runner = line(process)
        assert wait_until(partial(is_waiting_for_a_lock, laptop, runner), PATIENCE)
        laptop.run("kill", f"-{number}", runner)
        assert end(process) == (128 + number, "", "")
    assert not markers(laptop)
    assert end(held, "\n")[0] == 0
    assert is_clean(laptop, run)


def is_waiting_for_a_lock(laptop: Laptop, pid: str) -> bool:
    return pid in re.findall(r"-> FLOCK +ADVISORY +\w+ (\d+)", laptop.run("cat", "/proc/locks"))


class Terminal:
    """A shell with job control on a terminal of the laptop's."""

    PROMPT = "OUT> "

    def __init__(self, laptop: Laptop) -> None:
        self._main, other = os.openpty()
        self._seen = ""
        self._shell = subprocess.Popen(
            laptop.command("setsid", "--ctty", "--wait", "bash", "--norc", "--noprofile", "-i"),
            stdin=other, stdout=other, stderr=other,
            env={**laptop.env, "PS1": self.PROMPT, "TERM": "dumb", "vmnet": " ".join(VMNET)},
        )  # fmt: skip
        os.close(other)
        self.expect(self.PROMPT)

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def expect(self, words: str) -> str:
        """Return what was shown up to `words`, which must come."""
        os.set_blocking(self._main, False)
        assert wait_until(lambda: self._shows(words), PATIENCE), f"{words!r} is not in {self._seen!r}"
        shown, _, self._seen = self._seen.partition(words)
        return shown

    def ask(self, command: str) -> str:
        """Return what a command shows, up to the next prompt."""
        self.type(f"{command}\n")
        self.expect("\n")
        return self.expect(self.PROMPT).replace("\r\n", "\n")

    def start_cat(self, before: str = "") -> None:
        """Start a program that says what is typed."""
        self.type(f"{before} sh -c 'echo go; exec cat'\n")
        self.expect("go\r\n")

    def _shows(self, words: str) -> bool:
        with suppress(BlockingIOError):
            self._seen += os.read(self._main, 65536).decode()
        return words in self._seen

    def close(self) -> None:
        os.close(self._main)
        self._shell.wait(PATIENCE)


@pytest.fixture
def terminal(laptop: Laptop) -> Iterator[Terminal]:
    made = Terminal(laptop)
    yield made
    made.close()


def test_an_interactive_shell_has_its_terminal(laptop: Laptop, run: Run, terminal: Terminal) -> None:
    terminal.type("$vmnet run web -- bash --norc --noprofile -i\n")
    terminal.expect("\n")
    terminal.expect(terminal.PROMPT)
    assert terminal.ask("echo $VMNET_NAME; cat /proc/net/dev | grep -c eth0") == "web\n1\n"
    terminal.start_cat()
    terminal.type("\x03")
    terminal.expect(terminal.PROMPT)
    assert terminal.ask("echo $?") == "130\n"
    terminal.start_cat()
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.expect(terminal.PROMPT)
    assert "Stopped" in terminal.ask("jobs")
    # The shell inside stops as a whole, and its terminal goes to the outer one and back.
    assert "Stopped" in terminal.ask("suspend")
    assert terminal.ask("echo +$VMNET_NAME+") == "++\n"
    terminal.type("fg\n")
    terminal.expect("-i\r\n")
    terminal.expect(terminal.PROMPT)
    assert terminal.ask("echo +$VMNET_NAME+") == "+web+\n"
    terminal.type("fg\n")
    terminal.expect("exec cat'\r\n")
    terminal.type("\x04")
    terminal.expect(terminal.PROMPT)
    terminal.type("exit 9\n")
    terminal.expect("exit\r\n")
    terminal.expect(terminal.PROMPT)
    assert terminal.ask("echo $?") == "9\n"
    assert is_clean(laptop, run)


def test_a_key_that_interrupts_reaches_the_command_once(laptop: Laptop, run: Run, terminal: Terminal) -> None:
    laptop.path("/run/count").write_text(COUNT)
    terminal.type("$vmnet run web -- python3 /run/count INT QUIT; echo code $?\n")
    terminal.expect("$?\r\n")
    terminal.expect("\n")
    terminal.type("\x03")
    terminal.expect("^C")
    terminal.type("\x1c")
    terminal.expect("^\\")
    terminal.type("\n")
    assert sorted(terminal.expect("code 0").split()) == ["INT", "QUIT"]
    terminal.start_cat("$vmnet run web --")
    terminal.type("\x03")
    terminal.expect(terminal.PROMPT)
    assert terminal.ask("echo $?") == "130\n"
    assert is_clean(laptop, run)


def test_a_job_is_stopped_and_continued(laptop: Laptop, run: Run, terminal: Terminal) -> None:
    terminal.start_cat("$vmnet run web --")
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.expect(terminal.PROMPT)
    assert run("show", "web", "--json").json["state"] == "up"
    terminal.type("fg\n")
    terminal.expect("exec cat'\r\n")
    terminal.type("again\n")
    terminal.expect("again\r\nagain")
    terminal.type("\x04")
    terminal.expect(terminal.PROMPT)
    assert terminal.ask("echo $?") == "0\n"
    assert is_clean(laptop, run)


def test_a_terminal_that_goes_away_ends_the_command(laptop: Laptop, run: Run) -> None:
    terminal = Terminal(laptop)
    terminal.type("exec $vmnet run web -- sh -c 'echo go; exec sleep 1000'\n")
    terminal.expect("go\r")
    terminal.close()
    assert is_clean(laptop, run)


# Killed


def family(laptop: Laptop, process: "subprocess.Popen[str]") -> tuple[str, str, str]:
    """Return the processes of a run whose command prints its own and its parent's: runner, command, heir."""
    command, runner = line(process).split()
    children = laptop.path(f"/proc/{runner}/task/{runner}/children").read_text().split()
    words = laptop.path(f"/proc/{runner}/cmdline").read_bytes()
    [heir] = [child for child in children if laptop.path(f"/proc/{child}/cmdline").read_bytes() == words]
    return runner, command, heir


def test_a_run_that_is_killed_takes_its_command_and_its_guest_along(laptop: Laptop, run: Run) -> None:
    process = start(laptop, "sh", "-c", "echo $$ $PPID; exec sleep 1000")
    runner, command, heir = family(laptop, process)
    laptop.run("kill", "-KILL", runner)
    assert end(process)[0] == -signal.SIGKILL
    assert wait_until(lambda: is_clean(laptop, run), PATIENCE)
    assert wait_until(lambda: not any(laptop.path(f"/proc/{pid}").exists() for pid in (command, heir)), PATIENCE)


def test_what_answers_guests_hears_signals_as_ever(laptop: Laptop, run: Run) -> None:
    run("create", "other", "--kind", "veth")
    before = keeper(laptop)
    process = start(laptop, "sh", "-c", "echo in; read end")
    assert line(process) == "in"
    laptop.run("kill", "-KILL", before[0])
    assert end(process, "\n")[0] == 0
    after = keeper(laptop)
    assert after[0] != before[0]
    assert after[1:] == before[1:]


def keeper(laptop: Laptop) -> list[str]:
    """Return the process that keeps what answers guests, and which signals it blocks and ignores."""
    pid = Path(laptop.env["VMNET_RUN_DIR"], "dns/keeper.pid").read_text().split()[0]
    return [pid, *re.findall(r"Sig(?:Blk|Ign):.*", laptop.path(f"/proc/{pid}/status").read_text())]


@pytest.mark.parametrize("next_", ["run other -- true", "up", "watch --once"])
def test_a_run_that_was_killed_with_its_heir_is_ended_by_the_next(laptop: Laptop, run: Run, next_: str) -> None:
    process = start(laptop, "sh", "-c", "echo $$ $PPID; exec sleep 1000")
    runner, _, heir = family(laptop, process)
    laptop.run("kill", "-KILL", heir)
    laptop.run("kill", "-KILL", runner)
    end(process)
    assert [guest["name"] for guest in run("list", "--json").json] == ["web"]
    run(*next_.split())
    assert is_clean(laptop, run)


def test_a_dead_run_does_not_end_a_living_one(laptop: Laptop, run: Run) -> None:
    process = start(laptop, "sh", "-c", "echo in; read end")
    assert line(process) == "in"
    run("up")
    run("run", "other", "--", "true")
    assert run("show", "web", "--json").json["state"] == "up"
    assert end(process, "\n")[0] == 0


def test_a_guest_that_others_have_made_meanwhile_is_theirs(laptop: Laptop, run: Run) -> None:
    process = start(laptop, "sh", "-c", "echo in; read end")
    assert line(process) == "in"
    first = run("show", "web", "--json").json["created"]

    def is_made_anew() -> bool:
        run("delete", "web")
        run("create", "web", "--kind", "veth")
        return bool(run("show", "web", "--json").json["created"] != first)  # to the second

    assert wait_until(is_made_anew, PATIENCE)
    assert end(process, "\n")[0] == 0
    assert run("show", "web", "--json").json["state"] == "up"
    assert not markers(laptop)


# Many


def test_fifty_at_once_serve_the_same_port_at_addresses_and_names_of_their_own(
    laptop: Laptop, warm: Warm, run: Run
) -> None:
    laptop.path("/run/nsswitch").write_text("hosts: files\n")
    laptop.run("mount", "--bind", "/run/nsswitch", "/etc/nsswitch.conf")
    laptop.run("mount", "--bind", str(laptop.hosts_file), "/etc/hosts")
    laptop.env["VMNET_HOSTS_FILE"] = "/etc/hosts"
    names = [f"web{number}" for number in range(FIFTY)]
    run("run", "first", "--", "true")  # with the first guest come its servers of names
    before = laptop.snapshot()
    calls = [warm.start(laptop, "run", name, "--", "python3", "-S", "-c", SERVER) for name in names]

    def addresses() -> dict[str, str]:
        return {guest["name"]: guest["address"] for guest in run("list", "--json").json if guest["state"] == "up"}

    assert wait_until(lambda: len(addresses()) == FIFTY, 120), sorted(addresses())
    where = addresses()
    assert len(set(where.values())) == FIFTY
    said = laptop.run("python3", "-c", ASK_BY_NAME, *[f"{name}.vmnet.internal" for name in names]).splitlines()
    runners = []
    for name, answer in zip(names, said, strict=True):
        address, who, runner = answer.split()
        assert (address, who) == (where[name], name)
        runners.append(runner)
    laptop.run("kill", "-TERM", *runners)
    assert [call.wait() for call in calls] == [Result(128 + signal.SIGTERM, "", "")] * FIFTY
    assert laptop.snapshot() == before
    assert is_clean(laptop, run)
