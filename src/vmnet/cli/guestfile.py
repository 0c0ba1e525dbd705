"""A file of guests, as `apply` reads it: TOML, one table for each guest, with the options of `create` as keys."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vmnet.cli.show import as_json, print_guests, say
from vmnet.cli.values import check_mtu, check_queues, parse_address, parse_mac, parse_owner
from vmnet.engine import Applied
from vmnet.model import UsageError, check_name
from vmnet.settings import Settings, read_toml, shown
from vmnet.specs import GuestSpec

_STDIN = "-"
_FORM = "each guest is a table of its own, such as [guest.web]"


def read_guests(file: str) -> list[GuestSpec]:
    """Return the guests that `file` names, in its order; `-` is the standard input.

    Raises UsageError naming the file, and where it is one of a guest, guest, key and value; NotPermitted.
    """
    if file == _STDIN:
        return parse_guests("standard input", read_toml("standard input", _read_stdin))
    try:
        return parse_guests(file, read_toml(file, lambda: Path(file).read_text("utf-8")))
    except FileNotFoundError:
        raise UsageError(f"there is no file {file}", hint=f"{_FORM}; {_STDIN} is the standard input") from None


def _read_stdin() -> str:
    with open(0, encoding="utf-8", closefd=False) as stream:
        return stream.read()


def parse_guests(file: str, document: Mapping[str, Any]) -> list[GuestSpec]:
    """Return the guests of a TOML document that is called `file`."""
    for key in document:
        if key != "guest":
            raise UsageError(f"{file}: there is no key {shown(key)}", hint=_FORM)
    tables = document.get("guest", {})
    if not isinstance(tables, dict):
        raise UsageError(f"{file}: guest = {shown(tables)} is no table of guests", hint=_FORM)
    return [_parse_guest(file, name, table) for name, table in tables.items()]


def _parse_guest(file: str, name: str, table: object) -> GuestSpec:
    try:
        where = f"{file}: guest.{check_name(name)}"
    except UsageError as error:
        raise UsageError(f"{file}: {error.message}", hint=error.hint) from None
    if not isinstance(table, dict):
        raise UsageError(f"{where} = {shown(table)} is no guest", hint=_FORM)
    for key in table:
        if key not in _PARSERS:
            raise UsageError(f"{where}: there is no key {shown(key)}", hint=f"there are {', '.join(_PARSERS)}")
    values = {key: _PARSERS[key](f"{where}.{key}", value) for key, value in table.items()}
    return GuestSpec(name=name, origin=where, **values)


def _one_of(*words: str) -> Callable[[str, object], str]:
    def check(what: str, value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise UsageError(f"{what} {shown(value)} is not one of {', '.join(words)}")
        return value

    return check


def _text(what: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{what} {shown(value)} is no text", hint='texts are in quotes, such as "web"')
    return value


def _number(what: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{what} {shown(value)} is no whole number")
    if abs(value) > 1 << 64:  # a number that Python may not be able to write
        raise UsageError(f"{what} {shown(value)} is too large")
    return value


# What each key may be.
_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "kind": _one_of("tap", "veth", "tun", "alias"),
    "netns": _text,
    "mode": _one_of("native", "mapped"),
    "address": lambda what, value: parse_address(what, _text(what, value)),
    "mac": lambda what, value: parse_mac(what, _text(what, value)),
    "mtu": lambda what, value: check_mtu(what, _number(what, value)),
    "owner": lambda what, value: parse_owner(what, value if isinstance(value, str) else str(_number(what, value))),
    "queues": lambda what, value: check_queues(what, _number(what, value)),
}
KEYS = tuple(_PARSERS)


def say_applied(done: Applied, settings: Settings, *, json_: bool) -> None:
    """Print the guests of a file, and which others were deleted."""
    guests = [as_json(one, settings) for one in done.guests]
    if json_:
        say(json.dumps({"guests": guests, "deleted": done.deleted}))
        return
    if guests:
        print_guests(guests)
    for name in done.deleted:
        say(f"{name} is deleted")
