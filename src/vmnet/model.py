"""The words of vmnet: what a guest, a lease and the host part are, and what can go wrong.

Everything else imports this module; it imports nothing of vmnet.
"""

import hashlib
import re
import string
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from netaddr import IPAddress, IPNetwork

Kind: TypeAlias = Literal["tap", "veth", "tun", "alias"]
Mode: TypeAlias = Literal["mapped", "native"]
Wish: TypeAlias = Literal["up", "down", "deleting"]
State: TypeAlias = Literal["up", "down", "degraded"]
Maker: TypeAlias = Literal["vmnet", "libvirt"]

LOOPBACK = IPNetwork("127.0.0.0/8")
POOL_SPAN = IPNetwork("127.0.0.0/10")
HOST_PART = IPNetwork("127.0.0.0/16")
POOL_FIRST = 0x7F010000
BLOCK_SIZE = 4
POOL_BLOCKS = 1_032_192
LIBVIRT_BRIDGE = "vmn-_bridge"  # no guest's device: a name has no underscore, and a shortened one has it further on
MTU = (576, 65535)  # bytes: the least and the most that a guest may have
QUEUES = (1, 256)  # of a tap, the same
USUAL_MTU = 1500  # bytes: what an Ethernet device has by itself (RFC 894), and virtio's


class VmnetError(Exception):
    """What went wrong, in the user's words; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class KernelRefused(VmnetError):
    """The kernel or a program said no; its words are in the message."""

    exit_code = 1


class UsageError(VmnetError):
    """The command line, a name or a setting is not of the right form."""

    exit_code = 2


class NoSuchGuest(VmnetError):
    """No lease bears that name."""

    exit_code = 3


class NoSuchRelay(NoSuchGuest):
    """A port leads nowhere."""


class Conflict(VmnetError):
    """What was asked for contradicts what exists."""

    exit_code = 4


class NameTaken(Conflict):
    """There is a guest of that name already."""


class NetnsGone(Conflict):
    """The network namespace of a guest, which somebody else made, is not there any more."""


class PoolExhausted(VmnetError):
    """No free block is left in the pool."""

    exit_code = 5


class NotPermitted(VmnetError):
    """The caller lacks a right; the message says which."""

    exit_code = 6


class HostLacks(VmnetError):
    """A program, a device node or a kernel feature is missing on this host."""

    exit_code = 7


NAME_MAX = 63  # of a label (RFC 1123, section 2.1)
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DIGITS = string.ascii_letters + string.digits
_DEVICE_NAME_MAX = 15  # IFNAMSIZ is 16 with the final NUL (include/uapi/linux/if.h)


def check_name(name: str) -> str:
    """Return `name` if it is a guest name, else raise `UsageError`.

    A guest name is an RFC 1123 label: 1 to 63 of a-z, 0-9 and -, with no - at an end.
    """
    if _LABEL.fullmatch(name):
        return name
    shown = repr(name) if len(name) <= 80 else repr(name[:77]) + "..."
    raise UsageError(
        f"{shown} is not a guest name",
        hint="a name is 1 to 63 of a-z, 0-9 and -, and neither starts nor ends with -",
    )


def is_mac(value: object) -> bool:
    """Say whether `value` is the MAC of one device, in lower case and with colons."""
    if not isinstance(value, str) or len(value) != 17:
        return False
    parts = value.split(":")
    digits = len(parts) == 6 and all(len(one) == 2 and set(one) <= set("0123456789abcdef") for one in parts)
    return digits and not int(parts[0], 16) & 1 and any(int(one, 16) for one in parts)


def device_name(name: str) -> str:
    """Return the name of the guest's device on the host: at most 15 characters, stable, unique.

    A name too long for a device is shortened to two of its characters, an underscore (which no guest name has) and
    eight characters of its SHA-256, in base 62: 47 bits, with which a million such names share a device once in four
    hundred times. (Five of either, in base 32, had a clash among ten thousand that began alike.)
    """
    device = f"vmn-{name}"
    if len(device) <= _DEVICE_NAME_MAX:
        return device
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    tail = "".join(_DIGITS[digest // len(_DIGITS) ** place % len(_DIGITS)] for place in range(8))
    return f"vmn-{name[:2]}_{tail}"


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """Block `number` of the pool: the /30 at 127.1.0.0 + 4 * number, 0 <= number < 1,032,192."""

    number: int

    @property
    def first(self) -> int:
        """The block's network address as a number in host order."""
        return POOL_FIRST + BLOCK_SIZE * self.number

    @property
    def network(self) -> IPNetwork:
        """The block as the host's programs see it, such as 127.1.0.0/30."""
        return IPNetwork((self.first, 30))

    @property
    def gateway(self) -> IPAddress:
        """The block's .1: the name of the host's side."""
        return IPAddress(self.first + 1)

    @property
    def address(self) -> IPAddress:
        """The block's .2: how the host reaches the guest."""
        return IPAddress(self.first + 2)


def block_of(address: IPAddress) -> Block:
    """Return the block that holds `address`; raise `UsageError` for an address outside the pool."""
    number = (int(address) - POOL_FIRST) // BLOCK_SIZE
    if address.version != 4 or not 0 <= number < POOL_BLOCKS:
        raise UsageError(
            f"{address} is not in the pool",
            hint="the pool is 127.1.0.0 to 127.63.255.255; a guest has the third address of a /30, such as 127.1.0.2",
        )
    return Block(number)


@dataclass(frozen=True, slots=True, eq=False)
class NetnsId:
    """Which network namespace a path led to: device and inode of its nsfs file, and the boot they belong to.

    The kernel gives the inode's number again as soon as the namespace is gone, its `cookie` never; None, where the
    caller may not ask or the kernel has none, equals any.
    """

    device: int
    inode: int
    boot_id: str
    cookie: int | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NetnsId):
            return NotImplemented
        same = (self.device, self.inode, self.boot_id) == (other.device, other.inode, other.boot_id)
        return same and (self.cookie == other.cookie or None in (self.cookie, other.cookie))

    def __hash__(self) -> int:
        return hash((self.device, self.inode, self.boot_id))


class Netns(NamedTuple):
    """Where a veth guest lives: the way there, whether vmnet made it, and which one it was."""

    path: str
    owned: bool
    identity: NetnsId | None


class Lease(NamedTuple):
    """The record that a guest holds a block, with all that its devices are made from.

    An alias has no device of its own: it is an address of the host itself, and its mode says nothing.

    `mac` is the guest's own MAC (None for a tun and an alias), `owner` the uid that may open its tap and manage it.
    `maker` is who makes its device: libvirt does for a domain on its network `vmnet`, and vmnet takes that tap over.
    `applied`: it was made from a file of guests, so it may go once it is not named there any more.
    """

    name: str
    block: Block
    kind: Kind
    mode: Mode
    mac: str | None
    mtu: int
    owner: int
    queues: int
    netns: Netns | None
    wish: Wish
    created: str
    maker: Maker = "vmnet"
    applied: bool = False

    @property
    def device(self) -> str:
        """The guest's device on the host."""
        return device_name(self.name)
