"""Whether guests work: VMs that can be started anew, questions in both directions, and a connection that stays."""

import errno
import os
import socket
from functools import partial
from itertools import count
from typing import Any

from tests.kernel.machine import ECHO_PORT, wait_until
from tests.kernel.net import Guest, Lab

PATIENCE = 20.0
"""Seconds until what does not answer never will: the machine may be busy, and the VMs' wires with it."""


class Guests:
    """The guests of a laptop, as often as one looks at them."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._laptop = lab.laptop
        self._ports = count(1000)
        self._tokens = count()
        self._wires: dict[str, tuple[int, int]] = {}
        lab.internet.serve()

    def boot(self, info: dict[str, Any]) -> Guest:
        """Return the running guest; the VM behind a tap or tun is started anew each time."""
        if info["kind"] == "veth":
            return self._laptop.boot(info)
        self.stop(info["name"])
        guest = Guest(self._lab, info, self._lab.new_namespace())
        wire = (self._laptop.open_device(info["device"], info["kind"]), guest.open_device("eth0", info["kind"]))
        self._wires[info["name"]] = wire
        for source, sink in (wire, wire[::-1]):
            self._lab.loop.watch(source, partial(self._carry, info["name"], wire, source, sink))
        guest.configure()
        return guest

    def _carry(self, name: str, wire: tuple[int, int], source: int, sink: int) -> None:
        try:
            os.write(sink, os.read(source, 65535))
        except OSError as error:
            # A device that is down takes nothing; one that was deleted never will.
            if error.errno == errno.EBADFD and self._wires.get(name) is wire:
                self.stop(name)

    def stop(self, *names: str) -> None:
        """End the VMs of these guests, or of all; one that does not run is as it should be."""
        for name in names or list(self._wires):
            for end in self._wires.pop(name, ()):
                self._lab.loop.forget(end)
                # The lab closes it; what it stands for ends now.
                with open(os.devnull, "rb") as nothing:
                    os.dup2(nothing.fileno(), end, inheritable=False)

    def wire(self, info: dict[str, Any]) -> int:
        """Return the VM's end of a tap or tun: what its user holds open."""
        return self._wires[info["name"]][0]

    def work(self, info: dict[str, Any]) -> bool:
        """Tell whether a guest answers the host, and gets an answer from the internet, by ping and TCP."""
        guest, port = self.boot(info), next(self._ports)
        guest.serve(port)
        here, there = self._laptop, self._lab.internet.address
        if not wait_until(lambda: here.ping(guest.address), PATIENCE):
            return False
        if not wait_until(lambda: guest.ping(there), PATIENCE):
            return False
        token = f"{next(self._tokens):8}".encode()
        asked = (here.tcp(guest.address, port, token, wait=PATIENCE), guest.tcp(there, ECHO_PORT, token, wait=PATIENCE))
        return asked == (token, token)

    def talk(self, info: dict[str, Any]) -> "Talk":
        """Open a connection from the host to a guest."""
        guest = self.boot(info)
        guest.serve()
        client = self._laptop.socket(socket.AF_INET, socket.SOCK_STREAM)
        client.settimeout(PATIENCE)
        client.connect((guest.address, ECHO_PORT))
        return Talk(client)


class Talk:
    """A connection that is open all the time."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._tokens = count()
        self.goes_on()

    def goes_on(self) -> None:
        """Assert that what is sent comes back."""
        token = f"{next(self._tokens):8}".encode()
        self._client.sendall(token)
        assert self._client.recv(len(token)) == token
