"""The steps that lead from what the kernel shows to what the records ask for.

An op is one idempotent step. `str(op)` says it to a person, `op.command()` as the command that a person could
type; a platform's edge carries it out. A `place` is a network namespace: the empty string for the host's own,
else the path that leads to a guest's.

Ops are named tuples, not dataclasses: there are twenty kinds, and to make the class of a dataclass takes long.
"""

import shlex
from typing import Literal, NamedTuple, TypeAlias

from vmnet.filters import Program, bytecode

TABLE_LOCAL, TABLE_MAIN = 255, 254
SCOPE_GLOBAL, SCOPE_LINK, SCOPE_HOST = 0, 253, 254
ROUTE_PROTOCOL = 127
_SCOPES = {SCOPE_GLOBAL: "global", SCOPE_LINK: "link", SCOPE_HOST: "host"}
_TABLES = {TABLE_LOCAL: "local", TABLE_MAIN: "main"}


def _in(place: str, program: str) -> str:
    """Return how to call `program` in the namespace at `place`."""
    if not place:
        return program
    return f"nsenter --net={shlex.quote(place)} {program}"


def _where(place: str) -> str:
    return f" in {place}" if place else ""


class Route(NamedTuple):
    """A route as the kernel holds it; `destination` is a prefix such as 127.1.0.0/30."""

    destination: str
    table: int
    type: str
    device: str | None = None
    gateway: str | None = None
    source: str | None = None
    scope: int = SCOPE_GLOBAL
    metric: int = 0
    onlink: bool = False

    def __str__(self) -> str:
        words = [] if self.type == "unicast" else [self.type]
        words.append("default" if self.destination == "0.0.0.0/0" else self.destination)
        if self.gateway:
            words += ["via", self.gateway]
        if self.device:
            words += ["dev", self.device]
        words += ["table", _TABLES.get(self.table, str(self.table)), "proto", str(ROUTE_PROTOCOL)]
        if self.scope != SCOPE_GLOBAL:
            words += ["scope", _SCOPES[self.scope]]
        if self.source:
            words += ["src", self.source]
        if self.metric:
            words += ["metric", str(self.metric)]
        if self.onlink:
            words.append("onlink")
        return " ".join(words)


class Address(NamedTuple):
    """An IPv4 address of a device with its prefix length and scope."""

    value: str
    scope: int = SCOPE_GLOBAL


class LoAddress(NamedTuple):
    """An IPv4 address of lo, with all that is needed to put it back as it was.

    `attributes` are the rtnetlink attributes (number, payload in hex) that the kernel showed, `flags` its flags.
    """

    value: str
    scope: int
    flags: int
    attributes: tuple[tuple[int, str], ...]


class Peer(NamedTuple):
    """A veth's far end: its name, ifindex and MAC, and the place where it is made."""

    name: str
    ifindex: int
    mac: str
    place: str


class AddRoute(NamedTuple):
    """Add a route over the device of that ifindex (0: none).

    `verb` is that of ip(8): others may have a route to the same place, which wins (append) or not (prepend).
    """

    place: str
    route: Route
    ifindex: int = 0
    verb: Literal["add", "append", "prepend"] = "add"

    def __str__(self) -> str:
        return f"+ route {self.route}{_where(self.place)}"

    def command(self) -> str:
        return f"{_in(self.place, 'ip')} route {self.verb} {self.route}"


class DelRoute(NamedTuple):
    """Delete a route of ours over the device of that ifindex (0: none)."""

    place: str
    route: Route
    ifindex: int = 0

    def __str__(self) -> str:
        return f"- route {self.route}{_where(self.place)}"

    def command(self) -> str:
        return f"{_in(self.place, 'ip')} route del {self.route}"


class AddAddress(NamedTuple):
    """Put an address on a device."""

    place: str
    device: str
    ifindex: int
    address: Address

    def __str__(self) -> str:
        return f"+ address {self.address.value} on {self.device}{_where(self.place)}"

    def command(self) -> str:
        scope = _SCOPES[self.address.scope]
        return f"{_in(self.place, 'ip')} addr add {self.address.value} dev {self.device} scope {scope}"


class DelAddress(NamedTuple):
    """Take an address off a device."""

    place: str
    device: str
    ifindex: int
    address: Address

    def __str__(self) -> str:
        return f"- address {self.address.value} on {self.device}{_where(self.place)}"

    def command(self) -> str:
        return f"{_in(self.place, 'ip')} addr del {self.address.value} dev {self.device}"


class PutBackAddress(NamedTuple):
    """Put an address back on lo as it was, label and lifetime included."""

    place: str
    address: LoAddress

    def __str__(self) -> str:
        return f"+ address {self.address.value} on lo{_where(self.place)}"

    def command(self) -> str:
        scope = _SCOPES.get(self.address.scope, str(self.address.scope))
        return f"{_in(self.place, 'ip')} addr add {self.address.value} dev lo scope {scope}"


class SetNeighbour(NamedTuple):
    """Make a neighbour known for good."""

    place: str
    device: str
    ifindex: int
    address: str
    mac: str

    def __str__(self) -> str:
        return f"+ neighbour {self.address} is {self.mac} on {self.device}{_where(self.place)}"

    def command(self) -> str:
        ip = _in(self.place, "ip")
        return f"{ip} neigh replace {self.address} lladdr {self.mac} dev {self.device} nud permanent"


class DelNeighbour(NamedTuple):
    """Forget a neighbour that somebody has made known for good."""

    device: str
    ifindex: int
    address: str
    mac: str

    def __str__(self) -> str:
        return f"- neighbour {self.address} is {self.mac} on {self.device}"

    def command(self) -> str:
        return f"ip neigh del {self.address} dev {self.device}"


class AddNetns(NamedTuple):
    """Make a network namespace at a path, marked as ours by the alias of its lo."""

    path: str
    alias: str

    def __str__(self) -> str:
        return f"+ namespace {self.path}"

    def command(self) -> str:
        name = shlex.quote(self.path.rpartition("/")[2])
        return f"ip netns add {name} && ip -n {name} link set lo up alias {self.alias}"


class DelNetns(NamedTuple):
    """Take away a network namespace that vmnet made."""

    path: str

    def __str__(self) -> str:
        return f"- namespace {self.path}"

    def command(self) -> str:
        return f"ip netns del {shlex.quote(self.path.rpartition('/')[2])}"


class AddVeth(NamedTuple):
    """Make a veth pair, its far end in the guest's namespace from the start."""

    device: str
    ifindex: int
    group: int
    mac: str
    mtu: int
    peer: Peer

    def __str__(self) -> str:
        return f"+ veth {self.device}, its peer {self.peer.name} in {self.peer.place}"

    def command(self) -> str:
        peer = self.peer
        return (
            f"ip link add {self.device} address {self.mac} mtu {self.mtu} group {self.group} numtxqueues 1 "
            f"numrxqueues 1 type veth peer name {peer.name} address {peer.mac} mtu {self.mtu} numtxqueues 1 "
            f"numrxqueues 1 netns {shlex.quote(peer.place.removeprefix('/run/netns/'))}"
        )


class AddBridge(NamedTuple):
    """Make a bridge; it is down, and so no frame gets from one of its ports to another."""

    device: str

    def __str__(self) -> str:
        return f"+ bridge {self.device}"

    def command(self) -> str:
        return f"ip link add {self.device} type bridge"


class AddAltName(NamedTuple):
    """Give a device another name beside its own."""

    device: str
    ifindex: int
    name: str

    def __str__(self) -> str:
        return f"+ name {self.name} for {self.device}"

    def command(self) -> str:
        return f"ip link property add dev {self.device} altname {self.name}"


class AddAlias(NamedTuple):
    """Give the host an address of a guest's as its own, alone in its subnet, on its loopback device."""

    device: str
    address: str

    def __str__(self) -> str:
        return f"+ alias {self.address} on {self.device}"

    def command(self) -> str:
        if self.device == "lo":
            return f"ip addr add {self.address}/32 dev lo scope host"
        return f"ifconfig {self.device} alias {self.address} netmask 255.255.255.255"


class DelAlias(NamedTuple):
    """Take an address of a guest's off the host's loopback device; `value` has the prefix that it has there."""

    device: str
    value: str
    scope: int = SCOPE_HOST

    def __str__(self) -> str:
        return f"- alias {self.value} on {self.device}"

    def command(self) -> str:
        if self.device == "lo":
            return f"ip addr del {self.value} dev lo"
        return f"ifconfig {self.device} -alias {self.value.partition('/')[0]} netmask 255.255.255.255"


class AddTun(NamedTuple):
    """Make a tun or tap, which lives only while it is open until it is made persistent."""

    device: str
    ifindex: int
    kind: str
    owner: int
    queues: int

    def __str__(self) -> str:
        return f"+ {self.kind} {self.device} of uid {self.owner}"

    def command(self) -> str:
        many = " multi_queue" if self.queues > 1 else ""
        return f"ip tuntap add {self.device} mode {self.kind} user {self.owner}{many}"


class PersistTun(NamedTuple):
    """Make a tun or tap outlive the program that has it open, and give it to its owner."""

    device: str
    kind: str
    owner: int
    queues: int

    def __str__(self) -> str:
        return f"~ {self.kind} {self.device} persistent, of uid {self.owner}"

    def command(self) -> str:
        return f":  # ip tuntap add has made {self.device} persistent already, of uid {self.owner}"


class OwnTap(NamedTuple):
    """Give a tap with several queues, which a program has open, to its owner: until then anybody may open one."""

    device: str
    owner: int

    def __str__(self) -> str:
        return f"~ tap {self.device} of uid {self.owner}"

    def command(self) -> str:
        return f":  # no command gives {self.device}, which is open, to uid {self.owner}"


class DelLink(NamedTuple):
    """Delete a device, and with it all that hangs on it."""

    place: str
    device: str
    ifindex: int

    def __str__(self) -> str:
        return f"- device {self.device}{_where(self.place)}"

    def command(self) -> str:
        return f"{_in(self.place, 'ip')} link del {self.device}"


class SetLink(NamedTuple):
    """Change properties of a device; None leaves one as it is. `master`: 0 takes it off a bridge."""

    place: str
    device: str
    ifindex: int
    alias: str | None = None
    group: int | None = None
    mac: str | None = None
    mtu: int | None = None
    up: bool | None = None
    multicast: bool | None = None
    name: str | None = None
    master: int | None = None

    def _words(self) -> str:
        words = []
        if self.alias is not None:
            words.append(f"alias {shlex.quote(self.alias)}")
        if self.group is not None:
            words.append(f"group {self.group}")
        if self.mac is not None:
            words.append(f"address {self.mac}")
        if self.mtu is not None:
            words.append(f"mtu {self.mtu}")
        if self.multicast is not None:
            words.append(f"multicast {'on' if self.multicast else 'off'}")
        if self.up is not None:
            words.append("up" if self.up else "down")
        if self.name is not None:
            words.append(f"name {self.name}")
        if self.master is not None:
            words.append(f"master {self.master}" if self.master else "nomaster")
        return " ".join(words)

    def __str__(self) -> str:
        return f"~ device {self.device}{_where(self.place)}: {self._words()}"

    def command(self) -> str:
        return f"{_in(self.place, 'ip')} link set {self.device} {self._words()}"


class SetConf(NamedTuple):
    """Set IPv4 sysctls of a device (name, value), without a way through /proc."""

    place: str
    device: str
    ifindex: int
    values: tuple[tuple[str, int], ...]

    def _words(self) -> str:
        return " ".join(f"net.ipv4.conf.{self.device}.{name}={value}" for name, value in self.values)

    def __str__(self) -> str:
        return f"~ sysctl {self._words()}{_where(self.place)}"

    def command(self) -> str:
        return f"{_in(self.place, 'sysctl')} -qw {self._words()}"


class SetSysctl(NamedTuple):
    """Set a sysctl of the host by its name with slashes (a device's name may have dots): net/ipv4/ip_forward."""

    key: str
    value: int

    def __str__(self) -> str:
        return f"~ sysctl {self.key}={self.value}"

    def command(self) -> str:
        return f"sysctl -qw {self.key}={self.value}"


class AddClsact(NamedTuple):
    """Give a device the hook that filters are attached to."""

    device: str
    ifindex: int

    def __str__(self) -> str:
        return f"+ clsact on {self.device}"

    def command(self) -> str:
        return f"tc qdisc add dev {self.device} clsact"


class DelFilter(NamedTuple):
    """Delete what stands in our filter's place."""

    device: str
    ifindex: int
    direction: str

    def __str__(self) -> str:
        return f"- filter {self.direction} of {self.device} at pref 1"

    def command(self) -> str:
        return f"tc filter del dev {self.device} {self.direction} pref 1"


class SetFilter(NamedTuple):
    """Attach a program to a device, `direction` being ingress or egress, in place of the one there."""

    device: str
    ifindex: int
    direction: str
    program: Program

    def __str__(self) -> str:
        return f"+ filter {self.direction} of {self.device}"

    def command(self) -> str:
        return (
            f"tc filter replace dev {self.device} {self.direction} pref 1 protocol all handle 1 "
            f"bpf da bytecode '{bytecode(self.program)}'"
        )


class LoadRules(NamedTuple):
    """Load our nftables table whole: one transaction, without a gap."""

    text: str

    def __str__(self) -> str:
        return "~ nftables table ip vmnet"

    def command(self) -> str:
        return f"nft -f - <<'END'\n{self.text}END"


class DelRules(NamedTuple):
    """Delete our nftables table."""

    def __str__(self) -> str:
        return "- nftables table ip vmnet"

    def command(self) -> str:
        return "nft delete table ip vmnet"


class ForgetFlows(NamedTuple):
    """Have the kernel forget guests' connections that lead nowhere; `lost` are addresses that the host had until now.

    `shadow` is the first octet of the shadow.
    """

    shadow: int
    lost: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = f" and {len(self.lost) - 3} more" if len(self.lost) > 3 else ""
        why = f"over {', '.join(self.lost[:3])}{more}" if self.lost else "without our rules"
        return f"- connections of guests {why}"

    def command(self) -> str:
        ends = self.lost or (f"{self.shadow}.0.0.0/8",)
        return "; ".join(f"conntrack -D --orig-src {self.shadow}.0.0.0/8 --reply-dst {end}" for end in ends)


class PutRules(NamedTuple):
    """Give a chain of another firewall the rules `new`, before all others, in place of `old`: both are ours.

    `program` is the iptables that keeps the chain, iptables-nft or iptables-legacy.
    """

    program: str
    chain: str
    old: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'~' if self.new else '-'} rules of ours in {self.chain} of {self.program}"

    def script(self) -> str:
        """Return what to tell iptables-restore: one transaction."""
        lines = [f"-D {self.chain} {rule}" for rule in self.old]
        lines += [f"-I {self.chain} {number} {rule}" for number, rule in enumerate(self.new, 1)]
        return "\n".join(["*filter", *lines, "COMMIT", ""])

    def command(self) -> str:
        return f"{self.program}-restore -w -n <<'END'\n{self.script()}END"


class WriteNames(NamedTuple):
    """Change the block of guest names in the hosts file: (hostname, address) for each change; "" is no name."""

    path: str
    names: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"~ names of guests in {self.path}"

    def command(self) -> str:
        shown = ", ".join(f"{address} {hostname or 'goes'}" for hostname, address in self.names[:3])
        return f"editor {self.path}  # the block of vmnet: {shown}{', ...' if len(self.names) > 3 else ''}"


class WriteAnswers(NamedTuple):
    """Write what dnsmasq reads: the files of those names in the folder."""

    folder: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"~ DHCP and DNS: {', '.join(self.names)} in {self.folder}"

    def command(self) -> str:
        return f"editor {' '.join(f'{self.folder}/{name}' for name in self.names)}"


class RunAnswers(NamedTuple):
    """Start dnsmasq, with the process that keeps it."""

    folder: str

    def __str__(self) -> str:
        return "+ DHCP and DNS for guests"

    def command(self) -> str:
        return f"for server in dhcp mapped native; do dnsmasq --conf-file={self.folder}/$server.conf; done"


class EndAnswers(NamedTuple):
    """End dnsmasq and the process that keeps it, and take its files away."""

    folder: str

    def __str__(self) -> str:
        return "- DHCP and DNS for guests"

    def command(self) -> str:
        return f"kill $(cat {self.folder}/keeper.pid); rm -r {self.folder}"


Op: TypeAlias = (
    AddRoute | DelRoute | AddAddress | DelAddress | PutBackAddress | AddAlias | DelAlias | SetNeighbour | DelNeighbour
    | AddNetns | DelNetns | AddVeth | AddTun | AddBridge | AddAltName | PersistTun | OwnTap | DelLink | SetLink
    | SetConf | SetSysctl | AddClsact | DelFilter | SetFilter | LoadRules | DelRules | ForgetFlows | PutRules
    | WriteNames | WriteAnswers | RunAnswers | EndAnswers
)  # fmt: skip
