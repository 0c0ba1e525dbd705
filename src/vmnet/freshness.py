"""Whether the files of vmnet have changed since this process read them, and whether they are all there."""

import os
from collections.abc import Iterable
from contextlib import suppress

_HALF_COPIED = 2.0  # seconds that a new version of vmnet has to be all there
_ROOT = os.path.dirname(__file__)
_Stamp = tuple[tuple[int, int] | None, ...]


# What happens to a file of a folder, or to the folder itself (inotify(7)): all but reading and opening.
_IN_CHANGES = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800


def _folders() -> list[tuple[str, list[str]]]:
    found = [(folder, names) for folder, _, names in os.walk(_ROOT, followlinks=True)]
    return [(folder, names) for folder, names in found if not folder.endswith("__pycache__")]


def _files() -> list[str]:
    return [os.path.join(folder, name) for folder, names in _folders() for name in sorted(names)]


class _Notice:
    """Hears of changes to the files; where it cannot, there may be one at any time."""

    def __init__(self) -> None:
        import ctypes  # of Linux alone, as what is called by it

        libc = ctypes.CDLL(None)
        self._handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        added = [libc.inotify_add_watch(self._handle, os.fsencode(folder), _IN_CHANGES) for folder, _ in _folders()]
        if min(added) < 0:  # the limit of watches (fs.inotify.max_user_watches) is used up
            self.close()

    def close(self) -> None:
        """Hear no more."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def may_have_changed(self) -> bool:
        """Say whether there was anything since the last time: the kernel tells before the change itself is done."""
        if self._handle < 0:
            return True
        heard = False
        with suppress(BlockingIOError):
            while os.read(self._handle, 1 << 16):
                heard = True
        return heard


def _stamp(files: Iterable[str]) -> _Stamp:
    """Return what differs when one of the files does."""
    found: list[tuple[int, int] | None] = []
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns))
    return tuple(found)


class Freshness:
    """How long the files have been others than this process started with. `now` is a time in seconds, of any clock.

    With `listens` changes are heard of, on Linux, so that to ask costs next to nothing.
    """

    def __init__(self, *, listens: bool = False) -> None:
        self._notice = _Notice() if listens else None
        self._files = _files()
        self._own = _stamp(self._files)
        # Whether the path still leads to the files that are watched.
        self._place = _stamp([__file__])
        self._newer: tuple[list[str], _Stamp, float] | None = None

    def is_fresh(self, now: float) -> bool:
        """Say whether the files are those that this process started with."""
        changed = self._notice is None or self._notice.may_have_changed() or _stamp([__file__]) != self._place
        if not changed and self._newer is None:
            return True
        if _stamp(self._files) == self._own:
            self._newer = None
            return True
        files = _files()
        code = _stamp(files)
        if self._newer is None or self._newer[:2] != (files, code):
            self._newer = files, code, now
        return False

    @property
    def due(self) -> float | None:
        """When newer files will have been the same for long enough to start from them; None without any."""
        return None if self._newer is None else self._newer[2] + _HALF_COPIED
