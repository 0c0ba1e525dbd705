"""Fit vmnet into what is installed, take it out again, say how it is: what the command `hooks` does."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from vmnet.cli.hooks import Verb
from vmnet.cli.show import Reporter, print_ops, print_table, say
from vmnet.hooks.call import Call
from vmnet.hooks.install import Run, Seen, Step, apply, look, plan_install, plan_uninstall
from vmnet.hooks.parts import PARTS, Part
from vmnet.model import NotPermitted, UsageError
from vmnet.systemd import is_in_hosts_netns, systemd_runs

_FOUND = 10
_DONE = {
    "install": {"missing": "written", "outdated": "written", "current": "same", "changed": "left: changed by somebody"},
    "uninstall": {
        "current": "removed",
        "outdated": "removed",
        "changed": "left: changed by somebody",
        "foreign": "left: not written by vmnet",
    },
}


def fit(
    verb: Verb, names: Sequence[str] | None, prefix: Path | None, *, json_: bool, dry_run: bool, verbose: bool
) -> None:
    """Do what `vmnet hooks VERB NAMES...` says; below `prefix` no program is run."""
    call = Call.from_here()
    live = prefix is None
    seen = look(_parts(names, verb, live=live), call, prefix or Path("/"))
    if verb is Verb.status:
        _say_status(seen, json_=json_)
        return
    plan = plan_install if verb is Verb.install else plan_uninstall
    steps = plan(seen, live=live)
    if dry_run:
        print_ops(steps, json_=json_, verbose=verbose)
        raise typer.Exit(_FOUND if steps else 0)
    warn = Reporter(verbose=False).warn
    if live and os.geteuid() != 0:
        raise NotPermitted("only root may write to the system's folders", hint="run it with sudo")
    if verb is Verb.install and live and steps:
        call.check()
    for complaint in apply(steps, mark=live):
        warn(complaint)
    _say_done(verb, seen, steps, json_=json_)
    if verb is Verb.install and live:
        for text in _reservations(call, seen):
            warn(text)


def _parts(names: Sequence[str] | None, verb: Verb, *, live: bool) -> list[Part]:
    known = {part.name: part for part in PARTS}
    for name in names or ():
        if name not in known:
            raise UsageError(f"there is no part {name[:80]!r}", hint=f"there are {', '.join(known)}")
    if names:
        return [part for part in PARTS if part.name in names]
    return [part for part in PARTS if verb is not Verb.install or not live or part.found()]


def _say_status(seen: Sequence[Seen], *, json_: bool) -> None:
    by_part = {one.part.name: [two for two in seen if two.part is one.part] for one in seen}
    parts: list[dict[str, Any]] = [
        {
            "part": name,
            "found": files[0].part.found(),
            "installed": all(one.state not in ("missing", "foreign") for one in files),
            "files": [{"path": str(one.path), "state": one.state} for one in files],
        }
        for name, files in by_part.items()
    ]
    if json_:
        say(json.dumps(parts))
        return
    rows = [
        (part["part"], "found" if part["found"] else "not found", one["path"], one["state"])
        for part in parts
        for one in part["files"]
    ]
    print_table([("PART", "HERE", "FILE", "STATE"), *rows])


def _say_done(verb: Verb, seen: Sequence[Seen], steps: Sequence[Step], *, json_: bool) -> None:
    done = _DONE[verb]
    rows = [(one.part.name, str(one.path), done[one.state]) for one in seen if one.state in done]
    ran = [step.command() for step in steps if isinstance(step, Run)]
    if json_:
        files = [{"part": part, "path": path, "done": what} for part, path, what in rows]
        say(json.dumps({"files": files, "ran": ran}))
        return
    if rows:
        print_table([("PART", "FILE", "DONE"), *rows])
    for command in ran:
        say(f"ran: {command}")


def _reservations(call: Call, seen: Sequence[Seen]) -> list[str]:
    """Return what a person should know of a service that is installed now."""
    if not any(one.file.template.startswith(("systemd/", "sysvinit/")) for one in seen):
        return []
    texts = []
    if systemd_runs() and not is_in_hosts_netns():
        texts.append("the service was not started: this is not the system's own network namespace")
    owners = sorted(call.owners())
    if owners:
        texts.append(f"at every boot root runs what uid {owners[0]} may change: {call.argv[0]} and its vmnet")
    return texts
