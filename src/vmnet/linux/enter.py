"""Run a command inside a guest's namespace, as ip-netns(8) exec does, with the guest's own view of names."""

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from vmnet.hostsfile import render
from vmnet.linux.places import CLONE_NEWNET, CLONE_NEWNS, mount, setns, umount, unshare
from vmnet.model import Conflict, KernelRefused, NetnsId
from vmnet.platform import Resolver

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_SLAVE = 1, 2, 4, 4096, 16384, 1 << 19
_ETC = Path("/etc")
# Sockets of the host's resolvers, which the C library asks before it reads resolv.conf: systemd-resolved's (nss-resolve
# speaks varlink) and nscd's. What is a file is the same in all network namespaces.
_RESOLVERS = ("/run/systemd/resolve", "/run/nscd")


def execute(path: str, expected: NetnsId | None, argv: Sequence[str], resolver: Resolver) -> NoReturn:
    """Become `argv` in the network namespace at `path`, with its own /sys, the files of /etc/netns/NAME, and names.

    Unless /etc/netns/NAME has one, /etc/resolv.conf is the guest's own. Raises Conflict where `path` leads to another
    namespace than `expected`, KernelRefused where it cannot be entered, FileNotFoundError or PermissionError where
    `argv` cannot be run.
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
        files = Path("/etc/netns", Path(path).name)
        given = sorted(files.iterdir()) if path.startswith("/run/netns/") and files.is_dir() else []
        made = {name: text for name, text in _files(resolver).items() if name not in {file.name for file in given}}
        _show(made)
        for file in given:
            if os.path.lexists(_ETC / file.name):
                _bind(file, _ETC / file.name)
        for folder in filter(os.path.isdir, _RESOLVERS):
            mount("tmpfs", folder, "tmpfs", _MS_RDONLY)
        _mount_sys()
    except OSError as error:
        raise KernelRefused(f"{path} cannot be entered: {error.strerror}") from None
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them, and what it starts would do so too
    os.execvp(argv[0], list(argv))


def _files(resolver: Resolver) -> dict[str, bytes]:
    """Return what the guest has in place of the host's files of /etc, by name."""
    made = {"resolv.conf": f"nameserver {resolver.address}\nsearch {resolver.domain}\n".encode()}
    with suppress(OSError):
        hosts = Path(_ETC, "hosts").read_bytes()
        if resolver.mode == "mapped" and (rest := render(hosts, {})) != hosts:
            made["hosts"] = rest  # the block spells guests as the host does, and those that are mapped do not
    return made


def _show(made: Mapping[str, bytes]) -> None:
    """Show files in /etc to this mount namespace alone; no trace of them is anywhere else."""
    mount("tmpfs", "/sys", "tmpfs", _MS_NOSUID | _MS_NODEV)  # any folder will do, for as long as this takes
    for name, content in made.items():
        file = Path("/sys", name)
        file.write_bytes(content)
        file.chmod(0o644)
    if "resolv.conf" in made and not os.path.lexists(_ETC / "resolv.conf"):
        # There is nothing to mount a file on, so it is /etc as a whole, read-only: who writes there is told.
        mount("overlay", str(_ETC), "overlay", _MS_RDONLY, f"lowerdir=/sys:{_ETC}")
    else:
        for name in made:
            _bind(Path("/sys", name), _ETC / name)
    umount("/sys")


def _bind(source: Path, target: Path) -> None:
    """Mount `source` on `target`; on a link itself, which may lead nowhere or into a folder that is masked."""
    handle = os.open(target, os.O_PATH | os.O_CLOEXEC | (0 if target.is_dir() else os.O_NOFOLLOW))
    try:
        mount(str(source), f"/proc/self/fd/{handle}", None, _MS_BIND)
    finally:
        os.close(handle)


def _mount_sys() -> None:
    """Show the namespace's own devices under /sys, where that may be mounted."""
    try:
        umount("/sys")
        mount("sysfs", "/sys", "sysfs", 0)
    except OSError:
        return
