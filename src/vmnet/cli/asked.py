"""What the server does for users without root: each question of the typed protocol by the engine, on their behalf."""

import os
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any

from netaddr import IPAddress

from vmnet import __version__
from vmnet.cli.show import as_json, op_as_json
from vmnet.engine import Engine
from vmnet.linux.places import find_process, identify, is_theirs
from vmnet.model import NoSuchGuest, NotPermitted, UsageError, VmnetError
from vmnet.ops import Op
from vmnet.platform import Listener, Report
from vmnet.requests import Answer, Question, encode_refusal, parse_question
from vmnet.settings import Paths
from vmnet.specs import GuestSpec

OpenFor = Callable[[Report, int], AbstractContextManager[Engine]]
BUSY = encode_refusal(1, "the server has too many questions at a time, yours among them", "try again in a moment")


class _Steps(Listener):
    """A Report that keeps what is done, if somebody wants to know it."""

    def __init__(self, *, wanted: bool) -> None:
        super().__init__()
        self._wanted = wanted
        self.steps: list[str] = []

    def did(self, op: Op) -> None:
        if self._wanted:
            self.steps.append(op.command())


def reply(open_for: OpenFor, data: bytes, uid: int, descriptors: list[int]) -> bytes:
    """Do what user `uid` asks for, and return the answer; an empty one says that it is not for this server."""
    try:
        question = parse_question(data)
        if (question.place, question.version) != (str(Paths.from_environment().state), __version__):
            return b""
        if question.netns != bool(descriptors):
            raise UsageError("a descriptor goes with the question if, and only if, it says so")
        report = _Steps(wanted=question.steps)
        with open_for(report, uid) as engine:
            answer = _answer(engine, question, uid, descriptors)
        return replace(answer, steps=tuple(report.steps), warnings=tuple(report.warnings)).encode()
    except VmnetError as error:
        return encode_refusal(error.exit_code, error.message, error.hint)
    except OSError as error:
        return encode_refusal(1, f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), "")
    except Exception:  # noqa: BLE001 -- what is wrong with the server is for its log, not for whoever asks
        traceback.print_exc()
        return encode_refusal(1, "the server failed at this", "its log says why: journalctl -u vmnet-server")


def _answer(engine: Engine, question: Question, uid: int, descriptors: list[int]) -> Answer:
    names = None if question.every else list(question.names)
    dry_run = question.dry_run
    match question.verb:
        case "look":
            return Answer(guests=_shown(engine, names))
        case "create":
            specs = _specs(engine, question, uid, descriptors)
            if dry_run:
                return _planned(engine.create(specs, dry_run=True)[1])
            seen = engine.create_and_look(specs)
            return Answer(guests=tuple(as_json(one, engine.settings) for one in seen))
        case "delete":
            gone, ops = engine.delete(names, if_exists=question.if_exists, dry_run=dry_run)
            return _planned(ops) if dry_run else Answer(deleted=tuple(gone))
        case "up" | "down":
            ops = (engine.up if question.verb == "up" else engine.down)(names, dry_run=dry_run)
            return _planned(ops) if dry_run else Answer(guests=_shown(engine, names))


def _shown(engine: Engine, names: list[str] | None) -> tuple[dict[str, Any], ...]:
    return tuple(as_json(one, engine.settings) for one in engine.look(names))


def _planned(ops: list[Op]) -> Answer:
    return Answer(ops=tuple(map(op_as_json, ops)))


def _specs(engine: Engine, question: Question, uid: int, descriptors: list[int]) -> list[GuestSpec]:
    """Return what to create; raises NotPermitted for a veth whose namespace is not the user's own."""
    kind = question.kind or ("veth" if question.netns else None)
    spec = GuestSpec(
        name="",
        kind=kind,
        mode=question.mode,
        address=None if question.address is None else IPAddress(question.address),
        mac=question.mac,
        mtu=question.mtu,
        queues=question.queues,
    )
    if question.netns:
        spec = _in_theirs(engine, spec, question.names[0], descriptors[0], uid)
    elif kind == "veth":
        raise NotPermitted(
            "without root a veth goes into a network namespace of your own, and none is named",
            hint="--netns /proc/PID/ns/net, of a process in it",
        )
    return [spec._replace(name=name) for name in question.names]


def _in_theirs(engine: Engine, spec: GuestSpec, name: str, descriptor: int, uid: int) -> GuestSpec:
    """Return a spec with the way into the namespace behind a user's descriptor: by a process in it, found here."""
    if not is_theirs(descriptor, uid):
        raise NotPermitted(
            "what --netns names is no network namespace of your own",
            hint="one that you have made with a user namespace is (unshare --user --net); into any other root puts it",
        )
    place = identify(f"/proc/self/fd/{descriptor}")
    known = None
    with suppress(NoSuchGuest):
        known = engine.lease(name).netns
    if known and known.identity == place and os.path.exists(known.path):
        path: str | None = known.path
    else:
        path = find_process(place) if place else None
    if path is None:
        raise NotPermitted(
            "no process is in the namespace that --netns names, and vmnet keeps none alive",
            hint="start what is to run in it first",
        )
    return spec._replace(netns=path, place=place)
