"""Frames and packets as bytes, right or wrong: what an attacker can put on a wire.

Addresses are dotted or colon-separated text, payloads bytes; checksums are right, so that nothing but what is meant to
stop a packet stops it. Formats: RFC 791, 792, 768, 9293, 826, 8200, 4861, IEEE 802.1Q.
"""

import socket
import struct

from tests.kernel.machine import checksum

IPV4, ARP, IPV6, VLAN, QINQ, EXPERIMENT = 0x0800, 0x0806, 0x86DD, 0x8100, 0x88A8, 0x88B5
BY_LENGTH = 4  # ETH_P_802_2 (linux/if_ether.h): the kernel's name for a length where the type should be
ICMP, TCP, UDP, ICMPV6, UNKNOWN = 1, 6, 17, 58, 253
BROADCAST = "ff:ff:ff:ff:ff:ff"
ALL_NODES_MAC = "33:33:00:00:00:01"


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ether(dst: str, src: str, kind: int, payload: bytes) -> bytes:
    """Return an Ethernet frame, padded to the least that a card sends."""
    return (mac_bytes(dst) + mac_bytes(src) + struct.pack("!H", kind) + payload).ljust(60, b"\0")


def tagged(frame: bytes, vlan: int, tag: int = VLAN) -> bytes:
    """Return `frame` with one more VLAN tag in front of its own type; `vlan` 0 is a mere priority tag."""
    return frame[:12] + struct.pack("!HH", tag, vlan) + frame[12:]


def ipv4(src: str, dst: str, protocol: int, payload: bytes, *, options: bytes = b"") -> bytes:
    """Return a packet with its header; `options` are a multiple of four bytes."""

    def head(total: int) -> bytes:
        size = 20 + len(options)
        fixed = struct.pack("!BBHHHBBH", 0x40 + size // 4, 0, size + len(payload), 0, 0, 64, protocol, total)
        return fixed + socket.inet_aton(src) + socket.inet_aton(dst) + options

    return head(checksum(head(0))) + payload


def source_routed(src: str, through: str, dst: str, data: bytes) -> bytes:
    """Return a packet to `through` that asks to be sent on to `dst` (loose source route, RFC 791 3.1)."""
    return ipv4(src, through, UNKNOWN, data, options=b"\x01\x83\x07\x04" + socket.inet_aton(dst))


def _sealed(src: str, dst: str, protocol: int, segment: bytes, at: int) -> bytes:
    """Return `segment` with its checksum, over the pseudo header too, put in at offset `at`."""
    family, form = (socket.AF_INET6, "!IxxxB") if ":" in src else (socket.AF_INET, "!HxB")
    addresses = socket.inet_pton(family, src) + socket.inet_pton(family, dst)
    # A sum does not mind the order: the length may stand before the protocol in either version.
    pseudo = addresses + struct.pack(form, len(segment), protocol)
    return segment[:at] + struct.pack("!H", checksum(pseudo + segment)) + segment[at + 2 :]


def udp(src: str, dst: str, port: int, data: bytes, *, source_port: int = 4000) -> bytes:
    """Return a UDP packet with its IPv4 header."""
    segment = struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data
    return ipv4(src, dst, UDP, _sealed(src, dst, UDP, segment, 6))


def syn(src: str, dst: str, port: int, data: bytes, *, source_port: int = 4000) -> bytes:
    """Return the first packet of a TCP connection with its IPv4 header; `data` rides along and numbers it."""
    segment = (
        struct.pack("!HHIIBBHHH", source_port, port, int.from_bytes(data[:4], "big"), 0, 0x50, 2, 65535, 0, 0) + data
    )
    return ipv4(src, dst, TCP, _sealed(src, dst, TCP, segment, 16))


def signs_of(data: bytes) -> set[bytes]:
    """Return what a packet bears that was made of `data`, or that answers its `syn` (SYN and ACK, or RST)."""
    number = int.from_bytes(data[:4], "big") + 1
    return {data, *((more % 2**32).to_bytes(4, "big") for more in (number, number + len(data)))}


def echo(src: str, dst: str, data: bytes) -> bytes:
    """Return an echo request with its IPv4 header."""
    return icmp(src, dst, 8, 0, b"\x12\x34\0\x01" + data)


def icmp(src: str, dst: str, kind: int, code: int, rest: bytes) -> bytes:
    """Return an ICMP packet with its IPv4 header; `rest` is all that follows the checksum."""
    message = struct.pack("!BBH", kind, code, 0) + rest
    return ipv4(src, dst, ICMP, message[:2] + struct.pack("!H", checksum(message)) + message[4:])


def arp(operation: int, sender: tuple[str, str], target: tuple[str, str], data: bytes = b"") -> bytes:
    """Return an ARP message (1 request, 2 reply); `sender` and `target` are MAC and address, `data` is padding."""
    parts = [mac_bytes(mac) + socket.inet_aton(address) for mac, address in (sender, target)]
    return struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + b"".join(parts) + data


def ipv6(src: str, dst: str, protocol: int, payload: bytes) -> bytes:
    addresses = socket.inet_pton(socket.AF_INET6, src) + socket.inet_pton(socket.AF_INET6, dst)
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 255) + addresses + payload


def udp6(src: str, dst: str, port: int, data: bytes) -> bytes:
    """Return a UDP packet with its IPv6 header."""
    segment = struct.pack("!HHHH", 4000, port, 8 + len(data), 0) + data
    return ipv6(src, dst, UDP, _sealed(src, dst, UDP, segment, 6))


def router_advertisement(src: str, mac: str, data: bytes) -> bytes:
    """Return an advertisement of a default router to all nodes, with its IPv6 header; `data` (6 bytes) an option."""
    options = b"\x01\x01" + mac_bytes(mac) + b"\xfe\x01" + data
    message = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + options
    return ipv6(src, "ff02::1", ICMPV6, _sealed(src, "ff02::1", ICMPV6, message, 2))


def kind_of(frame: bytes) -> int:
    """Return the EtherType of a frame."""
    return int.from_bytes(frame[12:14], "big")


def addresses_of(frame: bytes) -> set[str]:
    """Return the IPv4 addresses that a frame bears, as source or destination of IPv4, or in ARP."""
    body = frame[14:]
    spans = {IPV4: (12, 16), ARP: (14, 24)}.get(kind_of(frame), ())
    return {socket.inet_ntoa(body[at : at + 4]) for at in spans if len(body) >= at + 4}


def arp_sender(frame: bytes) -> str:
    """Return the address that an ARP frame's sender says is its own."""
    return socket.inet_ntoa(frame[28:32])
