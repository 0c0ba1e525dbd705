"""The hosts file where the system makes it hard: mounts, owners, attributes, full disks, and writers killed midway.

Each test that mounts does so in a child process with a mount namespace of its own, which goes with the child.
"""

import ctypes
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from vmnet import hostsfile
from vmnet.hostsfile import HostsFile, HostsFileUnwritable, names_in, render
from vmnet.model import Block

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000  # linux/sched.h
_MS_PRIVATE_REC = 0x44000  # linux/mount.h

DEBIAN = b"127.0.0.1\tlocalhost\n127.0.1.1\tlaptop\n"
ONE = {"web.vmnet.internal": "127.1.0.2"}
MORE = {f"{name}.vmnet.internal": str(Block(number).address) for number, name in enumerate(["web", "db", "mail", "x"])}

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def enter_user_namespace() -> None:
    """Make the caller root of a user namespace that knows no uid and no gid but its own."""
    uid, gid = os.geteuid(), os.getegid()
    _checked(_libc.unshare(_CLONE_NEWUSER), "unshare user")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def enter_mount_namespace() -> None:
    if os.geteuid() != 0:
        enter_user_namespace()
    _checked(_libc.unshare(_CLONE_NEWNS), "unshare mounts")
    _checked(_libc.mount(b"none", b"/", None, _MS_PRIVATE_REC, None), "mount private")


def spawn(work: Callable[[], object]) -> tuple[int, int]:
    """Run `work` in a child; return its pid and the end of a pipe that gives its traceback, or nothing."""
    theirs, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            if code:
                os.write(ours, traceback.format_exc().encode())
            os._exit(code)
    os.close(ours)
    return pid, theirs


def reap(pid: int, pipe: int) -> int:
    """Return how the child ended, -N if by signal N; fail with its traceback if it had one."""
    with open(pipe, "rb") as said:
        text = said.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if text:
        pytest.fail(text)
    return code


@cache
def why_no_mounts() -> str:
    pid, pipe = spawn(enter_mount_namespace)
    with open(pipe, encoding="utf-8") as said:
        text = said.read()
    os.waitpid(pid, 0)
    return text.strip().rpartition("\n")[2]


def privately(work: Callable[[], object]) -> None:
    """Run `work` with mounts of its own; skip where the kernel gives none."""
    if reason := why_no_mounts():
        pytest.skip(reason)

    def inside() -> None:
        enter_mount_namespace()
        work()

    assert reap(*spawn(inside)) == 0


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def ordinary(folder: Path) -> Path:
    return folder / "hosts"


def bind_mounted(folder: Path) -> Path:
    """As in a container: /etc is the image's, /etc/hosts is a file from elsewhere."""
    (folder / "elsewhere").write_bytes((folder / "hosts").read_bytes())
    mount("--bind", folder / "elsewhere", folder / "hosts")
    return folder / "hosts"


def in_read_only_folder(folder: Path) -> Path:
    """As in a container with a read-only root: only the file itself can be written."""
    etc = folder / "etc"
    etc.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", "mode=755", "none", etc)
    (etc / "hosts").touch()
    mount("-o", "remount,bind,ro", etc)
    mount("--bind", folder / "hosts", etc / "hosts")
    return etc / "hosts"


Place = Callable[[Path], Path]
PLACES = [ordinary, bind_mounted, in_read_only_folder]
places = pytest.mark.parametrize("place", PLACES)
fixed_places = pytest.mark.parametrize("place", PLACES[1:])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hosts").write_bytes(DEBIAN)
    return tmp_path


@fixed_places
def test_a_file_that_cannot_be_replaced_is_written(folder: Path, place: Place) -> None:
    def work() -> None:
        path = place(folder)
        file, before = HostsFile(path), path.stat()
        for names in (ONE, MORE, ONE, {}):
            file.update(names)
            assert path.read_bytes() == render(DEBIAN, names)
            assert file.difference(names) is None
            assert os.listdir(path.parent) == sorted(set(os.listdir(path.parent)) - {".hosts.vmnet"})
        after = path.stat()
        assert (after.st_ino, after.st_mode, after.st_uid) == (before.st_ino, before.st_mode, before.st_uid)

    privately(work)


@fixed_places
def test_a_file_that_we_made_and_that_cannot_go_is_emptied(folder: Path, place: Place) -> None:
    def work() -> None:
        (folder / "hosts").write_bytes(render(b"", ONE, made=True))
        path = place(folder)
        HostsFile(path).update({})
        assert path.read_bytes() == b""
        assert HostsFile(path).difference({}) is None

    privately(work)


@fixed_places
def test_sixteen_writers_in_place_leave_the_names_of_all(folder: Path, place: Place) -> None:
    def work() -> None:
        path = place(folder)
        records = folder / "records"
        records.mkdir()

        def recorded() -> dict[str, str]:
            return {f"{number}.vmnet.internal": str(Block(int(number)).address) for number in os.listdir(records)}

        def add(numbers: range) -> None:
            for number in numbers:
                (records / str(number)).touch()
                HostsFile(path).update(recorded)

        children = [spawn(partial(add, range(first, first + 4))) for first in range(0, 64, 4)]
        assert [reap(*child) for child in children] == [0] * 16
        assert path.read_bytes() == render(DEBIAN, recorded())
        assert len(recorded()) == 64

    privately(work)


def at_line(chosen: Callable[[int, FrameType], bool], act: Callable[[], object], work: Callable[[], object]) -> int:
    """Do `work` in a child, and `act` before the chosen of the lines it runs while it writes; return how it ended.

    Lines of hostsfile count from the function that takes the lock: what stands above it only reads and computes.
    """
    first = hostsfile._take_turn.__code__.co_firstlineno

    def inside() -> None:
        met = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal met
            if frame.f_code.co_filename != hostsfile.__file__ or frame.f_code.co_firstlineno < first:
                return None
            met += event == "line"
            if event == "line" and chosen(met, frame):
                act()
            return trace

        sys.settrace(trace)
        work()

    return reap(*spawn(inside))


def killed_before_line(number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child that is killed before the `number`th of those lines; return False if it has fewer."""
    return at_line(lambda met, frame: met == number, lambda: os.kill(os.getpid(), signal.SIGKILL), work) != 0


def interrupted_before_line(number: int, work: Callable[[], object]) -> bool:
    """The same with Ctrl-C, which lets the child clean up."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def until_interrupted() -> None:
        try:
            work()
        except KeyboardInterrupt:
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGKILL)

    return at_line(lambda met, frame: met == number, interrupt, until_interrupted) != 0


def lines(first: int, count: int) -> bytes:
    return b"".join(b"10.%d.%d.9 h%d\n" % (number >> 8, number & 255, number) for number in range(first, first + count))


# The block lies across a page's end, and more pages follow.
BEFORE, AFTER = lines(1000, 246), lines(2000, 500)
OTHERS = set((BEFORE + AFTER).splitlines())
BLOCK_IN_THE_MIDDLE = {names: BEFORE + render(b"", held) + AFTER for names, held in (("one", ONE), ("more", MORE))}


@places
@pytest.mark.parametrize(("was", "held"), [("one", MORE), ("more", ONE), ("one", {})], ids=["grow", "shrink", "remove"])
def test_whenever_a_writer_is_killed_the_next_one_puts_it_right(
    folder: Path, place: Place, was: str, held: dict[str, str]
) -> None:
    old = BLOCK_IN_THE_MIDDLE[was]
    new = render(old, held)
    assert render(old, {}) == BEFORE + AFTER
    assert len(BEFORE) < 4096 < len(render(BEFORE, ONE))

    def work() -> None:
        (folder / "hosts").write_bytes(old)
        path = place(folder)
        with suppress(OSError):  # without the machine's own root there is no other owner
            os.chown(path, 1234, 5678)
        file, number, left_behind = HostsFile(path), 1, 0
        while killed_before_line(number, lambda: file.update(held)):
            content = path.read_bytes()
            left_behind += (path.parent / ".hosts.vmnet").exists()
            if place is ordinary:
                assert content in (old, new), f"torn before line {number}"
            assert set(content.splitlines()) >= OTHERS, f"lost before line {number}"
            file.update(held)
            assert file.difference(held) is None
            if place is in_read_only_folder:
                assert set(file.read().splitlines()) >= OTHERS
                assert names_in(file.read()) == held
            else:
                assert file.read() == new
            path.write_bytes(old)
            number += 1
        assert file.read() == new
        assert number > 30
        assert (left_behind > 10) == (place is not in_read_only_folder)
        assert not (path.parent / ".hosts.vmnet").exists()

    privately(work)


def test_whenever_its_maker_is_killed_the_file_is_whole_or_missing(folder: Path) -> None:
    path = ordinary(folder)
    path.unlink()
    number = 1
    while killed_before_line(number, lambda: HostsFile(path).update(ONE)):
        assert not path.exists() or path.read_bytes() == render(b"", ONE, made=True)
        HostsFile(path).update(ONE)
        assert os.listdir(folder) == ["hosts"]
        assert not killed_before_line(10_000, lambda: HostsFile(path).update({}))
        assert os.listdir(folder) == []
        number += 1
    assert number > 30


@pytest.mark.parametrize("place", [ordinary, bind_mounted])
def test_whenever_a_writer_is_interrupted_the_next_one_puts_it_right(folder: Path, place: Place) -> None:
    old = BLOCK_IN_THE_MIDDLE["one"]

    def work() -> None:
        (folder / "hosts").write_bytes(old)
        path = place(folder)
        file, number = HostsFile(path), 1
        while interrupted_before_line(number, lambda: file.update(MORE)):
            whole = path.read_bytes() in (old, render(old, MORE))
            assert whole or (path.parent / ".hosts.vmnet").exists(), f"no journal before line {number}"
            file.update(MORE)
            assert file.read() == render(old, MORE)
            assert not (path.parent / ".hosts.vmnet").exists()
            path.write_bytes(old)
            number += 1
        assert number > 30

    privately(work)


@fixed_places
def test_what_others_append_meanwhile_is_kept(folder: Path, place: Place) -> None:
    def work() -> None:
        path = place(folder)

        def append() -> None:
            # Like a start of our block: a journal of what was not begun would take it for one.
            if path.read_bytes() == DEBIAN:
                path.write_bytes(DEBIAN + b"#")

        writer = "_write_without_temp" if place is in_read_only_folder else "_write_in_place"
        update = partial(HostsFile(path).update, MORE)
        assert at_line(lambda _, frame: frame.f_code.co_name == writer, append, update) == 0
        assert path.read_bytes() == render(DEBIAN + b"#", MORE)

    privately(work)


@places
def test_one_writer_at_a_time(folder: Path, place: Place) -> None:
    def work() -> None:
        path = place(folder)
        others: list[tuple[int, int]] = []

        def names() -> dict[str, str]:
            """Be asked by `difference`, and then, holding the lock, give another writer the time to pass it."""
            if len(asked) == 1:
                others.append(spawn(lambda: HostsFile(path).update(MORE)))
                time.sleep(0.2)
                assert path.read_bytes() == DEBIAN
            asked.append(True)
            return ONE

        asked: list[bool] = []
        HostsFile(path).update(names)
        assert [reap(*other) for other in others] == [0]
        assert path.read_bytes() == render(DEBIAN, MORE)

    privately(work)


def test_the_lock_ends_with_the_update_whoever_was_forked_meanwhile(folder: Path) -> None:
    def work() -> None:
        path = in_read_only_folder(folder)
        theirs, ours = os.pipe()
        asleep: list[tuple[int, int]] = []

        def sleep_until_closed() -> None:
            os.close(ours)
            os.read(theirs, 1)

        def names() -> dict[str, str]:
            asleep.append(spawn(sleep_until_closed))
            return ONE

        HostsFile(path).update(names)
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(ours)
        assert [reap(*child) for child in asleep] == [0, 0]

    privately(work)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("place", "calls"),
    [
        (ordinary, "pwrite64 fsync rename"),
        (bind_mounted, "pwrite64 fsync rename pwrite64 fsync pwrite64 pwrite64 ftruncate fsync unlink"),
    ],
)
def test_what_is_written_is_on_the_disk_before_the_next_step(folder: Path, place: Place, calls: str) -> None:
    """Else a power cut could leave the new name without the content, or half a file without its journal."""
    program = "import sys; from pathlib import Path; from vmnet.hostsfile import HostsFile\n"
    program += "HostsFile(Path(sys.argv[1])).update({'web.vmnet.internal': '127.1.0.2'})"

    def work() -> None:
        path, log = place(folder), folder / "log"
        traced = "--trace=pwrite64,fsync,ftruncate,/^rename,/^unlink"
        command: list[str | Path] = ["strace", "-qq", "-o", log, traced, sys.executable, "-c", program, path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run(command, check=True, env=environment)
        made = [line.partition("(")[0] for line in log.read_text().splitlines()]
        journal = made.index("ftruncate") if place is bind_mounted else len(made)
        assert made[:journal] + made[journal + 1 :] == calls.split()

    privately(work)


@pytest.mark.parametrize("place", [ordinary, in_read_only_folder])
def test_a_write_that_stops_in_the_middle_loses_nothing(folder: Path, place: Place) -> None:
    """The kernel writes up to the limit and then kills: a torn write."""

    def work() -> None:
        old = BLOCK_IN_THE_MIDDLE["one"]
        (folder / "hosts").write_bytes(old)
        path = place(folder)

        def limited() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) + 7, len(old) + 7))
            HostsFile(path).update(MORE)

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        assert reap(*spawn(limited)) == -signal.SIGXFSZ
        torn = path.read_bytes()
        assert torn == old if place is ordinary else torn.startswith(old)
        assert (folder / ".hosts.vmnet").exists() == (place is ordinary)
        HostsFile(path).update(MORE)
        assert names_in(path.read_bytes()) == MORE
        assert set(path.read_bytes().splitlines()) >= OTHERS
        assert not (folder / ".hosts.vmnet").exists()

    privately(work)


def test_what_was_edited_after_a_kill_is_not_written_over(folder: Path) -> None:
    old = BLOCK_IN_THE_MIDDLE["one"]

    def work() -> None:
        (folder / "hosts").write_bytes(old)
        path = bind_mounted(folder)
        file, number, torn = HostsFile(path), 1, 0
        while killed_before_line(number, lambda: file.update(MORE)):
            torn += path.read_bytes() not in (old, render(old, MORE))
            path.write_bytes(b"10.0.0.5 printer\n")
            file.update(MORE)
            assert path.read_bytes() == render(b"10.0.0.5 printer\n", MORE)
            path.write_bytes(old)
            number += 1
        assert torn > 5

    privately(work)


def tiny_disk(folder: Path) -> Path:
    disk = folder / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=12k", "none", disk)
    (disk / "hosts").write_bytes(DEBIAN)
    return disk


MANY = {f"guest-{number}.vmnet.internal": str(Block(number).address) for number in range(1000)}


@pytest.mark.parametrize("bound", [False, True], ids=["replaced", "written in place"])
def test_a_full_disk_leaves_everything_as_it_was(folder: Path, bound: bool) -> None:
    def work() -> None:
        disk = tiny_disk(folder)
        path = disk / "hosts"
        if bound:
            path = folder / "hosts"
            mount("--bind", disk / "hosts", path)
        with pytest.raises(HostsFileUnwritable, match=f"{path}: No space left on device"):
            HostsFile(path).update(MANY)
        assert path.read_bytes() == DEBIAN
        assert set(os.listdir(path.parent)) <= {"hosts", "disk"}
        HostsFile(path).update(ONE)
        assert path.read_bytes() == render(DEBIAN, ONE)

    privately(work)


def test_a_read_only_file_system_is_said_to_be_one(folder: Path) -> None:
    def work() -> None:
        disk = tiny_disk(folder)
        HostsFile(disk / "hosts").update(ONE)
        mount("-o", "remount,bind,ro", disk)
        file = HostsFile(disk / "hosts")
        assert file.difference(ONE) is None
        for likely in (False, True):
            assert file.update(ONE, likely=likely) is None
            for held in (MORE, {}):
                assert file.difference(held) is not None
                with pytest.raises(HostsFileUnwritable, match=f"{disk / 'hosts'}: Read-only file system"):
                    file.update(held, likely=likely)
        assert file.read() == render(DEBIAN, ONE)
        missing = HostsFile(disk / "missing")
        assert missing.difference({}) is None
        with pytest.raises(HostsFileUnwritable, match=f"{disk / 'missing'}: Read-only file system"):
            missing.update(ONE)

    privately(work)


@pytest.mark.root
@pytest.mark.parametrize("flag", ["i", "a"], ids=["immutable", "append-only"])
def test_an_immutable_file_is_said_to_be_one(folder: Path, flag: str) -> None:
    path = folder / "hosts"
    subprocess.run(["chattr", f"+{flag}", path], check=True)
    try:
        with pytest.raises(HostsFileUnwritable, match=f"{path}: Operation not permitted"):
            HostsFile(path).update(ONE)
        assert path.read_bytes() == DEBIAN
        assert os.listdir(folder) == ["hosts"]
    finally:
        subprocess.run(["chattr", f"-{flag}", path], check=True)


@pytest.mark.root
def test_a_user_without_the_right_is_told(folder: Path) -> None:
    def work() -> None:
        path = Path("/mnt/hosts")  # nobody may pass through the folders above `folder`
        mount("-t", "tmpfs", "-o", "mode=755", "none", path.parent)
        path.write_bytes(DEBIAN)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        file = HostsFile(path)
        assert file.difference({}) is None
        with pytest.raises(HostsFileUnwritable, match="Permission denied"):
            file.update(ONE)
        assert file.read() == DEBIAN

    privately(work)


@pytest.mark.root
def test_owner_mode_and_attributes_stay(folder: Path) -> None:
    path = folder / "hosts"
    os.chown(path, 1234, 5678)
    path.chmod(0o640)
    attributes = {"user.note": b"mine\0", "trusted.vmnet-test": b"1", "security.vmnet-test": b"label"}
    for name, value in attributes.items():
        os.setxattr(path, name, value)
    for held in (ONE, {}):
        before = path.stat()
        HostsFile(path).update(held)
        after = path.stat()
        assert after.st_ino != before.st_ino
        assert (after.st_uid, after.st_gid, after.st_mode) == (1234, 5678, before.st_mode)
        assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == attributes


def acl(path: Path) -> str:
    shown = subprocess.run(["getfacl", "-n", "-p", path], check=True, capture_output=True, text=True)
    return shown.stdout


@pytest.fixture
def setfacl(folder: Path) -> Callable[..., object]:
    if shutil.which("setfacl") is None:
        pytest.skip("setfacl is not installed")
    probe = subprocess.run(["setfacl", "-m", f"u:{os.geteuid()}:rw", folder / "hosts"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"no ACLs on this file system: {probe.stderr}")
    subprocess.run(["setfacl", "-b", folder / "hosts"], check=True)
    return lambda *arguments: subprocess.run(["setfacl", *arguments], check=True)


def test_an_acl_stays(folder: Path, setfacl: Callable[..., object]) -> None:
    path = folder / "hosts"
    setfacl("-m", f"u:{os.geteuid()}:rw,g:{os.getegid()}:r,m::rw", path)
    before, inode = acl(path), path.stat().st_ino
    assert f"user:{os.geteuid()}:rw-" in before
    HostsFile(path).update(ONE)
    assert path.stat().st_ino != inode
    assert acl(path) == before


def test_the_default_acl_of_the_folder_is_not_picked_up(folder: Path, setfacl: Callable[..., object]) -> None:
    path = folder / "hosts"
    setfacl("-d", "-m", f"u:{os.geteuid()}:rwx", folder)
    before, inode = acl(path), path.stat().st_ino
    HostsFile(path).update(ONE)
    assert path.stat().st_ino != inode
    assert acl(path) == before


@pytest.mark.root
def test_a_file_whose_owner_has_no_number_here_is_written_in_place(folder: Path) -> None:
    path = folder / "hosts"
    os.chown(path, 1234, 5678)
    path.chmod(0o666)
    before = path.stat()

    def inside() -> None:
        enter_user_namespace()
        HostsFile(path).update(ONE)

    assert reap(*spawn(inside)) == 0
    after = path.stat()
    assert path.read_bytes() == render(DEBIAN, ONE)
    assert (after.st_ino, after.st_uid, after.st_gid, after.st_mode) == (before.st_ino, 1234, 5678, before.st_mode)
    assert os.listdir(folder) == ["hosts"]
