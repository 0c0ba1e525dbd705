"""What cloud-init in a VM needs where the image does not ask by DHCP: the three documents of its NoCloud source.

Everything in them is rendered from a record and the settings, which were checked when they came in; network-config is
in version 2. https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html says what each of them is for.
"""

from importlib.resources import files
from string import Template

from vmnet.model import USUAL_MTU, Conflict, Lease
from vmnet.plan import dotted, shadow_of
from vmnet.settings import Settings

DOCUMENTS = ("network-config", "meta-data", "user-data")

_SEPARATORS = str.maketrans("", "", "-:")
_HINTS = {
    "veth": "vmnet configures the namespace of a veth itself",
    "alias": "an alias is an address of the host itself",
    "tun": "what opens a tun configures it: vmnet show has the addresses",
}


def render(lease: Lease, settings: Settings) -> dict[str, str]:
    """Return the documents for a guest by their names, in the order of `DOCUMENTS`.

    Raises Conflict for a guest that is no VM on a tap: there is nothing for cloud-init to configure.
    """
    if lease.kind != "tap" or lease.mac is None:
        raise Conflict(f"{lease.name} is a {lease.kind}: cloud-init is for VMs on a tap", hint=_HINTS[lease.kind])
    values = {
        "name": lease.name,
        # An instance is one life of a guest: deleted and created anew it is another, with a first boot of its own.
        "instance": f"{lease.name}-{lease.created.translate(_SEPARATORS)}",
        "mac": lease.mac,
        "address": dotted(shadow_of(lease.block.first + 2, settings.plane)),
        "gateway": dotted(shadow_of(lease.block.first + 1, settings.plane)),
        "domain": settings.domain,
        # netplan writes an MTU into a .link file too, which then takes the place of the one that names devices.
        "mtu": "" if lease.mtu == USUAL_MTU else f"    mtu: {lease.mtu}\n",
    }
    folder = files("vmnet") / "templates" / "cloud-init"
    return {name: Template((folder / name).read_text()).substitute(values) for name in DOCUMENTS}
