"""The server: root's commands are as without it, it serves nobody but its own, and its end is told and put right."""

import fcntl
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.kernel.machine import somebody_waits_for, wait_until
from tests.kernel.net import CLIENT, SOURCES, Laptop, need_own_etc
from tests.kernel.watching import Watching
from tests.unit.test_libvirt import domain, ethernet

MAC = "<mac address='52:54:00:aa:00:01'/>"
TYPER = re.compile("import time:.* typer$", re.MULTILINE)


@pytest.fixture
def server(laptop: Laptop) -> "subprocess.Popen[str]":
    """A laptop that is carved, and has a server."""
    laptop.vmnet("carve")
    laptop.start_server()
    assert laptop.server is not None
    return laptop.server


def path_of(laptop: Laptop) -> Path:
    return laptop.folder / "run/server.sock"


def is_served(laptop: Laptop, *before: str, env: dict[str, str] | None = None, client: Path = SOURCES) -> bool:
    """Say whether the server does `list` for who is called by the words `before`; it must work in any case."""
    main = str(client / "vmnet/__main__.py")
    told = laptop.execute(*before, sys.executable, "-X", "importtime", "-IS", main, "list", env=env)
    assert told.code == 0, told.err
    return not TYPER.search(told.err)


def processes(laptop: Laptop) -> list[int]:
    """Return the processes of the laptop's that are vmnet's, by their numbers here."""
    inside = os.stat(f"{laptop.proc}/ns/pid_for_children").st_ino
    found = []
    for entry in Path("/proc").iterdir():
        try:
            is_inside = entry.name.isdecimal() and os.stat(entry / "ns/pid").st_ino == inside
            if is_inside and b"vmnet/__main__.py" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def pid_of_server(laptop: Laptop) -> int:
    """Return the number here of the server itself, whose forks are called as it is."""

    def parent(pid: int) -> int:
        try:
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return pid  # it has ended meanwhile

    servers = [pid for pid in processes(laptop) if not is_client(pid)]
    [pid] = [one for one in servers if parent(one) not in servers]
    return pid


def kill_server(laptop: Laptop) -> None:
    """Kill the server and its forks, which end with it by themselves, too."""
    for pid in processes(laptop):
        if not is_client(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_client(pid: int) -> bool:
    """Say whether a process is a client, and not the server or a fork of it."""
    try:
        return b"serve" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


@contextmanager
def host_locked(laptop: Laptop) -> Iterator[None]:
    """Hold the lock that each command needs that changes anything."""
    with host_lock(laptop).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def host_lock(laptop: Laptop) -> Path:
    return laptop.path(f"{laptop.env['VMNET_RUN_DIR']}/host.lock")


def begin(laptop: Laptop, *args: str) -> "subprocess.Popen[str]":
    """Start a command, and wait until a fork of the server's waits for the lock that `host_locked` holds."""
    command = laptop.start(*CLIENT, *args)
    assert wait_until(lambda: somebody_waits_for(host_lock(laptop)), 10), command.communicate(timeout=10)
    return command


# As without it


def test_a_command_is_what_it_is_without(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    calls = [
        ["create", "web", "--kind", "veth", "--json"], ["create", "web", "--kind", "veth", "-v"], ["list"],
        ["ip", "web"], ["show", "web", "--json"], ["ip", "nobody", "--json"], ["create", "a!"],
        ["create", "--mtu", "x"], ["plan"],
        ["down", "web", "--dry-run"], ["down", "web", "-v"], ["delete", "web"], ["up", "--json"],
    ]  # fmt: skip
    served = [laptop.vmnet(*call, check=False) for call in calls]
    laptop.server = None
    direct = [laptop.vmnet(*call, check=False) for call in calls]
    created = re.compile(r'"created": "[^"]*"')
    for one, other in zip(served, direct, strict=True):
        assert (one.code, created.sub("", one.out), one.err) == (other.code, created.sub("", other.out), other.err)


def test_the_callers_folder_environment_and_input_count(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    text = '[guest.web]\nkind = "veth"\n'
    inside = laptop.folder / "inside"
    inside.mkdir()
    (inside / "guests.toml").write_text(text)
    script = 'cd "$1" && shift && exec "$@"'
    there = ("sh", "-c", script, "sh", str(inside), *CLIENT)
    env = {"SUDO_UID": "4242"}
    done = laptop.execute(*there, "apply", "guests.toml", "--json", env=env)
    assert done.json["guests"][0]["owner"] == 4242, done.err
    done = laptop.execute(*CLIENT, "apply", "-", "--json", stdin=text.replace("web", "db"))
    assert done.json["guests"][0]["name"] == "db"
    assert laptop.execute(*there, "apply", "missing.toml").code == 2


def test_long_work_shows_progress_on_a_terminal(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    ours, theirs = pty.openpty()
    argv = laptop.command(*CLIENT, "create", *(f"n{number}" for number in range(60)), "--kind", "veth")
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=laptop.env) as command:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # EIO: the other end is closed
                break
        os.close(ours)
    assert command.returncode == 0
    assert b"working" in shown
    assert b"n59" in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
def test_a_signal_ends_the_work(laptop: Laptop, server: "subprocess.Popen[str]", number: signal.Signals) -> None:
    laptop.vmnet("create", "web", "--kind", "veth")
    with host_locked(laptop):
        command = begin(laptop, "delete", "web")
        inside = next(pid for pid in processes(laptop) if os.stat(f"/proc/{pid}").st_uid == 0 and is_client(pid))
        os.kill(inside, number)
        out, err = command.communicate(timeout=10)
        assert wait_until(lambda: not any(map(is_client, processes(laptop))), 5)
        if number == signal.SIGINT:
            assert (command.returncode, err.splitlines()[0]) == (130, "vmnet: interrupted")
        else:
            assert command.returncode in (-number, 128 + number)
            assert err == ""
        assert out == ""
    laptop.vmnet("up")
    assert laptop.vmnet("list", "--json").json == []  # its deletion was recorded before it had to wait


def test_a_client_that_is_stopped_stops_the_work(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    def states() -> list[str]:
        found = [Path(f"/proc/{pid}/stat").read_text() for pid in processes(laptop)]
        return [text.rpartition(")")[2].split()[0] for text in found]

    with host_locked(laptop):
        command = begin(laptop, "create", "web", "--kind", "veth")
        client = next(filter(is_client, processes(laptop)))
        os.kill(client, signal.SIGTSTP)
        assert wait_until(lambda: states().count("T") == 2, 5)
        os.kill(client, signal.SIGCONT)
        command.send_signal(signal.SIGCONT)  # nsenter stops itself when its child is stopped
        assert wait_until(lambda: states().count("T") == 0, 5)
    out, err = command.communicate(timeout=20)
    assert (command.returncode, err) == (0, "")
    assert "127.1.0.2" in out


def test_what_was_closed_before_stays_closed(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    laptop.vmnet("create", "web", "--kind", "veth")
    for closed in ("<&-", ">&-", "2>&-"):
        done = laptop.execute("sh", "-c", f'exec "$@" {closed}', "sh", *CLIENT, "ip", "web")
        assert (done.code, done.err) == (0, "")
        assert done.out == ("" if closed == ">&-" else "127.1.0.2\n")
    full = laptop.execute("sh", "-c", 'exec "$@" >/dev/full', "sh", *CLIENT, "list")
    assert (full.code, full.err) == (1, "vmnet: the output cannot be written: No space left on device\n")


# Whom it serves


def test_it_serves_nobody_but_its_own(laptop: Laptop, server: "subprocess.Popen[str]", tmp_path: Path) -> None:
    assert is_served(laptop)
    laptop.run("ip", "netns", "add", "other")
    elsewhere = {"VMNET_STATE_DIR": str(tmp_path / "other")}
    assert not is_served(laptop, "nsenter", "--net=/run/netns/other", env=elsewhere)
    assert not is_served(laptop, env=elsewhere)
    assert not is_served(laptop, env={"VMNET_CONFIG": str(tmp_path / "other.toml")})
    assert not is_served(laptop, "unshare", "--mount")
    assert not is_served(laptop, "unshare", "--pid", "--fork", "--mount-proc")
    assert not is_served(laptop, "setpriv", "--bounding-set", "-net_admin")
    assert not is_served(laptop, env={"VMNET_RUN_DIR": str(tmp_path / "empty")})
    # More than a message may have.
    assert not is_served(laptop, env={"FILLER": "x" * 100_000, "MORE": "y" * 100_000})
    copy = tmp_path / "src"
    shutil.copytree(SOURCES, copy)
    assert not is_served(laptop, client=copy)
    assert is_served(laptop)


def test_nobody_but_root_is_given_an_order(laptop: Laptop, tmp_path: Path) -> None:
    need_own_etc()
    laptop.vmnet("carve")
    script = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); os.setuid(4242);"
        " s.bind(sys.argv[1]); s.listen(); print('ready', flush=True); c, _ = s.accept();"
        " c.settimeout(3); print(c.recv(1 << 18), flush=True)"
    )
    open_to_all = laptop.path("/run/open")
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    impostor = laptop.start(sys.executable, "-c", script, "/run/open/server.sock")
    assert impostor.stdout is not None
    assert impostor.stdout.readline() == "ready\n"
    assert not is_served(laptop, env={"VMNET_RUN_DIR": "/run/open"})
    assert impostor.stdout.readline() == "b''\n"
    refused = laptop.execute(*CLIENT, "serve", env={"VMNET_RUN_DIR": "/run/open"})
    assert refused.code == 6
    assert "mode 0777" in refused.err


def test_there_is_one_of_it(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    refused = laptop.vmnet("serve", check=False)
    assert refused.code == 4
    assert "another server is at work" in refused.err
    assert is_served(laptop)
    os.kill(pid_of_server(laptop), signal.SIGTERM)
    assert server.wait(10) == 0
    assert not path_of(laptop).exists()
    assert not is_served(laptop)


def test_newer_files_are_served_by_a_newer_server(laptop: Laptop, tmp_path: Path) -> None:
    laptop.vmnet("carve")
    sources = tmp_path / "src"
    shutil.copytree(SOURCES, sources)
    process = laptop.start(sys.executable, "-IS", str(sources / "vmnet/__main__.py"), "serve")
    assert process.stderr is not None
    assert "serving" in process.stderr.readline()
    assert is_served(laptop, client=sources)
    with (sources / "vmnet/model.py").open("a") as file:
        file.write("\n")
    assert not is_served(laptop, client=sources)
    assert "starting anew" in process.stderr.readline()
    assert "serving" in process.stderr.readline()
    assert process.poll() is None
    assert is_served(laptop, client=sources)


# Its end


def test_killed_in_the_middle_it_is_said_and_put_right(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    laptop.vmnet("create", "web", "--kind", "veth")
    with host_locked(laptop):
        command = begin(laptop, "delete", "web", "--json")
        kill_server(laptop)
        out, err = command.communicate(timeout=10)
        assert command.returncode == 1
        words = ["vmnet: the server ended before this was done", "hint: vmnet up finishes what was begun"]
        assert err.splitlines() == words
        assert '"code": 1' in out
        assert wait_until(lambda: not processes(laptop), 5)
    laptop.vmnet("up")
    assert laptop.vmnet("list", "--json").json == []


def test_it_finishes_what_it_has_begun(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    with host_locked(laptop):
        command = begin(laptop, "create", "web", "--kind", "veth")
        os.kill(pid_of_server(laptop), signal.SIGTERM)
        time.sleep(0.5)
        assert server.poll() is None
    out, err = command.communicate(timeout=20)
    assert (command.returncode, err) == (0, "")
    assert "127.1.0.2" in out
    assert server.wait(10) == 0


def test_idle_connections_are_closed_and_cost_nothing(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    pid = pid_of_server(laptop)
    before = descriptors(pid)
    silent = []
    for _ in range(1000):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(path_of(laptop)))
        silent.append(connection)
    assert is_served(laptop)
    assert laptop.vmnet("create", "web", "--kind", "veth").code == 0
    assert wait_until(lambda: descriptors(pid) <= before + 4, 15)
    assert all(connection.recv(1) == b"" for connection in silent)
    for connection in silent:
        connection.close()
    assert is_served(laptop)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def forks(laptop: Laptop) -> int:
    """Return how many forks the server has, those that wait for work included."""
    return sum(not is_client(pid) for pid in processes(laptop)) - 1


def test_forks_that_are_done_are_few_and_end_when_nobody_asks(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    assert wait_until(lambda: forks(laptop) == 2, 5)
    most = 0
    for number in range(12):
        laptop.vmnet("create", f"web{number}", "--kind", "veth")
        most = max(most, forks(laptop))
    assert 2 < most <= 2 + 4 + 2  # those that wait, those that are done, and who is just ending or beginning
    assert wait_until(lambda: forks(laptop) == 2, 5)
    # One that was given what is not for this server was ready to do it, and is gone; nothing was done.
    assert not is_served(laptop, env={"VMNET_STATE_DIR": str(laptop.folder / "other")})
    assert wait_until(lambda: forks(laptop) == 2, 5)
    assert is_served(laptop)


def test_told_to_stop_it_lets_those_end_that_are_done(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    pid = pid_of_server(laptop)
    for number in range(4):
        laptop.vmnet("create", f"web{number}", "--kind", "veth")
    os.kill(pid, signal.SIGTERM)
    began = time.monotonic()
    assert server.wait(10) == 0
    assert time.monotonic() - began < 5
    assert wait_until(lambda: not processes(laptop), 5)


def test_many_commands_at_once_are_all_done(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    names = [f"n{number}" for number in range(40)]
    started = [laptop.start(*CLIENT, "create", name, "--kind", "veth") for name in names]
    assert [(one.communicate()[1], one.returncode) for one in started] == [("", 0)] * len(names)
    assert {info["state"] for info in laptop.vmnet("list", "--json").json} == {"up"}
    started = [laptop.start(*CLIENT, "delete", name) for name in names]
    assert [(one.communicate()[1], one.returncode) for one in started] == [("", 0)] * len(names)


# Who starts it


def test_a_watcher_has_one_where_no_systemd_does(laptop: Laptop) -> None:
    laptop.vmnet("carve")
    with Watching(laptop) as watcher:
        assert wait_until(lambda: path_of(laptop).exists(), 5)
        assert processes(laptop) == []  # nobody has asked yet
        assert is_served(laptop)
        kill_server(laptop)
        assert wait_until(lambda: is_served(laptop), 15)
        with Watching(laptop):
            assert is_served(laptop)
    assert not path_of(laptop).exists()
    assert wait_until(lambda: not processes(laptop), 5)
    assert "no server" not in watcher.log()


def test_a_watcher_that_is_killed_leaves_no_server(laptop: Laptop) -> None:
    laptop.vmnet("carve")
    with Watching(laptop) as watcher:
        assert wait_until(lambda: path_of(laptop).exists(), 5)
        assert is_served(laptop)
        watcher.kill()
        assert wait_until(lambda: not processes(laptop), 10)
    assert not is_served(laptop)
    with Watching(laptop):
        assert wait_until(lambda: is_served(laptop), 10)


def test_a_watcher_that_is_killed_at_once_leaves_no_server(laptop: Laptop) -> None:
    laptop.vmnet("carve")
    with Watching(laptop) as watcher:
        assert wait_until(lambda: path_of(laptop).exists(), 5)
        command = laptop.start(*CLIENT, "list")
        assert wait_until(lambda: any(not is_client(pid) for pid in processes(laptop)), 10)
        watcher.kill()  # while what it has started imports
        assert wait_until(lambda: not processes(laptop), 10)
    assert command.wait(20) == 0  # the client did it by itself


def test_systemd_may_pass_it_the_socket(laptop: Laptop) -> None:
    laptop.vmnet("carve")
    activate = shutil.which("systemd-socket-activate")
    if activate is None:
        pytest.skip("needs systemd-socket-activate, of systemd")
    names = [f"--setenv={name}" for name in laptop.env if name.startswith("VMNET_")]
    laptop.start(activate, "--seqpacket", f"--listen={path_of(laptop)}", *names, *CLIENT, "serve")
    assert wait_until(path_of(laptop).exists, 10)
    assert is_served(laptop)
    assert is_served(laptop)


def test_systemds_socket_stays_with_the_newer_server(laptop: Laptop, tmp_path: Path) -> None:
    laptop.vmnet("carve")
    activate = shutil.which("systemd-socket-activate")
    if activate is None:
        pytest.skip("needs systemd-socket-activate, of systemd")
    sources = tmp_path / "src"
    shutil.copytree(SOURCES, sources)
    names = [f"--setenv={name}" for name in laptop.env if name.startswith("VMNET_")]
    program = [sys.executable, "-IS", str(sources / "vmnet/__main__.py"), "serve"]
    manager = laptop.start(activate, "--seqpacket", f"--listen={path_of(laptop)}", *names, *program)
    assert wait_until(path_of(laptop).exists, 10)
    assert is_served(laptop, client=sources)
    pid = pid_of_server(laptop)
    with (sources / "vmnet/model.py").open("a") as file:
        file.write("\n")
    assert not is_served(laptop, client=sources)
    assert wait_until(lambda: is_served(laptop, client=sources), 15)
    assert pid_of_server(laptop) == pid
    assert manager.poll() is None


FROM_A_FILE = """
import os, socket, sys
sys.path.append(sys.argv[1])
from vmnet import client
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.settimeout(10)
server.connect(client._address())
words = [client.own_code(), *client._arguments(["list"]), *client._environment()]
request = b"\\0".join((client.MAGIC, client.RUN, *words))
handles = [os.open("/dev/null", os.O_RDWR) for _ in range(3)] + [os.open("/etc/passwd", os.O_RDONLY)]
socket.send_fds(server, [request], handles)
print(server.recv(16))
"""


def test_from_a_folder_that_is_closed_to_root_it_is_the_callers(
    laptop: Laptop, server: "subprocess.Popen[str]"
) -> None:
    assert laptop.run(sys.executable, "-c", FROM_A_FILE, str(SOURCES)) == "b'd'\n"


# libvirt's hooks


def test_libvirts_hooks_are_served(laptop: Laptop, server: "subprocess.Popen[str]") -> None:
    xml = domain(ethernet("vmn-web", MAC), name="webserver").decode()
    words = ("libvirt-hook", "qemu", "vm", "prepare", "begin", "-")
    told = laptop.execute(sys.executable, "-X", "importtime", *CLIENT[1:], *words, stdin=xml)
    assert told.code == 0, told.err
    assert "vmnet.libvirt" not in told.err
    [guest] = laptop.vmnet("list", "--json").json
    assert guest["state"] == "up"
    refused = laptop.execute(*CLIENT, *words, stdin=xml.replace("managed='no'", "managed='yes'"))
    assert refused.code == 1
    assert refused.err.startswith("vmnet: ")
