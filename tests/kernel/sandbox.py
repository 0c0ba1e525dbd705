"""Run a program as systemd would confine it by a unit: python sandbox.py UNIT ARGV...

What works without systemd is done: CapabilityBoundingSet, NoNewPrivileges, SystemCallFilter, RestrictAddressFamilies,
RestrictNamespaces and MemoryDenyWriteExecute, with libseccomp, which systemd itself uses. Sterner than the unit: what
that refuses ends the process here, so that no refusal passes unseen.
"""

import ctypes
import errno
import os
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38  # linux/prctl.h
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000  # seccomp.h: SCMP_ACT_*
_EQUAL, _MASKED = 4, 7  # SCMP_CMP_EQ, SCMP_CMP_MASKED_EQ
_FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16, "AF_PACKET": 17}
_NAMESPACES = {
    "cgroup": 0x02000000, "ipc": 0x08000000, "mnt": 0x00020000, "net": 0x40000000, "pid": 0x20000000,
    "user": 0x10000000, "uts": 0x04000000,
}  # fmt: skip
_PROT_WRITE, _PROT_EXEC = 2, 4


class _Compare(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_seccomp = ctypes.CDLL("libseccomp.so.2")
_seccomp.seccomp_init.restype = ctypes.c_void_p


def settings_of(unit: Path) -> dict[str, list[str]]:
    """Return the values of each setting of a unit, in order."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in unit.read_text().splitlines():
        name, is_setting, value = line.partition("=")
        if is_setting and not line.startswith("#"):
            found[name].append(value)
    return found


def capabilities() -> list[str]:
    """Return the names of all capabilities, by number (capability.h lists them in this order)."""
    listed = subprocess.run(["systemd-analyze", "capability"], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in listed.splitlines()[1:]]
    return [name.upper() for name, _ in sorted(pairs, key=lambda pair: int(pair[1]))]


@cache
def system_calls(name: str) -> frozenset[str]:
    """Return the system calls of a group such as @system-service, or of one that is named itself."""
    if not name.startswith("@"):
        return frozenset({name})
    argv = ["systemd-analyze", "syscall-filter", name]
    listed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    members = [line.strip() for line in listed if not line.strip().startswith("#")]
    return frozenset().union(*(system_calls(one) for one in members if one))


def allowed_calls(unit: dict[str, list[str]]) -> set[str]:
    """Return the system calls that SystemCallFilter= leaves; @default is always among them (systemd.exec(5))."""
    allowed = set(system_calls("@default"))
    for value in unit["SystemCallFilter"]:
        calls = {call for word in value.removeprefix("~").split() for call in system_calls(word)}
        allowed = allowed - calls if value.startswith("~") else allowed | calls
    return allowed | system_calls("@default")


class _Filter:
    def __init__(self) -> None:
        self._context = ctypes.c_void_p(_seccomp.seccomp_init(_KILL))
        assert self._context.value, "libseccomp makes no filter"

    def add(self, action: int, call: str, *compares: tuple[int, int, int, int]) -> None:
        number = _seccomp.seccomp_syscall_resolve_name(call.encode())
        if number < 0:
            return  # of another architecture
        array = (_Compare * len(compares))(*(_Compare(*one) for one in compares))
        code = _seccomp.seccomp_rule_add_array(self._context, action, number, len(compares), array)
        assert code == 0, f"{call}: {os.strerror(-code)}"

    def load(self) -> None:
        code = _seccomp.seccomp_load(self._context)
        assert code == 0, os.strerror(-code)


def confine(unit: dict[str, list[str]]) -> None:
    """Put this process, and what it becomes, under the settings of a unit."""
    keep = {word for value in unit["CapabilityBoundingSet"] for word in value.split()}
    for number, name in enumerate(capabilities()):
        if name not in keep:
            _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    forbidden = sum(set(_NAMESPACES.values()) - {_NAMESPACES[word] for word in unit["RestrictNamespaces"][0].split()})
    families = [_FAMILIES[word] for word in unit["RestrictAddressFamilies"][0].split()]
    executable = _PROT_WRITE | _PROT_EXEC
    special: dict[str, list[tuple[int, int, int, int]]] = {
        "socket": [(0, _EQUAL, family, 0) for family in families],
        "unshare": [(0, _MASKED, forbidden, 0)],
        "clone": [(0, _MASKED, forbidden, 0)],
        "setns": [(1, _EQUAL, flag, 0) for flag in _NAMESPACES.values() if not flag & forbidden],
        "mmap": [(2, _MASKED, executable, one) for one in (0, _PROT_WRITE, _PROT_EXEC)],
        "mprotect": [(2, _MASKED, _PROT_EXEC, 0)],
        "pkey_mprotect": [(2, _MASKED, _PROT_EXEC, 0)],
    }
    filters = _Filter()
    for call in allowed_calls(unit) - {"clone3"}:
        for compare in special.get(call, []):
            filters.add(_ALLOW, call, compare)
        if call not in special:
            filters.add(_ALLOW, call)
    filters.add(_ERRNO | errno.ENOSYS, "clone3")  # its flags cannot be looked at: libc falls back to clone
    assert _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    filters.load()


if __name__ == "__main__":
    confine(settings_of(Path(sys.argv[1])))
    os.execv(sys.argv[2], sys.argv[2:])
