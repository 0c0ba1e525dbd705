"""Files that know whether they are as they were written: the seal in their first lines is the hash of all the rest."""

import hashlib
import re
from typing import Literal, TypeAlias

State: TypeAlias = Literal["missing", "current", "outdated", "changed", "foreign"]
"""What is at a path: nothing; what belongs there; what an earlier vmnet, or one at another place, wrote; what we wrote
and somebody has changed since; what we did not write."""

_SEAL = re.compile(rb"(?<=vmnet hooks, which leaves it alone once somebody has changed it \(seal )([0-9a-f]{16})(?=\))")
_BLANK = "0" * 16
_HEAD = 400  # bytes in which the seal is to be found: the first or second line


def seal(text: str) -> bytes:
    """Return `text`, whose place for the seal is the token @SEAL@, sealed."""
    blank = text.replace("@SEAL@", _BLANK, 1).encode()
    return blank.replace(_BLANK.encode(), _digest(blank), 1)


def state_of(content: bytes | None, wanted: bytes) -> State:
    """Return how a file with this content (None: there is none) stands to what we would write."""
    if content is None:
        return "missing"
    if content == wanted:
        return "current"
    found = _SEAL.search(content, 0, _HEAD)
    if found is None:
        return "foreign"
    blank = content[: found.start()] + _BLANK.encode() + content[found.end() :]
    return "outdated" if _digest(blank) == found[1] else "changed"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:16].encode()
