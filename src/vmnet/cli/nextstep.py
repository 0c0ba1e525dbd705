"""What a user does next with a guest that is there: the words for qemu and libvirt, ready to paste."""

import os
import pwd
import stat

from vmnet.libvirt.element import libvirt_interface, need_tap
from vmnet.model import USUAL_MTU, Lease

_VHOST = "/dev/vhost-net"


def next_step(lease: Lease) -> str:
    """Return what to do with a guest that was just made, in a few lines."""
    if lease.kind == "veth":
        return f"next: vmnet exec {lease.name} -- CMD runs a command in it"
    if lease.kind == "alias":
        return f"next: bind to its address, or have it lead elsewhere: vmnet relay {lease.name} PORT:HOST:PORT"
    if lease.kind == "tun":
        return f"next: open the tun device {lease.device}"
    # One option a line, as long as they are.
    words = qemu_arguments(lease)
    options = "".join(f" \\\n    {option} {value}" for option, value in zip(words[::2], words[1::2], strict=True))
    interface = libvirt_interface(lease).replace("\n", "\n  ")
    return (
        f"next, as {_user(lease.owner)}: qemu-system-x86_64 ...{options}\n"
        f"or, among the devices of a libvirt domain:\n  {interface}"
    )


def qemu_arguments(lease: Lease) -> list[str]:
    """Return the arguments that give a VM of qemu's a guest's tap; raises Conflict for a guest that has none.

    vhost only where the tap's owner may use it: without, qemu aborts rather than do it itself.
    """
    need_tap(lease)
    backend = f"tap,id=vmn0,ifname={lease.device},script=no,downscript=no"
    device = f"virtio-net-pci,netdev=vmn0,mac={lease.mac}"
    if lease.queues > 1:
        backend += f",queues={lease.queues}"
        # Two for each queue, one for changes of the configuration, one for control.
        device += f",mq=on,vectors={2 * lease.queues + 2}"
    if _may_use(lease.owner, _VHOST):
        backend += ",vhost=on"
    if lease.mtu != USUAL_MTU:
        device += f",host_mtu={lease.mtu}"
    return ["-netdev", backend, "-device", device]


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _may_use(uid: int, device: str) -> bool:
    """Say whether a user may read and write a device, by its owner, group and mode."""
    try:
        found = os.stat(device)
    except OSError:
        return False
    if not stat.S_ISCHR(found.st_mode):
        return False
    wanted = stat.S_IROTH | stat.S_IWOTH
    if uid == found.st_uid:
        wanted = stat.S_IRUSR | stat.S_IWUSR
    elif found.st_gid in _groups(uid):
        wanted = stat.S_IRGRP | stat.S_IWGRP
    return uid == 0 or found.st_mode & wanted == wanted


def _groups(uid: int) -> list[int]:
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return []
    return os.getgrouplist(user.pw_name, user.pw_gid)
