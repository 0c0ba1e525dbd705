"""What `show --cloud-init` prints and makes."""

import json
import sys
from pathlib import Path

from vmnet.cli.caller import caller_gid
from vmnet.cli.show import say
from vmnet.cloudinit import render
from vmnet.model import Lease, UsageError
from vmnet.seed import write_seed
from vmnet.settings import Settings


def show_cloud_init(
    lease: Lease, settings: Settings, *, seed: Path | None, user_data: Path | None, caller: int, as_json: bool
) -> None:
    """Print the documents for a guest, or make a seed image of them; `user_data` replaces the document of that name."""
    documents = render(lease, settings)
    if user_data:
        documents["user-data"] = _text(user_data)
    if seed:
        write_seed(seed, documents, (caller, caller_gid()))
    if as_json:
        say(json.dumps({**documents, "seed": str(seed)} if seed else documents))
    elif seed is None:
        say("".join(f"--- # {name}\n{text}" for name, text in documents.items()).removesuffix("\n"))
    elif sys.stdout.isatty():
        say(f"{seed} is a seed image for {lease.name}: give it to the VM as a disk or CD-ROM")


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError:
        raise UsageError(f"--user-data {file} is not text in UTF-8") from None
