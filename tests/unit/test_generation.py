"""What the kernel must show belongs to the number of the records' schema: an older vmnet must not undo a newer one's.

Two versions that want different things of the same records would each take the other's work for drift, for ever. So a
version that wants something else has a schema of a higher number, be it one without a change (an empty step in
`store.MIGRATIONS`), which an older one refuses.
"""

import hashlib

from netaddr import IPNetwork

from tests.unit.test_plan import KINDS, absent, lease_of
from vmnet import rules
from vmnet.plan import HostWish, Plane, desire, host_routes, plan_guest
from vmnet.store import MIGRATIONS

# By number of the schema. That of a version that is not released may change; one that is may not.
WANTED = {1: "fd0ea85db7bf252c", 2: "fd0ea85db7bf252c", 3: "fd0ea85db7bf252c"}
RELEASED = 0


def wanted() -> str:
    """Return a digest of all that the kernel must show for some guests of each form."""
    plane = Plane()
    texts = [rules.render(plane, guard=guard) for guard in (False, True)]
    wish = HostWish(plane, (IPNetwork("127.5.5.5/32"),), (IPNetwork("127.6.0.0/24"),), "", None)
    made = [plan_guest(desire(lease_of(kind, mode), plane), absent(kind)) for kind, mode in KINDS]
    shown = [*texts, *map(str, host_routes(wish)), *(op.command() for ops in made for op in ops)]
    return hashlib.sha256("\n".join(shown).encode()).hexdigest()[:16]


def test_the_kernel_must_show_what_belongs_to_the_schema() -> None:
    number = len(MIGRATIONS)
    assert wanted() == WANTED[number], (
        f"what the kernel must show has changed: add an empty step to MIGRATIONS and an entry {number + 1} here"
        if number <= RELEASED
        else f"schema {number} is not released yet: write the new digest here"
    )
