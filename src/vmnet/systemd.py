"""Whether systemd runs this system, and would run something in the network namespace of the caller."""

import os


def systemd_runs() -> bool:
    """Say whether systemd is what runs this system now."""
    return os.path.isdir("/run/systemd/system")  # sd_booted(3)


def is_in_hosts_netns() -> bool:
    """Say whether a service of the system's would work in the caller's network namespace."""
    try:
        return os.path.samestat(os.stat("/proc/1/ns/net"), os.stat("/proc/self/ns/net"))
    except OSError:
        return False
