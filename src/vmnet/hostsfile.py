"""Keep the names of the guests in a marked block of the hosts file, and everything else in it as it is.

`render()` and `names_in()` are pure; `HostsFile` is the edge. Only "\\n" ends a line (hosts(5), glibc reads with
getline); whatever else stands in the file passes through byte by byte. docs/decisions/hosts-file.md says why.
"""

import errno
import fcntl
import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, inet_pton
from typing import TypeAlias

from vmnet.model import BLOCK_SIZE, POOL_BLOCKS, POOL_FIRST, VmnetError

Names: TypeAlias = Mapping[str, str]
"""Host name, such as "myvm.vmnet.internal", to address, such as "127.1.0.2": the third of a block of the pool."""

_BEGIN = b"# BEGIN vmnet"
_END = b"# END vmnet"
_NO_NEWLINE = b" (no newline before)"
_MADE = b" (made this file)"
_MARKER = re.compile(
    rb"(?<![^\n])(?:# (?P<begin>BEGIN) vmnet(?P<note> \((?:no newline before|made this file)\))?|# END vmnet)"
    rb"[ \t\r]*(?:\n|\Z)"
)
_LINE = re.compile(rb"(127\.\d{1,3}\.\d{1,3}\.\d{1,3})\t([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)+)[ \t\r]*\n?")

_PATIENCE = 5.0  # seconds; an update takes milliseconds, so whoever holds the lock longer is stuck or none of us
_TRIES = 100
_PAGE = 4096
_JOURNAL = re.compile(rb"vmnet hosts journal (\d+) (\d+) ([0-9a-f]{64})\n")

# What forbids a replacement but may allow writing into the file that is there: EBUSY is a bind mount, EROFS a writable
# file mounted into a read-only system, EINVAL an owner that this user namespace cannot name.
_NOT_REPLACEABLE = {errno.EBUSY, errno.EXDEV, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP}

# The kernel computes these from the content; a copy would be wrong.
_COMPUTED_XATTRS = {"security.ima", "security.evm"}


class HostsFileUnwritable(VmnetError):
    """The hosts file can be neither replaced nor written, or not read; the message has the path and the reason."""


def render(original: bytes, names: Names, *, made: bool = False) -> bytes:
    """Return `original` with one block that holds just `names`, sorted by address; without names, without a block.

    The block stays where it is, or comes last. `render(x, {})` is what the file was before there was a block; `made`
    notes in a new block that there was no file. Lines of others inside a block move after it. Raises ValueError for
    a name or an address that would not be recognised later.
    """
    found = _parse(original)
    if not names:
        before = found.before
        if found.note == _NO_NEWLINE and not found.after:
            before = before.removesuffix(b"\n")
        return before + found.after
    before, note = found.before, found.note
    if not found.block:
        note = _MADE if made else b""
        if before and not before.endswith(b"\n"):
            before, note = before + b"\n", _NO_NEWLINE
    return b"".join([before, _BEGIN, note, b"\n", *_lines(names), _END, b"\n", found.after])


def names_in(content: bytes) -> dict[str, str]:
    """Return the names that the block (or the remains of one) in `content` holds, whatever their domain."""
    return _parse(content).names


def _lines(names: Names) -> list[bytes]:
    lines = [(address, f"{address}\t{name}\n".encode()) for name, address in names.items()]
    for _, line in lines:
        if _ours(line) is None:
            raise ValueError(f"{line!r} is no line of a guest")
    return [line for _, line in sorted(lines, key=lambda pair: (inet_pton(AF_INET, pair[0]), pair[1]))]


def _ours(line: bytes) -> tuple[str, str] | None:
    """Return name and address if `line` has the shape of ours."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    address = match[1].decode()
    try:
        offset = int.from_bytes(inet_pton(AF_INET, address), "big") - POOL_FIRST
    except OSError:
        return None
    if not 0 <= offset < BLOCK_SIZE * POOL_BLOCKS or offset % BLOCK_SIZE != 2:
        return None
    return match[2].decode(), address


@dataclass(frozen=True, slots=True)
class _Found:
    """What is not ours, before and after the place of the block; whether there is one, its note and its names."""

    before: bytes
    after: bytes
    block: bool
    note: bytes
    names: dict[str, str]


def _parse(content: bytes) -> _Found:
    markers = list(_MARKER.finditer(content))
    if not markers:
        return _Found(content, b"", False, b"", {})
    names: dict[str, str] = {}
    pieces: list[bytes] = []
    starts = [0, *(marker.end() for marker in markers)]
    ends = [*(marker.start() for marker in markers), len(content)]
    opened = False
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        closes = index < len(markers) and not markers[index]["begin"]
        pieces.append(_foreign(content[start:end], opened, closes, names))
        opened = index < len(markers) and not closes
    note = next((marker["note"] or b"" for marker in markers if marker["begin"]), b"")
    return _Found(pieces[0], b"".join(pieces[1:]), True, note, names)


def _foreign(segment: bytes, opened: bool, closed: bool, names: dict[str, str]) -> bytes:
    """Return what is not ours of the lines between two markers, and put what is ours into `names`.

    Between a begin and an end all lines of our shape are ours. Where one of the two is missing it is those that
    touch the other: nothing says how far the block went.
    """
    if not opened and not closed:
        return segment
    lines = re.findall(rb"[^\n]*\n|[^\n]+", segment)
    guests = [_ours(line) for line in lines]
    first, last = 0, len(lines)
    if not closed:
        last = next((i for i, guest in enumerate(guests) if guest is None), last)
    if not opened:
        first = next((i + 1 for i in reversed(range(last)) if guests[i] is None), 0)
    names.update(guest for guest in guests[first:last] if guest is not None)
    return b"".join(line for i, line in enumerate(lines) if guests[i] is None or not first <= i < last)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A hosts file as it was at one moment: two that are equal are the same file, unchanged."""

    content: bytes
    identity: tuple[int, ...]
    mode: int
    uid: int
    gid: int


class HostsFile:
    """The hosts file at `path`, a symbolic link or not, existing or not.

    A new version is written beside it as `.NAME.vmnet` and renamed over it, so that it is either old or new whenever
    a writer is killed; what such a writer leaves is taken up by the next `update()`. Where the file cannot be
    replaced (a bind mount), the new version is written into it, with `.NAME.vmnet` as the journal to finish from.
    Every method raises `HostsFileUnwritable` where the system refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> bytes:
        """Return the content; of a missing file, nothing."""
        with self._explained():
            seen = _look(os.path.realpath(self.path))
        return seen.content if seen else b""

    def is_current(self, names: Names) -> bool:
        """Return whether `update(names)` has nothing to do: the block is right and no writer left anything behind."""
        with self._explained():
            real = os.path.realpath(self.path)
            return not os.path.lexists(_temp(real)) and _is_settled(_look(real), names)

    def update(self, names: Names | Callable[[], Names]) -> None:
        """Make the block hold just `names`.

        Several processes may do so at once. A callable is asked when it is this process's turn: with one that reads
        the records, the last to write has the newest.
        """
        ask = names if callable(names) else lambda: names
        if self.is_current(ask()):
            return
        with self._explained():
            real = os.path.realpath(self.path)
            for _ in range(_TRIES):
                if _take_turn(real, ask):
                    return
            raise OSError(errno.EAGAIN, "it changes all the time")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise HostsFileUnwritable(
                f"the names of guests cannot be kept in {self.path}: {error.strerror or error}",
                hint="guests work without; an empty VMNET_HOSTS_FILE leaves the hosts file alone",
            ) from error


def _temp(real: str) -> str:
    folder, name = os.path.split(real)
    return os.path.join(folder, f".{name}.vmnet")


def _look(real: str) -> _Seen | None:
    try:
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        return _Seen(file.read(), identity, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)


def _desired(seen: _Seen | None, names: Names) -> bytes | None:
    """Return what the file must hold; None: there must be none."""
    if seen is None:
        return render(b"", names, made=True) if names else None
    content = render(seen.content, names)
    return None if not content and _parse(seen.content).note == _MADE else content


def _is_settled(seen: _Seen | None, names: Names) -> bool:
    return _desired(seen, names) == (seen.content if seen else None)


def _take_turn(real: str, ask: Callable[[], Names]) -> bool:
    """Write the file once, under the lock; return False if somebody else changed it meanwhile."""
    temp = _temp(real)
    try:
        turn = _lock(temp)
    except OSError as error:
        if error.errno not in _NOT_REPLACEABLE:
            raise
        return _write_without_temp(real, ask)
    try:
        _finish(real, turn)
        seen, names = _look(real), ask()
        if _is_settled(seen, names):
            os.unlink(temp)
            return True
        return _write(real, temp, turn, seen, _desired(seen, names))
    finally:
        os.close(turn)


def _lock(temp: str) -> int:
    """Create or take over the temporary file, and return it open and locked.

    It is the lock, too: nothing else is left behind, and unlike the folder or the hosts file, which every user can
    open and so hold a lock on for ever, it is root's alone.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, temp):
                return fd
        os.close(fd)
        if time.monotonic() > deadline:
            with suppress(FileNotFoundError):
                os.unlink(temp)
            deadline = time.monotonic() + _PATIENCE
        time.sleep(0.002)


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _write(real: str, temp: str, turn: int, seen: _Seen | None, content: bytes | None) -> bool:
    try:
        if content is not None:
            _fill(turn, content)
            _dress(turn, real, seen)
            os.fsync(turn)
        if not _is_at(turn, temp) or _look(real) != seen:
            return False
        if content is None:
            os.unlink(real)
            os.unlink(temp)
        else:
            os.rename(temp, real)
        return True
    except OSError as error:
        if seen is None or error.errno not in _NOT_REPLACEABLE:
            os.unlink(temp)
            raise
    return _write_in_place(real, seen, content or b"", temp, turn)


def _fill(fd: int, content: bytes) -> None:
    os.ftruncate(fd, 0)
    _put(fd, content, 0)


def _put(fd: int, content: bytes, offset: int) -> None:
    while content:
        written = os.pwrite(fd, content, offset)
        content, offset = content[written:], offset + written


def _dress(fd: int, real: str, seen: _Seen | None) -> None:
    """Give `fd` owner, mode and extended attributes (ACLs and SELinux's label among them) of the file it replaces.

    On macOS owner and mode only: Python has no call for the rest there.
    """
    if seen is None:
        os.fchmod(fd, 0o644)
        return
    os.fchown(fd, seen.uid, seen.gid)
    os.fchmod(fd, seen.mode)
    if sys.platform == "linux":
        wanted = {name: os.getxattr(real, name) for name in os.listxattr(real) if name not in _COMPUTED_XATTRS}
        # A default ACL of the folder gives the new file entries that the old one need not have.
        for name in set(os.listxattr(fd)) - set(wanted) - _COMPUTED_XATTRS:
            os.removexattr(fd, name)
        for name, value in wanted.items():
            os.setxattr(fd, name, value)


def _write_without_temp(real: str, ask: Callable[[], Names]) -> bool:
    """Write into the file where nothing can be created beside it (a container with a read-only root)."""
    fd = os.open(real, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.002)
        seen, names = _look(real), ask()
        if seen is None or not _is_at(fd, real):
            return False
        _overwrite(fd, seen.content, _desired(seen, names) or b"")
        return True
    finally:
        os.close(fd)


def _write_in_place(real: str, seen: _Seen, content: bytes, temp: str, turn: int) -> bool:
    fd = -1
    try:
        fd = os.open(real, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        os.fchmod(turn, 0o600)
        digest = hashlib.sha256(seen.content + content).hexdigest()
        head = f"vmnet hosts journal {len(seen.content)} {len(content)} {digest}\n".encode()
        _fill(turn, head + seen.content + content)
        os.fsync(turn)
        if not _is_at(turn, temp) or _look(real) != seen:
            return False
        _overwrite(fd, seen.content, content)
        os.unlink(temp)
        return True
    finally:
        if fd >= 0:
            os.close(fd)


def _overwrite(fd: int, old: bytes, new: bytes) -> None:
    """Turn the content of `fd` from `old` into `new` so that, at every moment, all foreign bytes are there.

    The part that makes the file longer comes first: a full disk is met before anything is touched. What follows the
    block moves; it goes from the end if the block grows and from the start if it shrinks, a page at a time (the
    kernel looks for a fatal signal between pages, generic_perform_write in mm/filemap.c).
    """
    try:
        _put(fd, new[len(old) :], len(old))
    except OSError:
        os.ftruncate(fd, len(old))
        raise
    starts = range(0, min(len(old), len(new)), _PAGE)
    for start in reversed(starts) if len(new) > len(old) else starts:
        _put(fd, new[start : min(start + _PAGE, len(old))], start)
    os.ftruncate(fd, len(new))
    os.fsync(fd)


def _finish(real: str, turn: int) -> None:
    """Finish what a writer that was killed while writing in place left half done."""
    journal = os.pread(turn, os.fstat(turn).st_size, 0)
    head = _JOURNAL.match(journal)
    if head is None or hashlib.sha256(journal[head.end() :]).hexdigest().encode() != head[3]:
        return
    middle = head.end() + int(head[1])
    old, new = journal[head.end() : middle], journal[middle:]
    seen = _look(real)
    if seen is None or not _is_mixture(seen.content, old, new):
        return
    fd = os.open(real, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _overwrite(fd, seen.content, new)
    finally:
        os.close(fd)


def _is_mixture(content: bytes, old: bytes, new: bytes) -> bool:
    """Return whether `content` is what `_overwrite(old, new)`, stopped on the way, leaves (anything else was edited)."""
    if not min(len(old), len(new)) <= len(content) <= max(len(old), len(new)):
        return False
    return all(byte in (old[i : i + 1] + new[i : i + 1]) for i, byte in enumerate(content))
