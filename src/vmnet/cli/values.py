"""What a guest may be given, in a person's words: `what` names the option, or the key of a file, in what is refused."""

import os
import pwd

from netaddr import AddrFormatError, IPAddress

from vmnet.model import MTU, QUEUES, NotPermitted, UsageError, is_mac


def parse_address(what: str, text: str | None) -> IPAddress | None:
    """Return the address that is meant; raises UsageError."""
    if text is None:
        return None
    try:
        return IPAddress(text, flags=1)  # INET_PTON: four decimal numbers, nothing else
    except (AddrFormatError, ValueError):
        raise UsageError(f"{what} {text[:80]!r} is not an IP address", hint="such as 127.1.0.2") from None


def parse_mac(what: str, text: str | None) -> str | None:
    """Return the MAC that is meant, in small letters; raises UsageError."""
    if text is None:
        return None
    if not is_mac(text.lower()):
        raise UsageError(f"{what} {text[:80]!r} is not the MAC of one device", hint="such as 02:00:00:00:00:01")
    return text.lower()


def check_mtu(what: str, value: int | None) -> int | None:
    """Return the MTU if it is one that devices can have; raises UsageError."""
    return _between(what, value, *MTU)


def check_queues(what: str, value: int | None) -> int | None:
    """Return the number of queues if a tap can have that many; raises UsageError."""
    return _between(what, value, *QUEUES)


def _between(what: str, value: int | None, low: int, high: int) -> int | None:
    if value is not None and not low <= value <= high:
        raise UsageError(f"{what} {value} is not between {low} and {high}")
    return value


def parse_owner(what: str, text: str | None) -> int | None:
    """Return the uid of the user who is meant, by name or by uid; raises NotPermitted for all but root."""
    if text is None:
        return None
    if os.geteuid() != 0:
        raise NotPermitted(f"{what} needs root", hint="run it with sudo")
    if text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) < 0xFFFFFFFF:
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        raise UsageError(f"{what}: there is no user {text[:80]!r}") from None
