"""launchctl(1) of macOS, for the daemons of the system: `services` of the state has the plist of each label.

FAKE_MAC_ROOT is a folder to be taken for the root of the system.
"""

import os
import plistlib
from pathlib import Path
from xml.parsers.expat import ExpatError

from tests.darwin.fakes.state import Answer, Failed, State, uid

_DOMAIN = "system"
_IN_OUT, _NO_PROCESS, _NO_SERVICE, _USAGE = 5, 3, 113, 64


def main(state: State, argv: list[str]) -> Answer:
    """Answer `bootstrap system PLIST`, `bootout system/LABEL` and `print system/LABEL`, the first two to root only."""
    match argv[1:]:
        case ["bootstrap" | "bootout", *_] if uid(state) != 0:
            raise Failed(f"{argv[1]}: permission denied", 1)
        case ["bootstrap", "system", path]:
            _load(state["services"], path)
            return Answer()
        case ["bootout", target]:
            if state["services"].pop(_label(target), None) is None:
                raise Failed("Boot-out failed: 3: No such process", _NO_PROCESS)
            return Answer()
        case ["print", target]:
            return Answer(_printed(state["services"], _label(target)))
    raise Failed(f"Unrecognized subcommand: {' '.join(argv[1:])}", _USAGE)


def _load(services: dict[str, str], path: str) -> None:
    try:
        with open(os.environ.get("FAKE_MAC_ROOT", "") + path, "rb") as file:
            label = plistlib.load(file).get("Label")
    except (OSError, ValueError, AttributeError, ExpatError, plistlib.InvalidFileException):
        label = None
    if not isinstance(label, str) or label in services:
        raise Failed("Bootstrap failed: 5: Input/output error", _IN_OUT)
    services[label] = str(Path(path).absolute())


def _printed(services: dict[str, str], label: str) -> str:
    if label not in services:
        raise Failed(f'Could not find service "{label}" in domain for {_DOMAIN}', _NO_SERVICE)
    rows = (("path", services[label]), ("type", "LaunchDaemon"), ("state", "running"))
    return "".join([f"{_DOMAIN}/{label} = {{\n", *(f"\t{name} = {value}\n" for name, value in rows), "}\n"])


def _label(target: str) -> str:
    domain, _, label = target.partition("/")
    if domain != _DOMAIN or not label:
        raise Failed(f"fake: not modelled: the domain of {target}", _USAGE)
    return label
