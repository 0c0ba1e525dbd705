"""Text whose lines are ordered by the address that each of them has. Pure."""

from collections.abc import Callable, Mapping
from typing import TypeVar

_Text = TypeVar("_Text", bytes, str)


def put(text: _Text, newline: _Text, address_of: Callable[[_Text], bytes], changes: Mapping[bytes, _Text]) -> _Text:
    """Return `text` with this line alone for each of these addresses, 4 bytes in network order; an empty one: no line.

    All other lines stay, and their order. It looks at a few of them, however many there are: each look is one call of
    `address_of`, which may raise what it likes for what is no such line.
    """
    for address, line in changes.items():
        start = end = _first(text, newline, address_of, address)
        while end < len(text) and address_of(text[end : (after := _end(text, newline, end))]) == address:
            end = after
        text = text[:start] + line + text[end:]
    return text


def _first(text: _Text, newline: _Text, address_of: Callable[[_Text], bytes], address: bytes) -> int:
    """Return where the first line with that address or a higher one starts."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high) // 2
        start = text.rfind(newline, low, middle) + 1 or low
        end = _end(text, newline, middle)
        if address_of(text[start:end]) < address:
            low = end
        else:
            high = start
    return low


def _end(text: _Text, newline: _Text, place: int) -> int:
    """Return where the line ends that has what stands at `place`."""
    return text.find(newline, place) + 1 or len(text)
