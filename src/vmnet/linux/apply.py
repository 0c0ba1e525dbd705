"""Carry out ops: many netlink messages in one send, the rest one by one. Each op may run twice.

Lists of ops belong to one thing each (a guest, the host part) and do not depend on each other: they advance
side by side, so that a thousand guests cost a few sends.
"""

import errno
import fcntl
import os
import random
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, TypeAlias

from vmnet.filters import encode
from vmnet.flows import leads_nowhere
from vmnet.linux import conntrack, iptables, nft, wire
from vmnet.linux.netlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_DELTFILTER,
    RTM_GETLINK,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWLINKPROP,
    RTM_NEWNEIGH,
    RTM_NEWQDISC,
    RTM_NEWROUTE,
    RTM_NEWTFILTER,
    RTM_SETLINK,
    Failure,
    Message,
    Netlink,
    attr,
    text,
    u32,
)
from vmnet.linux.places import Places
from vmnet.model import HostLacks, KernelRefused, NotPermitted, VmnetError
from vmnet.ops import (
    SCOPE_HOST,
    AddAddress,
    AddAlias,
    AddAltName,
    AddBridge,
    AddClsact,
    AddNetns,
    Address,
    AddRoute,
    AddTun,
    AddVeth,
    DelAddress,
    DelAlias,
    DelFilter,
    DelLink,
    DelNeighbour,
    DelNetns,
    DelRoute,
    DelRules,
    EndAnswers,
    ForgetFlows,
    LoadRules,
    Op,
    OwnTap,
    PersistTun,
    PutBackAddress,
    PutRules,
    RunAnswers,
    SetConf,
    SetFilter,
    SetLink,
    SetNeighbour,
    SetSysctl,
    WriteAnswers,
    WriteNames,
)
from vmnet.plan import HOST
from vmnet.platform import Refusal

_TUN_DEVICE = "/dev/net/tun"
# include/uapi/linux/if_tun.h
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER, _TUNSETIFINDEX = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454DA
_IFF_TUN, _IFF_TAP, _IFF_NO_PI, _IFF_MULTI_QUEUE = 0x1, 0x2, 0x1000, 0x100

_GLANCES = 0.0003  # seconds between two looks whether a device is listed
_NEW = NLM_F_CREATE | NLM_F_EXCL
_LO = 1
_ROUTE_FLAGS = {"add": _NEW, "append": NLM_F_CREATE | NLM_F_APPEND, "prepend": NLM_F_CREATE}
# What says that the wanted state is already there.
_SETTLED: dict[type, frozenset[int]] = {
    AddRoute: frozenset({errno.EEXIST}),
    AddBridge: frozenset({errno.EEXIST}),
    AddAltName: frozenset({errno.EEXIST}),
    DelRoute: frozenset({errno.ESRCH, errno.ENODEV}),
    AddAddress: frozenset({errno.EEXIST}),
    AddAlias: frozenset({errno.EEXIST}),
    DelAlias: frozenset({errno.EADDRNOTAVAIL}),
    PutBackAddress: frozenset({errno.EEXIST}),
    DelAddress: frozenset({errno.EADDRNOTAVAIL, errno.ENODEV}),
    DelLink: frozenset({errno.ENODEV}),
    AddClsact: frozenset({errno.EEXIST}),
    DelFilter: frozenset({errno.ENOENT, errno.EINVAL}),
    DelNeighbour: frozenset({errno.ENOENT}),
}
# What a kernel may have been built without, its option, and its module.
_FEATURES: dict[type, tuple[str, str, str]] = {
    AddVeth: ("veth", "CONFIG_VETH", "veth"),
    AddBridge: ("bridges", "CONFIG_BRIDGE", "bridge"),
    AddClsact: ("clsact", "CONFIG_NET_SCH_INGRESS", "sch_ingress"),
    SetFilter: ("BPF filters of tc", "CONFIG_NET_CLS_BPF", "cls_bpf"),
}
_NONE: frozenset[int] = frozenset()
_Direct: TypeAlias = (
    AddNetns | DelNetns | AddTun | PersistTun | OwnTap | SetSysctl | LoadRules | DelRules | ForgetFlows | PutRules
    | WriteNames | WriteAnswers | RunAnswers | EndAnswers
)  # fmt: skip


def apply(
    places: Places, lists: Sequence[Sequence[Op]], done: Callable[[Op], None], meanwhile: Callable[[], None]
) -> list[Refusal]:
    """Carry out `lists` of ops and return what was refused; the rest of such a list is left undone.

    `meanwhile` is called while the kernel deletes devices, which takes it a millisecond.
    """
    return _Run(places, lists, done, meanwhile).run()


class _Run:
    def __init__(
        self,
        places: Places,
        lists: Sequence[Sequence[Op]],
        done: Callable[[Op], None],
        meanwhile: Callable[[], None],
    ) -> None:
        self._places = places
        self._left = [deque(ops) for ops in lists]
        self._done = done
        self._meanwhile = meanwhile
        self._tuns: dict[str, int] = {}
        self._refusals: list[Refusal] = []

    def run(self) -> list[Refusal]:
        try:
            active = [number for number, ops in enumerate(self._left) if ops]
            while active:
                self._round(active)
                active = [number for number in active if self._left[number]]
        finally:
            # A tun that was not made persistent goes with its descriptor.
            for handle in self._tuns.values():
                os.close(handle)
        return self._refusals

    def _round(self, active: Sequence[int]) -> None:
        batches: dict[str, list[tuple[int, Op]]] = {}
        doomed: list[tuple[int, DelLink]] = []
        for number in active:
            ops = self._left[number]
            sending = False
            while ops:
                op = ops[0]
                if isinstance(op, _Direct):
                    if sending:
                        break  # what stands before it has to be sent first
                    self._do(number, op)
                    continue
                if isinstance(op, DelLink) and op.place == HOST:
                    if not sending:
                        doomed.append((number, op))
                        ops.popleft()
                    break
                if sending and isinstance(op, SetLink) and op.up and op.place == HOST:
                    break  # only when its filters are known to stand
                batches.setdefault(op.place if not isinstance(op, _HostOnly) else HOST, []).append((number, op))
                ops.popleft()
                sending = True
                if isinstance(op, AddVeth):
                    break  # what follows goes by its index, which may turn out to be another device's
        for place, batch in batches.items():
            self._send(place, batch)
        if doomed:
            self._delete_links(doomed)

    def _do(self, number: int, op: _Direct) -> None:
        self._left[number].popleft()
        try:
            self._direct(op)
        except VmnetError as error:
            self._refuse(number, op, 0, error)
        except OSError as error:
            self._refuse(number, op, error.errno or 0, _explain(op, error.errno or 0, str(error.strerror)))
        else:
            self._done(op)

    def _refuse(self, number: int, op: Op, code: int, error: VmnetError) -> None:
        self._refusals.append(Refusal(number, op, code, error))
        self._left[number].clear()

    def _direct(self, op: _Direct) -> None:
        match op:
            case AddNetns():
                self._places.make(op.path, op.alias)
            case DelNetns():
                self._places.delete(op.path)
            case AddTun() | PersistTun() | OwnTap():
                self._open_tun(op)
            case SetSysctl():
                _write_sysctl(op)
            case LoadRules():
                nft.load(op.text)
            case DelRules():
                nft.delete()
            case ForgetFlows():
                lost = {int.from_bytes(socket.inet_aton(address), "big") for address in op.lost}
                conntrack.forget(lambda flow: leads_nowhere(flow, op.shadow, lost))
            case PutRules():
                iptables.put(op)
            case WriteNames() | WriteAnswers() | RunAnswers() | EndAnswers():
                raise TypeError(f"{op} is not for the kernel")

    def _open_tun(self, op: AddTun | PersistTun | OwnTap) -> None:
        match op:
            case AddTun():
                self._add_tun(op)
            case PersistTun():
                self._persist_tun(op)
            case OwnTap():
                self._own_tap(op)

    def _add_tun(self, op: AddTun) -> None:
        """Make a tun or tap, gone with this process; raises KernelRefused where another program has it open, too.

        Until it has an owner, anybody may open one with several queues (drivers/net/tun.c, tun_not_capable).
        """
        self._tuns[op.device] = _open_tun(op, index=op.ifindex)
        fcntl.ioctl(self._tuns[op.device], _TUNSETOWNER, op.owner)
        netlink = self._places.host
        link = netlink.get(Message(RTM_GETLINK, 0, wire.link_query(op.device))) if op.queues > 1 else None
        if link and wire.parse_queues(link) != 1:
            netlink.send([Message(RTM_DELLINK, 0, wire.link_header() + text(wire.IFLA_IFNAME, op.device))])
            raise KernelRefused(
                f"another program opened {op.device} before it was anybody's", hint="end that program, then try again"
            )

    def _persist_tun(self, op: PersistTun) -> None:
        handle = self._tuns.pop(op.device, -1)
        if handle < 0:
            handle = _open_tun(op)
        try:
            fcntl.ioctl(handle, _TUNSETOWNER, op.owner)
            fcntl.ioctl(handle, _TUNSETPERSIST, 1)
        finally:
            os.close(handle)

    def _own_tap(self, op: OwnTap) -> None:
        """Open one more queue, for a moment and as all are: whoever opens one sets how frames look to all of them."""
        body = self._places.host.get(Message(RTM_GETLINK, 0, wire.link_query(op.device)))
        if body is None:
            return  # it went with its VM
        name, flags = op.device.encode(), wire.parse_tun_flags(body)
        handle = os.open(_TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(handle, _TUNSETIFF, struct.pack("=16sH22x", name, _IFF_TAP | _IFF_MULTI_QUEUE | flags))
            fcntl.ioctl(handle, _TUNSETOWNER, op.owner)
        finally:
            os.close(handle)

    def _send(self, place: str, batch: Sequence[tuple[int, Op]]) -> None:
        try:
            netlink = self._places.open(place)
        except OSError as error:
            for number, op in batch:
                self._refuse_all_of(number, op, error, KernelRefused(f"{place} cannot be entered: {error.strerror}"))
            return
        messages: list[Message] = []
        sent: list[tuple[int, Op]] = []
        for number, op in batch:
            try:
                messages.append(self._encode(op))
            except OSError as error:
                there = op.peer.place if isinstance(op, AddVeth) else place
                words = error.strerror or str(error)
                self._refuse_all_of(number, op, error, KernelRefused(f"{there} cannot be entered: {words}"))
            else:
                sent.append((number, op))
        try:
            failures = {failure.position: failure for failure in netlink.send(messages)}
        except OSError as error:
            for number, op in sent:
                self._refuse_all_of(number, op, error, _explain(op, error.errno or 0, str(error.strerror)))
            return
        for position, (number, op) in enumerate(sent):
            failure = failures.get(position)
            if failure is None or failure.errno in _SETTLED.get(type(op), _NONE):
                self._done(op)
            elif not self._is_refused(number):
                # The first refusal of a list is the cause; what follows it in the same send is its echo.
                self._refuse(number, op, failure.errno, _explain(op, failure.errno, str(failure)))

    def _refuse_all_of(self, number: int, op: Op, cause: OSError, error: VmnetError) -> None:
        """Refuse a list from `op` on, unless it is refused already."""
        if not self._is_refused(number):
            self._refuse(number, op, cause.errno or 0, error)

    def _is_refused(self, number: int) -> bool:
        return any(refusal.number == number for refusal in self._refusals)

    def _encode(self, op: Op) -> Message:
        if isinstance(op, AddVeth):
            peer = op.peer
            self._places.open(peer.place)
            body = wire.veth(op.device, op.ifindex, op.group, op.mac, op.mtu)
            body += wire.veth_peer(peer.name, peer.ifindex, peer.mac, op.mtu, self._places.handle(peer.place))
            return Message(RTM_NEWLINK, _NEW, body)
        return _ENCODERS[type(op)](op)

    def _delete(self, message: Message, index: int) -> Sequence[Failure]:
        """Have devices deleted, and return what the kernel refused, as soon as it lists that of `index` no more.

        It answers only when nobody refers to them any more (netdev_run_todo in net/core/dev.c), 15 ms later, though
        their names and numbers can be given again: that answer a thread waits for, whatever becomes of it.
        """
        failures: list[Failure] = []
        deleting = Netlink()

        def delete() -> None:
            try:
                failures.extend(deleting.send([message]))
            except OSError as error:
                failures.append(Failure(0, error.errno or errno.EIO, ""))
            finally:
                deleting.close()

        thread = Thread(target=delete, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads are to be had (pids.max of a cgroup)
            delete()
        self._meanwhile()
        while thread.is_alive() and self._places.host.get(Message(RTM_GETLINK, 0, wire.link_query(index=index))):
            thread.join(_GLANCES)
        return failures

    def _delete_links(self, doomed: Sequence[tuple[int, DelLink]]) -> None:
        if len(doomed) == 1:
            failed = self._delete(_ENCODERS[DelLink](doomed[0][1]), doomed[0][1].ifindex)
            self._conclude(doomed, {0: failed[0]} if failed else {})
            return
        # The kernel waits for a grace period after each deletion; by group it waits once for all.
        netlink = self._places.host
        links = list(netlink.dump(RTM_GETLINK, wire.link_query()))
        groups = iter(lambda: random.randrange(1 << 30, 1 << 31), 0)
        group = next(one for one in groups if not any(u32(wire.IFLA_GROUP, one) in link for link in links))
        marks = [
            Message(RTM_SETLINK, 0, wire.link_header(op.ifindex) + u32(wire.IFLA_GROUP, group)) for _, op in doomed
        ]
        failures = {failure.position: failure for failure in netlink.send(marks)}
        marked = [op.ifindex for position, (_, op) in enumerate(doomed) if position not in failures]
        last = Message(RTM_DELLINK, 0, wire.link_header() + u32(wire.IFLA_GROUP, group))
        failed = self._delete(last, marked[0]) if marked else []
        self._conclude(doomed, {**dict.fromkeys(range(len(doomed)), failed[0]), **failures} if failed else failures)

    def _conclude(self, doomed: Sequence[tuple[int, DelLink]], failures: Mapping[int, Failure]) -> None:
        for position, (number, op) in enumerate(doomed):
            failure = failures.get(position)
            if failure is None or failure.errno in _SETTLED[DelLink]:
                self._done(op)
            else:
                self._refuse(number, op, failure.errno, _explain(op, failure.errno, str(failure)))


def _add_alias(op: AddAlias) -> Message:
    return Message(RTM_NEWADDR, _NEW, wire.address(_LO, Address(f"{op.address}/32", SCOPE_HOST)))


def _add_route(op: AddRoute) -> Message:
    return Message(RTM_NEWROUTE, _ROUTE_FLAGS[op.verb], wire.route(op.route, op.ifindex))


def _set_filter(op: SetFilter) -> Message:
    body = wire.filter_program(op.ifindex, op.direction, encode(op.program))
    return Message(RTM_NEWTFILTER, NLM_F_CREATE, body)


def _del_neighbour(op: DelNeighbour) -> Message:
    return Message(RTM_DELNEIGH, 0, wire.neighbour(op.ifindex, op.address, op.mac))


def _set_neighbour(op: SetNeighbour) -> Message:
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, wire.neighbour(op.ifindex, op.address, op.mac))


_ENCODERS: dict[type, Callable[[Any], Message]] = {
    SetLink: lambda op: Message(RTM_SETLINK, 0, _link_changes(op)),
    SetConf: lambda op: Message(RTM_SETLINK, 0, wire.link_header(op.ifindex) + wire.conf_spec(op.values)),
    AddAlias: _add_alias,
    DelAlias: lambda op: Message(RTM_DELADDR, 0, wire.address(_LO, Address(op.value, op.scope))),
    AddBridge: lambda op: Message(RTM_NEWLINK, _NEW, wire.bridge(op.device)),
    AddAltName: lambda op: Message(RTM_NEWLINKPROP, _NEW | NLM_F_APPEND, wire.alternative_name(op.ifindex, op.name)),
    AddClsact: lambda op: Message(RTM_NEWQDISC, _NEW, wire.clsact(op.ifindex)),
    SetFilter: _set_filter,
    DelFilter: lambda op: Message(RTM_DELTFILTER, 0, wire.filter_place(op.ifindex, op.direction)),
    AddAddress: lambda op: Message(RTM_NEWADDR, _NEW, wire.address(op.ifindex, op.address)),
    DelAddress: lambda op: Message(RTM_DELADDR, 0, wire.address(op.ifindex, op.address)),
    PutBackAddress: lambda op: Message(RTM_NEWADDR, _NEW, wire.lo_address(op.address)),
    AddRoute: _add_route,
    DelRoute: lambda op: Message(RTM_DELROUTE, 0, wire.route(op.route, op.ifindex)),
    SetNeighbour: _set_neighbour,
    DelNeighbour: _del_neighbour,
    DelLink: lambda op: Message(RTM_DELLINK, 0, wire.link_header(op.ifindex)),
}
_HostOnly: TypeAlias = (
    AddAlias | DelAlias | AddVeth | AddBridge | AddAltName | AddClsact | SetFilter | DelFilter | DelNeighbour
)


def _link_changes(op: SetLink) -> bytes:
    flags = change = 0
    if op.up is not None:
        change |= wire.IFF_UP
        flags |= wire.IFF_UP if op.up else 0
    if op.multicast is not None:
        change |= wire.IFF_MULTICAST
        flags |= wire.IFF_MULTICAST if op.multicast else 0
    body = wire.link_header(op.ifindex, flags, change)
    if op.alias is not None:
        # An alias is taken away by one of no bytes at all, without the NUL.
        body += text(wire.IFLA_IFALIAS, op.alias) if op.alias else attr(wire.IFLA_IFALIAS, b"")
    if op.group is not None:
        body += u32(wire.IFLA_GROUP, op.group)
    if op.mac is not None:
        body += wire.mac_attr(op.mac)
    if op.mtu is not None:
        body += u32(wire.IFLA_MTU, op.mtu)
    if op.name is not None:
        body += text(wire.IFLA_IFNAME, op.name)
    if op.master is not None:
        body += u32(wire.IFLA_MASTER, op.master)
    return body


def _open_tun(op: AddTun | PersistTun, index: int = 0) -> int:
    """Open a tun or tap, making it where it is not there; `index` is that of a new one. Raises OSError."""
    handle = os.open(_TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = _IFF_NO_PI | (_IFF_TAP if op.kind == "tap" else _IFF_TUN)
        if op.queues > 1:
            flags |= _IFF_MULTI_QUEUE
        if index:
            fcntl.ioctl(handle, _TUNSETIFINDEX, struct.pack("=I", index))
        fcntl.ioctl(handle, _TUNSETIFF, struct.pack("=16sH22x", op.device.encode(), flags))
    except OSError:
        os.close(handle)
        raise
    return handle


def _write_sysctl(op: SetSysctl) -> None:
    try:
        Path("/proc/sys", op.key).write_text(str(op.value))
    except FileNotFoundError:
        return  # a kernel without IPv6, or a device that is gone


def _explain(op: Op, code: int, words: str) -> VmnetError:
    if isinstance(op, AddTun | PersistTun) and code in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return HostLacks(f"{_TUN_DEVICE} is missing ({words})", hint="load the module tun: modprobe tun")
    if isinstance(op, AddTun) and code in (errno.EPERM, errno.EACCES):
        return NotPermitted(
            f"{_TUN_DEVICE} may not be used: {words}", hint="a container is given it with --device /dev/net/tun"
        )
    if isinstance(op, PersistTun) and code == errno.EBUSY:
        return KernelRefused(
            f"{op.device} cannot be made persistent, of uid {op.owner}, while another program has it open: {words}",
            hint="end that program, most likely the VM, then vmnet up",
        )
    feature = _FEATURES.get(type(op))
    if feature and code in (errno.EOPNOTSUPP, errno.ENOENT):
        what, option, module = feature
        return HostLacks(f"the kernel lacks {what} ({option}): {words}", hint=f"load the module: modprobe {module}")
    # There is no command that makes a tap persistent and does nothing else.
    shown = str(op) if isinstance(op, PersistTun) else op.command()
    return KernelRefused(f"the kernel refused `{shown}`: {words}")
