"""How guests, plans and progress look to a person and to a program."""

import json
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import typer

from vmnet.cli.nextstep import next_step
from vmnet.engine import Seen
from vmnet.hooks import is_installed
from vmnet.model import KernelRefused, Lease
from vmnet.ops import Op
from vmnet.plan import dotted, shadow_of
from vmnet.settings import Settings

if TYPE_CHECKING:
    from rich.progress import Progress

    from vmnet.hooks.install import Step

_PROGRESS_FROM = 500  # ops: fewer are done before a bar could be read


def say(text: str) -> None:
    """Print what was asked for; raises KernelRefused where it cannot be written, as on a full disk."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        raise  # nobody reads on, which is no error
    except OSError as error:
        raise KernelRefused(f"the output cannot be written: {error.strerror}") from None


def as_json(seen: Seen, settings: Settings) -> dict[str, Any]:
    """Return a guest as the command line's contract has it."""
    lease = seen.lease
    block = lease.block
    mapped, is_alias = lease.mode == "mapped", lease.kind == "alias"
    address, gateway = block.first + 2, block.first + 1
    shadow, shadow_gateway = (dotted(shadow_of(one, settings.plane)) for one in (address, gateway))
    return {
        "name": lease.name,
        "kind": lease.kind,
        "mode": None if is_alias else lease.mode,
        "address": dotted(address),
        "gateway": dotted(gateway),
        "block": f"{dotted(block.first)}/30",
        "shadow": None if is_alias else shadow,
        "guest_address": None if is_alias else shadow if mapped else dotted(address),
        "guest_gateway": None if is_alias else shadow_gateway if mapped else dotted(gateway),
        "guest_prefix": None if is_alias else 30,
        "device": seen.device,
        "mac": lease.mac,
        "netns": lease.netns.path.removeprefix("/run/netns/") if lease.netns else None,
        "hostname": f"{lease.name}.{settings.domain}",
        "published": [],
        "mtu": lease.mtu,
        "queues": lease.queues,
        "maker": lease.maker,
        "relays": list(map(str, seen.relays)),
        "state": seen.state,
        "owner": lease.owner,
        "created": lease.created,
    }


def print_guests(guests: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of guests, each as `as_json` has it."""
    if not guests:
        if sys.stdout.isatty():
            say("no guests; vmnet create NAME makes one")
        return
    columns = ("name", "address", "kind", "mode", "state", "hostname")
    print_table([tuple(map(str.upper, columns)), *(tuple(one[column] or "-" for column in columns) for one in guests)])


def print_next_step(lease: Lease) -> None:
    """Say, on a terminal, what to do with a guest that was just made."""
    if sys.stdout.isatty():
        say(f"\n{next_step(lease)}")
        if not is_installed():
            say("after a reboot it comes back by itself once `vmnet hooks install` has been run")


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns, the first of them as a heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    say(
        "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )
    )


def op_as_json(op: "Op | Step") -> dict[str, str]:
    """Return an op as a program reads it; `text` is for a person, `command` what that could type."""
    return {"op": type(op).__name__, "text": str(op), "command": op.command()}


def print_ops(ops: Sequence[Mapping[str, str]], *, json_: bool, verbose: bool) -> None:
    """Print a plan, each op as `op_as_json` has it: to a person, as commands, or for a program."""
    if json_:
        say(json.dumps(ops))
    elif ops:
        say("\n".join(op["command" if verbose else "text"] for op in ops))
    elif sys.stdout.isatty():
        say("nothing to do")


class Reporter:
    """Tells a person what happens: each step with -v, a bar for long work on a terminal, warnings always."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._progress: Progress | None = None
        self._total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def begin(self, total: int) -> None:
        """Hear that `total` ops are to come."""
        self._total += total
        if self._progress is None and not self._verbose and total >= _PROGRESS_FROM and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._progress.add_task("working", total=self._total)
            self._progress.start()
        if self._progress:
            self._progress.update(self._progress.task_ids[0], total=self._total)

    def did(self, op: Op) -> None:
        """Hear that an op was carried out."""
        if self._verbose:
            typer.echo(op.command(), err=True)
        if self._progress:
            self._progress.advance(self._progress.task_ids[0])

    def warn(self, text: str) -> None:
        """Say what a person should know although the command goes on."""
        typer.echo(f"vmnet: warning: {text}", err=True)
