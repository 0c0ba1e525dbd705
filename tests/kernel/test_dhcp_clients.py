"""Debian's DHCP clients, unmodified, each in a VM of its own: each gets its own guest's lease, keeps and renews it."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernel.clients import CLIENTS, PATIENCE, Client, System, Told
from tests.kernel.machine import Machine, Sniffer, wait_until
from tests.kernel.net import Laptop

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("tap")]

MTU = 1400
EACH = 5
_SERVER, _CLIENT = b"\x00\x43", b"\x00\x44"
_OPTIONS = 14 + 20 + 8 + 240  # Ethernet, IP and UDP without options, and BOOTP with its magic cookie (RFC 2131)
_TYPE, _ACK = 53, b"\x05"
_IP_MTU = 14


def acks(sniffer: Sniffer) -> list[dict[int, bytes]]:
    """Return the options (RFC 2132) of each DHCPACK that came since the last call, by their numbers."""
    from_server = [
        frame for frame in sniffer.frames() if frame[12:14] == b"\x08\x00" and frame[34:38] == _SERVER + _CLIENT
    ]
    told = [dict(_options(frame[_OPTIONS:])) for frame in from_server]
    return [options for options in told if options.get(_TYPE) == _ACK]


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data and data[0] != 255:
        if data[0] == 0:
            data = data[1:]
            continue
        yield data[0], data[2 : 2 + data[1]]
        data = data[2 + data[1] :]


def mtu_towards(machine: Machine, address: str) -> int:
    """Return what the machine itself, by its device and its routes, takes for the MTU of the way to `address`."""
    with machine.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return int(probe.getsockopt(socket.IPPROTO_IP, _IP_MTU))


def create(laptop: Laptop, *names: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = laptop.vmnet("create", *names, "--mtu", str(MTU), "--json").json
    return made


def assert_online(vm: System, client: Client, internet: Machine) -> None:
    """Assert that the VM has its own guest's lease, all of it, and that host and internet are in reach."""
    guest = vm.guest
    assert vm.is_configured(), f"{guest.name}: {vm.addresses()} {vm.gateways()}\n{vm.read('/run/said')}"
    told = client.told(vm)
    assert told == Told([guest.guest_gateway], "vmnet.internal", None if told.name is None else guest.name), guest.name
    assert mtu_towards(guest, internet.address) == MTU, guest.name
    assert guest.tcp(internet.address, payload=guest.name.encode()) == guest.name.encode()


def test_twenty_clients_at_once_get_their_own_leases(laptop: Laptop, internet: Machine) -> None:
    internet.serve()
    vms: list[System] = []
    kinds: list[Client] = []
    heard: list[Sniffer] = []
    for info in create(laptop, *(f"{name}-{number}" for number in range(EACH) for name in CLIENTS)):
        vms.append(System(laptop.boot(info, configured=False), laptop.folder))
        heard.append(vms[-1].guest.sniff("eth0"))
        kinds.append(CLIENTS[info["name"].partition("-")[0]])
        kinds[-1].start(vms[-1])
    wait_until(lambda: all(vm.is_configured() for vm in vms), PATIENCE)
    for vm, client in zip(vms, kinds, strict=True):
        wait_until(lambda vm=vm, client=client: bool(client.told(vm).resolvers), PATIENCE)  # type: ignore[misc]
        assert_online(vm, client, internet)
        echo = vm.guest.serve()
        assert laptop.tcp(vm.guest.address, payload=b"hi") == b"hi"
        assert echo.peers == [vm.guest.guest_gateway]
    for vm, sniffer in zip(vms, heard, strict=True):
        given = acks(sniffer)
        assert given, vm.guest.name
        for options in given:
            gateway = socket.inet_aton(vm.guest.guest_gateway)
            assert options[1] == socket.inet_aton("255.255.255.252")
            assert (options[3], options[6]) == (gateway, gateway)
            assert options[12] == vm.guest.name.encode()
            assert options[15] == b"vmnet.internal"
            assert options[26] == MTU.to_bytes(2)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_lease_is_renewed(laptop: Laptop, internet: Machine, name: str) -> None:
    internet.serve()
    [info] = create(laptop, "web")
    vm, client = System(laptop.boot(info, configured=False), laptop.folder), CLIENTS[name]
    client.start(vm)
    assert wait_until(vm.is_configured, PATIENCE), vm.read("/run/said")
    assert wait_until(lambda: bool(client.told(vm).resolvers), PATIENCE)
    heard = vm.guest.sniff("eth0")
    client.renew(vm)
    assert wait_until(lambda: acks(heard) != [], PATIENCE), vm.read("/run/said")
    assert wait_until(vm.is_configured, PATIENCE)
    assert_online(vm, client, internet)
