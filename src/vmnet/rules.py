"""Render the nftables ruleset from its template: from validated settings only, and without I/O beyond that."""

from functools import cache, lru_cache
from importlib.resources import files
from string import Template

from vmnet.plan import Plane

GUARDED = "goto guard"
"""What the ruleset holds, also as nft lists it, where it guards a host that did not forward before vmnet."""

# What the host itself sends came in by no device, has no group, and so is not meant. (`meta iif` would say it, and
# make each listing ask for all devices.)
_GUARD = f"\t\tmeta iifgroup != {{ $mapped, $native }} {GUARDED}\n"


@lru_cache(maxsize=4)
def render(plane: Plane, *, guard: bool) -> str:
    """Return the ruleset; with `guard`, what is not ours and not translated is not forwarded either."""
    step = plane.shadow - 0x7F << 8
    values = {
        "mapped": plane.group_mapped,
        "native": plane.group_native,
        "shadow": plane.shadow,
        "shadow_hex": f"{plane.shadow:#04x}",
        "mark": f"{plane.mark:#010x}",
        "dns_mapped": plane.dns_port,
        "dns_native": plane.dns_port + 1,
        # Ones' complement arithmetic of RFC 1624: what the unused word must hold for the sum to stay the same.
        "one_in": f"{~step & 0xFFFF:#06x}",
        "both_in": f"{~(2 * step) & 0xFFFF:#06x}",
        "one_out": f"{step:#06x}",
        "both_out": f"{2 * step & 0xFFFF:#06x}",
    }
    guard_text = Template(_GUARD).substitute(values) if guard else ""
    return _template().substitute(values, guard=guard_text)


@cache
def _template() -> Template:
    return Template((files("vmnet") / "templates" / "nftables.nft").read_text())
