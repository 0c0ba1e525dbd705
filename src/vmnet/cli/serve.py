"""The server as a program: all that its forks may need is imported first."""

import gc
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from vmnet.cli.asked import BUSY, reply
from vmnet.client import is_for_server
from vmnet.libvirt.hook import main as libvirt_hook
from vmnet.model import NotPermitted, VmnetError
from vmnet.platform import Listener
from vmnet.server.loop import Server, Work
from vmnet.settings import Paths
from vmnet.signs import Service
from vmnet.specs import GuestSpec

# What commands import only when they come to it.
_LATE = (
    "email.utils", "importlib.readers", "netaddr.ip.sets", "pyroute2", "rich.console", "rich.progress", "shutil",
    "tempfile", "tomllib", "vmnet.cli.relays", "vmnet.cli.seed", "vmnet.linux.glance", "vmnet.linux.platform",
    "vmnet.linux.usage",
)  # fmt: skip


def run_server(
    main: Callable[[], None],
    open_engine: Callable[..., Any],
    rehearse: Callable[[bool], None],
    *,
    descriptor: int | None,
    parent: int | None,
    as_json: bool,
) -> None:
    """Serve until SIGTERM or SIGINT; raises NotPermitted for all but root."""
    if os.geteuid() != 0:
        raise NotPermitted("a server needs root, which is who it works for", hint="run it with sudo")
    for number in (0, 1, 2):  # what is opened next must not be one of them
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115 -- None where it was closed
    for module in _LATE:
        importlib.import_module(module)

    def open_for(report: Any, uid: int) -> Any:
        return open_engine(report, on_behalf=uid)

    with suppress(VmnetError, OSError), open_engine(Listener()) as engine:
        # What it leads to is loaded then, and what can be kept is kept.
        engine.create([GuestSpec("rehearsal", kind="veth")], dry_run=True)

    work = Work(main=partial(_run, main), reply=partial(reply, open_for), rehearse=rehearse, busy=BUSY)
    gc.collect()
    gc.freeze()  # nothing of this is garbage, and to look through it would copy its pages in each fork
    Server(Paths.from_environment(), Service(as_json=as_json), work, descriptor, parent).serve()


def _run(main: Callable[[], None]) -> None:
    """Run the command line, or what libvirt calls, by sys.argv."""
    import sys

    if not is_for_server(sys.argv[1:]):
        raise SystemExit(2)  # a client that asks for this is none of ours
    if sys.argv[1] == "libvirt-hook":
        raise SystemExit(libvirt_hook(sys.argv[2:]))
    main()
