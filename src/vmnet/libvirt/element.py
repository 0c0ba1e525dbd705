"""The element by which a domain of libvirt's has a guest's tap (formatdomain, "Generic ethernet connection"). Pure."""

from vmnet.model import USUAL_MTU, Conflict, Lease


def libvirt_interface(lease: Lease) -> str:
    """Return the element that gives a libvirt domain a guest's tap; raises Conflict for a guest that has none."""
    need_tap(lease)
    inner = [
        f"<mac address='{lease.mac}'/>",
        f"<target dev='{lease.device}' managed='no'/>",  # what vmnet has made, libvirt leaves as it is
        "<model type='virtio'/>",
    ]
    if lease.queues > 1:
        inner.append(f"<driver queues='{lease.queues}'/>")
    if lease.mtu != USUAL_MTU:
        inner.append(f"<mtu size='{lease.mtu}'/>")
    return "\n  ".join(["<interface type='ethernet'>", *inner]) + "\n</interface>"


def need_tap(lease: Lease) -> None:
    """Raise Conflict for a guest that has no tap."""
    if lease.kind != "tap":
        raise Conflict(f"{lease.name} is of kind {lease.kind}: no VM has it", hint="vmnet create NAME makes a tap")
