"""ifconfig(8) of macOS: interfaces are shown, and IPv4 addresses added and deleted.

As in Apple's network_cmds (ifconfig.c, af_inet.c) and xnu (in.c): words are done from the left to the right, one that
is no keyword is an address, and what is deleted and added is known, and asked of the kernel, at the end of the line.
"""

from _socket import inet_aton  # the module socket takes longer to load than all the rest of a call
from collections.abc import Iterator
from typing import Any

from tests.darwin.fakes.state import Answer, Failed, State, uid

Interface = dict[str, Any]

USAGE = """\
usage: ifconfig interface address_family [address [dest_address]]
                [parameters]
       ifconfig -a [address_family]
       ifconfig -l [address_family]"""
_FAMILIES = ("inet", "inet6")
_UP = 0x1
_ALL_ONES = 0xFFFFFFFF


def main(state: State, argv: list[str]) -> Answer:
    """Show interfaces, or change one."""
    words = argv[1:]
    if not words or words[0].startswith("-"):
        return Answer(_overview(state, words or ["-a"]))
    name, *rest = words
    if name not in state["ifaces"]:
        raise _refused(f"interface {name} does not exist")
    family = rest.pop(0) if rest and rest[0] in _FAMILIES else None
    if not rest:
        return Answer(shown(state, name, family))
    if family == "inet6":
        raise Failed("fake: inet6 not modelled")
    _Line(state, name).do(rest)
    return Answer()


def shown(state: State, name: str, family: str | None = None) -> str:
    """Return what is told of an interface: all of it, or only its addresses of one family."""
    interface = state["ifaces"][name]
    lines = [f"{name}: flags={interface['flags']} mtu {interface['mtu']}"]
    if interface["options"] is not None:
        lines.append(f"\toptions={interface['options']}")
    space = " " if state["trailing_space"] else ""
    lines += [
        f"\t{one['fam']} {_value(one)}{space if one['fam'] in _FAMILIES else ''}"
        for one in interface["addrs"]
        if family in (None, one["fam"])
    ]
    if family is None:
        lines += [f"\t{line}" for line in interface["tail"]]
    return "".join(f"{line}\n" for line in lines)


def _value(one: dict[str, Any]) -> str:
    if one["fam"] != "inet":
        return str(one["text"])
    dest = f" --> {one['dest']}" if "dest" in one else ""
    broadcast = f" broadcast {one['broadcast']}" if "broadcast" in one else ""
    return f"{one['addr']}{dest} netmask {one['mask']:#x}{broadcast}"


def _overview(state: State, words: list[str]) -> str:
    option, *family = words
    if option not in ("-a", "-l") or len(family) > 1 or not set(family) <= set(_FAMILIES):
        raise Failed(USAGE)
    chosen = family[0] if family else None
    names = [
        name
        for name, interface in state["ifaces"].items()
        if chosen is None or any(one["fam"] == chosen for one in interface["addrs"])
    ]
    return " ".join(names) + "\n" if option == "-l" else "".join(shown(state, name, chosen) for name in names)


class _Line:
    """The words after an interface's name, as far as they have been read."""

    def __init__(self, state: State, name: str) -> None:
        self._state = state
        self._interface: Interface = state["ifaces"][name]
        self._alias = 0
        self._clear, self._new = False, True
        self._address: str | None = None
        self._mask: int | None = None
        self._removed: str | None = None
        self._has_address = False

    def do(self, words: list[str]) -> None:
        rest = iter(words)
        for word in rest:
            match word:
                case "alias" | "add":
                    self._alias, self._clear = 1, False
                case "-alias" | "delete" | "remove":
                    if self._alias == 0:
                        self._removed = self._address
                    self._alias, self._clear, self._new = -1, True, False
                case "netmask":
                    self._mask = _parsed(_argument(word, rest))
                case "broadcast":
                    _parsed(_argument(word, rest))
                case "up" | "down":
                    self._set_up(word)
                case _ if self._has_address:
                    _parsed(word)  # a destination, which lo0 has no use for
                case _:
                    self._take_address(word)
        if self._clear:
            self._delete()
        if self._new and not (self._address is None and self._mask is None):
            self._add()

    def _set_up(self, word: str) -> None:
        if uid(self._state) != 0:
            raise _refused(f"{word}: permission denied")
        number, _, names = self._interface["flags"].rstrip(">").partition("<")
        others = [name for name in names.split(",") if name not in ("UP", "")]
        value, kept = int(number, 16) & ~_UP, others
        if word == "up":
            value, kept = value | _UP, ["UP", *others]
        self._interface["flags"] = f"{value:x}<{','.join(kept)}>"

    def _take_address(self, word: str) -> None:
        self._has_address = True
        if self._alias == 0:
            self._clear = True
        address, slash, length = word.partition("/")
        if slash:
            if not (length.isascii() and length.isdecimal() and int(length) <= 32):
                raise _refused(f"{word}: bad value")
            self._mask = _ALL_ONES << (32 - int(length)) & _ALL_ONES
        plain = _dotted(_parsed(address))
        if self._alias == -1:
            self._removed = plain
        else:
            self._address = plain

    def _delete(self) -> None:
        self._need_root("SIOCDIFADDR")
        addresses = self._interface["addrs"]
        for place, one in enumerate(addresses):
            if one["fam"] == "inet" and self._removed in (None, one["addr"]):
                del addresses[place]
                return
        if self._alias == -1:
            raise _refused("ioctl (SIOCDIFADDR): Can't assign requested address")

    def _add(self) -> None:
        self._need_root("SIOCAIFADDR")
        number = _parsed(self._address or "0.0.0.0")
        if number in (0, _ALL_ONES) or number >> 28 == 0xE:
            raise _refused("ioctl (SIOCAIFADDR): Invalid argument")
        for one in self._interface["addrs"]:
            if one["fam"] == "inet" and one["addr"] == self._address:
                if self._mask is not None and not self._state["sticky_mask"]:
                    one["mask"] = self._mask
                return
        mask = _classful(number) if self._mask is None else self._mask
        self._interface["addrs"].append({"fam": "inet", "addr": self._address, "mask": mask})

    def _need_root(self, request: str) -> None:
        if uid(self._state) != 0:
            raise _refused(f"ioctl ({request}): permission denied")


def _refused(text: str) -> Failed:
    return Failed(f"ifconfig: {text}")


def _argument(keyword: str, rest: Iterator[str]) -> str:
    for word in rest:
        return word
    raise _refused(f"'{keyword}' requires argument")


def _parsed(word: str) -> int:
    try:
        return int.from_bytes(inet_aton(word), "big")
    except OSError:
        raise _refused(f"{word}: bad value") from None


def _dotted(number: int) -> str:
    return ".".join(str(octet) for octet in number.to_bytes(4, "big"))


def _classful(number: int) -> int:
    if number >> 31 == 0:
        return 0xFF000000
    return 0xFFFF0000 if number >> 30 == 0b10 else 0xFFFFFF00
