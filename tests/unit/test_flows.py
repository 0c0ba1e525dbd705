"""Which connections the kernel is to forget."""

from ipaddress import IPv4Address

import pytest

from vmnet.flows import Flow, leads_nowhere

LOST = "10.8.0.3"


def flow(*addresses: str) -> Flow:
    return Flow(*(int(IPv4Address(address)) for address in addresses))


@pytest.mark.parametrize(
    ("one", "nowhere"),
    [
        (flow("247.1.0.2", "198.51.100.2", "198.51.100.2", "192.168.77.2"), False),
        (flow("247.1.0.2", "198.51.100.2", "198.51.100.2", LOST), True),
        (flow("247.1.0.2", "198.51.100.2", "198.51.100.2", "247.1.0.2"), True),
        (flow("247.1.0.2", "247.1.0.6", "247.1.0.6", "247.1.0.2"), False),
        (flow("247.1.0.2", "247.1.0.1", "247.1.0.1", "247.1.0.2"), False),
        (flow("247.1.0.1", "127.1.0.2", "247.1.0.2", "247.1.0.1"), False),
        (flow("247.1.0.1", "127.1.0.2", "127.1.0.2", "247.1.0.1"), True),
        (flow("127.0.0.1", "127.1.0.2", "127.1.0.2", "127.0.0.1"), True),
        (flow("127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.1"), False),
        (flow("127.70.0.1", "127.70.0.1", "127.70.0.1", "127.70.0.1"), False),
        (flow(LOST, "198.51.100.2", "198.51.100.2", LOST), False),
        (flow("172.17.0.2", "198.51.100.2", "198.51.100.2", LOST), False),
    ],
)
def test_guests_connections_without_translation_or_over_a_lost_address_lead_nowhere(one: Flow, nowhere: bool) -> None:
    assert leads_nowhere(one, 247, {int(IPv4Address(LOST))}) is nowhere
