"""Say what is wrong with vmnet on this host, and what to do about it: what was seen in, findings out. Pure.

`vmnet.checkup` looks, with a limit to each thing that may take time. `CHECKS` is the table of what is looked for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

Severity: TypeAlias = Literal["error", "warning", "note"]
Spelling: TypeAlias = Literal["mapped", "native"]

_SHOWN = 5  # things of a kind that evidence names
_NOERROR, _NXDOMAIN = 0, 3
_CODES = {0: "no such record", 2: "SERVFAIL", 3: "NXDOMAIN", 5: "REFUSED"}
_PUT_RIGHT = "vmnet watch --once"
_HOW_TO = "docs/how-to/names.md"


class Finding(NamedTuple):
    """What is wrong, what shows it, and what to do about it: a command wherever one does it.

    An error: guests or the host are not as vmnet promises. A warning: soon they may not be. A note: it could be better.
    """

    severity: Severity
    what: str
    evidence: str
    fix: str


class Reply(NamedTuple):
    """What came back for a question: the code of a response (RFC 1035) and the addresses in it, or what went wrong."""

    code: int | None = None
    values: tuple[str, ...] = ()
    trouble: str = ""

    def __str__(self) -> str:
        return self.trouble or " ".join(self.values) or _CODES.get(self.code or 0, f"code {self.code}")


class Asked(NamedTuple):
    """A question to one of vmnet's own servers, and what its answer must be."""

    server: Spelling
    name: str
    kind: Literal["A", "AAAA"]
    tcp: bool
    right: Reply

    def __str__(self) -> str:
        return f"{self.name} {self.kind} by {'TCP' if self.tcp else 'UDP'}"


class Guest(NamedTuple):
    """A guest that is to be up, by its full name, with the address that it has for the host, and its shadow."""

    name: str
    address: str
    shadow: str


@dataclass(frozen=True, slots=True)
class Resolver:
    """Whom programs of this host ask by wire: the first server of /etc/resolv.conf.

    `part` is the part of `vmnet hooks` for whoever answers there, "" for none; `replies` are by the names of guests,
    empty for a server that is not `here`.
    """

    server: str
    here: bool
    part: str = ""
    replies: Mapping[str, Reply] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Server:
    """Where the server that does commands is to listen, whether it does, and whether systemd does so for it.

    `heeds_group`: for members of the group that there is now.
    """

    path: str
    listens: bool
    by_systemd: bool
    heeds_group: bool = True


@dataclass(frozen=True, slots=True)
class Sight:
    """All that was seen. `guests` are those asked for by name: all that are to be up, or some of many.

    `trouble` is what kept vmnet from looking at the rest, with its hint. `drift` are the steps that would put right
    what differs from the records, `stuck` what is in their way, with hints. `wanted`: somebody is to be answered.
    `hosts` is the file that names are kept in, and `hosts_read` says whether programs read it; `listed` are the names
    that it has rightly. `servers` are the pids of vmnet's dnsmasq, `parts` the states of the files of those parts of
    hooks whose programs are here. `open_devices` have route_localnet. `forwards`: this host forwards, and for nobody
    who is known. Where guests are aliases, `aliases` is how many there are to be, `wide` are those of others that are
    not alone in their subnets, and `version` is that of macOS.
    """

    privileged: bool = True
    trouble: tuple[str, str] | None = None
    drift: Sequence[str] = ()
    stuck: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    guests: Sequence[Guest] = ()
    found: Mapping[str, Reply] = field(default_factory=dict)
    hosts: str = "/etc/hosts"
    hosts_read: bool = True
    listed: frozenset[str] = frozenset()
    wanted: bool = False
    has_dnsmasq: bool = True
    keeper: bool = True
    servers: Mapping[str, int | None] = field(default_factory=dict)
    problems: Sequence[str] = ()
    answers: Mapping[Asked, Reply] = field(default_factory=dict)
    resolver: Resolver | None = None
    installed: bool = True
    watcher: bool = True
    left_alone: Sequence[str] = ()
    server: Server | None = None
    parts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    open_devices: Sequence[str] = ()
    forwards: bool = False
    aliases: int | None = None
    wide: Sequence[str] = ()
    version: str = ""


def questions(guests: Iterable[Guest], domain: str) -> list[Asked]:
    """Return what to ask vmnet's own servers, with the right answers."""
    asked = []
    for server in ("mapped", "native"):
        # No guest can have that name.
        asked.append(Asked(server, f"_doctor.{domain}", "A", False, Reply(_NXDOMAIN)))
        for guest in guests:
            right = Reply(_NOERROR, (guest.shadow if server == "mapped" else guest.address,))
            asked += [Asked(server, guest.name, "A", tcp, right) for tcp in (False, True)]
            asked.append(Asked(server, guest.name, "AAAA", False, Reply(_NOERROR)))
    return asked


def examine(sight: Sight) -> list[Finding]:
    """Return all findings, the worst first."""
    found = [finding for check in CHECKS for finding in check(sight)]
    return sorted(found, key=lambda one: ("error", "warning", "note").index(one.severity))


def _some(things: Sequence[object]) -> str:
    shown = [str(one) for one in things[:_SHOWN]]
    return "; ".join([*shown, f"and {len(things) - _SHOWN} more"] if len(things) > _SHOWN else shown)


# The records and the kernel


def _look(sight: Sight) -> Iterator[Finding]:
    if sight.trouble:
        message, hint = sight.trouble
        yield Finding("error", "vmnet cannot look at its own", message, hint)
    if not sight.privileged:
        yield Finding(
            "note", "not all could be seen", "rules, and what is inside of namespaces, are root's", "sudo vmnet doctor"
        )


def _drift(sight: Sight) -> Iterator[Finding]:
    if sight.drift:
        yield Finding("error", "guests or the host part are not as recorded", _some(sight.drift), _PUT_RIGHT)
    for message, hint in sight.stuck:
        yield Finding("error", "a guest cannot be as recorded", message, hint)
    for text in sight.warnings:
        yield Finding("warning", "something is in the way", text, "")


def _route_localnet(sight: Sight) -> Iterator[Finding]:
    for device in sight.open_devices:
        key = f"net/ipv4/conf/{device}/route_localnet"
        if device == "all":
            what = "neighbours on the LAN may reach services on 127.0.0.1"
        else:
            what = f"what is behind {device} may reach services on 127.0.0.1"
        yield Finding("error" if device == "all" else "warning", what, f"{key} is 1", f"sysctl -w {key}=0")


def _forwarding(sight: Sight) -> Iterator[Finding]:
    if sight.forwards:
        evidence = "net.ipv4.ip_forward is 1, nobody's rules translate addresses, and vmnet does not guard it"
        yield Finding(
            "note", "neighbours on the LAN can use this host as a router", evidence, "sysctl -w net/ipv4/ip_forward=0"
        )


# Where guests are aliases


def _mac(sight: Sight) -> Iterator[Finding]:
    release = tuple(int(part) for part in sight.version.split(".")[:2] if part.isdecimal())
    counts_all = (10, 15) <= release < (14, 1)
    of = f"macOS {sight.version}" if sight.version else "this system"
    if sight.wide:
        what = "other programs' aliases are each one more interface for mDNSResponder to announce all services on"
        yield Finding("note", what, f"{_some(sight.wide)}; {of}", "have them added by whoever adds them as /32")
    if sight.aliases and counts_all:
        what = "each alias is one more interface for mDNSResponder to announce all services on, though it is a /32"
        evidence = f"macOS 10.15 to 14.0 do not look at the mask: {of}, {sight.aliases} aliases"
        yield Finding("note", what, evidence, "keep them few, or update to macOS 14.1 or later")


# Names


def _library(sight: Sight) -> Iterator[Finding]:
    wrong = [one for one in sight.guests if sight.found.get(one.name, Reply()).values != (one.address,)]
    if not wrong:
        return
    evidence = _some([f"{one.name}: {sight.found.get(one.name, Reply(trouble='not asked'))}" for one in wrong])
    if not sight.hosts_read:
        place = f"VMNET_HOSTS_FILE is {sight.hosts}" if sight.hosts else "VMNET_HOSTS_FILE is empty"
        fix = "call vmnet without VMNET_HOSTS_FILE"
        yield Finding("note", "names of guests are not kept where programs look", f"{place}; {evidence}", fix)
        return
    if any(one.name not in sight.listed for one in wrong):
        fix = _PUT_RIGHT
    elif any(len(sight.found.get(one.name, Reply()).values) for one in wrong):
        fix = f"take other addresses for {wrong[0].name} out of {sight.hosts}"
    elif sight.aliases is not None:
        fix = "dscacheutil -flushcache; killall -HUP mDNSResponder"
    else:
        fix = "have `files` in the line `hosts:` of /etc/nsswitch.conf"
    yield Finding("error", "programs do not find guests by name", evidence, fix)


def _processes(sight: Sight) -> Iterator[Finding]:
    if not sight.wanted:
        return
    if not sight.has_dnsmasq:
        yield Finding(
            "error", "guests have no DHCP and no names", "dnsmasq is missing", "apt-get install dnsmasq-base"
        )  # fmt: skip
        return
    if not sight.keeper:
        yield Finding("error", "nothing keeps DHCP and DNS for guests running", "its process is gone", _PUT_RIGHT)
    told = {line.partition(":")[0] for line in sight.problems}
    for line in sight.problems:
        name, _, words = line.partition(": ")
        in_use = "in use" in words
        fix = "end whoever has that port (ss -lntup), or set another dns_port" if in_use else "put that right"
        yield Finding("error", f"dnsmasq ({name}) does not start", words, f"{fix}; it is tried again within a minute")
    for name, pid in sight.servers.items():
        if pid is None and sight.keeper and name not in told:
            yield Finding("error", f"dnsmasq ({name}) does not run", "its process is gone", _PUT_RIGHT)


def _answers(sight: Sight) -> Iterator[Finding]:
    for server, pid in sight.servers.items():
        replies = {asked: reply for asked, reply in sight.answers.items() if asked.server == server}
        wrong = [f"{asked}: {reply}" for asked, reply in replies.items() if reply != asked.right]
        if pid is not None and wrong:
            what = f"dnsmasq ({server}) does not answer as it should"
            yield Finding("error", what, _some(wrong), f"kill -KILL {pid}  # vmnet starts it anew")


_AGAIN = {
    "networkmanager-dns": "nmcli general reload dns-full",
    "dnsmasq": "systemctl restart dnsmasq",
    "resolved": "systemctl reload systemd-resolved",
}


def _by_wire(sight: Sight) -> Iterator[Finding]:
    resolver = sight.resolver
    if resolver is None or not sight.guests:
        return
    what = "programs that ask for names by wire do not find guests"
    if not resolver.here:
        fix = f"use addresses (vmnet ip NAME), or have systemd-resolved or dnsmasq answer on this host: {_HOW_TO}"
        yield Finding("note", what, f"/etc/resolv.conf names {resolver.server}, which is not on this host", fix)
        return
    replies = [(one, resolver.replies.get(one.name, Reply())) for one in sight.guests]
    wrong = [(one, reply) for one, reply in replies if reply != Reply(_NOERROR, (one.address,))]
    if not wrong:
        return
    evidence = _some([f"{resolver.server} says to {one.name}: {reply}" for one, reply in wrong])
    if any(reply.values for _, reply in wrong):
        what = "programs that ask for names by wire are sent elsewhere than to guests"
    if not resolver.part:
        fix = _HOW_TO
    elif sight.parts.get(resolver.part) == frozenset({"current"}):
        fix = _AGAIN[resolver.part]
    elif resolver.part == "resolved" and resolver.part not in sight.parts:  # one that knows no delegates
        fix = "ReadEtcHosts=yes in /etc/systemd/resolved.conf, and systemctl restart systemd-resolved"
    else:
        fix = f"vmnet hooks install {resolver.part}"
    yield Finding("warning" if any(reply.values for _, reply in wrong) else "note", what, evidence, fix)


# The service


def _service(sight: Sight) -> Iterator[Finding]:
    wanted = sight.wanted or bool(sight.aliases)
    if wanted and not sight.installed:
        yield Finding("note", "nothing brings guests back at boot", "no service is installed", "vmnet hooks install")
    if wanted and not sight.watcher:
        fix = "vmnet hooks install"
        yield Finding("note", "nobody puts right what others undo", "no watcher is at work", fix)
    if server := sight.server:
        fix = "systemctl restart vmnet-server.socket" if server.by_systemd else "end the watcher, and start it again"
        if not server.listens:
            what = "commands take a tenth of a second, and members of group vmnet need root"
            yield Finding("note", what, f"no server listens at {server.path}", fix)
        elif not server.heeds_group:
            what = "members of group vmnet cannot ask for guests of their own"
            yield Finding("warning", what, f"{server.path} is not the group's, which is newer", fix)
    for line in sight.left_alone:
        fix = "end who undoes it; the log of the watcher names programs"
        yield Finding("warning", "the watcher leaves something alone, which was undone again and again", line, fix)
    outdated = [name for name, states in sight.parts.items() if "outdated" in states]
    if outdated:
        evidence, fix = f"outdated: {', '.join(outdated)}", f"vmnet hooks install {' '.join(outdated)}"
        yield Finding("warning", "files of hooks are of another vmnet, or of other settings", evidence, fix)
    told = sight.resolver.part if sight.resolver and any(_by_wire(sight)) else ""
    missing = [name for name, states in sight.parts.items() if "missing" in states and name != told]
    if sight.installed and missing:
        evidence, fix = f"not installed: {', '.join(missing)}", f"vmnet hooks install {' '.join(missing)}"
        yield Finding("note", "vmnet is not fitted into all that is here", evidence, fix)


CHECKS: tuple[Callable[[Sight], Iterator[Finding]], ...] = (
    _look,
    _drift,
    _processes,
    _answers,
    _library,
    _by_wire,
    _route_localnet,
    _forwarding,
    _mac,
    _service,
)
