"""Plan aliases: addresses of the host itself on its loopback device, each alone in its subnet. Pure.

On macOS an address with another mask than /32 is one more interface for mDNSResponder to announce everything on.
"""

from collections.abc import Collection

from vmnet.model import Lease
from vmnet.ops import AddAlias, Address, DelAlias, Op
from vmnet.plan import dotted


def address_of(lease: Lease) -> str:
    """Return an alias's address."""
    return dotted(lease.block.first + 2)


def plan_alias(lease: Lease, device: str, seen: Collection[Address]) -> list[Op]:
    """Return the ops after which a guest's address is there as /32, and only so; `seen` is how it is on `device`."""
    address = address_of(lease)
    others = sorted(one for one in seen if one.value != f"{address}/32")
    ops: list[Op] = [DelAlias(device, one.value, one.scope) for one in others]
    if len(others) == len(seen):
        ops.append(AddAlias(device, address))
    return ops


def plan_alias_removal(device: str, seen: Collection[Address]) -> list[Op]:
    """Return the ops after which a guest's address is not there."""
    return [DelAlias(device, one.value, one.scope) for one in sorted(seen)]
