"""Read a domain's XML, which anybody who may define domains has written: what it asks of vmnet. Pure.

Formats: libvirt's formatdomain, and its hooks' standard input. What vmnet does not know in it is passed over.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from vmnet.model import UsageError, check_name, device_name

LARGEST = 16 << 20  # bytes; libvirt itself takes no more than 10 MiB in one call
_PREFIX = "vmn-"
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_NO_LABEL = re.compile(r"[^a-z0-9]+")
_LONGEST_LABEL = 63


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface that is to be a guest's tap: its device, and what the domain says of it (None: nothing)."""

    device: str
    mac: str | None
    mtu: int | None
    queues: int | None
    managed: bool


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain, as far as vmnet has to do with it."""

    name: str
    uuid: str
    interfaces: tuple[Interface, ...]

    def guest_name(self, interface: Interface) -> str:
        """Return the name of the guest behind an interface; raises UsageError where its device tells none.

        A device bears the guest's name, or what a name too long for it becomes: then it is the domain's.
        """
        tail = interface.device.removeprefix(_PREFIX)
        for name in (tail, label(self.name)):
            with suppress(UsageError):
                if device_name(check_name(name)) == interface.device:
                    return name
        raise UsageError(
            f"no guest has the device {interface.device}",
            hint=f"for a guest NAME the device is vmn-NAME: `vmnet create {label(self.name) or 'NAME'}` tells its own",
        )


def label(name: str) -> str:
    """Return a domain's name as a guest name: what none may hold becomes a hyphen; "" where nothing is left."""
    return _NO_LABEL.sub("-", name.lower()).strip("-")[:_LONGEST_LABEL].rstrip("-")


def parse_domain(xml: bytes) -> Domain:
    """Return what a domain asks for; raises UsageError for what is no domain, or has a document type.

    A document type is where entities are declared, and libvirt writes none: so nothing is ever expanded.
    """
    root = _parse(xml)
    if root.tag != "domain":
        raise UsageError("this is no libvirt domain", hint="the XML begins with <domain>")
    uuid = (root.findtext("uuid") or "").strip()
    return Domain(
        (root.findtext("name") or "").strip(),
        uuid if _UUID.fullmatch(uuid) else "",
        tuple(_interfaces(root)),
    )


def _interfaces(root: Element) -> Iterator[Interface]:
    for one in root.iterfind("devices/interface[@type='ethernet']"):
        target = one.find("target")
        device = target.get("dev", "") if target is not None else ""
        if target is None or not device.startswith(_PREFIX):
            continue
        mac = (_attribute(one, "mac", "address") or "").lower()
        yield Interface(
            device=device,
            mac=mac if _MAC.fullmatch(mac) else None,
            mtu=_number(_attribute(one, "mtu", "size")),
            queues=_number(_attribute(one, "driver", "queues")),
            managed=target.get("managed") != "no",
        )


def _attribute(element: Element, tag: str, name: str) -> str | None:
    found = element.find(tag)
    return None if found is None else found.get(name)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 10 else None


def _parse(xml: bytes) -> Element:
    if len(xml) > LARGEST:
        raise UsageError(f"the domain's XML has more than {LARGEST >> 20} MiB")
    builder = TreeBuilder()
    parser = expat.ParserCreate()
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
