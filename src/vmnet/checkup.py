"""Look at all that `vmnet.doctor` decides by, with a limit to everything that may take time: 5 seconds in all."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from vmnet.client import SOCKET
from vmnet.dnsmasq.processes import PATH, SERVERS, find_keeper, find_server, gives_addresses, is_there
from vmnet.doctor import Guest, Reply, Resolver, Server, Sight, questions
from vmnet.engine import Engine
from vmnet.hooks import is_installed
from vmnet.hooks.call import Call
from vmnet.hooks.install import look as look_at_files
from vmnet.hooks.parts import parts_here
from vmnet.members import group_id
from vmnet.model import Lease, VmnetError
from vmnet.ondisk import find_program
from vmnet.ops import RunAnswers
from vmnet.plan import dotted, shadow_of
from vmnet.platform import Listener, Report
from vmnet.questions import ask
from vmnet.settings import Paths, Settings
from vmnet.signs import read_status
from vmnet.systemd import is_in_hosts_netns, systemd_runs

OpenEngine: TypeAlias = Callable[[Report], AbstractContextManager[Engine]]

_MANY = 8  # guests that are asked for by name; of more, as many from all over
_AT_ONCE = 64  # questions under way: all of them
_PATIENCE = 2.0  # seconds for the C library to find a name
_DNS_PORT = 53
_RESOLV = Path("/etc/resolv.conf")
_ASK_LIBRARY = """
import socket, sys
try:
    found = socket.getaddrinfo(sys.argv[1], None, type=socket.SOCK_STREAM)
    print(*sorted({one[4][0] for one in found}))
except OSError as error:
    sys.exit(error.strerror)
"""
# Who answers at which address of this host, as a part of hooks, by a file that is there as long as it runs.
_ANSWERERS = (
    ("networkmanager-dns", "127.0.0.1", "/run/NetworkManager/dnsmasq.pid"),
    ("dnsmasq", "", "/run/dnsmasq/dnsmasq.pid"),
    ("dnsmasq", "", "/run/dnsmasq.pid"),
    ("resolved", "127.0.0.53", "/run/systemd/resolve"),
    ("resolved", "127.0.0.54", "/run/systemd/resolve"),
)


def look(open_engine: OpenEngine) -> Sight:
    """Return all that can be seen by the caller."""
    listener = Listener()
    paths = Paths.from_environment()
    with open_engine(listener) as engine:
        sight, leases, addresses = _look_at_records(engine, listener)
        settings = engine.settings
        if not engine.platform.carves:
            return replace(sight, **_look_at_aliases(engine, leases, paths))
    sight = replace(sight, **_look_at_sysctls(), **_look_at_service(paths))
    sight = replace(sight, server=_look_at_server(paths, watched=sight.watcher))
    if leases:
        names = _guests(_sample(leases), settings)
        sight = replace(sight, wanted=True, guests=names, **_look_at_processes(paths))
        sight = replace(sight, **_look_at_names(names, paths, settings, addresses))
    return sight


def _look_at_records(engine: Engine, listener: Listener) -> tuple[Sight, Sequence[Lease], frozenset[str]]:
    """Return what differs from the records, the guests that are to be up, and the host's addresses."""
    sight = Sight(privileged=engine.platform.privileged)
    leases: Sequence[Lease] = ()
    addresses: frozenset[str] = frozenset()
    try:
        recorded = engine.recorded()
        leases = [one for one in recorded or () if one.wish == "up"]
        addresses = engine.platform.addresses()
        ops, problems = engine.drift()
        sight = replace(
            sight,
            drift=[str(op) for op in ops if not isinstance(op, RunAnswers)],
            stuck=[(f"{name}: {error.message}", error.hint) for name, error in problems.items()],
            forwards=recorded is None
            and _forwards()
            and sight.privileged
            and not engine.platform.forwards_for_others(),
        )
    except (VmnetError, OSError) as error:
        told = (error.message, error.hint) if isinstance(error, VmnetError) else (str(error), "")
        sight = replace(sight, trouble=told)
    # What it says of dnsmasq is looked at here, too.
    warnings = [text for text in dict.fromkeys(listener.warnings) if not text.startswith("dnsmasq")]
    return replace(sight, warnings=warnings), leases, addresses


def _sample(leases: Sequence[Lease]) -> Sequence[Lease]:
    return leases[:: -(-len(leases) // _MANY)]


def _guests(leases: Sequence[Lease], settings: Settings) -> list[Guest]:
    return [
        Guest(
            f"{one.name}.{settings.domain}",
            dotted(one.block.first + 2),
            dotted(shadow_of(one.block.first + 2, settings.plane)),
        )
        for one in leases
    ]


def _forwards() -> bool:
    return Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() != "0"


def _look_at_sysctls() -> dict[str, Any]:
    conf = Path("/proc/sys/net/ipv4/conf")
    found = []
    for device in sorted(os.listdir(conf)):
        with suppress(OSError):
            if (conf / device / "route_localnet").read_text().strip() != "0":
                found.append(device)
    return {"open_devices": found}


def _look_at_service(paths: Paths) -> dict[str, Any]:
    status = read_status(paths.run)
    states: dict[str, set[str]] = {}
    for seen in look_at_files([part for part in parts_here() if part.found()], Call.from_here(), Path("/")):
        states.setdefault(seen.part.name, set()).add(seen.state)
    return {
        "installed": is_installed(),
        "watcher": status is not None,
        "left_alone": status["left_alone"] if status else (),
        "parts": {name: frozenset(found) for name, found in states.items()},
    }


def _look_at_server(paths: Paths, *, watched: bool) -> Server | None:
    by_systemd = systemd_runs() and is_in_hosts_netns()
    path = paths.run / SOCKET
    if not (Path("/etc/systemd/system/vmnet-server.socket").exists() if by_systemd else watched):
        return None
    try:
        found = path.stat()
    except OSError:
        return Server(str(path), listens=False, by_systemd=by_systemd)
    # The unit names its group, so that it is another's is seen by its file.
    heeds = by_systemd or group_id() in (None, found.st_gid)
    return Server(str(path), listens=True, by_systemd=by_systemd, heeds_group=heeds)


def _look_at_aliases(engine: Engine, leases: Sequence[Lease], paths: Paths) -> dict[str, Any]:
    """Return what there is to see where guests are aliases: of lo0, of the system, and of names."""
    guests = _guests(_sample(leases), engine.settings) if leases else []
    found: dict[str, Any] = {
        "aliases": len(leases),
        "guests": guests,
        "found": _ask_library(guests),
        **_look_at_service(paths),
        **_look_at_hosts_file(guests, paths.hosts),
    }
    try:
        ours = {dotted(lease.block.first + 2) for lease in engine.recorded() or ()}
        loopback = engine.platform.look_at_loopback()
    except VmnetError as error:
        return {**found, "trouble": (error.message, error.hint)}
    others = [one for one in loopback.addresses if one.partition("/")[0] not in ours]
    return {**found, "wide": [one for one in others if not one.endswith("/32")], "version": loopback.version}


def _look_at_processes(paths: Paths) -> dict[str, Any]:
    folder = paths.answers
    servers: dict[str, int | None] = {}
    for name in SERVERS:
        if name == "dhcp" and not gives_addresses(folder):
            continue
        servers[name] = None
        if is_there(find_server(folder, name)):
            with suppress(OSError, ValueError):
                servers[name] = int((folder / f"{name}.pid").read_text())
    problems = ""
    with suppress(OSError):
        problems = (folder / "problems").read_text()
    return {
        "has_dnsmasq": find_program("dnsmasq", PATH) is not None,
        "keeper": is_there(find_keeper(folder)),
        "servers": servers,
        "problems": problems.splitlines(),
    }


def _look_at_names(
    guests: Sequence[Guest], paths: Paths, settings: Settings, addresses: frozenset[str]
) -> dict[str, Any]:
    ports = {"mapped": settings.plane.dns_port, "native": settings.plane.dns_port + 1}
    asked = questions(guests, settings.domain)
    resolver = _resolver(addresses)
    others = [one.name for one in guests] if resolver.here else []
    with ThreadPoolExecutor(_AT_ONCE + 1) as pool:
        library = pool.submit(_ask_library, guests)
        ours = [
            pool.submit(ask, "127.0.0.1", ports[one.server], one.name, one.kind, tcp=one.tcp) for one in asked
        ]  # fmt: skip
        theirs = [pool.submit(ask, resolver.server, _DNS_PORT, name) for name in others]
        answers = {one: future.result() for one, future in zip(asked, ours, strict=True)}
        replies = {name: future.result() for name, future in zip(others, theirs, strict=True)}
    return {
        "answers": answers,
        "resolver": replace(resolver, replies=replies),
        "found": library.result(),
        **_look_at_hosts_file(guests, paths.hosts),
    }


def _start_asking_library(name: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    argv = [sys.executable, "-I", "-S", "-c", _ASK_LIBRARY, name]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def _ask_library(guests: Sequence[Guest]) -> dict[str, Reply]:
    end = time.monotonic() + _PATIENCE
    children = {one.name: _start_asking_library(one.name) for one in guests}
    return {name: _told_by_library(child, end) for name, child in children.items()}


def _told_by_library(child: "subprocess.Popen[str]", end: float) -> Reply:
    try:
        out, err = child.communicate(timeout=max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return Reply(trouble=f"no answer within {_PATIENCE:g} s")
    return Reply(0, tuple(out.split())) if child.returncode == 0 else Reply(trouble=err.strip() or "no answer")


def _look_at_hosts_file(guests: Sequence[Guest], hosts: Path | None) -> dict[str, Any]:
    lines: Mapping[str, list[str]] = {}
    read = False
    with suppress(OSError):
        read = hosts is not None and os.path.samefile(hosts, "/etc/hosts")
        text = Path("/etc/hosts").read_text(errors="replace")
        split = [line.partition("#")[0].split() for line in text.splitlines()]
        lines = {words[0]: words[1:] for words in split if len(words) > 1 and words[0].startswith("127.")}
    listed = {one.name for one in guests if one.name in lines.get(one.address, ())}
    return {"hosts": str(hosts or ""), "hosts_read": read, "listed": frozenset(listed)}


def _resolver(addresses: frozenset[str]) -> Resolver:
    """Return whom programs ask: the first server; without one this host itself (resolv.conf(5))."""
    server = "127.0.0.1"
    with suppress(OSError):
        lines = [line.split() for line in _RESOLV.read_text(errors="replace").splitlines()]
        server = next((words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"), server)
    here = server.startswith("127.") or server == "::1" or server in addresses
    places = ((part, address or server, file) for part, address, file in _ANSWERERS)
    part = next((part for part, address, file in places if here and address == server and os.path.exists(file)), "")
    return Resolver(server, here, part)
