"""What is seen of the rules: our table, and what of ours stands in others' chains.

To see them takes nft and iptables-save, some 4 ms each, so what they said is kept as long as the kernel says that
nothing has changed: each change of any rule raises a number (NFT_MSG_GETGEN), and a namespace has a number, too, which
no other of this boot ever has (SO_NETNS_COOKIE). Without either all is looked at each time.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from vmnet.firewalls import Chain
from vmnet.linux import iptables, nft
from vmnet.linux.netlink import NETLINK_NETFILTER, Netlink
from vmnet.linux.places import boot_id

_FILE = "nftables.seen"


class Ruleset:
    """What was seen last, in this process and, if a folder `kept` is there, in others."""

    def __init__(self, kept: Path | None) -> None:
        self._file = kept / _FILE if kept else None
        self._netlink: Netlink | None = None
        self._seen: tuple[str, str | None, tuple[Chain, ...]] | None = None

    def close(self) -> None:
        """Close the socket."""
        if self._netlink:
            self._netlink.close()
            self._netlink = None

    def look(self) -> tuple[str | None, tuple[Chain, ...]]:
        """Return our table as nft lists it, None where there is none, and the chains there are of iptables."""
        if self._netlink is None:
            self._netlink = Netlink(NETLINK_NETFILTER)
        number = self._number(self._netlink)
        seen = self._seen or self._read()
        if number is None or seen is None or seen[0] != number:
            chains = iptables.look_at_nft(self._netlink)
            seen = number or "", nft.listing(), chains or ()
            if number and chains is not None and number == self._number(self._netlink):
                self._seen = seen
                self._write(seen)
        return seen[1], (*seen[2], *iptables.look_at_legacy())

    def _number(self, netlink: Netlink) -> str | None:
        """Return what another state of the rules, another namespace or another nft would have otherwise."""
        generation, cookie = nft.generation(netlink), netlink.netns_cookie
        if generation is None or cookie is None:
            return None
        program = os.stat(nft.program())
        return f"{boot_id()} {cookie} {generation.hex()} {program.st_mtime_ns} {program.st_size}"

    def _read(self) -> tuple[str, str | None, tuple[Chain, ...]] | None:
        if self._file is None:
            return None
        try:
            number, listing, chains = json.loads(self._file.read_text())
            self._seen = number, listing, tuple(Chain(program, name, tuple(rules)) for program, name, rules in chains)
        except (OSError, ValueError, TypeError):
            return None
        return self._seen

    def _write(self, seen: tuple[str, str | None, tuple[Chain, ...]]) -> None:
        if self._file is None:
            return
        partial = self._file.with_name(f".{_FILE}.{os.getpid()}")  # several may write it at once
        with suppress(OSError):  # no folder, a full disk: then it is looked at anew the next time
            partial.unlink(missing_ok=True)
            with open(partial, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                json.dump(seen, file)
            partial.replace(self._file)
