"""Keep the records: who holds which block, which blocks are free, and which host they belong to.

One SQLite file, `vmnet.db`, that root writes and everybody may read. Every method is one transaction of its own, so
nothing stays locked between two calls; any number of processes may write at once, and one killed at any point leaves
the last committed state to all, readers without any right to write included (docs/decisions/records.md says how). A
store is for one thread of one process: a fork opens its own. Every method raises `RecordsUnreadable` for a damaged
file, `Conflict` for one of a newer vmnet or one kept locked, `NotPermitted` without the right to read or write it,
`KernelRefused` for a full or read-only disk.
"""

import errno
import fcntl
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeAlias, TypeVar

from netaddr import IPAddress

from vmnet.ipam import Extent, Pool, blocks_touching, guest_mac, holds, merge, runs, subtract
from vmnet.model import (
    USUAL_MTU,
    Block,
    Conflict,
    KernelRefused,
    Kind,
    Lease,
    Maker,
    Mode,
    NameTaken,
    Netns,
    NetnsId,
    NoSuchGuest,
    NotPermitted,
    PoolExhausted,
    UsageError,
    VmnetError,
    Wish,
    device_name,
)

APPLICATION_ID = 0x766D6E74  # "vmnt", for file(1) and for us
LOCK_WAIT = 30.0  # seconds
JOURNAL_KEPT = 1 << 20  # bytes
# SQLite's own wait sleeps up to 0.1 s between two looks: of 16 busy writers one then waited 1.8 s, with this 0.4 s.
LOCK_NAP = 0.004

_T = TypeVar("_T")

# Each step leads from the schema before it to the next; a file's user_version is the number of steps behind it.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE lease (
            block INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, mode TEXT NOT NULL, mac TEXT,
            mtu INTEGER NOT NULL, owner INTEGER NOT NULL, queues INTEGER NOT NULL, netns_path TEXT,
            netns_owned INTEGER, netns_device INTEGER, netns_inode INTEGER, netns_boot_id TEXT, netns_cookie INTEGER,
            wish TEXT NOT NULL, created TEXT NOT NULL, maker TEXT NOT NULL) STRICT""",
        # Who has a name in the hosts file: asked for by each create and delete.
        "CREATE INDEX lease_up ON lease (block, name) WHERE wish = 'up'",
        "CREATE INDEX lease_libvirt ON lease (name) WHERE maker = 'libvirt'",
        # What the pool last used allows, reservations taken off; and the part of it that nobody ever had.
        "CREATE TABLE allocatable (lo INTEGER PRIMARY KEY, hi INTEGER NOT NULL) STRICT",
        "CREATE TABLE unused (hi INTEGER PRIMARY KEY, lo INTEGER NOT NULL) STRICT",
        # The queue of blocks that were given back: the lowest turn has been free longest.
        """CREATE TABLE freed (
            turn INTEGER PRIMARY KEY, block INTEGER NOT NULL UNIQUE, name TEXT NOT NULL, freed REAL NOT NULL,
            usable INTEGER NOT NULL) STRICT""",
        "CREATE INDEX freed_name ON freed (name, turn) WHERE usable",
        "CREATE INDEX freed_turn ON freed (turn) WHERE usable",
        "CREATE TABLE reservation (first INTEGER NOT NULL, last INTEGER NOT NULL, reason TEXT NOT NULL) STRICT",
        "CREATE TABLE pool (definition TEXT NOT NULL) STRICT",
        """CREATE TABLE host (
            wish TEXT NOT NULL, boot_id TEXT NOT NULL, netns_device INTEGER NOT NULL,
            netns_inode INTEGER NOT NULL) STRICT""",
        # Which domain of libvirt's a guest belongs to; it goes with the guest.
        """CREATE TABLE domain (
            name TEXT PRIMARY KEY, uuid TEXT NOT NULL, mac TEXT NOT NULL, domain TEXT NOT NULL,
            made INTEGER NOT NULL, gone REAL) STRICT""",
        # What of an alias's ports leads elsewhere; it goes with the guest.
        """CREATE TABLE relay (
            name TEXT NOT NULL, port INTEGER NOT NULL, protocol TEXT NOT NULL, target TEXT NOT NULL,
            target_port INTEGER NOT NULL, PRIMARY KEY (name, port, protocol)) STRICT""",
    ),
    # Whether a guest was made from a file of guests. Those that were there before were not.
    ("ALTER TABLE lease ADD COLUMN applied INTEGER NOT NULL DEFAULT 0",),
    # Which MTUs DHCP has to tell of: asked for by each create and delete; few guests have another than the usual.
    (f"CREATE INDEX lease_mtu ON lease (mtu) WHERE wish = 'up' AND mtu <> {USUAL_MTU}",),
)


class RecordsUnreadable(Conflict):
    """The file of records is damaged, one of a newer vmnet, or not one of vmnet's."""


class DomainKey(NamedTuple):
    """What tells one interface of libvirt's domains from another: the domain's UUID, and the MAC; and its name."""

    uuid: str
    mac: str
    domain: str


class DomainRecord(NamedTuple):
    """Which domain the guest `name` belongs to: `made` by libvirt's hook for it, or before and by a person.

    `gone` is when libvirt was first seen without that domain, seconds since the epoch; None while it is there.
    """

    name: str
    uuid: str
    mac: str
    domain: str
    made: bool
    gone: float | None

    @property
    def key(self) -> DomainKey:
        """What tells this interface of libvirt's from another."""
        return DomainKey(self.uuid, self.mac, self.domain)


class Relay(NamedTuple):
    """What comes to `port` of a guest's address goes on to `target_port` of `target`; `protocol` is tcp or udp."""

    port: int
    protocol: str
    target: str
    target_port: int

    def __str__(self) -> str:
        target = f"[{self.target}]" if ":" in self.target else self.target
        return f"{self.port}:{target}:{self.target_port}/{self.protocol}"


class LeaseRequest(NamedTuple):
    """What a new guest is to be; without `mac` a guest other than a tun gets its block's own."""

    name: str
    kind: Kind
    mode: Mode
    mac: str | None
    mtu: int
    owner: int
    queues: int
    netns: Netns | None
    address: IPAddress | None
    maker: Maker = "vmnet"
    applied: bool = False


class HostRecord(NamedTuple):
    """The wish for the host part, and which host network namespace, in which boot, the records belong to."""

    wish: Wish
    boot_id: str
    netns_device: int
    netns_inode: int


class Reservation(NamedTuple):
    """Addresses first..last (both included) of the pool that somebody else uses, and who or what that is."""

    first: IPAddress
    last: IPAddress
    reason: str


class Limits(NamedTuple):
    """How many aliases there may be, and how many guests `owned` by one user; None: any number."""

    aliases: int | None = None
    owned: int | None = None


_File: TypeAlias = tuple[int, int]  # device and inode


class _Kept:
    """A connection to write by that nobody uses; SQLite sees by itself what others have written meanwhile."""

    def __init__(self) -> None:
        self._held: tuple[Path, sqlite3.Connection, _File] | None = None

    def put(self, path: Path, db: sqlite3.Connection, file: _File) -> None:
        self._held = path, db, file

    def take(self, path: Path) -> tuple[sqlite3.Connection, _File] | None:
        """Return it, and which file that is, if it is one to the file that is at `path` now."""
        if self._held is None:
            return None
        (kept_path, db, file), self._held = self._held, None
        if kept_path == path and _file_at(path) == file:
            return db, file
        db.close()
        return None


_kept = _Kept()


def _file_at(path: Path) -> _File | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class Store:
    """The records in one directory; made by `open`, and a context manager that closes itself."""

    def __init__(
        self,
        path: Path,
        db: sqlite3.Connection | None,
        *,
        write: bool,
        file: _File | None = None,
        was_kept: bool = False,
    ) -> None:
        self._path = path
        self._db = db
        self._write = write
        self._file = file
        self._was_kept = was_kept

    @classmethod
    def open(cls, directory: Path, *, write: bool) -> Self:
        """Open the records in `directory`.

        To write, directory (0755) and file (0644, whatever the umask) are made if need be, and an older schema is
        brought up to date. To read, nothing is ever written: missing records read as none.
        """
        path = directory.absolute() / "vmnet.db"
        with _explained(path, "write" if write else "read"):
            if not write:
                return cls(path, _connect_reader(path), write=False)
            if (kept := _kept.take(path)) is not None:
                return cls(path, kept[0], write=True, file=kept[1], was_kept=True)
            _make_directory(path.parent)
            _make_file(path)
            file = _file_at(path)
            return cls(path, _patiently(lambda: _connect_writer(path)), write=True, file=file)

    @staticmethod
    def stamp(directory: Path) -> bytes:
        """Return what differs from one committed state of the records in `directory` to the next; empty without any.

        It is which file there is, and the counter in its header that each transaction raises (SQLite's file format,
        1.3.7). Not to be called while this process has a store open: to close the file here would end SQLite's locks.
        """
        path = directory.absolute() / "vmnet.db"
        with _explained(path, "read"):
            if not path.exists():
                return b""
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                return b"%d:%d:" % (found.st_dev, found.st_ino) + file.read(100)[24:28]

    def close(self) -> None:
        """Close the file, or keep it open where it was kept before; closing twice is harmless."""
        if self._was_kept:
            self.keep()
        if self._db is not None:
            self._db.close()
            self._db = None

    def keep(self) -> None:
        """Leave what is open to write to the next `open` of this process, and to the one after that.

        Such a process must not fork. If by then another file is there it opens that one.
        """
        if self._db is not None and self._file is not None:
            _kept.put(self._path, self._db, self._file)
            self._db = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def lease(self, name: str) -> Lease | None:
        """Return the lease of `name`, None without one."""
        with self._reading() as db:
            return _find_lease(db, name)

    def guest_on(self, device: str) -> str | None:
        """Return the name of the guest whose device is called so, None without one."""
        start = device.removeprefix("vmn-")[:2]
        with self._reading() as db:
            # No name has a character beyond z, and each device keeps the first two of its guest's.
            for (name,) in db.execute("SELECT name FROM lease WHERE name >= ? AND name < ?", (start, f"{start}~")):
                if device_name(name) == device:
                    return str(name)
        return None

    def leases(self, names: Sequence[str] | None = None) -> list[Lease]:
        """Return the leases of `names` in that order, or all in the order of their names; deleting ones included.

        Raises `NoSuchGuest` naming the first that has none.
        """
        with self._reading() as db:
            if names is None:
                return [_lease(row) for row in db.execute(f"SELECT {_COLUMNS} FROM lease ORDER BY name")]
            return [_need_lease(db, name) for name in names]

    def leases_up(self, blocks: Collection[Block] | None = None) -> list[Lease]:
        """Return the leases of guests that are to be up, all or those in `blocks`, ordered by block.

        Those of others cost nothing.
        """
        if blocks is not None and not blocks:
            return []  # SQLite finds no way to ask for none by this index
        those = "" if blocks is None else f" AND block IN ({', '.join(str(block.number) for block in blocks)})"
        # By itself SQLite would go through all leases, to have them in order.
        query = f"SELECT {_COLUMNS} FROM lease INDEXED BY lease_up WHERE wish = 'up'{those} ORDER BY block"
        with self._reading() as db:
            return [_lease(row) for row in db.execute(query)]

    def unusual_mtus_up(self) -> list[int]:
        """Return each MTU but the usual of guests that are to be up, once, in their order."""
        query = (
            f"SELECT DISTINCT mtu FROM lease INDEXED BY lease_mtu WHERE wish = 'up' AND mtu <> {USUAL_MTU} ORDER BY mtu"
        )
        with self._reading() as db:
            return [mtu for (mtu,) in db.execute(query)]

    def wished_up(self) -> list[tuple[str, Block]]:
        """Return name and block of each guest that is to be up, ordered by block."""
        with self._reading() as db:
            rows = db.execute("SELECT name, block FROM lease WHERE wish = 'up' ORDER BY block")
            return [(name, Block(block)) for name, block in rows]

    def count(self) -> int:
        """Return how many leases there are."""
        with self._reading() as db:
            return _number(db.execute("SELECT count(*) FROM lease"))

    def allocate(
        self, requests: Sequence[LeaseRequest], *, pool: Pool, created: str, limits: Limits | None = None
    ) -> list[Lease]:
        """Give a block to each of `requests` and return the leases in the same order: all of them, or none.

        Asked-for addresses come first, then blocks that a name had before, then never-used blocks from the lowest,
        then freed ones from the one that has been free longest. A `pool` other than last time's is taken over;
        leases outside it stay. `created` is kept as it is.

        Raises `NameTaken` for a name that has a lease, whatever else there is; `Conflict` for an address that is held
        or reserved, `UsageError` for an address that cannot be a guest's, `PoolExhausted` when too few blocks are free,
        or when there would be more guests than `limits` allow, those that are down included.
        """
        with self._writing() as db:
            return _allocate(db, requests, pool, created, limits)

    def preview(
        self, requests: Sequence[LeaseRequest], *, pool: Pool, created: str, limits: Limits | None = None
    ) -> list[Lease]:
        """Return and raise what `allocate` would, and write nothing; works on a copy in memory of all records."""
        with self._reading() as db, closing(_copy_to_memory(db)) as copy:
            return _allocate(copy, requests, pool, created, limits)

    def set_wish(self, names: Sequence[str], wish: Wish, *, gone_ok: bool = False, owner: int | None = None) -> None:
        """Record `wish` for all of `names`; a name without a lease raises `NoSuchGuest`, or is passed over.

        With `owner` all must be of that uid: the first that is not raises `NotPermitted`, and nothing is recorded.
        """
        with self._writing() as db:
            for name in names:
                lease = None if owner is None else _find_lease(db, name)
                if lease:
                    need_own(lease, owner)
                found = db.execute("UPDATE lease SET wish = ? WHERE name = ?", (wish, name)).rowcount
                if not found and not gone_ok:
                    raise _no_such_guest(name)

    def set_netns(self, places: Mapping[str, Netns], *, owner: int | None = None) -> None:
        """Record where guests live now, by name, all or none; raise `NoSuchGuest` for a name without a lease.

        With `owner` all must be of that uid, else `NotPermitted`.
        """
        with self._writing() as db:
            for name, netns in places.items():
                need_own(_need_lease(db, name), owner)
                db.execute(f"UPDATE lease SET {_NETNS_SET} WHERE name = ?", (*_netns_row(netns), name))

    def release(self, names: Sequence[str], *, freed: float) -> None:
        """Drop the leases of `names`; their blocks join the queue of freed ones in that order.

        `freed` is the time, seconds since the epoch, kept for people: the queue goes by order alone. A name without
        a lease is passed over, so releasing twice is harmless.
        """
        with self._writing() as db:
            db.executemany(
                "INSERT INTO freed (block, name, freed, usable)"
                f" SELECT block, name, ?, {_IS_ALLOCATABLE.format('lease.block')} FROM lease WHERE name = ?",
                [(freed, name) for name in dict.fromkeys(names)],
            )
            for table in ("domain", "relay"):
                db.executemany(f"DELETE FROM {table} WHERE name = ?", [(name,) for name in names])
            db.executemany("DELETE FROM lease WHERE name = ?", [(name,) for name in names])

    def domain(self, name: str) -> DomainRecord | None:
        """Return which domain of libvirt's a guest belongs to, None for one that libvirt does not know."""
        with self._reading() as db:
            return next(_domains(db, "WHERE name = ?", name), None)

    def guest_of(self, uuid: str, mac: str) -> str | None:
        """Return the name of the guest that is an interface of a domain of libvirt's, None without one."""
        with self._reading() as db:
            row = db.execute("SELECT name FROM domain WHERE uuid = ? AND mac = ? ORDER BY name", (uuid, mac)).fetchone()
            return None if row is None else str(row[0])

    def domains(self) -> dict[str, DomainRecord]:
        """Return which guests belong to which domains of libvirt's, by the guests' names and in their order."""
        with self._reading() as db:
            return {one.name: one for one in _domains(db, "ORDER BY name")}

    def set_domain(self, name: str, key: DomainKey | None, maker: Maker, *, made: bool = False) -> None:
        """Record which domain, which is there, a guest belongs to (None: none), and who makes its tap.

        A guest that was once `made` for a domain stays so. Of a tap that libvirt makes nothing but the MAC tells whose
        it is, so the guest has that of its domain.
        """
        with self._writing() as db:
            if key is None:
                db.execute("DELETE FROM domain WHERE name = ?", (name,))
            else:
                db.execute(
                    "INSERT INTO domain (name, uuid, mac, domain, made) VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO"
                    " UPDATE SET uuid = excluded.uuid, mac = excluded.mac, domain = excluded.domain,"
                    " made = max(made, excluded.made), gone = NULL",
                    (name, *key, made),
                )
            db.execute("UPDATE lease SET maker = ? WHERE name = ?", (maker, name))
            if maker == "libvirt" and key:
                db.execute("UPDATE lease SET mac = ? WHERE name = ?", (key.mac, name))

    def set_gone(self, times: Mapping[str, float | None]) -> None:
        """Record since when the domains of guests have been gone, None: they are there; others stay as they are."""
        with self._writing() as db:
            db.executemany("UPDATE domain SET gone = ? WHERE name = ?", [(gone, name) for name, gone in times.items()])

    def give_up(self, names: Sequence[str], *, before: float) -> list[str]:
        """Wish those of `names` deleted that were made for a domain which has been gone since `before`; return them.

        One whose domain has come back meanwhile stays.
        """
        with self._writing() as db:
            overdue = [one.name for one in _domains(db, "WHERE made AND gone <= ?", before) if one.name in set(names)]
            db.executemany("UPDATE lease SET wish = 'deleting' WHERE name = ?", [(name,) for name in overdue])
            return overdue

    def prune(self, kept: Collection[str]) -> list[Lease]:
        """Wish those guests deleted that were made from a file, and are not among `kept`; return them, by name."""
        with self._writing() as db:
            made = [_lease(row) for row in db.execute(f"SELECT {_COLUMNS} FROM lease WHERE applied ORDER BY name")]
            surplus = [lease for lease in made if lease.name not in kept]
            db.executemany("UPDATE lease SET wish = 'deleting' WHERE name = ?", [(lease.name,) for lease in surplus])
            return surplus

    def relays(self) -> dict[str, list[Relay]]:
        """Return which ports lead elsewhere, by guests' names."""
        found: dict[str, list[Relay]] = {}
        with self._reading() as db:
            columns = "name, port, protocol, target, target_port"
            for name, *relay in db.execute(f"SELECT {columns} FROM relay ORDER BY name, port, protocol"):
                found.setdefault(name, []).append(Relay(*relay))
        return found

    def set_relays(self, name: str, relays: Sequence[Relay]) -> None:
        """Record that these ports of a guest lead elsewhere, and no others; raises `NoSuchGuest`."""
        with self._writing() as db:
            _need_lease(db, name)
            db.execute("DELETE FROM relay WHERE name = ?", (name,))
            db.executemany("INSERT INTO relay VALUES (?, ?, ?, ?, ?)", [(name, *one) for one in relays])

    def has_libvirts(self) -> bool:
        """Say whether there are guests whose taps libvirt makes."""
        with self._reading() as db:
            return bool(_number(db.execute("SELECT EXISTS (SELECT 1 FROM lease WHERE maker = 'libvirt')")))

    def host(self) -> HostRecord | None:
        """Return what is recorded of the host part, None before the first `set_host`."""
        with self._reading() as db:
            row = db.execute("SELECT wish, boot_id, netns_device, netns_inode FROM host").fetchone()
            return None if row is None else HostRecord(*row)

    def set_host(self, record: HostRecord) -> None:
        """Record the wish for the host part and whose records these are."""
        with self._writing() as db:
            db.execute("DELETE FROM host")
            row = (record.wish, record.boot_id, record.netns_device, record.netns_inode)
            db.execute("INSERT INTO host (wish, boot_id, netns_device, netns_inode) VALUES (?, ?, ?, ?)", row)

    def reservations(self) -> list[Reservation]:
        """Return what others were found to use, in the order of the addresses."""
        with self._reading() as db:
            return _reservations(db)

    def replace_reservations(self, reservations: Sequence[Reservation]) -> None:
        """Record what others use, in place of what was recorded; their blocks are not given out.

        Leases that are there already stay. Costs a look at every record if something changed, else next to nothing.
        """
        wanted = sorted(reservations, key=lambda one: (one.first, one.last, one.reason))
        with self._writing() as db:
            if wanted == _reservations(db):
                return
            db.execute("DELETE FROM reservation")
            db.executemany(
                "INSERT INTO reservation (first, last, reason) VALUES (?, ?, ?)",
                [(int(one.first), int(one.last), one.reason) for one in wanted],
            )
            definition = db.execute("SELECT definition FROM pool").fetchone()
            if definition is not None:
                _rebuild(db, [_extent(text) for text in definition[0].split()])

    def purge(self) -> None:
        """Forget everything: leases, freed blocks, reservations, the host. The file stays, empty of records."""
        with self._writing() as db:
            for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                db.execute(f"DELETE FROM {table}")

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        db = self._db
        if db is None or not self._write:
            raise RuntimeError("this store is not open for writing")
        try:
            _patiently(lambda: db.execute("BEGIN IMMEDIATE"))
            _bring_up_to_date(db, self._path)  # somebody may have emptied the file since it was opened
            yield db
            _patiently(lambda: db.execute("COMMIT"))  # waits for readers; those to come wait for it
        except (sqlite3.Error, OSError, UnicodeError) as error:
            raise _explain(error, self._path, "write") from error
        finally:
            db.rollback()  # does nothing after the commit

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection that shows one committed state, in this vmnet's schema, to the end of the block."""
        with _explained(self._path, "read"):
            if self._db is None:
                self._db = _connect_reader(self._path)
            with _snapshot(self._path, self._db) as db:
                yield db


_COLUMNS = (
    "block, name, kind, mode, mac, mtu, owner, queues,"
    " netns_path, netns_owned, netns_device, netns_inode, netns_boot_id, netns_cookie, wish, created,"
    " maker, applied"
)
_INSERT_LEASE = f"INSERT INTO lease ({_COLUMNS}) VALUES ({', '.join('?' * 18)})"
_NETNS_SET = "netns_path = ?, netns_owned = ?, netns_device = ?, netns_inode = ?, netns_boot_id = ?, netns_cookie = ?"
_IS_ALLOCATABLE = "coalesce((SELECT hi > {0} FROM allocatable WHERE lo <= {0} ORDER BY lo DESC LIMIT 1), 0)"


def _domains(db: sqlite3.Connection, which: str, *values: object) -> Iterator[DomainRecord]:
    for row in db.execute(f"SELECT name, uuid, mac, domain, made, gone FROM domain {which}", values):
        name, uuid, mac, domain, made, gone = row
        yield DomainRecord(name, uuid, mac, domain, bool(made), gone)


def _allocate(
    db: sqlite3.Connection, requests: Sequence[LeaseRequest], pool: Pool, created: str, limits: Limits | None
) -> list[Lease]:
    try:
        if limits:
            _need_room(db, requests, limits)
        _adopt_pool(db, pool)
        blocks = _take_blocks(db, requests, pool)
    except (Conflict, PoolExhausted):
        for request in requests:  # whatever it lacks, a guest that is there has it already
            if _find_lease(db, request.name):
                raise _taken(request.name) from None
        raise
    leases = [_new_lease(request, Block(blocks[request.name]), created) for request in requests]
    for lease in leases:
        try:
            db.execute(_INSERT_LEASE, _lease_row(lease))
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_UNIQUE:
                raise
            raise _taken(lease.name) from None
    return leases


def _taken(name: str) -> NameTaken:
    return NameTaken(f"{name} exists already", hint=f"vmnet show {name}")


def _take_blocks(db: sqlite3.Connection, requests: Sequence[LeaseRequest], pool: Pool) -> dict[str, int]:
    """Take a block for each of `requests` away from the free ones; return them by name."""
    blocks: dict[str, int] = {}
    for request in requests:
        if request.address is not None:
            blocks[request.name] = _take_address(db, request.address, pool)
    for request in requests:
        if request.name not in blocks and (own := _take_own(db, request.name)) is not None:
            blocks[request.name] = own
    others = [request.name for request in requests if request.name not in blocks]
    blocks.update(zip(others, _take_next(db, len(others)), strict=True))
    return blocks


def _need_room(db: sqlite3.Connection, requests: Sequence[LeaseRequest], limits: "Limits") -> None:
    """Raise PoolExhausted where there would be more guests than `limits` allow."""
    if limits.aliases is not None:
        wanted = sum(request.kind == "alias" for request in requests)
        there = _number(db.execute("SELECT count(*) FROM lease WHERE kind = 'alias'"))
        if wanted and there + wanted > limits.aliases:
            raise PoolExhausted(
                f"{there} aliases are there and {wanted} are asked for: more than the {limits.aliases} that"
                " alias_budget allows",
                hint="vmnet delete gives one back; or set a larger alias_budget in the file of settings: before macOS"
                " 14.1 each alias is one more interface for mDNSResponder to announce all services on, and all"
                " programs that walk the addresses get slower",
            )
    if limits.owned is not None:
        for owner, wanted in Counter(request.owner for request in requests).items():
            there = _number(db.execute("SELECT count(*) FROM lease WHERE owner = ?", (owner,)))
            if there + wanted > limits.owned:
                raise PoolExhausted(
                    f"uid {owner} has {there} guests and asks for {wanted}: more than the {limits.owned} that"
                    " user_guests allows",
                    hint="vmnet delete gives one back; root may set a larger user_guests in the file of settings",
                )


def _take_address(db: sqlite3.Connection, address: IPAddress, pool: Pool) -> int:
    """Take the block of `address` away from the free ones, wherever it is."""
    block = pool.block_at(address).number
    holder = db.execute("SELECT name FROM lease WHERE block = ?", (block,)).fetchone()
    if holder is not None:
        raise Conflict(f"{address} is held by {holder[0]}", hint="ask for another address, or for none")
    for one in _reservations(db):
        if holds([_reserved_blocks(one)], block):
            raise Conflict(f"{address} is reserved: {one.reason}", hint="ask for another address, or for none")
    if db.execute("DELETE FROM freed WHERE block = ?", (block,)).rowcount:
        return block
    covering = "SELECT lo, hi FROM unused WHERE lo <= ? AND hi > ? ORDER BY hi LIMIT 1"
    extent = db.execute(covering, (block, block)).fetchone()
    if extent is None:
        raise Conflict(f"{address} is asked for twice")
    db.execute("DELETE FROM unused WHERE hi = ?", (extent[1],))
    db.executemany("INSERT INTO unused (lo, hi) VALUES (?, ?)", subtract([extent], [(block, block + 1)]))
    return block


def _take_own(db: sqlite3.Connection, name: str) -> int | None:
    """Take the block that `name` had last, if nobody got it since."""
    row = db.execute(
        "SELECT turn, block FROM freed WHERE usable AND name = ? ORDER BY turn DESC LIMIT 1", (name,)
    ).fetchone()
    if row is None:
        return None
    db.execute("DELETE FROM freed WHERE turn = ?", (row[0],))
    return int(row[1])


def _take_next(db: sqlite3.Connection, wanted: int) -> list[int]:
    """Take `wanted` blocks: never-used ones from the lowest, then freed ones in their order."""
    taken: list[int] = []
    while len(taken) < wanted:
        extent = db.execute("SELECT lo, hi FROM unused ORDER BY hi LIMIT 1").fetchone()
        if extent is None:
            break
        lo, hi = extent
        cut = min(hi, lo + wanted - len(taken))
        taken.extend(range(lo, cut))
        if cut == hi:
            db.execute("DELETE FROM unused WHERE hi = ?", (hi,))
        else:
            db.execute("UPDATE unused SET lo = ? WHERE hi = ?", (cut, hi))
    if len(taken) == wanted:
        return taken
    rows = db.execute(
        "SELECT turn, block FROM freed WHERE usable ORDER BY turn LIMIT ?", (wanted - len(taken),)
    ).fetchall()
    if len(taken) + len(rows) < wanted:
        raise PoolExhausted(
            f"the pool has {len(taken) + len(rows)} free blocks, {wanted} are asked for",
            hint="vmnet list shows who has them; vmnet delete gives one back",
        )
    db.executemany("DELETE FROM freed WHERE turn = ?", [(turn,) for turn, _ in rows])
    return taken + [block for _, block in rows]


def _adopt_pool(db: sqlite3.Connection, pool: Pool) -> None:
    row = db.execute("SELECT definition FROM pool").fetchone()
    if row is not None and row[0] == pool.definition:
        return
    db.execute("DELETE FROM pool")
    db.execute("INSERT INTO pool (definition) VALUES (?)", (pool.definition,))
    _rebuild(db, pool.extents)


def _rebuild(db: sqlite3.Connection, extents: Sequence[Extent]) -> None:
    """Work out anew what may be given out, from the pool's `extents`, the reservations and the leases."""
    allocatable = subtract(extents, merge(map(_reserved_blocks, _reservations(db))))
    known = db.execute("SELECT block FROM lease UNION ALL SELECT block FROM freed ORDER BY block")
    unused = subtract(allocatable, runs(block for (block,) in known))
    for table, rows in (("allocatable", allocatable), ("unused", unused)):
        db.execute(f"DELETE FROM {table}")
        db.executemany(f"INSERT INTO {table} (lo, hi) VALUES (?, ?)", rows)
    db.execute(f"UPDATE freed SET usable = {_IS_ALLOCATABLE.format('freed.block')}")


def _extent(text: str) -> Extent:
    lo, hi = text.split("-")
    return int(lo), int(hi)


def _reservations(db: sqlite3.Connection) -> list[Reservation]:
    rows = db.execute("SELECT first, last, reason FROM reservation ORDER BY first, last, reason")
    return [Reservation(IPAddress(first, 4), IPAddress(last, 4), reason) for first, last, reason in rows]


def _reserved_blocks(reservation: Reservation) -> Extent:
    return blocks_touching(int(reservation.first), int(reservation.last))


def _new_lease(request: LeaseRequest, block: Block, created: str) -> Lease:
    mac = guest_mac(block) if request.mac is None and request.kind not in ("tun", "alias") else request.mac
    return Lease(
        name=request.name,
        block=block,
        kind=request.kind,
        mode=request.mode,
        mac=mac,
        mtu=request.mtu,
        owner=request.owner,
        queues=request.queues,
        netns=request.netns,
        wish="up",
        created=created,
        maker=request.maker,
        applied=request.applied,
    )


_NetnsRow: TypeAlias = tuple[str | None, bool | None, int | None, int | None, str | None, int | None]


def _netns_row(netns: Netns | None) -> _NetnsRow:
    if netns is None:
        return None, None, None, None, None, None
    which = netns.identity
    if which is None:
        return netns.path, netns.owned, None, None, None, None
    return netns.path, netns.owned, which.device, which.inode, which.boot_id, which.cookie


def _lease_row(lease: Lease) -> tuple[object, ...]:
    words = (lease.block.number, lease.name, lease.kind, lease.mode, lease.mac, lease.mtu, lease.owner, lease.queues)
    return (*words, *_netns_row(lease.netns), lease.wish, lease.created, lease.maker, lease.applied)


def _lease(row: tuple[object, ...]) -> Lease:
    block, name, kind, mode, mac, mtu, owner, queues, path, owned, *which, wish, created, maker, applied = row
    netns = None
    if path is not None:
        identity = None if which[0] is None else NetnsId(*which)  # type: ignore[arg-type]
        netns = Netns(path, bool(owned), identity)  # type: ignore[arg-type]
    return Lease(
        name, Block(block), kind, mode, mac, mtu, owner, queues, netns, wish, created, maker,  # type: ignore[arg-type]
        bool(applied),
    )  # fmt: skip


def _find_lease(db: sqlite3.Connection, name: str) -> Lease | None:
    row = db.execute(f"SELECT {_COLUMNS} FROM lease WHERE name = ?", (name,)).fetchone()
    return None if row is None else _lease(row)


def _need_lease(db: sqlite3.Connection, name: str) -> Lease:
    lease = _find_lease(db, name)
    if lease is None:
        raise _no_such_guest(name)
    return lease


def need_own(lease: Lease, owner: int | None) -> None:
    """Raise `NotPermitted` unless the guest is that uid's; None is whoever may touch them all."""
    if owner is not None and lease.owner != owner:
        raise NotPermitted(f"{lease.name} is a guest of uid {lease.owner}", hint="root may do that: run it with sudo")


def _no_such_guest(name: str) -> NoSuchGuest:
    return NoSuchGuest(f"there is no guest {name}", hint="vmnet list shows those there are")


def _number(cursor: sqlite3.Cursor) -> int:
    return int(cursor.fetchone()[0])


def _make_directory(directory: Path) -> None:
    """Make `directory` and what is missing above it, open to all: the umask is for the user's own files."""
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    try:
        directory.mkdir()
    except FileExistsError:
        return
    directory.chmod(0o755)


def _make_file(path: Path) -> None:
    """Make the file if it is missing; raise `PermissionError` for one that the caller may not write."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        # SQLite would open it for reading alone, and complain at the first write.
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from None
        return
    # SQLite gives its journal the mode of the file itself.
    os.fchmod(descriptor, 0o644)
    os.close(descriptor)


def _connect(path: Path, mode: Literal["ro", "rw"]) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=0)


def _connect_writer(path: Path) -> sqlite3.Connection:
    db = _connect(path, "rw")
    try:
        # Durable when COMMIT returns: the journal's header is zeroed, and that is synced.
        db.execute("PRAGMA journal_mode = PERSIST")
        db.execute(f"PRAGMA journal_size_limit = {JOURNAL_KEPT}")
        db.execute("PRAGMA synchronous = FULL")
        _migrate(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _connect_reader(path: Path) -> sqlite3.Connection | None:
    try:
        path.stat()
    except FileNotFoundError:
        return None
    return _connect(path, "ro")


def _check_version(db: sqlite3.Connection, path: Path) -> int:
    """Return the schema's version; refuse a newer one and a file that is not ours."""
    version = _number(db.execute("PRAGMA user_version"))
    if version > len(MIGRATIONS):
        raise RecordsUnreadable(
            f"{path} was written by a newer vmnet: schema {version}, this one knows {len(MIGRATIONS)}",
            hint="install the newer vmnet again; vmnet restore works without records",
        )
    if version == len(MIGRATIONS):
        return version
    ours = _number(db.execute("PRAGMA application_id")) == APPLICATION_ID
    if not ours and (version or _number(db.execute("SELECT count(*) FROM sqlite_master"))):
        raise _unreadable(path, "it is a database, but not one of vmnet's")
    return version


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring the schema up to this vmnet's in one transaction."""
    if _check_version(db, path) == len(MIGRATIONS):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        _bring_up_to_date(db, path)  # another process may have done it while this one waited
        db.execute("COMMIT")
    except BaseException:
        db.rollback()
        raise


def _bring_up_to_date(db: sqlite3.Connection, path: Path) -> None:
    """Do in the transaction that was begun what the schema lacks of this vmnet's; nothing for most."""
    version = _check_version(db, path)
    if version == len(MIGRATIONS):
        return
    for step in MIGRATIONS[version:]:
        for statement in step:
            db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


@contextmanager
def _snapshot(path: Path, db: sqlite3.Connection | None) -> Iterator[sqlite3.Connection]:
    """Lend the last committed state of `db`, unchanging to the end of the block, in this vmnet's schema.

    That is the file itself, but for three cases in which a reader may not do what is to be done, and does it to a
    copy instead: no file, an older schema, and a journal that a killed writer left to be rolled back.
    """
    if db is None:
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as empty:
            _migrate(empty, path)
            yield empty
        return
    try:
        db.execute("BEGIN")
        try:
            version = _patiently(lambda: _check_version(db, path))
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise
            db.rollback()
            copy = _copy_rolled_back(path)
        else:
            if version == len(MIGRATIONS):
                yield db
                return
            copy = _copy_to_memory(db)
        with closing(copy):
            _migrate(copy, path)
            yield copy
    finally:
        db.rollback()


def _copy_to_memory(db: sqlite3.Connection) -> sqlite3.Connection:
    memory = sqlite3.connect(":memory:", isolation_level=None)
    db.backup(memory)
    return memory


def _copy_rolled_back(path: Path) -> sqlite3.Connection:
    """Return, in memory, the state before the transaction of a writer that was killed within it.

    The lock is the one that SQLite calls SHARED (https://sqlite.org/lockingv3.html; its bytes: os.h). While it is
    held nobody can change the file, neither commit nor roll back, and a journal begun meanwhile holds only what the
    file holds: so the two copies fit together.
    """
    # Rare, and 7 ms to import.
    import shutil
    import tempfile

    shared_first, shared_size = 0x40000002, 510
    # Closing any descriptor of a file drops all of a process's locks on it: copy from the one that holds the lock.
    with path.open("rb") as file, tempfile.TemporaryDirectory(prefix="vmnet-") as directory:
        _patiently(lambda: fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, shared_size, shared_first))
        copy = Path(directory) / path.name
        with copy.open("wb") as target:
            shutil.copyfileobj(file, target)
        shutil.copyfile(f"{path}-journal", f"{copy}-journal")
        with closing(_connect(copy, "rw")) as db:
            return _copy_to_memory(db)


def _patiently(step: Callable[[], _T]) -> _T:
    """Return what `step` does, trying again for `LOCK_WAIT` seconds while others have the file locked."""
    give_up = None
    while True:
        try:
            return step()
        except (sqlite3.OperationalError, BlockingIOError) as error:
            give_up = give_up or time.monotonic() + LOCK_WAIT
            if not _is_locked(error) or time.monotonic() > give_up:
                raise
        time.sleep(os.urandom(1)[0] / 255 * LOCK_NAP)  # `random` takes 2 ms to import


def _is_locked(error: Exception) -> bool:
    return isinstance(error, BlockingIOError) or getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


_Doing: TypeAlias = Literal["read", "write"]


@contextmanager
def _explained(path: Path, doing: _Doing) -> Iterator[None]:
    """Turn what SQLite and the system say about the file into errors for people."""
    try:
        yield
    except (sqlite3.Error, OSError, UnicodeError) as error:
        raise _explain(error, path, doing) from error


def _explain(error: sqlite3.Error | OSError | UnicodeError, path: Path, doing: _Doing) -> Exception:
    """Return the error for people; one that only a mistake of ours brings about is returned as it is."""
    if _is_locked(error):
        return Conflict(
            f"{path} stayed locked for {LOCK_WAIT:g} seconds",
            hint=f"lsof {path} shows the processes that have it open; end the one that hangs",
        )
    if isinstance(error, UnicodeEncodeError):
        return UsageError(f"{error.object!r} is not text that can be recorded")
    if isinstance(error, UnicodeError):
        return _unreadable(path, str(error))
    if isinstance(error, OSError):
        if error.errno in (errno.EACCES, errno.EPERM):
            return _refused(path, doing, error.strerror or "")
        return KernelRefused(f"{error.filename or path}: {error.strerror}")
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return _refused(path, doing, str(error))
        case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR:
            return KernelRefused(f"{path}: {error}", hint=f"df {path.parent} shows whether the disk is full")
    # Not only SQLITE_CORRUPT and SQLITE_NOTADB: a table that is missing, a constraint that does not hold.
    return error if isinstance(error, sqlite3.ProgrammingError) else _unreadable(path, str(error))


def _refused(path: Path, doing: _Doing, words: str) -> VmnetError:
    """Tell a right that the caller lacks from a file that nobody may write."""
    try:
        read_only = bool(os.statvfs(path.parent).f_flag & os.ST_RDONLY)
    except OSError:
        read_only = False
    if os.geteuid() == 0 or read_only:
        return KernelRefused(f"{path}: {words}", hint=f"findmnt --target {path.parent} shows how it is mounted")
    return NotPermitted(f"user {os.geteuid()} may not {doing} {path}", hint="try it as root")


def _unreadable(path: Path, why: str) -> RecordsUnreadable:
    return RecordsUnreadable(
        f"{path} cannot be read: {why}",
        hint=f"put a backup in its place, or move it away: mv {path} {path}.bad; vmnet restore works without records",
    )
