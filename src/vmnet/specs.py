"""What a caller asks a guest to be: against what there is already, and as a request for a lease."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import PurePath
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

from netaddr import IPAddress

from vmnet.model import Conflict, Kind, Lease, Maker, Mode, Netns, NetnsId, UsageError
from vmnet.platform import Platform
from vmnet.settings import Settings
from vmnet.store import LeaseRequest

_P = ParamSpec("_P")
_T = TypeVar("_T")
_NAME_MAX, _PATH_MAX = 255, 4095  # bytes (linux/limits.h)
_DEFAULT_MODES: dict[Kind, Mode] = {"tap": "mapped", "veth": "native", "tun": "native", "alias": "native"}


class GuestSpec(NamedTuple):
    """What the caller asks a guest to be; None leaves a property to its default, or as it is.

    `new`: there must be no guest of that name yet. `maker`: who makes the device of a guest that is new, `applied`: it
    is made from a file. `origin` is where all this is asked for, for a refusal to say. `place`: which namespace `netns`
    must lead to.
    """

    name: str
    kind: Kind | None = None
    mode: Mode | None = None
    netns: str | None = None
    address: IPAddress | None = None
    mac: str | None = None
    mtu: int | None = None
    owner: int | None = None
    queues: int | None = None
    new: bool = False
    maker: Maker = "vmnet"
    place: NetnsId | None = None
    applied: bool = False
    origin: str = ""


def _saying_where(
    method: Callable[Concatenate["Asking", GuestSpec, _P], _T],
) -> Callable[Concatenate["Asking", GuestSpec, _P], _T]:
    """Have what a method refuses say where it was asked for."""

    @wraps(method)
    def saying(asking: "Asking", spec: GuestSpec, /, *rest: _P.args, **named: _P.kwargs) -> _T:
        try:
            return method(asking, spec, *rest, **named)
        except UsageError as error:
            if not spec.origin:
                raise
            raise UsageError(f"{spec.origin}: {error.message}", hint=error.hint) from None

    return saying


@dataclass(frozen=True, slots=True)
class Asking:
    """Reads specs on this host. `here` is the host's own namespace, `caller` the uid that owns guests by default."""

    platform: Platform
    settings: Settings
    here: NetnsId
    caller: int

    @_saying_where
    def refuse_what_is_lacking(self, spec: GuestSpec) -> None:
        """Raise UsageError for what only guests with a network of their own have, on a system that has none."""
        if self.platform.carves:
            return
        given = {
            "--netns": spec.netns,
            f"--kind {spec.kind}": spec.kind != "alias" and spec.kind,
            f"--{spec.mode}": spec.mode,
            "--mac": spec.mac,
            "--mtu": spec.mtu,
            "--queues": spec.queues,
        }
        for option, value in given.items():
            if value:
                raise UsageError(
                    f"{option} is for guests with a network of their own, which only Linux has",
                    hint="leave it out: here a guest is an alias, an address of this host itself with a name",
                )

    @_saying_where
    def compare(self, spec: GuestSpec, lease: Lease) -> Netns | None:
        """Raise Conflict where `spec` asks for something else than the lease has; return a namespace made anew."""
        if spec.new:
            raise Conflict(f"{lease.name} exists already", hint="take another name")
        path = None if spec.netns is None else self._netns_path(spec.netns)
        asked: dict[str, tuple[object, object]] = {
            "kind": (spec.kind, lease.kind),
            "mode": (spec.mode, lease.mode),
            "netns": (path, lease.netns.path if lease.netns else None),
            "address": (spec.address, lease.block.address),
            "mac": (spec.mac, lease.mac),
            "mtu": (spec.mtu, lease.mtu),
            "owner": (spec.owner, lease.owner),
            "queues": (spec.queues, lease.queues),
        }
        for option, (wanted, held) in asked.items():
            if wanted is not None and wanted != held:
                raise Conflict(
                    f"{lease.name} exists with {option} {held}, not {wanted}",
                    hint=f"vmnet delete {lease.name} first, or leave the option out",
                )
        if path is None or lease.netns is None or lease.netns.owned:
            return None
        found = self.identify(path)
        if found is None or (spec.place and found != spec.place):
            raise Conflict(f"there is no network namespace at {path}", hint="start what makes it first")
        if found == lease.netns.identity:
            return None
        if self.platform.observe_guests([lease])[lease.name].host.link:
            raise Conflict(
                f"{path} is another network namespace than the one in which {lease.name} is",
                hint=f"vmnet delete {lease.name} first",
            )
        return lease.netns._replace(identity=found)

    @_saying_where
    def request(self, spec: GuestSpec) -> LeaseRequest:
        """Return the request for a lease; raises UsageError or Conflict where the spec makes no guest."""
        usual: Kind = "tap" if self.platform.carves else "alias"
        kind: Kind = spec.kind or (usual if spec.netns is None else "veth")
        mode: Mode = spec.mode or _DEFAULT_MODES[kind]
        if spec.netns is not None and kind != "veth":
            raise UsageError(f"a {kind} is in no network namespace", hint="leave --netns out, or --kind veth")
        if kind == "tap" and mode != "mapped":
            raise UsageError("a tap is always mapped", hint="leave --native out, or take a veth or a tun")
        if kind == "alias" and (spec.mode or spec.mtu):
            raise UsageError("an alias is an address of the host itself", hint="leave --native, --mapped and --mtu out")
        if kind in ("tun", "alias") and spec.mac:
            raise UsageError(f"a {kind} has no MAC", hint="leave --mac out, or take a tap")
        if spec.address is not None:
            self.settings.pool.block_at(spec.address)
        if kind != "tap" and (spec.queues or 1) > 1:
            raise UsageError(f"a {kind} has one queue", hint="leave --queues out, or take a tap")
        netns = None
        if kind == "veth":
            path = self._netns_path(spec.name if spec.netns is None else spec.netns)
            found = self.identify(path)
            if found is None and not self._is_named(path):
                raise Conflict(
                    f"there is no network namespace at {path}",
                    hint="give the name of one under /run/netns (made if need be), or a path such as /proc/PID/ns/net",
                )
            if found == self.here:
                raise Conflict(f"{path} is the host's own network namespace", hint="give the guest one of its own")
            if spec.place and found != spec.place:
                raise Conflict(f"{path} leads to another network namespace than a moment ago", hint="try again")
            netns = Netns(path, found is None, found)
        return LeaseRequest(
            name=spec.name,
            kind=kind,
            mode=mode,
            mac=spec.mac,
            mtu=spec.mtu or self.settings.mtu,
            owner=self.caller if spec.owner is None else spec.owner,
            queues=spec.queues or 1,
            netns=netns,
            address=spec.address,
            maker=spec.maker,
            applied=spec.applied,
        )

    def _netns_path(self, netns: str) -> str:
        """Return where a namespace is that was given as a name or as a path; raises UsageError."""
        name = PurePath(netns).name if self._is_named(netns) else netns
        right = name.isprintable() and len(name.encode()) <= _PATH_MAX
        if right and name.startswith("/"):
            return name
        if not right or not name or "/" in name or name in (".", "..") or len(name.encode()) > _NAME_MAX:
            shown = repr(netns if len(netns) < 80 else netns[:77] + "...")
            raise UsageError(
                f"{shown} names no network namespace", hint="give a name under /run/netns, or an absolute path"
            )
        return self.platform.netns_path(name)

    def _is_named(self, path: str) -> bool:
        """Say whether `path` is that of a named namespace, there or not: only those are ever made."""
        return PurePath(path).parent == PurePath(self.platform.netns_path(""))

    def identify(self, path: str) -> NetnsId | None:
        """Return which network namespace `path` leads to; raises Conflict where that cannot be seen."""
        try:
            return self.platform.identify(path)
        except OSError as error:
            raise Conflict(f"{path} cannot be looked at: {error.strerror}") from None
