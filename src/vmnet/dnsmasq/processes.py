"""Find dnsmasq and its keeper by their pid files, and end them. Without other imports, for the keeper."""

import _socket
import os
import select
import signal
from contextlib import suppress
from pathlib import Path

PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
"""Where dnsmasq is looked for."""
SERVERS = ("dhcp", "mapped", "native")
TELLS_OF_NAMES = "names.asked"
"""A file of the keeper's: while it is there, the keeper is to be told of names, not only of all else."""
_PATIENCE = 3.0  # seconds that a process has to end by itself


def find(pid_file: Path, word: str) -> int | None:
    """Return a pidfd (pidfd_open(2)) of the process in `pid_file`; None where none of that pid has `word` as argument.

    A pid is given again to another process; the descriptor is not.
    """
    try:
        pid = int(pid_file.read_text().split()[0])
        handle = os.pidfd_open(pid)
    except (OSError, ValueError, IndexError, OverflowError):
        return None
    with suppress(OSError):
        # Of a dead one that nobody has waited for there is no command line.
        if os.fsencode(word) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return handle
    os.close(handle)
    return None


def conf_word(folder: Path, server: str) -> str:
    """Return the argument by which the dnsmasq of that folder is known."""
    return f"--conf-file={folder / server}.conf"


def find_server(folder: Path, server: str) -> int | None:
    """Return a pidfd of one dnsmasq, or None."""
    return find(folder / f"{server}.pid", conf_word(folder, server))


def find_keeper(folder: Path) -> int | None:
    """Return a pidfd of the keeper, or None."""
    return find(folder / "keeper.pid", str(folder))


def is_there(handle: int | None) -> bool:
    """Say whether a process was found, and close its pidfd."""
    if handle is None:
        return False
    os.close(handle)
    return True


def gives_addresses(folder: Path) -> bool:
    """Say whether there is any guest that asks for its address, by what dnsmasq reads."""
    try:
        return (folder / "dhcp.live").stat().st_size > 0
    except OSError:
        return False


def follows_folders(words: str) -> bool:
    """Say whether a dnsmasq forgets by itself what goes from a folder of names: from 2.88 on, by its --version."""
    _, _, version = words.partition("version ")
    major, _, rest = version.partition(".")
    minor = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return not (major.isdigit() and minor) or (int(major), int(minor)) >= (2, 88)


def has_devices() -> bool:
    """Say whether there is a device of a guest's: without one dnsmasq does not start to give addresses to them."""
    names = (name for _, name in _socket.if_nameindex())
    return any(name.startswith("vmn-") and not name.startswith("vmn-_") for name in names)  # _bridge is libvirt's


def tell(handle: int | None, number: signal.Signals) -> None:
    """Send a process that was found a signal, if it is still there, and close its pidfd."""
    if handle is not None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)
        os.close(handle)


def end(handles: list[int]) -> None:
    """End those processes, by force if need be, and close the pidfds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for handle in handles:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
        if all(wait_for_end(handle, _PATIENCE) for handle in handles):
            break
    for handle in handles:
        os.close(handle)


def wait_for_end(handle: int, seconds: float) -> bool:
    """Say whether the process of a pidfd ends within that time."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def end_servers(folder: Path) -> None:
    """End each dnsmasq of that folder."""
    end([handle for server in SERVERS if (handle := find_server(folder, server)) is not None])
