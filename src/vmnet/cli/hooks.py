"""The command `hooks`, and no more of it than each start of vmnet can afford to import: `fit` does the work."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Verb(StrEnum):
    """What can be done with hooks."""

    install = "install"
    uninstall = "uninstall"
    status = "status"


def hooks(
    verb: Annotated[Verb, typer.Argument(metavar="install|uninstall|status", help="What to do.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[PART...]", help="What to fit vmnet into; all that is found.")
    ] = None,
    prefix: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take DIR for the root of the system, and run nothing.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing: exit 10 if anything.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="With --dry-run, print commands that can be typed.")
    ] = False,
) -> None:
    """Fit vmnet into the system: a service, and what keeps other programs off its devices."""
    from vmnet.cli.fit import fit

    fit(verb, names, prefix, json_=json_, dry_run=dry_run, verbose=verbose)
