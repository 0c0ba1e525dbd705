"""Know connections that the kernel would keep sending where nothing answers any more.

The kernel decides once how a connection is translated, with its first packet. One that began while our rules were away
has no translation for ever, and one over an address that the host has lost is not always forgotten: the kernel looks
for that address in the wrong place where it has a far end of its own (masq_inet_event, nf_nat_masquerade.c).
"""

from collections.abc import Collection
from typing import NamedTuple

_POOL_FIRST, _POOL_END = 0x7F010000, 0x7F400000


class Flow(NamedTuple):
    """A tracked connection: its addresses as it began, and as its answers bear them; numbers in host order."""

    source: int
    destination: int
    reply_source: int
    reply_destination: int


def leads_nowhere(flow: Flow, shadow: int, lost: Collection[int]) -> bool:
    """Say whether a guest's connection lacks its translation, or bears an address that is among the `lost`.

    `shadow` is the first octet of the shadow.
    """
    if _POOL_FIRST <= flow.destination < _POOL_END:
        return flow.reply_source == flow.destination
    if flow.source >> 24 != shadow or flow.destination >> 24 == shadow:
        return False  # not a guest's, or between guests and to their gateway, where nothing is translated
    return flow.reply_destination == flow.source or flow.reply_destination in lost
