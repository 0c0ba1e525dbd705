"""Read a domain's XML, which anybody who may define domains has written: what it asks of vmnet. Pure.

Formats: libvirt's formatdomain, and its hooks' standard input. What vmnet does not know in it is passed over.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from netaddr import INET_PTON, AddrFormatError, IPAddress

from vmnet.model import LIBVIRT_BRIDGE, NAME_MAX, Maker, UsageError, check_name, device_name

LARGEST = 16 << 20  # bytes; libvirt itself takes no more than 10 MiB in one call
NETWORK = "vmnet"
NAMESPACE = "urn:vmnet:domain"
_PREFIX = "vmn-"
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_NO_LABEL = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface that is to be a guest: its device, and what the domain says of it (None: nothing).

    `maker` is who makes its tap: libvirt does for one on its network `vmnet`, and may take any name for it: "". `name`
    and `address` are what the domain's metadata say.
    """

    device: str
    mac: str | None
    mtu: int | None
    queues: int | None
    managed: bool
    maker: Maker = "vmnet"
    name: str | None = None
    address: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain, as far as vmnet has to do with it."""

    name: str
    uuid: str
    interfaces: tuple[Interface, ...]

    def guest_name(self, interface: Interface, guest_on: Callable[[str], str | None]) -> str | None:
        """Return the name of the guest behind an interface; None where that depends on which guests there are.

        The metadata say it, or the device, which bears the guest's name, or what a name too long for it becomes: then
        it is the domain's, or that of a guest which is there, as `guest_on` tells. Raises UsageError for a device that
        cannot be a guest's.
        """
        if interface.name is not None:
            return check_name(interface.name)
        if not interface.device:
            return None
        tail = interface.device.removeprefix(_PREFIX)
        for name in (tail, label(self.name)):
            with suppress(UsageError):
                if device_name(check_name(name)) == interface.device:
                    return name
        if there := guest_on(interface.device):
            return there
        name = "NAME" if label(tail) != tail else tail
        raise UsageError(
            f"no guest has the device {interface.device}",
            hint=f"`vmnet create {name}`, and `vmnet show {name} --libvirt` prints its interface",
        )


@dataclass(frozen=True, slots=True)
class Port:
    """A port of the network `vmnet`, by whose it is: the name and UUID of the domain, and the MAC."""

    domain: str
    uuid: str
    mac: str


def label(name: str) -> str:
    """Return a domain's name as a guest name: what none may hold becomes a hyphen; "" where nothing is left."""
    return _NO_LABEL.sub("-", name.lower()).strip("-")[:NAME_MAX].rstrip("-")


def parse_domain(xml: bytes) -> Domain:
    """Return what a domain asks for; raises UsageError for what is no domain, or has a document type.

    A document type is where entities are declared, and libvirt writes none: so nothing is ever expanded.
    """
    root = parse_root(xml)
    if root.tag != "domain":
        raise UsageError("this is no libvirt domain", hint="the XML begins with <domain>")
    interfaces = list(_interfaces(root))
    wishes = [one for one in root.iterfind("metadata/*") if one.tag == f"{NAMESPACE} interface"]
    return Domain(
        (root.findtext("name") or "").strip(),
        _uuid(root.findtext("uuid")),
        tuple(_with_metadata(one, wishes, alone=len(interfaces) == 1) for one in interfaces),
    )


def parse_port(xml: bytes) -> Port | None:
    """Return whose port a network's hook is about, None for no guest's; raises UsageError for what is no port."""
    root = parse_root(xml)
    owner = root.find("networkport/owner")
    if root.tag != "hookData" or owner is None:
        raise UsageError("this is no port of a libvirt network", hint="the XML begins with <hookData>")
    mac = _mac(root.find("networkport"))
    if mac is None or not _is_ours(root):
        return None
    return Port(
        (owner.findtext("name") or "").strip(),
        _uuid(owner.findtext("uuid")),
        mac,
    )


def is_our_network(xml: bytes) -> bool:
    """Say whether a network's hook is about vmnet's; raises UsageError for what is not about a network."""
    root = parse_root(xml)
    if root.tag != "hookData" or root.find("network") is None:
        raise UsageError("this is no libvirt network", hint="the XML begins with <hookData>")
    return _is_ours(root)


def _is_ours(root: Element) -> bool:
    bridge = root.find("network/bridge")
    return bridge is not None and bridge.get("name") == LIBVIRT_BRIDGE


def _interfaces(root: Element) -> Iterator[Interface]:
    for one in root.iterfind("devices/interface"):
        device = _attribute(one, "target", "dev") or ""
        device = device if device.startswith(_PREFIX) else ""
        on_network = _is_on_network(one)
        if not on_network and (one.get("type") != "ethernet" or not device):
            continue
        yield Interface(
            device=device,
            mac=_mac(one),
            mtu=parse_number(_attribute(one, "mtu", "size")),
            queues=parse_number(_attribute(one, "driver", "queues")),
            managed=not on_network and _attribute(one, "target", "managed") != "no",
            maker="libvirt" if on_network else "vmnet",
        )


def _is_on_network(interface: Element) -> bool:
    """Say whether an interface is on the network `vmnet`: its bridge tells, once libvirt says which it is."""
    source = interface.find("source")
    if source is None or interface.get("type") not in ("network", "bridge"):
        return False
    bridge = source.get("bridge")
    return bridge == LIBVIRT_BRIDGE or (bridge is None and source.get("network") == NETWORK)


def _with_metadata(interface: Interface, wishes: Sequence[Element], *, alone: bool) -> Interface:
    """Return an interface with what the metadata say of the one of its MAC, or, of the only one, without a MAC."""
    for wish in wishes:
        mac = wish.get("mac")
        if mac.lower() == interface.mac if mac is not None else alone:
            return replace(interface, name=wish.get("name"), address=_address(wish.get("address")))
    return interface


def _address(text: str | None) -> IPAddress | None:
    if text is None:
        return None
    try:
        return IPAddress(text, 4, flags=INET_PTON)
    except (AddrFormatError, ValueError):
        raise UsageError(
            f"{text!r} in the domain's metadata is not an IPv4 address", hint="such as 127.1.7.2"
        ) from None


def _mac(element: Element | None) -> str | None:
    mac = (_attribute(element, "mac", "address") or "").lower() if element is not None else ""
    return mac if _MAC.fullmatch(mac) else None


def _uuid(text: str | None) -> str:
    text = (text or "").strip()
    return text if _UUID.fullmatch(text) else ""


def _attribute(element: Element, tag: str, name: str) -> str | None:
    found = element.find(tag)
    return None if found is None else found.get(name)


def parse_number(text: str | None) -> int | None:
    """Return the number that an attribute says, None where it says none."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 10 else None


def parse_root(xml: bytes) -> Element:
    """Return the root of a document, nothing expanded; raises UsageError for what is none, or declares entities."""
    if len(xml) > LARGEST:
        raise UsageError(f"the domain's XML has more than {LARGEST >> 20} MiB")
    builder = TreeBuilder()
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse
    try:
        parser.Parse(xml, True)
        return builder.close()
    except (expat.ExpatError, AssertionError, ValueError) as error:
        raise UsageError(f"the domain's XML cannot be read: {error}") from None


def _refuse(*_: object) -> None:
    raise UsageError("the domain's XML declares a document type", hint="libvirt writes none")
