"""What is read of a domain's XML, which anybody may have written."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet.libvirt.domain import LARGEST, Domain, Interface, label, parse_domain
from vmnet.model import UsageError, check_name, device_name

SAMPLES = Path(__file__).parent / "libvirt"
BOMB = b"""<?xml version="1.0"?>
<!DOCTYPE domain [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>
<domain><name>&b;</name></domain>"""


def domain(*interfaces: str, name: str = "myvm") -> bytes:
    uuid = "7f000102-0000-4000-8000-000000000003"
    inner = "".join(interfaces)
    return f"<domain><name>{name}</name><uuid>{uuid}</uuid><devices>{inner}</devices></domain>".encode()


def ethernet(device: str, more: str = "", managed: str = "no") -> str:
    return f"<interface type='ethernet'><target dev='{device}' managed='{managed}'/>{more}</interface>"


def nobody(_: str) -> str | None:
    """Say which guest has a device, where there are no guests."""
    return None


def sample(name: str) -> bytes:
    return (SAMPLES / f"{name}.xml").read_bytes()


def test_a_recorded_domain_is_read() -> None:
    read = parse_domain(sample("qemu-prepare-begin.ethernet-managed-no"))
    late = Interface("vmn-late", "52:54:00:7f:01:16", None, None, managed=False)
    assert read == Domain("ethvm", "7f000102-0000-4000-8000-000000000003", (late,))
    assert read.guest_name(late, nobody) == "late"


@pytest.mark.parametrize("name", ["qemu-prepare-begin", "qemu-release-end", "qemu-reconnect-begin"])
def test_a_domain_on_a_network_of_libvirts_asks_for_nothing(name: str) -> None:
    assert parse_domain(sample(name)).interfaces == ()


def test_options_of_an_interface_are_read() -> None:
    more = "<mac address='52:54:00:AA:00:01'/><mtu size='1400'/><driver name='vhost' queues='4'/>"
    [read] = parse_domain(domain(ethernet("vmn-web", more, managed="yes"), ethernet("tap0"))).interfaces
    assert read == Interface("vmn-web", "52:54:00:aa:00:01", 1400, 4, managed=True)
    odd = "<mac address='nonsense'/><mtu size='٣'/><driver queues='-1'/>"
    assert parse_domain(domain(ethernet("vmn-web", odd))).interfaces == (Interface("vmn-web", None, None, None, False),)


def test_any_guest_name_is_read_off_its_device() -> None:
    read = parse_domain(domain(ethernet("vmn-a--b")))
    assert read.guest_name(read.interfaces[0], nobody) == "a--b"


def test_a_device_too_long_for_its_guest_is_the_domains() -> None:
    name = "a-domain-with-a-long-name"
    read = parse_domain(domain(ethernet(device_name(name)), ethernet("vmn-ab_cdefghij"), name=name))
    assert read.guest_name(read.interfaces[0], nobody) == name
    with pytest.raises(UsageError, match="vmn-ab_cdefghij"):
        read.guest_name(read.interfaces[1], nobody)


@pytest.mark.parametrize(
    "xml",
    [b"", b"<", b"<domain>", b"<network/>", b"\0", b"<domain/><domain/>", BOMB, b"<domain>" + b" " * LARGEST],
    ids=["empty", "open", "half", "network", "nul", "two", "entities", "large"],
)
def test_what_is_no_domain_is_refused_in_one_line(xml: bytes) -> None:
    with pytest.raises(UsageError) as caught:
        parse_domain(xml)
    assert "\n" not in caught.value.message


@given(st.binary() | st.text().map(lambda text: domain(ethernet("vmn-x"), name=text)))
def test_nothing_but_a_refusal_comes_of_any_bytes(xml: bytes) -> None:
    with suppress(UsageError):
        parse_domain(xml)


@given(st.text())
def test_a_label_of_any_name_is_a_guest_name_or_nothing(name: str) -> None:
    found = label(name)
    assert found == "" or check_name(found) == found
    assert label(found) == found
