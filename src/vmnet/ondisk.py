"""Files that others read or replace meanwhile, and programs. It imports nothing more, for the keeper of dnsmasq."""

import os
from pathlib import Path


def replace(file: Path, text: str, folder: Path | None = None) -> None:
    """Replace what a file holds; whoever reads it sees all of the former, or all of the new.

    The new one is written in `folder` first, on the same file system: in the file's own unless somebody follows that.
    """
    partial = f"{folder or file.parent}/.{file.name}.new"
    with open(partial, "w", encoding="utf-8") as new:
        os.fchmod(new.fileno(), 0o644)  # whatever the umask: it is for others
        new.write(text)
    os.replace(partial, file)


def stamp(file: Path | None) -> tuple[int, ...]:
    """Return what differs when a file, or what a symlink leads to, is another or has changed; nothing without one."""
    if file is None:
        return ()
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def find_program(name: str, path: str) -> str | None:
    """Return where in the folders of `path`, spelled as PATH is, a program is that may be run; None without one."""
    places = (f"{folder}/{name}" for folder in path.split(":"))
    return next((place for place in places if os.access(place, os.X_OK)), None)
