"""Keep how the host was at the first carve of this boot: beside the records, so that restore can do without them."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from vmnet.model import KernelRefused, NetnsId
from vmnet.ops import LoAddress
from vmnet.plan import Found

_NAME = "found.json"
_PARTIAL = ".found.json.new"


def load_found(run: Path, here: NetnsId) -> Found | None:
    """Return what was found in the host namespace `here` (boot included), or None where nothing is known."""
    try:
        kept = json.loads((run / _NAME).read_text())
        if kept["netns"] != asdict(here):
            return None
        lo = tuple(
            LoAddress(one["value"], one["scope"], one["flags"], tuple((n, p) for n, p in one["attributes"]))
            for one in kept["lo"]
        )
        return Found(lo, kept["ip_forward"], kept["accept_redirects"], kept["forwarding"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_found(run: Path, here: NetnsId, found: Found) -> None:
    """Keep `found` for `here`, whole or not at all; one process at a time."""
    noted = {"netns": asdict(here), **found._asdict(), "lo": [one._asdict() for one in found.lo]}
    content = json.dumps(noted, indent=1)
    partial = run / _PARTIAL
    try:
        run.mkdir(mode=0o755, parents=True, exist_ok=True)
        with partial.open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(run / _NAME)
    except OSError as error:
        raise KernelRefused(f"{run / _NAME} cannot be written: {error.strerror}") from None


def forget_found(run: Path) -> None:
    """Forget what was found: the host is as it was."""
    for name in (_PARTIAL, _NAME):
        (run / name).unlink(missing_ok=True)
