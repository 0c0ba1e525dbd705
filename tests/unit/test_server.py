"""What the server reads of root's clients, whom it may serve, and how it hears that its files have changed."""

import os
import shutil
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmnet
from vmnet import client
from vmnet.client import ASK, MAGIC, RUN
from vmnet.model import Conflict, KernelRefused, NotPermitted
from vmnet.server.jobs import parse_order, parse_question
from vmnet.server.listening import Listener, passed_socket
from vmnet.server.peers import peer_of, standing_of

SOURCES = Path(vmnet.__file__).parent.parent
WORDS = st.binary(max_size=30).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"")))
NAMES = st.text("ABCdef_ é", min_size=1, max_size=8)
linux = pytest.mark.skipif(sys.platform != "linux", reason="the server is for Linux")


@given(st.lists(WORDS, max_size=5), st.dictionaries(NAMES, WORDS, max_size=5))
def test_an_order_says_what_the_client_was_called_with(words: list[str], environment: dict[str, str]) -> None:
    encoded = [f"{name}={value}".encode(errors="surrogateescape") for name, value in environment.items()]
    request = b"\0".join((MAGIC, RUN, b"1:2:3", *client._arguments(words), *encoded))
    order = parse_order(request)
    assert order is not None
    assert (list(order.words), dict(order.environment), order.code) == (words, environment, b"1:2:3")


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda rest: b"\0".join((MAGIC, RUN, rest))))
def test_any_bytes_are_an_order_or_none(data: bytes) -> None:
    order = parse_order(data)
    assert order is None or all(order.environment)
    assert parse_question(data) is None or data.startswith(MAGIC + b"\0" + ASK)


@pytest.mark.parametrize(
    ("words", "served"),
    [
        ("create web", True), ("ip web", True), ("apply -", True), ("libvirt-hook qemu vm start begin -", True),
        ("", False), ("--version", False), ("exec web -- ls", False), ("run web -- ls", False), ("watch", False),
        ("serve", False), ("doctor", False), ("hooks install", False), ("show web --seed=x", False),
        ("apply /dev/fd/63", False), ("apply /dev/stdin", False), ("create w --netns /proc/self/fd/3", False),
    ],
)  # fmt: skip
def test_what_a_server_does(words: str, served: bool) -> None:
    assert client.is_for_server(words.split()) is served


def test_the_client_imports_next_to_nothing() -> None:
    code = "import sys; before = set(sys.modules); import vmnet.client; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-IS", "-c", f"import sys; sys.path.append({str(SOURCES)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["vmnet", "vmnet.client"], done.stderr


@linux
def test_it_serves_only_who_is_as_it_is() -> None:
    own = standing_of("self")
    assert own is not None
    root = replace(own, uids=(b"0",) * 4, capabilities=0b111)
    assert root.serves(root)
    assert root.serves(replace(root, umask=0o777))
    assert root.serves(replace(root, capabilities=0b1111))
    assert not root.serves(replace(root, capabilities=0b011))
    assert not root.serves(replace(root, uids=(b"1000", b"0", b"0", b"0")))
    assert not root.serves(replace(root, uids=()))
    for number in range(len(root.places)):
        other = list(root.places)
        other[number] = (0, 0)
        assert not root.serves(replace(root, places=tuple(other)))
    assert standing_of(1 << 22) is None


@linux
def test_the_kernel_tells_who_connects() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert peer_of(ours) == (os.getpid(), os.geteuid(), os.getegid())


@linux
def test_a_socket_is_made_whole_and_taken_away(tmp_path: Path) -> None:
    run = tmp_path / ("long" * 40) / "run"  # longer than an address of a socket may be
    run.mkdir(parents=True)
    path = run / client.SOCKET
    path.symlink_to(tmp_path / "elsewhere")
    with Listener(run, None) as listener:
        assert path.is_socket()
        assert path.stat().st_mode & 0o777 == 0o600
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        with pytest.raises(Conflict), Listener(run, None):
            pass
        assert path.is_socket()
    assert not path.exists()
    assert not (tmp_path / "elsewhere").exists()
    with Listener(run, None):
        path.unlink()
        path.touch()
    assert path.is_file()  # it is somebody else's


@linux
@pytest.mark.parametrize("wrong", ["mode", "link", "file"])
def test_a_folder_that_others_may_change_is_refused(tmp_path: Path, wrong: str) -> None:
    run = tmp_path / "run"
    if wrong == "mode":
        run.mkdir()
        run.chmod(0o777)
    elif wrong == "link":
        run.symlink_to(tmp_path)
    else:
        run.touch()
    with pytest.raises((NotPermitted, KernelRefused)), Listener(run, None):
        pass


@linux
def test_what_is_passed_must_be_such_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert passed_socket() is None
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert passed_socket() is None
    with (tmp_path / "file").open("w") as file, pytest.raises(KernelRefused):
        passed_socket(os.dup(file.fileno()))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other, pytest.raises(KernelRefused):
        passed_socket(os.dup(other.fileno()))
    with pytest.raises(KernelRefused):
        passed_socket(987)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as right:
        right.bind(str(tmp_path / "s"))
        right.listen()
        passed = passed_socket(os.dup(right.fileno()))
        assert passed is not None
        passed.close()


FRESH = """
import sys
sys.path.insert(0, sys.argv[1])
from vmnet.freshness import Freshness
fresh = Freshness(listens=sys.argv[2] == "True")
for line in sys.stdin:
    print(fresh.is_fresh(float(line)), fresh.due, flush=True)
"""


@pytest.mark.parametrize("listens", [False, pytest.param(True, marks=linux)])
@pytest.mark.parametrize("deed", ["content", "replaced", "gone", "swapped"])
def test_a_change_of_a_file_is_noticed_at_once(tmp_path: Path, deed: str, listens: bool) -> None:
    folder = tmp_path / "src"
    shutil.copytree(SOURCES / "vmnet", folder / "vmnet", ignore=shutil.ignore_patterns("__pycache__"))
    process = subprocess.Popen(
        [sys.executable, "-IB", "-c", FRESH, str(folder), str(listens)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(now: float) -> str:
        print(now, file=process.stdin, flush=True)
        return process.stdout.readline().strip()  # type: ignore[union-attr]

    assert ask(1) == "True None"
    file = folder / "vmnet/plan.py"
    file.read_text()
    assert ask(2) == "True None"
    if deed == "content":
        with file.open("a") as appended:
            appended.write("\n")
    elif deed == "replaced":
        (tmp_path / "new").write_text(file.read_text())
        (tmp_path / "new").rename(file)
    elif deed == "gone":
        file.unlink()
    else:
        folder.rename(tmp_path / "old")
        shutil.copytree(SOURCES / "vmnet", folder / "vmnet", ignore=shutil.ignore_patterns("__pycache__"))
    assert ask(3) == "False 5.0"
    assert ask(4) == "False 5.0"
    (folder / "vmnet/model.py").touch()
    assert ask(4.5) == "False 6.5"
    process.communicate()


def test_credentials_are_what_the_client_takes_them_for() -> None:
    assert struct.pack("iII", 7, 0, 9)[4:8] == bytes(4)
