"""The typed protocol in which users without root ask the server for guests of their own: questions and answers.

A question is a JSON object, and of a namespace a descriptor that goes with it: there is no path in it, no environment
and nothing that a program is called with. An answer is a JSON object, too. All here is pure: what is asked is checked
field by field, and what does not fit is refused as a whole.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from netaddr import AddrFormatError, IPAddress

from vmnet.model import MTU, QUEUES, Kind, Mode, UsageError, block_of, check_name, is_mac

Verb: TypeAlias = Literal["create", "delete", "up", "down", "look"]

MOST_NAMES = 256
"""How many guests one question may be about."""
LARGEST = 1 << 16
"""Bytes that a question may have."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a user wants done with guests of theirs; what `create` knows as options is None where it is not given.

    `every`: all, for `look`, and all that are theirs, for `delete`. `netns`: a descriptor of the namespace goes with
    it. `steps`: they want to know each step. `place` and `version` are the folder of records and the vmnet that they
    mean, and are compared, never used.
    """

    verb: Verb
    names: tuple[str, ...]
    place: str
    version: str
    every: bool = False
    if_exists: bool = False
    dry_run: bool = False
    steps: bool = False
    kind: Kind | None = None
    mode: Mode | None = None
    address: str | None = None
    mac: str | None = None
    mtu: int | None = None
    queues: int | None = None
    netns: bool = False

    def encode(self) -> bytes:
        """Return the question as it is sent."""
        usual = {one.name: one.default for one in fields(self)}
        return json.dumps({key: value for key, value in asdict(self).items() if value != usual[key]}).encode()


def parse_question(data: bytes) -> Question:
    """Return the question in `data`; raises UsageError for anything that is none, naming the field at fault."""
    if len(data) > LARGEST:
        raise UsageError(f"the question has {len(data)} bytes, more than {LARGEST}")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the question is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError("the question is not an object")
    for key, value in found.items():
        if key not in _RULES or not _RULES[key](value):
            raise UsageError(f"{_shown(key)}: {_shown(value)} is not right in a question")
    if missing := {"verb", "names", "place", "version"} - found.keys():
        raise UsageError(f"the question lacks {', '.join(sorted(missing))}")
    question = Question(**{**found, "names": tuple(found["names"])})
    _check_whole(question)
    return question


def _check_whole(question: Question) -> None:
    """Raise UsageError for what is right field by field, and makes no sense together."""
    for name in question.names:
        check_name(name)
    if len(set(question.names)) < len(question.names):
        raise UsageError("a guest is named twice")
    if bool(question.names) == question.every or (question.every and question.verb not in ("delete", "look")):
        raise UsageError(f"{question.verb} is for guests by their names")
    options = (question.kind, question.mode, question.address, question.mac, question.mtu, question.queues)
    if question.verb != "create" and (question.netns or any(one is not None for one in options)):
        raise UsageError(f"{question.verb} takes no options of create")
    if len(question.names) > 1 and (question.netns or question.address or question.mac):
        raise UsageError("an address, a MAC and a namespace are for one guest")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 4096


def _is_between(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_address(value: object) -> bool:
    if not isinstance(value, str) or len(value) > 15:
        return False
    try:
        block_of(IPAddress(value, version=4, flags=1))  # INET_PTON: four decimal numbers, nothing else
    except (AddrFormatError, ValueError, UsageError):
        return False
    return True


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_NAMES and all(isinstance(one, str) for one in value)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


_RULES = {
    "verb": lambda value: isinstance(value, str) and value in get_args(Verb),
    "names": _is_names,
    "place": _is_text,
    "version": _is_text,
    "every": _is_flag,
    "if_exists": _is_flag,
    "dry_run": _is_flag,
    "steps": _is_flag,
    "kind": lambda value: isinstance(value, str) and value in get_args(Kind),
    "mode": lambda value: isinstance(value, str) and value in get_args(Mode),
    "address": _is_address,
    "mac": is_mac,
    "mtu": lambda value: _is_between(value, *MTU),
    "queues": lambda value: _is_between(value, *QUEUES),
    "netns": _is_flag,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What was done: guests as the command line shows them, names that are gone, or the ops of a dry run.

    `steps` are the commands of what was done, `warnings` what the user should know.
    """

    guests: tuple[dict[str, Any], ...] = ()
    deleted: tuple[str, ...] = ()
    ops: tuple[dict[str, str], ...] = ()
    steps: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """Return the answer as it is sent."""
        return json.dumps(asdict(self)).encode()


def encode_refusal(code: int, message: str, hint: str) -> bytes:
    """Return the answer that says why nothing was done; `code` is an exit code of the command line."""
    return json.dumps({"error": {"code": code, "message": message, "hint": hint}}).encode()
