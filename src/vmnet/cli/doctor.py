"""What the command `doctor` prints."""

import json
import sys

from vmnet.checkup import OpenEngine, look
from vmnet.cli.show import say
from vmnet.doctor import examine

_FOUND = 10


def show_findings(open_engine: OpenEngine, *, as_json: bool) -> int:
    """Print what is wrong on this host; return the exit code, for which notes do not count."""
    findings = examine(look(open_engine))
    if as_json:
        say(json.dumps([one._asdict() for one in findings]))
    elif not findings and sys.stdout.isatty():
        say("nothing is wrong")
    for one in [] if as_json else findings:
        say(f"{one.severity}: {one.what}")
        for word, text in (("seen", one.evidence), ("fix", one.fix)):
            if text:
                say(f"  {word}: {text}")
    return _FOUND if any(one.severity != "note" for one in findings) else 0
