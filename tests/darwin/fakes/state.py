"""A Mac in a file: what the fake system commands of this folder show and change.

The file is JSON, named by FAKE_MAC_STATE; what it leaves out is as in `DEFAULTS`. Besides the machine it holds how the
machine is to behave:

- `calls`: every argv so far, of every command, each with its name first.
- `uid`: who calls; `sudo` makes its child root whatever it says.
- `sticky_mask`: ifconfig takes a new mask for an address that is there, and keeps the old one.
- `trailing_space`: ifconfig puts a space after addresses, as up to macOS 10.13.
- `delay_ms`: each command waits that long before it does anything. It is in `calls` by then, and holds no lock.
- `fail`: faults, each `match` (a regular expression on the joined argv), `times`, `rc`, `stderr`, `partial` (what was
  asked for is done all the same). The first that matches and has `times` left is used.

A command is a function of the state and its argv; `run` does all the rest, under a lock, so that commands that run at
the same time come one after the other. The state is replaced as a whole: whoever reads it needs no lock, and a command
that is killed leaves it as it was.
"""

import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, TypeAlias

State: TypeAlias = dict[str, Any]

STATE_FILE = "FAKE_MAC_STATE"
UID = "FAKE_MAC_UID"
"""What `sudo` tells its child about who it is."""

_ND6 = "nd6 options=201<PERFORMNUD,DAD>"
DEFAULTS: State = {
    "uid": 0,
    "trailing_space": False,
    "sticky_mask": False,
    "fail": [],
    "delay_ms": 0,
    "darwin": "25.0.0",
    "calls": [],
    "route_events": [],
    "services": {},
    "pf": {"enabled": False, "tokens": [], "anchors": {}},
    "ifaces": {
        "lo0": {
            "flags": "8049<UP,LOOPBACK,RUNNING,MULTICAST>",
            "mtu": 16384,
            "options": "1203<RXCSUM,TXCSUM,TXSTATUS,SW_TIMESTAMP>",
            "addrs": [
                {"fam": "inet", "addr": "127.0.0.1", "mask": 0xFF000000},
                {"fam": "inet6", "text": "::1 prefixlen 128"},
                {"fam": "inet6", "text": "fe80::1%lo0 prefixlen 64 scopeid 0x1"},
            ],
            "tail": [_ND6],
        },
        "en0": {
            "flags": "8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST>",
            "mtu": 1500,
            "options": "6463<RXCSUM,TXCSUM,TSO4,TSO6,CHANNEL_IO,PARTIAL_CSUM,ZEROINVERT_CSUM>",
            "addrs": [
                {"fam": "ether", "text": "02:00:5e:10:00:01"},
                {"fam": "inet6", "text": "fe80::10:5eff:fe10:1%en0 prefixlen 64 secured scopeid 0xb"},
                {"fam": "inet", "addr": "192.168.77.2", "mask": 0xFFFFFF00, "broadcast": "192.168.77.255"},
            ],
            "tail": [_ND6, "media: autoselect", "status: active"],
        },
        "utun0": {
            "flags": "8051<UP,POINTOPOINT,RUNNING,MULTICAST>",
            "mtu": 1380,
            "options": None,
            "addrs": [
                {"fam": "inet6", "text": "fe80::1234%utun0 prefixlen 64 scopeid 0xf"},
                {"fam": "inet", "addr": "100.64.0.9", "dest": "100.64.0.1", "mask": 0xFFFFFFFF},
            ],
            "tail": [_ND6],
        },
    },
}
"""A stock Mac. An interface's `addrs` are shown in their order; those of `inet` have `addr`, `mask` (a number) and
perhaps `dest` and `broadcast`, all others a `text`."""


class Answer(NamedTuple):
    """How a command ends; `then`, where there is one, goes on in its place without the lock."""

    out: str = ""
    err: str = ""
    code: int = 0
    then: Callable[[], NoReturn] | None = None


class Failed(Exception):
    """A command ends here; what it has changed by now stays."""

    def __init__(self, err: str, code: int = 1) -> None:
        super().__init__(err)
        self.answer = Answer(err=f"{err}\n", code=code)


Command: TypeAlias = Callable[[State, list[str]], Answer]


def read(path: str) -> State:
    """Return the state as it is now; a file that is not there is a stock Mac."""
    try:
        with open(path) as file:
            found = json.load(file)
    except FileNotFoundError:
        found = {}
    # By way of text, so that nobody's changes are made to the defaults.
    return {**json.loads(json.dumps(DEFAULTS)), **found}


@contextmanager
def held(path: str) -> Iterator[State]:
    """Hold the state against all others and keep what becomes of it, unless an exception comes out."""
    with open(f"{path}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = read(path)
        yield state
        with open(f"{path}.new", "w") as file:
            json.dump(state, file)
        os.replace(f"{path}.new", path)


def uid(state: State) -> int:
    """Return who calls."""
    return int(os.environ.get(UID) or state["uid"])


def run(name: str, command: Command) -> NoReturn:
    """Be the command of that name, for the arguments of this process."""
    argv, path = [name, *sys.argv[1:]], os.environ[STATE_FILE]
    with held(path) as state:
        state["calls"].append(argv)
    time.sleep(state["delay_ms"] / 1000)
    with held(path) as state:
        answer = _answer(command, state, argv)
    sys.stdout.write(answer.out)
    sys.stdout.flush()
    sys.stderr.write(answer.err)
    if answer.then is not None:
        answer.then()
    sys.exit(answer.code)


def _answer(command: Command, state: State, argv: list[str]) -> Answer:
    line = " ".join(argv)
    fault = next((one for one in state["fail"] if one["times"] > 0 and re.search(one["match"], line)), None)
    if fault is None:
        return _do(command, state, argv)
    fault["times"] -= 1
    if fault.get("partial"):
        _do(command, state, argv)
    err = fault.get("stderr", "")
    return Answer(err=f"{err}\n" if err else "", code=fault.get("rc", 1))


def _do(command: Command, state: State, argv: list[str]) -> Answer:
    try:
        return command(state, argv)
    except Failed as end:
        return end.answer
