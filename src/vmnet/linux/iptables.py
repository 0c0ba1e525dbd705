"""The chains of iptables that other firewalls offer: what of ours stands in them, and how it is put there.

They are in nf_tables, or in the older ip_tables, or in both. Only iptables itself changes them, since it does not read
what nft has written. On a host without such chains no program is started.
"""

import socket
import subprocess
from pathlib import Path

from vmnet.firewalls import COMMENT, OFFERED, Chain
from vmnet.linux.netlink import Message, Netlink, text
from vmnet.model import HostLacks, KernelRefused
from vmnet.ondisk import find_program
from vmnet.ops import PutRules

NFT, LEGACY = "iptables-nft", "iptables-legacy"
# Of include/uapi/linux/netfilter/nfnetlink.h and nf_tables.h: the number of nf_tables, and its messages.
_GETCHAIN = 10 << 8 | 4
_NFTA_CHAIN_TABLE, _NFTA_CHAIN_NAME = 1, 3
_IPV4 = bytes((socket.AF_INET, 0, 0, 0))  # struct nfgenmsg
# Seconds to wait for others who change the older ip_tables; some hold that lock for good.
_TRIES = 3
_PATIENCE = "--wait=10"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def look_at_nft(netlink: Netlink) -> tuple[Chain, ...] | None:
    """Return the chains there are in nf_tables, None where no program shows them.

    `netlink` is to netfilter, and tells alone where there are none.
    """
    questions = [
        Message(_GETCHAIN, 0, _IPV4 + text(_NFTA_CHAIN_TABLE, "filter") + text(_NFTA_CHAIN_NAME, name))
        for name in OFFERED
    ]
    return _saved(NFT) if any(netlink.get_each(questions)) else ()


def look_at_legacy() -> tuple[Chain, ...]:
    """Return the chains there are in the older ip_tables."""
    return (_saved(LEGACY) or ()) if has_legacy_filter() else ()


def has_legacy_filter() -> bool:
    """Say whether anybody uses the table `filter` of the older ip_tables; raises nothing."""
    try:
        return "filter" in Path("/proc/thread-self/net/ip_tables_names").read_text().split()
    except OSError:
        return False


def _saved(program: str) -> tuple[Chain, ...] | None:
    """Return the offered chains as `program` shows them; None where it is missing, or cannot read the table."""
    done = _run(f"{program}-save", "-t", "filter")
    if done is None or done.returncode:
        return None
    lines = done.stdout.splitlines()
    return tuple(
        Chain(program, name, _ours(name, lines))
        for name in OFFERED
        if any(one.startswith(f":{name} ") for one in lines)
    )


def _ours(name: str, lines: list[str]) -> tuple[str, ...]:
    """Return the rules of a chain that bear our comment, without the words that say where they stand."""
    start = f"-A {name} "
    comment = f" --comment {COMMENT} "
    return tuple(one.removeprefix(start) for one in lines if one.startswith(start) and comment in f"{one} ")


def put(op: PutRules) -> None:
    """Change the rules of ours in a chain: all of it, or nothing. Raises HostLacks, or KernelRefused.

    Where others have changed the chain since it was looked at, nothing is done: the next look decides anew. It is tried
    again where the chain is as before, for it may have been another in between.
    """
    words = ""
    for _ in range(_TRIES):
        done = _run(f"{op.program}-restore", "-n", _PATIENCE, script=op.script())
        if done is None:
            raise HostLacks(f"the program {op.program}-restore is missing", hint="install iptables")
        if done.returncode == 0 or Chain(op.program, op.chain, op.old) not in (_saved(op.program) or ()):
            return
        words = done.stderr.strip().partition("\n")[0]
    raise KernelRefused(f"{op.program}-restore refused our rules in {op.chain}: {words or 'no reason given'}")


def _run(program: str, *arguments: str, script: str = "") -> subprocess.CompletedProcess[str] | None:
    """Run a program of iptables; None where it is missing."""
    path = find_program(program, _ENVIRONMENT["PATH"])
    if path is None:
        return None
    return subprocess.run(
        (path, *arguments), input=script, capture_output=True, text=True, check=False, env=_ENVIRONMENT
    )
