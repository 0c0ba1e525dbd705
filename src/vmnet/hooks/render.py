"""Render the templates: how vmnet is called where there is no environment, and where names of guests are asked."""

import re
import shlex
from html import escape
from importlib.resources import files

from vmnet.client import SOCKET
from vmnet.hooks.call import Call
from vmnet.hooks.parts import File
from vmnet.hooks.seal import seal
from vmnet.members import GROUP, group_id

_TOKEN = re.compile(r"@(COMMAND|ENVIRONMENT|SANDBOX|DOMAIN|PORT|SOCKET|ACCESS)@")
_BARE = re.compile(r"[A-Za-z0-9/_.,:=+-]+")
# systemd's path_is_safe for ExecStart= knows no quotes and backslashes; a $ in the first word is not undoubled.
_NO_PROGRAM = re.compile(r"[\"'\\$]")
_BY_SHELL = ("/bin/sh", "-c", 'exec "$0" "$@"')


def render(file: File, call: Call) -> bytes:
    """Return the content of a file that has a template, sealed."""
    folder = files("vmnet") / "templates"
    is_unit = file.template.startswith("systemd/")
    is_plist = file.template.startswith("launchd/")
    command, environment = _as_plist(call) if is_plist else _as_lines(call, is_unit=is_unit)
    values = {
        "COMMAND": command,
        "ENVIRONMENT": environment,
        "SANDBOX": (folder / "systemd" / "sandbox.conf").read_text() if is_unit else "",
        "DOMAIN": call.settings.domain,
        # No quotes: it is all of the line (systemd.socket(5)).
        "SOCKET": f"{call.environment.get('VMNET_RUN_DIR', '/run/vmnet')}/{SOCKET}".replace("%", "%%"),
        "ACCESS": f"SocketGroup={GROUP}\nSocketMode=0660" if group_id() is not None else "SocketMode=0600",
        "PORT": str(call.settings.plane.dns_port + 1),  # the spelling of native guests is the host's, too
    }
    text = (folder / file.template).read_text()
    return seal(_TOKEN.sub(lambda token: values[token[1]], text))


def _as_lines(call: Call, *, is_unit: bool) -> tuple[str, str]:
    """Return command and environment as lines of a unit of systemd's, or of a shell."""
    environment = "".join(
        f"Environment={quote(f'{name}={value}')}\n" if is_unit else f"export {name}={shlex.quote(value)}\n"
        for name, value in call.environment.items()
    )
    return command_line(call.argv) if is_unit else shlex.join(call.argv), environment


def _as_plist(call: Call) -> tuple[str, str]:
    """Return command and environment as items of an array and of a dictionary (plist(5))."""

    def item(kind: str, text: str) -> str:
        return f"\t\t<{kind}>{escape(text, quote=False)}</{kind}>\n"

    environment = (item("key", name) + item("string", value) for name, value in call.environment.items())
    return "".join(item("string", word) for word in call.argv), "".join(environment)


def command_line(argv: tuple[str, ...]) -> str:
    """Return `argv` as the beginning of an ExecStart= (systemd.service(5), "Command lines")."""
    if _NO_PROGRAM.search(argv[0]):
        argv = (*_BY_SHELL, *argv)
    return " ".join(quote(word).replace("$", "$$") for word in argv)


def quote(text: str) -> str:
    """Return `text` as one word of a unit's line: quotes (systemd.syntax(7)) and specifiers (systemd.unit(5))."""
    if _BARE.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
