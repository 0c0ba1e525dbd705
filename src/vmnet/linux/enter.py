"""Run a command inside a guest's namespace, as ip-netns(8) exec does."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vmnet.linux.places import CLONE_NEWNET, CLONE_NEWNS, mount, setns, umount, unshare
from vmnet.model import Conflict, KernelRefused, NetnsId

_MS_BIND, _MS_REC, _MS_SLAVE = 4096, 16384, 1 << 19


def execute(path: str, expected: NetnsId | None, argv: Sequence[str]) -> NoReturn:
    """Become `argv` in the network namespace at `path`, with its own /sys and the files of /etc/netns/NAME.

    Raises Conflict where `path` leads to another namespace than `expected`, KernelRefused where it cannot be
    entered, FileNotFoundError or PermissionError where `argv` cannot be run.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelRefused(f"{path} cannot be entered: {error.strerror}") from None
    found = os.fstat(handle)
    if expected and (found.st_dev, found.st_ino) != (expected.device, expected.inode):
        raise Conflict(f"{path} is another network namespace than the one recorded")
    try:
        setns(handle, CLONE_NEWNET)
        unshare(CLONE_NEWNS)
        mount("", "/", None, _MS_SLAVE | _MS_REC)
        _mount_sys()
        files = Path("/etc/netns", Path(path).name)
        for file in sorted(files.iterdir()) if path.startswith("/run/netns/") and files.is_dir() else ():
            target = Path("/etc", file.name)
            if target.exists():
                mount(str(file), str(target), None, _MS_BIND)
    except OSError as error:
        raise KernelRefused(f"{path} cannot be entered: {error.strerror}") from None
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them, and what it starts would do so too
    os.execvp(argv[0], list(argv))


def _mount_sys() -> None:
    """Show the namespace's own devices under /sys, where that may be mounted."""
    try:
        umount("/sys")
        mount("sysfs", "/sys", "sysfs", 0)
    except OSError:
        return
