"""nftables by its own program: load our table, list it, and learn how it is listed from a namespace of our own."""

import hashlib
import os
import subprocess
from contextlib import suppress
from pathlib import Path

from vmnet.linux.netlink import Message, Netlink, parse_attrs
from vmnet.linux.places import CLONE_NEWNET, unshare
from vmnet.model import HostLacks, KernelRefused

TABLE = ("table", "ip", "vmnet")
_GETGEN, _NFTA_GEN_ID = 10 << 8 | 16, 1  # include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h


# Numbers, not names: those are of files that change with any package (/etc/protocols is netbase's), and with anybody.
_LIST = ("--numeric", "list", *TABLE)
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def _run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = (program(), *arguments)
    # nft writes a listing word by word: into a pipe, each of them would wake this process.
    with open(os.memfd_create("nft"), "w+") as output:
        done = subprocess.run(
            command, input=text, stdout=output, stderr=subprocess.PIPE, text=True, check=False, env=_ENVIRONMENT
        )
        output.seek(0)
        done.stdout = output.read()
    return done


def listing() -> str | None:
    """Return our table as nft lists it, or None where there is none."""
    done = _run(*_LIST)
    if done.returncode == 0:
        return done.stdout
    if "No such file or directory" in done.stderr:
        return None
    raise KernelRefused(f"nft cannot list our table: {_first_line(done.stderr)}")


def load(text: str) -> None:
    """Load a ruleset, whole or not at all."""
    done = _run("-f", "-", text=text)
    if done.returncode:
        raise _refusal(done.stderr)


def delete() -> None:
    """Delete our table; one that is not there is deleted already."""
    done = _run("delete", *TABLE)
    if done.returncode and "No such file or directory" not in done.stderr:
        raise KernelRefused(f"nft cannot delete our table: {_first_line(done.stderr)}")


def generation(netlink: Netlink) -> bytes | None:
    """Return what each change of any rule raises, or None where there are no rules; `netlink` is to netfilter."""
    body = netlink.get(Message(_GETGEN, 0, bytes(4)))
    return parse_attrs(body, 4).get(_NFTA_GEN_ID) if body else None  # the rest is about who asks


def expected_listing(text: str, cache: Path) -> str:
    """Return how nft lists the ruleset `text`, learnt in a fresh namespace; a folder `cache` that is there keeps it.

    It is never learnt from the host's own table: what somebody changed in that would become the wish.
    """
    nft = os.stat(program())
    key = hashlib.sha256(f"{text}{_LIST}{os.uname().release}{nft.st_mtime_ns}{nft.st_size}".encode()).hexdigest()
    kept = cache / f"nftables-{key[:16]}.listing"
    try:
        return kept.read_text()
    except OSError:
        pass
    fresh = _learn(text)
    # No folder yet, a disk that is full or read-only, another process that sweeps at the same time: all that costs
    # is learning it anew the next time.
    with suppress(OSError):
        for old in [*cache.glob("nftables-*.listing"), *cache.glob(".nftables-*")]:
            old.unlink(missing_ok=True)
        partial = cache / f".{kept.name}.{os.getpid()}"
        partial.write_text(fresh)
        partial.replace(kept)
    return fresh


def _learn(text: str) -> str:
    script = f"nft -f /dev/stdin && nft {' '.join(_LIST)}"
    try:
        done = subprocess.run(
            ("/bin/sh", "-c", script),
            input=text,
            capture_output=True,
            text=True,
            check=False,
            env=_ENVIRONMENT,
            preexec_fn=lambda: unshare(CLONE_NEWNET),
        )
    except subprocess.SubprocessError:
        raise HostLacks("this kernel has no network namespaces", hint="it needs CONFIG_NET_NS") from None
    if done.returncode:
        raise _refusal(done.stderr)
    return done.stdout


def program() -> str:
    """Return the path of nft; raises HostLacks where there is none."""
    for folder in ("/usr/sbin", "/usr/bin", "/sbin", "/bin"):
        if os.access(f"{folder}/nft", os.X_OK):
            return f"{folder}/nft"
    raise HostLacks(
        "the program nft is missing", hint="install it: apt-get install nftables (or your system's package)"
    )


def _refusal(words: str) -> HostLacks | KernelRefused:
    line = _first_line(words)
    if "Operation not supported" in words or "No such file or directory" in words:
        return HostLacks(
            f"the kernel lacks a feature that the ruleset needs: {line}",
            hint="it needs nf_tables with nat, fib and ct (CONFIG_NF_TABLES, CONFIG_NFT_NAT, CONFIG_NFT_FIB_IPV4, "
            "CONFIG_NFT_CT, CONFIG_NFT_MASQ, CONFIG_NFT_REDIR)",
        )
    return KernelRefused(f"nft refused the ruleset: {line}")


def _first_line(words: str) -> str:
    return words.strip().partition("\n")[0] or "no reason given"
