"""What a domain's XML says of its interfaces, and that of an interface which takes another's place. Pure.

Formats: libvirt's formatdomain. What vmnet does not know in it is passed over.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element, SubElement, tostring

from vmnet.libvirt.domain import parse_domain, parse_number, parse_root
from vmnet.model import UsageError
from vmnet.store import DomainRecord

# What a guest sees of its interface, and what is the user's own: all of it goes on.
_KEPT = ("mac", "model", "driver", "mtu", "link", "boot", "rom", "acpi", "alias", "address")


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface of a domain: its type, the network and the device that it names ("": none), and its MAC.

    `is_ours`: it is to be a guest's. `guest` is its name, "" where there is none or the XML alone does not tell.
    """

    type: str
    network: str
    device: str
    mac: str
    is_ours: bool
    guest: str = ""
    managed: bool = False
    queues: int | None = None
    mtu: int | None = None


def read_interfaces(xml: str) -> list[Interface]:
    """Return the interfaces of a domain in their order; raises UsageError for what is no domain."""
    data = xml.encode()
    domain = parse_domain(data)
    ours = {(one.mac, one.maker): one for one in domain.interfaces}
    found = []
    for element in _elements(parse_root(data)):
        mac, network = _attribute(element, "mac", "address").lower(), _attribute(element, "source", "network")
        # One that runs on a network with a bridge of its own is told as one of type bridge.
        type_ = "network" if network else element.get("type", "")
        one = ours.get((mac, "vmnet" if type_ == "ethernet" else "libvirt"))
        guest = None
        with suppress(UsageError):
            guest = domain.guest_name(one, lambda _: None) if one else None
        found.append(
            Interface(
                type=type_,
                network=network,
                device=_attribute(element, "target", "dev"),
                mac=mac,
                is_ours=one is not None,
                guest=guest or "",
                managed=one is not None and one.managed,
                queues=parse_number(_attribute(element, "driver", "queues")),
                mtu=parse_number(_attribute(element, "mtu", "size")),
            )
        )
    return found


def replacement(xml: str, mac: str, device: str) -> str:
    """Return the interface on `device` that takes the place of that with `mac` in a domain: to its guest the same."""
    element = next(one for one in _elements(parse_root(xml.encode())) if _attribute(one, "mac", "address") == mac)
    new = Element("interface", {"type": "ethernet"})
    for child in element:
        if child.tag in _KEPT:
            child.tail = None
            new.append(child)
    SubElement(new, "target", {"dev": device, "managed": "no"})
    return tostring(new, encoding="unicode")


def _elements(root: Element) -> Iterator[Element]:
    yield from root.iterfind("devices/interface")


def _attribute(element: Element, tag: str, name: str) -> str:
    found = element.find(tag)
    return "" if found is None else found.get(name, "")


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain as libvirt tells of it: how it runs now (None: not), and how it will start (None: it is transient)."""

    name: str
    uuid: str
    state: str
    live_xml: str | None
    config_xml: str | None
    live: tuple[Interface, ...] = ()
    config: tuple[Interface, ...] = ()

    @classmethod
    def read(cls, told: dict[str, str | None]) -> "Domain":
        """Return a domain of what `client` tells; raises UsageError where its XML cannot be read."""
        live, config = told["live"], told["config"]
        return cls(
            told["name"] or "",
            told["uuid"] or "",
            told["state"] or "",
            live,
            config,
            tuple(read_interfaces(live)) if live else (),
            tuple(read_interfaces(config)) if config else (),
        )

    def is_on(self, network: str) -> bool:
        """Say whether any of its interfaces is on a network of libvirt's."""
        return any(one.network == network for one in (*self.live, *self.config))

    def known(self, records: Mapping[str, DomainRecord], guest_on: Callable[[str], str | None]) -> "Domain":
        """Return the same domain with the names of the guests that only the records tell.

        They know guests by domain and MAC, and `guest_on` by their devices.
        """
        names = {(one.uuid, one.mac): name for name, one in records.items()}

        def named(interfaces: Sequence[Interface]) -> tuple[Interface, ...]:
            return tuple(
                replace(one, guest=guest_on(one.device) or names.get((self.uuid, one.mac), ""))
                if one.is_ours and not one.guest
                else one
                for one in interfaces
            )

        return replace(self, live=named(self.live), config=named(self.config))

    @property
    def ours(self) -> list[tuple[Interface, bool, bool]]:
        """Its interfaces that are guests', as they are now or else will be, and whether they are in (live, config)."""
        found: dict[str, tuple[Interface, bool, bool]] = {}
        for one in self.live:
            if one.is_ours:
                found[one.guest or one.mac] = one, True, False
        for one in self.config:
            if one.is_ours:
                before = found.get(one.guest or one.mac)
                found[one.guest or one.mac] = (before[0], True, True) if before else (one, False, True)
        return list(found.values())


@dataclass(frozen=True, slots=True)
class Gift:
    """An interface that a domain is to have, for `guest`: into what it lacks it in, or `instead` of another.

    `like` is the one that is there already, in one of both, or that it takes the place of.
    """

    domain: Domain
    guest: str
    like: Interface | None
    live: bool
    config: bool
    instead: bool = False


def plan_attach(domain: Domain, guest: str) -> Gift:
    """Return what gives a domain an interface for `guest`; nothing is to be given where it has that."""
    there = [one for one in domain.ours if one[0].guest == guest]
    one, live, config = there[0] if there else (None, False, False)
    if one and one.type != "ethernet":
        live = config = True  # on libvirt's network: its own, in whatever it is
    return Gift(
        domain, guest, one, domain.live_xml is not None and not live, domain.config_xml is not None and not config
    )


def plan_adopt(domain: Domain, network: str, guest: str, *, instead: bool) -> list[Gift]:
    """Return what gives a domain on `network` interfaces of vmnet's: one beside, or each `instead` of one there.

    One that has any of vmnet's gets none. What is replaced is replaced in its configuration, which its next start
    reads; one that is transient has none.
    """
    if domain.ours:
        return []
    if instead:
        there = [one for one in domain.config if one.network == network]
        names = [guest if number == 1 else f"{guest}-{number}" for number in range(1, len(there) + 1)]
        return [Gift(domain, name, one, False, True, True) for name, one in zip(names, there, strict=True)]
    return [plan_attach(domain, guest)] if domain.is_on(network) else []
