"""The group whose members may have guests of their own without root. An administrator makes it; nobody else does."""

import grp

GROUP = "vmnet"


def group_id() -> int | None:
    """Return the gid of the group, None where there is none."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None
