"""Make a NoCloud seed image: the documents of cloud-init on an ISO 9660 volume labelled cidata, by a program for it."""

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vmnet.model import Conflict, HostLacks, KernelRefused

# Rock Ridge and Joliet: plain ISO 9660 knows no name like meta-data.
_OPTIONS = ("-quiet", "-output", "seed", "-volid", "cidata", "-joliet", "-rational-rock")
_FILES = ("network-config", "meta-data", "user-data")
MAKERS = {
    "genisoimage": (*_OPTIONS, *_FILES),
    "mkisofs": (*_OPTIONS, *_FILES),
    "xorriso": ("-as", "mkisofs", *_OPTIONS, *_FILES),
    "cloud-localds": ("--network-config=network-config", "seed", "user-data", "meta-data"),
}
"""The programs, of which the first that is there is taken, and their arguments in a folder with the documents."""

_LABEL = b"cidata"
_LABEL_AT = slice(16 * 2048 + 40, 16 * 2048 + 72)  # ECMA-119, 8.4.7: the first volume descriptor is in sector 16
_MARK = b"# made by vmnet for "  # how meta-data begins
_MOST = 16 << 20  # bytes of an image; ours have 400 KB


def write_seed(file: Path, documents: Mapping[str, str], owner: tuple[int, int]) -> None:
    """Put a seed image with `documents` in the place of `file`, whole or not at all.

    A new file belongs to `owner`, uid and gid, as far as the caller may give files away; an image of vmnet's that was
    there passes its owner and mode on. Raises Conflict for any other file that is there, HostLacks without a program of
    `MAKERS`, KernelRefused when that fails, OSError where one may not write.
    """
    before = _look(file)
    image = _make(documents)
    mask = os.umask(0)
    os.umask(mask)
    mode = stat.S_IMODE(before.st_mode) if before else 0o666 & ~mask
    try:
        fd, partial = tempfile.mkstemp(prefix=".vmnet-", dir=file.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
    try:
        with open(fd, "wb") as out:
            out.write(image)
            if os.geteuid() == 0:
                os.fchown(fd, *((before.st_uid, before.st_gid) if before else owner))
            os.fchmod(fd, mode)
            out.flush()
            os.fsync(fd)
        os.rename(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def _look(file: Path) -> os.stat_result | None:
    """Return the status of the image of vmnet's that is there, None without a file."""
    foreign = Conflict(f"{file} is there, and is no seed image of vmnet's", hint="move it away, or name another file")
    if file.is_symlink():
        raise foreign
    try:
        # Without waiting for somebody at the other end of a pipe.
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(fd)
        image = os.read(fd, _MOST) if stat.S_ISREG(status.st_mode) else b""
    finally:
        os.close(fd)
    if image[_LABEL_AT].rstrip(b" ") != _LABEL or _MARK not in image:
        raise foreign
    return status


def _make(documents: Mapping[str, str]) -> bytes:
    program = next(filter(shutil.which, MAKERS), None)
    if program is None:
        raise HostLacks(
            f"a seed image needs one of {', '.join(MAKERS)}, and none of them is here",
            hint="install xorriso (Arch: libisoburn), genisoimage or cloud-image-utils",
        )
    with tempfile.TemporaryDirectory(prefix="vmnet-") as folder:
        for name, text in documents.items():
            Path(folder, name).write_bytes(text.encode())
        done = subprocess.run(
            [program, *MAKERS[program]],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
            raise KernelRefused(f"{program} made no seed image: {said[-1]}")
        return Path(folder, "seed").read_bytes()
