"""Who is behind the call: sudo says so in the environment; and whether they have rights over the network."""

import os

from vmnet.settings import backend


def caller_uid() -> int:
    """Return the uid behind the call: SUDO_UID, else the caller's."""
    return _told_by_sudo("SUDO_UID", os.getuid())


def caller_gid() -> int:
    """Return the gid behind the call: SUDO_GID, else the caller's."""
    return _told_by_sudo("SUDO_GID", os.getgid())


def is_user() -> bool:
    """Say whether the caller is one who asks the server: on Linux, without root's rights over the network."""
    if backend() != "linux" or os.geteuid() == 0:
        return False
    from vmnet.linux.platform import has_rights

    return not has_rights()


def _told_by_sudo(variable: str, own: int) -> int:
    told = os.environ.get(variable, "")
    return int(told) if os.geteuid() == 0 and told.isdecimal() and int(told) < 0xFFFFFFFF else own
