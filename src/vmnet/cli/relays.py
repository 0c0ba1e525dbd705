"""Ports of aliases that lead elsewhere: how they are written, what `relay` and `unrelay` say, and who relays them."""

import json
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vmnet.cli.show import print_table, say
from vmnet.model import UsageError
from vmnet.store import Relay

if TYPE_CHECKING:
    from vmnet.relay.relays import Relays

_FORM = re.compile(r"(\d{1,5})(?::(\[[^\]\s]+\]|[^:\[\]\s/]+):(\d{1,5}))?(?:/(tcp|udp))?", re.ASCII)
_HERE = "127.0.0.1"


class Change(NamedTuple):
    """A relay that is to be, or not to be any more."""

    name: str
    relay: Relay
    is_new: bool

    def __str__(self) -> str:
        one = self.relay
        sign = "+" if self.is_new else "-"
        return f"{sign} relay {self.name} {one.port} to {one.target}:{one.target_port} ({one.protocol})"

    def command(self) -> str:
        if self.is_new:
            return f"vmnet relay {self.name} {self.relay}"
        return f"vmnet unrelay {self.name} {self.relay.port}/{self.relay.protocol}"


def parse_relay(text: str) -> Relay:
    """Return what PORT[:HOST:PORT][/tcp|udp] says: without HOST and PORT the same port of 127.0.0.1.

    An IPv6 address is written in brackets. Raises UsageError for anything else.
    """
    found = _FORM.fullmatch(text)
    ports = [int(one) for one in (found[1], found[3] or found[1])] if found else []
    if not found or not all(1 <= port <= 65535 for port in ports):
        shown = text if len(text) < 80 else f"{text[:77]}..."
        raise UsageError(
            f"{shown!r} is no relay", hint="PORT[:HOST:PORT][/tcp|udp], such as 80:127.0.0.1:8080; ports are 1 to 65535"
        )
    return Relay(ports[0], found[4] or "tcp", (found[2] or _HERE).strip("[]"), ports[1])


def say_changes(changes: Sequence[Change], *, as_json: bool) -> None:
    """Say which relays are new, and which are gone."""
    if as_json:
        say(json.dumps([{**one.relay._asdict(), "name": one.name, "new": one.is_new} for one in changes]))
    elif changes:
        rows = [
            (
                one.name, str(one.relay.port), one.relay.protocol, one.relay.target, str(one.relay.target_port),
                "relayed" if one.is_new else "ended",
            )
            for one in changes
        ]  # fmt: skip
        print_table([("NAME", "PORT", "PROTOCOL", "TARGET", "ITS PORT", "DONE"), *rows])


class Relaying:
    """Relays for the watcher, by a thread that starts with the first of them."""

    def __init__(self) -> None:
        self._relays: Relays | None = None

    def want(self, ports: Collection[tuple[str, Relay]]) -> None:
        """Relay these ports of addresses, and no others."""
        if self._relays is None and not ports:
            return
        from vmnet.relay import Forward
        from vmnet.relay.relays import Relays  # asyncio takes 40 ms to import

        self._relays = self._relays or Relays()
        # What the records hold was parsed before.
        self._relays.want(
            [Forward(address, one.port, one.protocol, one.target, one.target_port) for address, one in ports]  # type: ignore[arg-type]
        )

    def problems(self) -> list[str]:
        """Return what is wrong now."""
        return list(self._relays.problems().values()) if self._relays else []

    def close(self) -> None:
        """End all of it."""
        if self._relays:
            self._relays.close()
