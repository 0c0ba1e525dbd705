"""Ask a name server by wire, within a time, by UDP or TCP (RFC 1035)."""

import os
import socket
import struct

from vmnet.doctor import Reply

_TYPES = {"A": 1, "AAAA": 28}
_FAMILIES = {1: socket.AF_INET, 28: socket.AF_INET6}
_IN = 1
_LONGEST = 4096  # bytes of a datagram that anybody sends to who has not asked for more


def ask(server: str, port: int, name: str, kind: str = "A", *, tcp: bool = False, patience: float = 1.5) -> Reply:
    """Ask `server`, an address, for a name; what goes wrong is in the reply. `patience` is in seconds."""
    question = _question(name, _TYPES[kind])
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as client:
            client.settimeout(patience)
            client.connect((server, port))
            if not tcp:
                client.send(question)
                return _parse(client.recv(_LONGEST), question)
            client.sendall(struct.pack(">H", len(question)) + question)
            with client.makefile("rb") as answer:
                [length] = struct.unpack(">H", answer.read(2))
                return _parse(answer.read(length), question)
    except TimeoutError:
        return Reply(trouble=f"no answer within {patience:g} s")
    except OSError as error:
        return Reply(trouble=error.strerror or str(error))
    except (struct.error, IndexError, ValueError):
        return Reply(trouble="an answer that makes no sense")


def _question(name: str, number: int) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    head = os.urandom(2) + struct.pack(">5H", 0x0100, 1, 0, 0, 0)
    return head + labels + b"\0" + struct.pack(">HH", number, _IN)


def _parse(message: bytes, question: bytes) -> Reply:
    """Return what an answer says; raises ValueError, IndexError or struct.error for one that is none to `question`."""
    flags, _, answers = struct.unpack_from(">3H", message, 2)
    if message[:2] != question[:2] or message[12 : len(question)].lower() != question[12:].lower():
        raise ValueError("an answer to another question")
    at, values = len(question), []
    for _ in range(answers):
        while 0 < message[at] < 0xC0:
            at += 1 + message[at]
        at += 2 if message[at] else 1  # a pointer to a name that was there before, or the end of one
        number, _, _, length = struct.unpack_from(">HHIH", message, at)
        at += 10
        if number in _FAMILIES:
            values.append(socket.inet_ntop(_FAMILIES[number], message[at : at + length]))
        at += length
    return Reply(flags & 15, tuple(values))
