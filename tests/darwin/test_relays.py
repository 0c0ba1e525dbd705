"""Ports of an alias lead elsewhere on a Mac too: the watcher relays, whose own addresses here are this machine's."""

import socket
from contextlib import closing, suppress
from threading import Thread

from tests.darwin.mac import Mac
from tests.kernel.machine import wait_until


def free_port(address: str) -> int:
    """Return a port that nobody has there."""
    with closing(socket.socket()) as one:
        one.bind((address, 0))
        return int(one.getsockname()[1])


def answer(listener: socket.socket) -> None:
    """Say hello to each caller, until the listener is closed."""
    with suppress(OSError):
        while True:
            with closing(listener.accept()[0]) as client:
                client.sendall(b"hello")


def asked(address: str, port: int) -> bytes:
    """Return what is answered there, nothing where nobody listens."""
    with suppress(OSError), closing(socket.create_connection((address, port), timeout=5)) as client:
        return client.recv(100)
    return b""


def test_a_port_of_an_alias_leads_elsewhere(mac: Mac) -> None:
    [made] = mac.vmnet("create", "web", "--json").json
    address = made["address"]
    port = free_port(address)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        Thread(target=answer, args=(listener,), daemon=True).start()
        mac.vmnet("relay", "web", f"{port}:127.0.0.1:{listener.getsockname()[1]}")
        mac.start(*mac.command_line, "watch")
        assert wait_until(lambda: asked(address, port) == b"hello", 30)
        mac.vmnet("unrelay", "web", str(port))
        assert wait_until(lambda: asked(address, port) == b"", 30)
