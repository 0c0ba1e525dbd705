"""The block of names: laws over arbitrary files, then what a user of the hosts file would expect."""

import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from socket import inet_aton
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from netaddr import IPAddress

from vmnet import hostsfile
from vmnet.hostsfile import Change, Changes, HostsFile, HostsFileUnwritable, amend, names_in, render
from vmnet.model import POOL_BLOCKS, Block, UsageError, block_of

BEGIN, END = b"# BEGIN vmnet\n", b"# END vmnet\n"
WEB = b"127.1.0.2\tweb.vmnet.internal\n"
DB = b"127.1.0.6\tdb.vmnet.internal\n"
NAMES = {"web.vmnet.internal": "127.1.0.2", "db.vmnet.internal": "127.1.0.6"}
DEBIAN = b"127.0.0.1\tlocalhost\n127.0.1.1\tlaptop\n\n::1\tlocalhost ip6-localhost\n"

labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
hostnames = st.builds(
    lambda name, domain: f"{name}.{domain}", labels, st.sampled_from(["vmnet.internal", "test", "a-b.Example.org"])
)
addresses = st.integers(0, POOL_BLOCKS - 1).map(lambda number: str(Block(number).address))
names = st.dictionaries(hostnames, addresses, max_size=6)
one_name_each = st.lists(
    st.tuples(addresses, hostnames), max_size=3, unique_by=(lambda one: one[0], lambda one: one[1])
)
changes = st.builds(
    lambda gone, new: {**dict.fromkeys(gone), **dict(new)}, st.lists(addresses, max_size=2), one_name_each
)
some_names = st.dictionaries(hostnames, addresses, min_size=1, max_size=6)

LINES = [
    b"",
    b"\r",
    b"\0",
    b"127.0.0.1 localhost",
    b"127.0.0.1\tlocalhost.localdomain",
    b"10.0.0.5 printer\r",
    b"\xff\xfe\x80",
    b"127.1.0.2\tmine.vmnet.internal",
    b"127.1.0.2\tmine.vmnet.internal alias",
    b"127.1.0.3\tmine.vmnet.internal",
    b"127.1.0.2\tmine",
    b" # END vmnet",
    b"# END vmnet2",
    b"# END vmnet10.0.0.1 foo",
    b"x# BEGIN vmnet",
    b"# BEGIN vmnet (some other note)",
]
MARKERS = [
    b"# BEGIN vmnet",
    b"# BEGIN vmnet (no newline before)",
    b"# BEGIN vmnet (made this file)",
    b"# END vmnet",
    b"# END vmnet\r",
    b"# BEGIN vmnet \t",
]


def is_marker(line: bytes) -> bool:
    return line.rstrip(b" \t\r") in MARKERS


def has_no_marker(content: bytes) -> bool:
    return not any(is_marker(line) for line in content.split(b"\n"))


def files(lines: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.lists(st.one_of(st.sampled_from(lines), st.binary(max_size=20)), max_size=12).map(b"\n".join)


foreign = st.one_of(files(LINES), st.binary()).filter(has_no_marker)
damaged = files([*LINES, *MARKERS, *MARKERS, WEB[:-1], DB[:-1]])


@given(foreign, names)
@example(b"127.0.0.1 localhost", NAMES)
@example(b"\n", NAMES)
@example(b"\r", NAMES)
def test_without_names_the_file_is_what_it_was(content: bytes, held: dict[str, str]) -> None:
    assert render(render(content, held), {}) == content


@given(foreign, some_names)
def test_the_block_reads_back(content: bytes, held: dict[str, str]) -> None:
    assert names_in(render(content, held)) == held
    assert names_in(content) == {}


@given(damaged, names)
def test_a_second_rendering_changes_nothing(content: bytes, held: dict[str, str]) -> None:
    once = render(content, held)
    assert render(once, held) == once
    assert names_in(once) == held


@given(foreign, foreign, foreign, some_names, names)
def test_only_the_last_names_count_whatever_others_edit_outside(
    content: bytes, before: bytes, after: bytes, first: dict[str, str], second: dict[str, str]
) -> None:
    def edit(rendered: bytes) -> bytes:
        begin = rendered.index(b"# BEGIN vmnet")
        return before + b"\n" + rendered[begin:] + after

    assert render(edit(render(content, first)), second) == render(edit(render(content, {"x.y": "127.1.0.2"})), second)
    assert render(render(content, first), second) == render(content, second)


@given(foreign, foreign, some_names)
def test_the_lines_of_others_around_the_block_stay_where_they_are(
    before: bytes, after: bytes, held: dict[str, str]
) -> None:
    block = render(b"", held)
    assert render(before + b"\n" + block + after, {}) == before + b"\n" + after


@given(damaged, names)
def test_no_line_of_others_is_ever_lost_or_moved_past_another(content: bytes, held: dict[str, str]) -> None:
    def others(text: bytes) -> list[bytes]:
        kept = [line for line in text.split(b"\n") if not is_marker(line)]
        return [line for line in kept if line and line.rstrip(b"\r") not in (WEB[:-1], DB[:-1])]

    def known(line: bytes) -> bool:
        return names_in(BEGIN + line + b"\n" + END) == {}

    assert [line for line in others(render(content, {})) if known(line)] == [x for x in others(content) if known(x)]


@given(foreign, foreign, names, changes)
@example(b"", b"", NAMES, {"127.1.0.2": None, "127.1.0.6": None})
@example(b"a", b"", {}, {"127.1.0.2": "web.test"})
@example(b"", b"", NAMES, {"127.1.0.2": "new.test", "127.1.0.10": "x.test", "127.1.0.14": None})
def test_a_change_is_what_a_rendering_of_the_changed_names_is(
    content: bytes, after: bytes, held: dict[str, str], change: dict[str, str | None]
) -> None:
    rendered = render(content, held)
    file = rendered + after if held else rendered
    # A guest has one name, and a name one guest.
    wanted = {name: address for name, address in held.items() if address not in change}
    new = {name: address for address, name in change.items() if name and name not in wanted}
    change = {address: name if new.get(name or "") == address else None for address, name in change.items()}
    assert amend(file, Changes(change, lambda: wanted | new)) == render(file, wanted | new)


@given(damaged, names, changes)
def test_a_change_of_a_damaged_file_loses_nothing_and_mends_it(
    content: bytes, others: dict[str, str], change: dict[str, str | None]
) -> None:
    new = {name: address for address, name in change.items() if name}
    every = {name: address for name, address in others.items() if address not in change and name not in new} | new
    amended = amend(content, Changes(change, lambda: every))
    assert render(amended, {}) == render(content, {})
    assert amend(amended, Changes(change, lambda: every)) == amended
    if hostsfile._block(content) is None:
        assert amended == render(content, every)
    elif hostsfile._block(amended):
        assert {name: address for name, address in names_in(amended).items() if address in change} == new
    else:
        assert (new, names_in(amended)) == ({}, {})


def test_a_line_of_others_far_from_the_change_stays_until_all_names_are_written() -> None:
    held = {f"n{number}.vmnet.internal": str(Block(number).address) for number in range(64)}
    lines = render(DEBIAN, held).splitlines(keepends=True)
    printer = b"10.0.0.5\tprinter.example\n"
    file = b"".join([*lines[:-2], printer, *lines[-2:]])
    every = {**held, "n0.vmnet.internal": "127.200.0.2"}
    changed = amend(file, Changes({"127.1.0.2": "new.vmnet.internal"}, lambda: every))
    assert changed == file.replace(b"n0.vmnet.internal", b"new.vmnet.internal")
    near = amend(file, Changes({held["n63.vmnet.internal"]: "new.vmnet.internal"}, lambda: held))
    assert near == render(file, held) == render(DEBIAN, held) + printer


def test_a_change_with_a_thousand_guests_looks_at_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {f"n{number}.vmnet.internal": str(Block(number).address) for number in range(1000)}
    file = render(DEBIAN, held)
    looked_at = []

    def address_of(line: bytes) -> bytes:
        looked_at.append(line)
        return inet_aton(line.partition(b"\t")[0].decode())

    monkeypatch.setattr(hostsfile, "_address_of", address_of)
    amended = amend(file, Changes({"127.1.8.2": None}, dict))
    assert len(looked_at) < 40
    assert len(amended.splitlines()) == len(file.splitlines()) - 1


def test_one_line_a_guest_sorted_by_address() -> None:
    held = {"c.vmnet.internal": "127.10.0.2", "b.vmnet.internal": "127.2.0.2", "a.vmnet.internal": "127.2.0.10"}
    assert render(DEBIAN, held) == DEBIAN + (
        b"# BEGIN vmnet\n"
        b"127.2.0.2\tb.vmnet.internal\n127.2.0.10\ta.vmnet.internal\n127.10.0.2\tc.vmnet.internal\n"
        b"# END vmnet\n"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\n" + BEGIN + WEB + b"10.0.0.5 printer\n" + DB + END + b"z\n", b"a\n10.0.0.5 printer\nz\n"),
        (b"a\n" + BEGIN + WEB + DB + b"10.0.0.5 printer\n" + WEB, b"a\n10.0.0.5 printer\n" + WEB),
        (b"a\n" + BEGIN + WEB + DB, b"a\n"),
        (b"a\n" + BEGIN + WEB + DB[:-1], b"a\n"),
        (b"a\n" + WEB + b"b\n" + DB + END + b"z\n", b"a\n" + WEB + b"b\nz\n"),
        (b"a\n" + END + b"z\n", b"a\nz\n"),
        (b"a\n" + (BEGIN + WEB + END) * 2 + b"z\n", b"a\nz\n"),
        (b"a\n" + BEGIN + WEB + b"b\n" + BEGIN + DB + b"c\n" + END + b"z\n", b"a\nb\nc\nz\n"),
        (b"a\n" + BEGIN + WEB + END + b"b\n" + DB + b"c\n" + END, b"a\nb\n" + DB + b"c\n"),
        (b"a\n" + BEGIN + b"127.1.0.2\tweb.vmnet.internal mine\n" + END, b"a\n127.1.0.2\tweb.vmnet.internal mine\n"),
        ((b"a\n" + BEGIN + WEB + END).replace(b"\n", b"\r\n"), b"a\r\n"),
        (b"a\n" + BEGIN + WEB + END[:-1] + b"10.0.0.1 foo\n", b"a\n# END vmnet10.0.0.1 foo\n"),
        (b"a\n# BEGIN vmnet (no newline before)\n" + WEB + END + b"z", b"a\nz"),
    ],
    ids=[
        "edited inside",
        "no end",
        "no end, nothing after",
        "cut off",
        "no begin",
        "end alone",
        "doubled",
        "doubled, first without end",
        "doubled, second without begin",
        "line extended",
        "CRLF",
        "appended to the end marker",
        "appended after a missing newline",
    ],
)
def test_a_damaged_block_costs_nobody_a_line(content: bytes, expected: bytes) -> None:
    assert render(content, {}) == expected


def test_the_block_stays_in_its_place() -> None:
    content = b"a\n" + BEGIN + WEB + END + b"z\n"
    assert render(content, {"db.vmnet.internal": "127.1.0.6"}) == b"a\n" + BEGIN + DB + END + b"z\n"


def test_every_guest_address_and_no_other_is_taken() -> None:
    def takes(address: str) -> bool:
        try:
            return names_in(render(b"", {"a.b": address})) == {"a.b": address}
        except ValueError:
            return False

    def is_a_guests(address: str) -> bool:
        try:
            return block_of(IPAddress(address)).address == IPAddress(address)
        except UsageError:
            return False

    varied = [
        *(f"127.{octet}.0.2" for octet in range(256)),
        *(f"127.1.{octet}.2" for octet in range(256)),
        *(f"127.1.0.{octet}" for octet in range(256)),
        "126.1.0.2",
        "247.1.0.2",
    ]
    assert [address for address in varied if takes(address)] == [address for address in varied if is_a_guests(address)]


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("a.b\n10.0.0.1 bank.example", "127.1.0.2"),
        ("a.b # END vmnet", "127.1.0.2"),
        ("a.b c.d", "127.1.0.2"),
        ("a.b\r", "127.1.0.2"),
        ("a", "127.1.0.2"),
        ("", "127.1.0.2"),
        ("ä.b", "127.1.0.2"),
        ("\udc80.b", "127.1.0.2"),
        ("a.b", "127.1.0.2\n127.1.0.6"),
        ("a.b\n127.1.0.6\tc.d", "127.1.0.2"),
        ("a.b", "127.01.0.2"),
        ("a.b", "127.1.2"),
        ("a.b", "::1"),
        ("a.b", "127.0.0.2"),
    ],
)
def test_what_would_not_be_recognised_later_is_refused(name: str, address: str) -> None:
    with pytest.raises(ValueError, match=r"is not a guest's line|surrogates not allowed"):
        render(DEBIAN, {name: address})


def test_a_hundred_thousand_guests_fit() -> None:
    held = {f"guest-{number}.vmnet.internal": str(Block(number).address) for number in range(100_000)}
    content = render(DEBIAN, held)
    assert content.count(b"\n") == DEBIAN.count(b"\n") + 2 + len(held)
    assert names_in(content) == held
    assert render(content, {}) == DEBIAN


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_bytes(DEBIAN)
    return path


def test_update_writes_names_and_takes_them_away(hosts: Path) -> None:
    file = HostsFile(hosts)
    assert file.difference({}) is None
    assert file.difference(NAMES) is not None
    file.update(NAMES)
    assert file.read() == hosts.read_bytes() == render(DEBIAN, NAMES)
    assert file.difference(NAMES) is None
    assert file.difference({}) is not None
    file.update({})
    assert hosts.read_bytes() == DEBIAN
    assert os.listdir(hosts.parent) == ["hosts"]


@pytest.mark.parametrize("likely", [False, True])
def test_what_is_not_permitted_is_not_done(hosts: Path, likely: bool) -> None:
    file = HostsFile(hosts)
    asked: list[Change] = []

    def permits(change: Change) -> bool:
        asked.append(change)
        return len(asked) > 1

    change = {"127.1.0.2": "web.vmnet.internal"}
    names = {"web.vmnet.internal": "127.1.0.2"}
    assert file.update(names, permits, likely=likely) is None
    assert hosts.read_bytes() == DEBIAN
    assert os.listdir(hosts.parent) == ["hosts"]
    assert file.update(names, permits, likely=likely) == change
    assert names_in(file.read()) == names
    assert file.update(names, permits, likely=likely) is None
    assert asked == [change, change]
    assert os.listdir(hosts.parent) == ["hosts"]


def test_a_current_file_is_left_alone(hosts: Path) -> None:
    HostsFile(hosts).update(NAMES)
    before = hosts.stat()
    HostsFile(hosts).update(NAMES)
    after = hosts.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )


def test_a_file_that_we_made_goes_with_the_last_name(hosts: Path) -> None:
    hosts.unlink()
    file = HostsFile(hosts)
    assert file.read() == b""
    assert file.difference({}) is None
    mask = os.umask(0o077)
    try:
        file.update(NAMES)
    finally:
        os.umask(mask)
    assert names_in(file.read()) == NAMES
    assert hosts.stat().st_mode & 0o7777 == 0o644
    file.update({"web.vmnet.internal": "127.1.0.2"})
    assert file.difference({}) is not None
    file.update({})
    assert os.listdir(hosts.parent) == []


def test_a_file_that_we_made_stays_once_others_wrote_to_it(hosts: Path) -> None:
    hosts.unlink()
    HostsFile(hosts).update(NAMES)
    with hosts.open("ab") as appended:
        appended.write(b"10.0.0.5 printer\n")
    HostsFile(hosts).update({})
    assert hosts.read_bytes() == b"10.0.0.5 printer\n"


def test_an_empty_file_of_others_stays(hosts: Path) -> None:
    hosts.write_bytes(b"")
    HostsFile(hosts).update(NAMES)
    HostsFile(hosts).update({})
    assert hosts.read_bytes() == b""


@pytest.mark.parametrize("exists", [True, False], ids=["existing", "dangling"])
def test_a_symlink_stays_a_symlink(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "static" / "hosts.real", tmp_path / "hosts"
    target.parent.mkdir()
    if exists:
        target.write_bytes(DEBIAN)
    link.symlink_to("static/hosts.real")
    HostsFile(link).update(NAMES)
    assert os.readlink(link) == "static/hosts.real"
    assert names_in(target.read_bytes()) == NAMES
    HostsFile(link).update({})
    assert os.readlink(link) == "static/hosts.real"
    assert target.exists() == exists
    assert sorted(os.listdir(tmp_path)) == ["hosts", "static"]
    assert os.listdir(target.parent) == (["hosts.real"] if exists else [])


@pytest.mark.parametrize(
    "leave",
    [
        lambda path: path.write_bytes(b"127.0.0.1 loc"),
        lambda path: (path.write_bytes(b"whole\n"), path.chmod(0o644)),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"vmnet hosts journal 5 0000\nabcdefgh"),
        os.mkfifo,
        lambda path: os.link(path.parent / "precious", path),
    ],
    ids=["torn", "dressed", "empty", "torn journal", "fifo", "hard link"],
)
@pytest.mark.parametrize("held", [{}, NAMES], ids=["block right", "block wrong"])
def test_what_a_killed_writer_left_goes(hosts: Path, leave: Callable[[Path], object], held: Mapping[str, str]) -> None:
    precious = hosts.parent / "precious"
    precious.write_bytes(b"kept")
    leave(hosts.parent / ".hosts.vmnet")
    file = HostsFile(hosts)
    assert file.difference({}) is not None
    file.update(held)
    assert hosts.read_bytes() == render(DEBIAN, held)
    assert precious.read_bytes() == b"kept"
    assert sorted(os.listdir(hosts.parent)) == ["hosts", "precious"]


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: path.symlink_to("hosts"),
        lambda path: path.symlink_to("/dev/null"),
        lambda path: path.symlink_to("missing/folder/hosts"),
    ],
    ids=["folder", "fifo", "loop", "device", "missing folder"],
)
def test_what_cannot_be_a_hosts_file_is_said_to_be_so(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "hosts"
    make(path)
    with pytest.raises(HostsFileUnwritable, match=f"{path}: "):
        HostsFile(path).update(NAMES)
    assert os.listdir(tmp_path) == ["hosts"]


def spawn(work: Callable[[], None]) -> int:
    """Run `work` in a child process; return its pid. The child's exit code is 0 if `work` returns."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_sixteen_writers_leave_the_names_of_all(hosts: Path) -> None:
    records = hosts.parent / "records"
    records.mkdir()

    def recorded() -> dict[str, str]:
        return {f"{number}.vmnet.internal": str(Block(int(number)).address) for number in os.listdir(records)}

    def add(numbers: range) -> Callable[[], None]:
        def work() -> None:
            for number in numbers:
                (records / str(number)).touch()
                HostsFile(hosts).update(recorded)
                assert names_in(hosts.read_bytes()).keys() >= {f"{number}.vmnet.internal"}

        return work

    pids = [spawn(add(range(8 * writer, 8 * writer + 8))) for writer in range(16)]
    assert [exit_code(pid) for pid in pids] == [0] * 16
    assert hosts.read_bytes() == render(DEBIAN, recorded())
    assert len(recorded()) == 128
    assert sorted(os.listdir(hosts.parent)) == ["hosts", "records"]


def lines_run(work: Callable[[], None], act: Callable[[], None] | None = None, number: int = -1) -> list[str]:
    """Do `work`; return the lines of hostsfile that it ran, in order; do `act` before line `number` of them."""
    text = Path(hostsfile.__file__).read_text(encoding="utf-8").splitlines()
    lines: list[str] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != hostsfile.__file__:
            return None
        if event == "line":
            lines.append(text[frame.f_lineno - 1].strip())
            if act and len(lines) == number + 1:
                act()
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(previous)
    return lines


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"10.0.0.5 printer\n")


def exchange(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes((path.read_bytes() if path.exists() else b"") + b"10.0.0.5 printer\n")
    other.rename(path)


@pytest.mark.parametrize("edit", [append, exchange])
@pytest.mark.parametrize(
    ("content", "held", "last"),
    [
        (render(DEBIAN, NAMES), {}, "os.rename(temp, real)"),
        (DEBIAN, NAMES, "os.rename(temp, real)"),
        (render(b"", NAMES, made=True), {}, "os.unlink(real)"),
    ],
    ids=["remove", "add", "remove a file we made"],
)
def test_what_others_write_meanwhile_is_kept(
    hosts: Path, edit: Callable[[Path], None], content: bytes, held: dict[str, str], last: str
) -> None:
    def update() -> None:
        HostsFile(hosts).update(held)

    hosts.write_bytes(content)
    lines = lines_run(update)
    renamed = lines.index(last)
    looked = max(number for number in range(renamed) if lines[number] == "status = os.stat(real)")
    assert renamed - looked < 5
    for number in range(len(lines)):
        hosts.write_bytes(content)
        lines_run(update, lambda: edit(hosts), number)
        update()
        # Between the last look and what follows it nobody can be heard.
        if not looked < number <= renamed:
            assert b"10.0.0.5 printer\n" in hosts.read_bytes(), f"lost before {lines[number]}"
            assert names_in(hosts.read_bytes()) == held
        assert not (hosts.parent / ".hosts.vmnet").exists()


def test_a_file_that_others_remove_meanwhile_is_made_anew(hosts: Path) -> None:
    def update() -> None:
        HostsFile(hosts).update(NAMES)

    for number in range(len(lines_run(update))):
        hosts.write_bytes(DEBIAN)
        lines_run(update, lambda: hosts.unlink(missing_ok=True), number)
        update()
        assert names_in(hosts.read_bytes()) == NAMES
        assert os.listdir(hosts.parent) == ["hosts"]


def test_a_writer_that_hangs_is_not_waited_for_for_ever(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostsfile, "_PATIENCE", 0.05)
    refused: list[str] = []

    def contend() -> dict[str, str]:
        if not refused:
            with pytest.raises(HostsFileUnwritable) as caught:
                HostsFile(hosts).update({})
            refused.append(caught.value.message)
        return NAMES

    def answers() -> Iterator[dict[str, str]]:
        yield NAMES  # asked before the lock is taken
        while True:
            yield contend()

    asked = answers()
    HostsFile(hosts).update(lambda: next(asked))
    assert refused == [f"the names of guests cannot be kept in {hosts}: a writer has held it for 0.05 s"]
    assert hosts.read_bytes() == render(DEBIAN, NAMES)


def test_nobody_else_can_hold_us_up(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer killed just before it renames leaves a file that every user can open, and lock."""
    monkeypatch.setattr(hostsfile, "_PATIENCE", 0.05)
    temp = hosts.parent / ".hosts.vmnet"
    temp.write_bytes(b"whole\n")
    temp.chmod(0o644)
    with temp.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        HostsFile(hosts).update(NAMES)
    assert hosts.read_bytes() == render(DEBIAN, NAMES)
    assert os.listdir(hosts.parent) == ["hosts"]
