"""What talks to libvirt, as a process of its own: client.py ask URI, or listen URI WAKEUP

Whoever started it can end it at any time, which no call of libvirt's could be. Nothing else imports libvirt-python.
The system's Python may run it, which is not always that of vmnet: it needs 3.9, and nothing of vmnet.

`ask` does what the JSON on its stdin says, and answers on stdout: {"done": ...}, or {"error": {"kind", "words"}} where
the kind is lacks (no libvirt-python), connect, denied, missing (no such domain) or refused.

`listen` says on stdout which domains there are, as a line with an array of their UUIDs: at first, after each event
that may have changed it, and now and then without any; and writes a byte to the file descriptor WAKEUP. It ends with
its stdin, or when libvirt does not answer any more.
"""

from __future__ import annotations  # `X | None` is not of 3.9

import json
import os
import sys
from contextlib import suppress
from typing import Any

# virErrorNumber (include/libvirt/virterror.h): operation denied, authentication of four kinds, access denied
_DENIED = (29, 45, 79, 94, 80, 88)
_NO_DOMAIN = 42
# virDomainState, in the words of virsh domstate
_STATES = ("no state", "running", "idle", "paused", "in shutdown", "shut off", "crashed", "pmsuspended")
_INACTIVE, _LIVE, _CONFIG = 2, 1, 2  # virDomainXMLFlags, virDomainModificationImpact
_READABLE_OR_GONE = 1 | 4 | 8  # virEventHandleType
_KEEPALIVE = (20, 3)  # seconds between two questions, and how many may stay without an answer
_AGAIN = 600_000  # milliseconds


class _Failed(Exception):
    """What is answered: the kind, and libvirt's words."""


def _connect(uri: str, *, read_only: bool) -> tuple[Any, Any]:
    """Return libvirt-python and a connection."""
    try:
        import libvirt
    except ImportError as error:
        raise _Failed("lacks", str(error)) from None
    libvirt.registerErrorHandler(lambda *_: None, None)  # it would write to stderr
    libvirt.virEventRegisterDefaultImpl()
    try:
        return libvirt, libvirt.openReadOnly(uri) if read_only else libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise _Failed("denied" if error.get_error_code() in _DENIED else "connect", str(error)) from None


# ask


def _ask(uri: str, request: dict[str, Any]) -> Any:
    act = {"look": _look, "networks": _networks, "attach": _attach, "update": _update}[request["do"]]
    libvirt, connection = _connect(uri, read_only=act in (_look, _networks))
    try:
        return act(libvirt, connection, request)
    except libvirt.libvirtError as error:
        code = error.get_error_code()
        kind = "missing" if code == _NO_DOMAIN else "denied" if code in _DENIED else "refused"
        raise _Failed(kind, str(error)) from None


def _look(libvirt: Any, connection: Any, request: dict[str, Any]) -> list[dict[str, str | None]]:
    """Return the domain of that name or UUID, or all of them."""
    wanted = request.get("domain")
    if wanted is not None:
        return [_tell(_find(libvirt, connection, wanted))]
    told = []
    for domain in connection.listAllDomains():
        try:
            told.append(_tell(domain))
        except libvirt.libvirtError as error:
            if error.get_error_code() != _NO_DOMAIN:  # it has gone meanwhile
                raise
    return told


def _find(libvirt: Any, connection: Any, wanted: str) -> Any:
    try:
        return connection.lookupByName(wanted)
    except libvirt.libvirtError as error:
        if error.get_error_code() == _NO_DOMAIN:
            with suppress(libvirt.libvirtError):
                return connection.lookupByUUIDString(wanted)
        raise


def _tell(domain: Any) -> dict[str, str | None]:
    state = domain.state()[0]
    runs = bool(domain.isActive())
    return {
        "name": domain.name(),
        "uuid": domain.UUIDString(),
        "state": _STATES[state] if state < len(_STATES) else "no state",
        "live": domain.XMLDesc(0) if runs else None,
        "config": domain.XMLDesc(_INACTIVE) if domain.isPersistent() else None,
    }


def _networks(_: Any, connection: Any, request: dict[str, Any]) -> list[str]:
    del request
    return sorted(network.name() for network in connection.listAllNetworks())


def _flags(request: dict[str, Any]) -> int:
    return (_LIVE if request["live"] else 0) | (_CONFIG if request["config"] else 0)


def _attach(_: Any, connection: Any, request: dict[str, Any]) -> None:
    connection.lookupByUUIDString(request["uuid"]).attachDeviceFlags(request["xml"], _flags(request))


def _update(_: Any, connection: Any, request: dict[str, Any]) -> None:
    connection.lookupByUUIDString(request["uuid"]).updateDeviceFlags(request["xml"], _flags(request))


# listen


class _Listener:
    def __init__(self, uri: str, wakeup: int) -> None:
        self._libvirt, self._connection = _connect(uri, read_only=True)
        self._wakeup = wakeup
        self._is_due, self._ends = True, False

    def run(self) -> None:
        """Tell until there is nobody to tell, or nothing more to be heard; raises libvirt's errors."""
        libvirt, connection = self._libvirt, self._connection
        connection.registerCloseCallback(lambda *_: self._end(), None)
        with suppress(libvirt.libvirtError):  # a driver without a daemon needs none
            connection.setKeepAlive(*_KEEPALIVE)
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lambda *_: self._note(), None)
        libvirt.virEventAddTimeout(_AGAIN, lambda *_: self._note(), None)
        libvirt.virEventAddHandle(sys.stdin.fileno(), _READABLE_OR_GONE, lambda *_: self._end(), None)
        while not self._ends:
            if self._is_due:
                self._is_due = False
                print(json.dumps([one.UUIDString() for one in connection.listAllDomains()]), flush=True)
                with suppress(BlockingIOError):
                    os.write(self._wakeup, b"\0")
            libvirt.virEventRunDefaultImpl()

    def _note(self) -> None:
        self._is_due = True

    def _end(self) -> None:
        self._ends = True


def main(arguments: list[str]) -> None:
    """Ask or listen."""
    what, uri, *wakeup = arguments
    if what == "listen":
        with suppress(_Failed):
            _Listener(uri, int(*wakeup)).run()
        return
    try:
        answer = {"done": _ask(uri, json.load(sys.stdin))}
    except _Failed as failed:
        kind, words = failed.args
        answer = {"error": {"kind": kind, "words": words}}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # threads and handlers of libvirt's may take their time
