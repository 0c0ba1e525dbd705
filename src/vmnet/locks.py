"""Locks between processes of vmnet: one writer of the host part, guests in parallel.

The kernel gives a dead process's locks back. The host part comes before guests, so nobody waits in a circle.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vmnet.model import POOL_BLOCKS, KernelRefused


class Locks:
    """The locks in the folder `run`."""

    def __init__(self, run: Path) -> None:
        self._run = run

    @contextmanager
    def host(self, *, shared: bool) -> Iterator[None]:
        """Hold the host part: shared to rely on it, else to change it."""
        handle = self._open("host.lock")
        try:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    @contextmanager
    def guests(self, blocks: Iterable[int] | None) -> Iterator[None]:
        """Hold the guests in these blocks; None: all of them."""
        handle = self._open("guests.lock")
        try:
            if blocks is None:
                fcntl.lockf(handle, fcntl.LOCK_EX, POOL_BLOCKS, 0)
            else:
                # In order, so that two that want the same guests do not wait for each other.
                for first, count in _runs(sorted(set(blocks))):
                    fcntl.lockf(handle, fcntl.LOCK_EX, count, first)
            yield
        finally:
            os.close(handle)

    @contextmanager
    def answers(self) -> Iterator[None]:
        """Hold what dnsmasq reads, to write it."""
        handle = self._open("answers.lock")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _open(self, name: str) -> int:
        path, flags = f"{self._run}/{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            try:
                return os.open(path, flags, 0o600)
            except FileNotFoundError:
                self._run.mkdir(mode=0o755, parents=True, exist_ok=True)
                return os.open(path, flags, 0o600)
        except OSError as error:
            raise KernelRefused(f"{path} cannot be opened: {error.strerror}") from None


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each run of consecutive numbers."""
    start = 0
    for position in range(1, len(numbers) + 1):
        if position == len(numbers) or numbers[position] != numbers[position - 1] + 1:
            yield numbers[start], position - start
            start = position
