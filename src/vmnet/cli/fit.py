"""Fit vmnet into what is installed, take it out again, say how it is: what the command `hooks` does."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from vmnet.cli.hooks import Verb
from vmnet.cli.show import Reporter, op_as_json, print_ops, print_table, say
from vmnet.hooks import network as libvirt
from vmnet.hooks.call import Call
from vmnet.hooks.install import Run, Seen, Step, apply, look, plan_install, plan_uninstall
from vmnet.hooks.network import Network
from vmnet.hooks.parts import Part, parts_here
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
    parts = _parts(names, verb, live=live)
    seen = look(parts, call, prefix or Path("/"))
    network = _look_at_network(parts, verb, live=live)
    if verb is Verb.status:
        _say_status(seen, network, json_=json_)
        return
    plan = plan_install if verb is Verb.install else plan_uninstall
    steps = plan(seen, live=live)
    to_do = _plan_network(verb, network, seen, steps)
    if dry_run:
        print_ops(list(map(op_as_json, steps)), json_=json_, verbose=verbose)
        raise typer.Exit(_FOUND if steps else 0)
    warn = Reporter(verbose=False).warn
    if live and os.geteuid() != 0:
        raise NotPermitted("only root may write to the system's folders", hint="run it with sudo")
    if verb is Verb.install and live and steps:
        call.check()
    for complaint in apply(steps, mark=live):
        warn(complaint)
    _say_done(verb, seen, steps, to_do, json_=json_)
    if live:
        for text in [*_reservations(verb, call, seen), *_network_reservations(verb, network, to_do)]:
            warn(text)


def _parts(names: Sequence[str] | None, verb: Verb, *, live: bool) -> list[Part]:
    known = {part.name: part for part in parts_here()}
    for name in names or ():
        if name not in known:
            raise UsageError(f"there is no part {name[:80]!r}", hint=f"there are {', '.join(known)}")
    if names:
        return [part for part in known.values() if part.name in names]
    return [part for part in known.values() if verb is not Verb.install or not live or part.found()]


def _look_at_network(parts: Sequence[Part], verb: Verb, *, live: bool) -> Network | None:
    """Return how libvirt's network is, None where no part has to do with it."""
    owners = [part for part in parts if part.has_network]
    if not owners or not (live or verb is Verb.install):
        return None
    return libvirt.look() if live and any(part.found() for part in owners) else Network("unknown")


def _plan_network(verb: Verb, network: Network | None, seen: Sequence[Seen], steps: list[Step]) -> list[Run]:
    """Put into `steps` what the network needs; return what is left for a person to do."""
    if network is None:
        return []
    if verb is Verb.install:
        more = libvirt.plan_install(network)
        if network.state == "unknown":
            return more
        steps += more
        return []
    more = libvirt.plan_uninstall(network)
    if network.state == "unknown":
        # With the hooks that were for it.
        return more if any(one.part.has_network and one.state in ("current", "outdated") for one in seen) else []
    if network.users:
        return more
    steps[:0] = more
    return []


def _say_status(seen: Sequence[Seen], network: Network | None, *, json_: bool) -> None:
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
    for part in parts:
        if network and any(one.part.has_network for one in by_part[part["part"]]):
            part["network"] = network.state
    if json_:
        say(json.dumps(parts))
        return
    rows = [
        (part["part"], "found" if part["found"] else "not found", one["path"], one["state"])
        for part in parts
        for one in [
            *part["files"],
            *([{"path": f"network {libvirt.NAME}", "state": part["network"]}] if "network" in part else []),
        ]
    ]
    print_table([("PART", "HERE", "FILE", "STATE"), *rows])


def _say_done(verb: Verb, seen: Sequence[Seen], steps: Sequence[Step], to_do: Sequence[Run], *, json_: bool) -> None:
    done = _DONE[verb]
    rows = [(one.part.name, str(one.path), done[one.state]) for one in seen if one.state in done]
    ran = [step.command() for step in steps if isinstance(step, Run)]
    left = [step.command() for step in to_do]
    if json_:
        files = [{"part": part, "path": path, "done": what} for part, path, what in rows]
        say(json.dumps({"files": files, "ran": ran, "to_do": left}))
        return
    if rows:
        print_table([("PART", "FILE", "DONE"), *rows])
    for step in steps:
        if isinstance(step, Run):
            say(f"ran: {shlex.join(step.argv)}")
    if left:
        say("\n".join(["to do by hand:", *left]))


def _network_reservations(verb: Verb, network: Network | None, to_do: Sequence[Run]) -> list[str]:
    """Return what a person should know of the network."""
    if network is None or not (to_do or network.state == "foreign"):
        return []
    name = f"libvirt's network {libvirt.NAME}"
    if network.state == "foreign":
        return [f"{name} was left as it is: it is not on vmnet's bridge, so somebody else's"]
    if network.users:
        return [f"{name} was left: domains are on it: {', '.join(network.users)[:500]}"]
    done = "made" if verb is Verb.install else "taken away"
    return [f"{name} was not {done}: {network.words or 'there is no libvirt here'}"]


def _reservations(verb: Verb, call: Call, seen: Sequence[Seen]) -> list[str]:
    """Return what a person should know of a service that is installed now."""
    if verb is not Verb.install or not any(
        one.file.template.startswith(("systemd/", "sysvinit/", "launchd/")) for one in seen
    ):
        return []
    texts = []
    if systemd_runs() and not is_in_hosts_netns():
        texts.append("the service was not started: this is not the system's own network namespace")
    owners = sorted(call.owners())
    if owners:
        texts.append(f"at every boot root runs what uid {owners[0]} may change: {call.argv[0]} and its vmnet")
    return texts
