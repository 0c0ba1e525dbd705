"""sudo(8): the command that follows the options is run by root, as far as the fakes go."""

import os
import re
from typing import NoReturn

from tests.darwin.fakes.state import UID, Answer, Failed, State, uid

_WITH_ARGUMENT = frozenset("CDghpRrTtUu")
_SETTING = re.compile(r"[A-Za-z_]\w*=", re.ASCII)


def main(state: State, argv: list[str]) -> Answer:
    """Run the command in place of sudo, with the variables set that stand before it."""
    words = _without_options(argv[1:])
    settings = dict[str, str]()
    while words and _SETTING.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    if not words:
        raise Failed("usage: sudo [options] [VAR=value] command [argument ...]")
    caller = str(uid(state))
    environment = {**os.environ, "SUDO_UID": caller, "SUDO_GID": caller, **settings, UID: "0"}

    def become() -> NoReturn:
        try:
            os.execvpe(words[0], words, environment)
        except OSError:
            os.write(2, f"sudo: {words[0]}: command not found\n".encode())
            os._exit(1)

    return Answer(then=become)


def _without_options(words: list[str]) -> list[str]:
    rest = list(words)
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option == "--":
            break
        if not option.startswith("--") and option[-1] in _WITH_ARGUMENT and rest:
            rest.pop(0)
    return rest
