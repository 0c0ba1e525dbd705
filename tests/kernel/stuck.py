"""A file system of one file, whose server never says how that is: who asks is stuck, and no signal ends that.

It speaks FUSE (include/uapi/linux/fuse.h), as any user's program may where there is fusermount.
"""

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from tests.kernel.net import Laptop

_DEVICE = Path("/dev/fuse")
_ROOT, _FILE = 1, 2  # numbers of nodes
_HOUR = 3600  # seconds that the kernel need not ask again
_ENOSYS = 38
_HEADER = struct.Struct("=IIQQIIIHH")  # struct fuse_in_header
_OUT = 16  # bytes of struct fuse_out_header
_FORGET, _GETATTR, _INTERRUPT = 2, 3, 36


def _attributes(node: int) -> bytes:
    """Return a struct fuse_attr."""
    mode, links = (0o40755, 2) if node == _ROOT else (0o100644, 1)
    return struct.pack("=QQQQQQIIIIIIIIII", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)


_ANSWERS = {
    1: struct.pack("=QQQQII", _FILE, 0, _HOUR, 0, 0, 0) + _attributes(_FILE),  # FUSE_LOOKUP: what it has is old at once
    14: bytes(16),  # FUSE_OPEN
    18: b"",  # FUSE_RELEASE
    25: b"",  # FUSE_FLUSH
    26: struct.pack("=IIIIHHI", 7, 22, 1 << 16, 0, 0, 0, 1 << 16),  # FUSE_INIT, as it was in 7.22
}


def why_no_fuse() -> str | None:
    """Say what is lacking to mount one, None where nothing is."""
    return None if _DEVICE.exists() else "the kernel has no FUSE"


@contextmanager
def stuck_file(laptop: Laptop, folder: str) -> Iterator[str]:
    """Mount one at a folder of the laptop's, and lend the path of its file; in the end who is stuck gets an error."""
    device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    server = Thread(target=_serve, args=(device,))
    try:
        laptop.run("mkdir", folder)
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
        mount = laptop.command("mount", "-i", "-t", "fuse", "-o", options, "stuck", folder)
        subprocess.run(mount, check=True, pass_fds=[device])
        server.start()
        yield f"{folder}/file"
    finally:
        laptop.run("umount", "--force", folder, check=False)  # which ends what waits for an answer
        if server.ident:
            server.join()
        os.close(device)


def _serve(device: int) -> None:
    while True:
        try:
            request = os.read(device, 1 << 18)
        except OSError:  # ENODEV: it is no more
            return
        _, kind, number, node, *_ = _HEADER.unpack_from(request)
        if kind in (_FORGET, _INTERRUPT) or (kind == _GETATTR and node == _FILE):
            continue
        answer = _ANSWERS.get(kind)
        if kind == _GETATTR:
            answer = struct.pack("=QII", _HOUR, 0, 0) + _attributes(_ROOT)
        error, body = (0, answer) if answer is not None else (-_ENOSYS, b"")
        os.write(device, struct.pack("=IiQ", _OUT + len(body), error, number) + body)
