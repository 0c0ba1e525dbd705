"""Which domains of libvirt's have gone, and which guests go with them. Pure.

Whoever asks has seen all domains that libvirt has; a libvirt that did not answer tells nothing.
"""

from collections.abc import Collection, Iterable

from vmnet.store import DomainRecord


def notes(known: Iterable[DomainRecord], there: Collection[str], now: float) -> dict[str, float | None]:
    """Return what is to be recorded, by guest: since when its domain has been gone, or None for one that came back.

    `there` are the UUIDs of the domains that libvirt has at the time `now`. A guest that is not named stays as it is.
    """
    found: dict[str, float | None] = {}
    for one in known:
        if one.uuid in there:
            if one.gone is not None:
                found[one.name] = None
        elif one.gone is None or one.gone > now:  # the clock was set back since
            found[one.name] = now
    return found


def overdue(known: Iterable[DomainRecord], there: Collection[str], before: float) -> list[str]:
    """Return the guests that were made for a domain that is gone, and was seen gone at the time `before` or earlier."""
    return [
        one.name for one in known if one.made and one.uuid not in there and one.gone is not None and one.gone <= before
    ]
