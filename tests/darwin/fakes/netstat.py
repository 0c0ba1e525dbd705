"""netstat(1) of macOS: the IPv4 routes that follow from the interfaces, and statistics that never change."""

from collections.abc import Iterator

from tests.darwin.fakes.state import Answer, Failed, State

ROUTER = "192.168.77.1"
_HEAD = """\
Routing tables

Internet:
Destination        Gateway            Flags               Netif Expire
"""
_UDP = """\
udp:
	4321 datagrams received
		0 with incomplete header
		0 with bad data length field
		0 with bad checksum
		12 dropped due to no socket
		345 broadcast/multicast datagrams undelivered
		0 dropped due to full socket buffers
	3210 datagrams output
"""
_TRAFFIC = """\
            input        (Total)           output
   packets  errs      bytes    packets  errs      bytes colls
         7     0        812          5     0        534     0
"""


def main(state: State, argv: list[str]) -> Answer:
    """Answer `-rn` with or without `-f inet`, `-s -p udp`, and `-w` once."""
    match argv[1:]:
        case ["-rn"] | ["-rn", "-f", "inet"]:
            return Answer(_HEAD + "".join(_row(*route) for route in _routes(state)))
        case ["-s", "-p", "udp"]:
            return Answer(_UDP)
        case ["-w", *_]:
            return Answer(_TRAFFIC)
    raise Failed(f"fake: not modelled: {' '.join(argv)}")


def _row(destination: str, gateway: str, flags: str, link: str) -> str:
    return f"{destination:<18} {gateway:<18} {flags:<12}{link:>13}\n"


def _routes(state: State) -> Iterator[tuple[str, str, str, str]]:
    if "en0" in state["ifaces"]:
        yield "default", ROUTER, "UGScg", "en0"
    loopback = [one["addr"] for one in state["ifaces"]["lo0"]["addrs"] if one["fam"] == "inet"]
    if "127.0.0.1" in loopback:
        yield "127", "127.0.0.1", "UCS", "lo0"
    for address in loopback:
        yield address, address, "UH", "lo0"
