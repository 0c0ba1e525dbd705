"""What guests need of other firewalls: an accept of our table cannot undo the drop of another one.

Some offer chains for the rules of others. There ours let guests' packets pass, and keep closed what their owners do.
Everything here is pure.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from vmnet.ops import Op, PutRules

COMMENT = "vmnet"
_MARK = f"-m comment --comment {COMMENT}"
_GUESTS = "vmn-+"
# Bridges of containers and VMs, which may come at any time. Many are kept closed by nothing but the policy of the chain
# that an accept of ours would forestall.
_CLOSED = ("docker", "br-", "virbr", "podman", "cni", "lxdbr", "incusbr")
_PLAIN = re.compile(r"[\w.:@-]*", re.ASCII)


class Chain(NamedTuple):
    """A chain that another firewall offers; `rules` are ours in it, in order, `program` the iptables that keeps it."""

    program: str
    name: str
    rules: tuple[str, ...]


class Bridge(NamedTuple):
    """A bridge; `uplink` says whether it leads out of this host, as the bridge of its own network cards does."""

    name: str
    uplink: bool


def _forward_rules(bridges: Sequence[Bridge], _: int) -> list[str]:
    """Return the rules that let guests' packets pass, but not into networks that others keep on this host."""
    uplinks = [one.name for one in bridges if one.uplink and one.name.startswith(_CLOSED) and _is_plain(one.name)]
    others = [one.name for one in bridges if not one.uplink and not one.name.startswith(_CLOSED)]
    closed = dict.fromkeys([*(f"{name}+" for name in _CLOSED), *(_pattern(name) for name in others)])
    return [
        f"-o {_GUESTS} {_MARK} -j ACCEPT",
        *(f"-i {_GUESTS} -o {name} {_MARK} -j ACCEPT" for name in uplinks),
        *(f"-i {_GUESTS} -o {name} {_MARK} -j RETURN" for name in closed),
        f"-i {_GUESTS} {_MARK} -j ACCEPT",
    ]


def _is_plain(name: str) -> bool:
    """Say whether iptables can spell a device's name."""
    return _PLAIN.fullmatch(name) is not None


def _pattern(name: str) -> str:
    """Return what covers a device: its name, or as much of it as iptables can spell."""
    if _is_plain(name):
        return name
    plain = _PLAIN.match(name)
    return f"{plain[0] if plain else ''}+"


def _input_rules(_: Sequence[Bridge], dns_port: int) -> list[str]:
    """Return the rules that let guests ask this host for names and addresses."""
    ports = f"{dns_port},{dns_port + 1}"
    return [
        f"-i {_GUESTS} -p udp -m multiport --dports 67,{ports} {_MARK} -j ACCEPT",
        f"-i {_GUESTS} -p tcp -m multiport --dports {ports} {_MARK} -j ACCEPT",
    ]


OFFERED = {"DOCKER-USER": _forward_rules, "ufw-after-forward": _forward_rules, "ufw-after-input": _input_rules}
"""The chains of the table `filter` that take rules of others: before all of Docker's, between ufw's and its policy."""


def plan_chains(chains: Sequence[Chain], bridges: Sequence[Bridge], dns_port: int) -> list[Op]:
    """Return the ops after which each chain has the rules that guests need, and no others of ours."""
    ops: list[Op] = []
    for chain in chains:
        rules = tuple(OFFERED[chain.name](bridges, dns_port))
        if chain.rules != rules:
            ops.append(PutRules(chain.program, chain.name, chain.rules, rules))
    return ops


def plan_chains_removal(chains: Sequence[Chain]) -> list[Op]:
    """Return the ops after which no chain has a rule of ours."""
    return [PutRules(chain.program, chain.name, chain.rules, ()) for chain in chains if chain.rules]
