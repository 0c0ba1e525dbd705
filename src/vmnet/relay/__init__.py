"""Relay ports of an address of the host to where something listens: TCP streams and UDP datagrams.

`Forward`, here, says what goes where and imports next to nothing; `relays` has the one thread with one asyncio loop
that does it; `streams` and `datagrams` are a forward of TCP and of UDP, `listener` is what they share, `target` the way
to what they lead to, `floor` what all of them stand on.
"""

import ipaddress
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vmnet.model import UsageError

Protocol: TypeAlias = Literal["tcp", "udp"]


@dataclass(frozen=True, slots=True, order=True)
class Forward:
    """What comes to `port` of `address` goes on to `target_port` of `target`.

    `address` is an IPv4 or IPv6 address of this host and not the wildcard; `target` is an address or a name. Both
    ports are 1 to 65535. Raises `UsageError` for anything else.
    """

    address: str
    port: int
    protocol: Protocol
    target: str
    target_port: int

    def __post_init__(self) -> None:
        for port in (self.port, self.target_port):
            if not 1 <= port <= 65535:
                raise UsageError(f"{port} is not a port", hint="a port is 1 to 65535")
        if self.protocol not in ("tcp", "udp"):
            raise UsageError(f"{self.protocol!r} cannot be relayed", hint="the protocol is tcp or udp")
        if not self.target:
            raise UsageError("a relay's target has no address", hint="name an address or a host")
        try:
            address = ipaddress.ip_address(self.address)
        except ValueError:
            address = None
        if address is None or address.is_unspecified or address.is_multicast:
            raise UsageError(f"{self.address!r} is no address to listen on", hint="name one address of this host")

    def __str__(self) -> str:
        return f"{shown(self.address, self.port)}/{self.protocol}"


def shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
