"""Whether the files of vmnet have changed since this process read them, and whether they are all there."""

import os
from collections.abc import Iterable

HALF_COPIED = 2.0
"""Seconds that a new version of vmnet has to be all there."""
_ROOT = os.path.dirname(__file__)
_Stamp = tuple[tuple[int, int] | None, ...]


def _files() -> list[str]:
    found = []
    for folder, _, names in os.walk(_ROOT, followlinks=True):
        if not folder.endswith("__pycache__"):
            found += [os.path.join(folder, name) for name in sorted(names)]
    return found


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
    """How long the files have been others than this process started with. `now` is a time in seconds, of any clock."""

    def __init__(self) -> None:
        self._files = _files()
        self._own = _stamp(self._files)
        self._newer: tuple[list[str], _Stamp, float] | None = None

    def is_fresh(self, now: float) -> bool:
        """Say whether the files are those that this process started with; it takes 0.2 ms."""
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
        return None if self._newer is None else self._newer[2] + HALF_COPIED
