"""Fit vmnet into what else runs on a machine: its service, and what keeps others' hands off its devices.

`parts` is the table of what there is to install, `install` does it, `seal` tells our files from those of others.
"""

import os

_WATCHERS = (
    "/etc/systemd/system/vmnet-watch.service",
    "/usr/lib/systemd/system/vmnet-watch.service",
    "/lib/systemd/system/vmnet-watch.service",
    "/etc/init.d/vmnet",
    "/Library/LaunchDaemons/internal.vmnet.watch.plist",
)


def is_installed() -> bool:
    """Say whether something starts vmnet at boot; a few looks, no imports: each `create` on a terminal asks."""
    return any(map(os.path.lexists, _WATCHERS))
