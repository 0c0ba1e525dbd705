"""route(8) of macOS: which way an address goes, and what routing sockets tell.

`route -n monitor` tells what `route_events` of the state has, texts of some lines each, those that come later too, and
goes on until it is killed or nobody reads it any more.
"""

import os
import select
import sys
from _socket import inet_aton
from typing import NoReturn

from tests.darwin.fakes.netstat import ROUTER
from tests.darwin.fakes.state import STATE_FILE, Answer, Failed, State, read

_EX_NOHOST = 68  # sysexits.h
_POLL_MS = 20


def main(state: State, argv: list[str]) -> Answer:
    """Answer `-n get ADDRESS` and `-n monitor`."""
    match argv[1:]:
        case ["-n", "get", address]:
            return Answer(_way(state, address))
        case ["-n", "monitor"]:
            return Answer(then=_monitor)
    raise Failed(f"fake: not modelled: {' '.join(argv)}")


def _way(state: State, address: str) -> str:
    try:
        number = int.from_bytes(inet_aton(address), "big")
    except OSError:
        raise Failed(f"route: bad address: {address}", _EX_NOHOST) from None
    loopback = [one["addr"] for one in state["ifaces"]["lo0"]["addrs"] if one["fam"] == "inet"]
    if address in loopback:
        return _told(address, ("destination", address), ("interface", "lo0"), ("flags", "<UP,HOST,DONE,LOCAL>"))
    if number >> 24 == 127 and "127.0.0.1" in loopback:
        way = (("destination", "127.0.0.0"), ("mask", "255.0.0.0"), ("interface", "lo0"))
        return _told(address, *way, ("flags", "<UP,DONE,CLONING,STATIC>"))
    if "en0" not in state["ifaces"]:
        raise Failed("route: writing to routing socket: not in table")
    way = (("destination", "default"), ("mask", "default"), ("gateway", ROUTER))
    return _told(address, *way, ("interface", "en0"), ("flags", "<UP,GATEWAY,DONE,STATIC,PRCLONING,GLOBAL>"))


def _told(address: str, *rows: tuple[str, str]) -> str:
    return "".join(f"{name:>11}: {value}\n" for name, value in (("route to", address), *rows))


def _monitor() -> NoReturn:
    reader = select.poll()
    reader.register(1, 0)
    told = 0
    while not reader.poll(_POLL_MS):
        events = read(os.environ[STATE_FILE])["route_events"]
        for event in events[told:]:
            sys.stdout.write(f"{event}\n")
        sys.stdout.flush()
        told = len(events)
    sys.exit(0)
