"""A file of guests: each key is what the option of `create` is, and what is wrong is named with its guest."""

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from netaddr import IPAddress

from tests.unit.test_cli_reference import COMMANDS, PAGE, options, rows, sections
from vmnet.cli.guestfile import KEYS, parse_guests, read_guests
from vmnet.model import NotPermitted, UsageError, VmnetError
from vmnet.specs import GuestSpec

FILE = "guests.toml"


@pytest.fixture(autouse=True)
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be root to whoever asks: only root may name an owner."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def parsed(text: str) -> list[GuestSpec]:
    return parse_guests(FILE, tomllib.loads(text))


def refusal(text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parsed(text)
    assert caught.value.message.startswith(f"{FILE}: ")
    return caught.value


def test_every_key_is_what_its_option_is() -> None:
    text = """
    [guest.vm]
    kind = "tap"
    mode = "mapped"
    address = "127.1.0.6"
    mac = "02:AA:00:00:00:01"
    mtu = 1400
    owner = 1000
    queues = 2
    [guest.web]
    netns = "there"
    owner = "root"
    [guest]
    db = {}
    """
    vm, web, db = parsed(text)
    assert vm == GuestSpec(
        "vm", "tap", "mapped", None, IPAddress("127.1.0.6"), "02:aa:00:00:00:01", 1400, 1000, 2,
        origin=f"{FILE}: guest.vm",
    )  # fmt: skip
    assert web == GuestSpec("web", netns="there", owner=0, origin=f"{FILE}: guest.web")
    assert db == GuestSpec("db", origin=f"{FILE}: guest.db")
    assert {key for key in KEYS if key in text} == set(KEYS)


def test_the_keys_are_the_options_of_create_and_those_of_the_manual() -> None:
    others = {"json", "dry-run", "verbose", "v"}
    taken = {option.lstrip("-") for option in options(COMMANDS["create"])} - others
    assert set(KEYS) == taken - {"native", "mapped"} | {"mode"}
    documented = [row[0] for row in rows(sections(PAGE)["apply"]) if not row[0].startswith("`-")]
    assert sorted(word.strip("`") for cell in documented for word in cell.split(", ")) == sorted(KEYS)


@pytest.mark.parametrize("text", ["", "# nothing\n", "[guest]\n"])
def test_a_file_may_name_nobody(text: str) -> None:
    assert parsed(text) == []


WRONG: list[tuple[str, str, str]] = [
    *[("kind", text, text.strip("'")) for text in ("'bridge'", "''", "'TAP'", "7", "true", "[]")],
    *[("mode", text, text.strip("'")) for text in ("'both'", "''", "true")],
    *[("netns", text, text.strip("'")) for text in ("''", "7", "['a']", "1979-05-27")],
    *[("address", text, text.strip("'")) for text in ("''", "'127.1.0'", "'127.1.0.2/30'", "7", "'::x'")],
    *[("mac", text, text.strip("'")) for text in ("''", "'x'", "'01:00:5e:00:00:01'", "2")],
    *[("mtu", text, text.strip("'")) for text in ("575", "65536", "-1", "'1500'", "true", "1500.0", "nan")],
    *[("queues", text, text.strip("'")) for text in ("0", "257", "'2'", "false")],
    *[("owner", text, text.strip("'")) for text in ("'no-such-user'", "''", "-1", "4294967295")],
    ("mtu", "0x" + "f" * 5000, "a number without end"),
    ("owner", f"'{'9' * 5000}'", "9" * 80),
    ("address", f"'{'x' * 5000}'", "x" * 80),
]


def spelled(value: str) -> str:
    """Return a value of TOML as Python shows it."""
    return {"true": "True", "false": "False", "1979-05-27": "datetime.date(1979, 5, 27)"}.get(value, value)


@pytest.mark.parametrize(("key", "value", "shown"), WRONG, ids=[f"{key}={value[:20]}" for key, value, _ in WRONG])
def test_a_wrong_value_is_named_with_file_guest_and_key(key: str, value: str, shown: str) -> None:
    message = refusal(f"[guest.db]\n[guest.web]\n{key} = {value}\n").message
    assert f"guest.web.{key}" in message
    assert spelled(shown) in message
    assert len(message) < 300


def test_every_key_has_wrong_values_above() -> None:
    assert {key for key, _, _ in WRONG} == set(KEYS)


def test_who_is_not_root_may_name_no_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotPermitted, match=r"guests.toml: guest.web.owner needs root"):
        parsed("[guest.web]\nowner = 1000")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[guest.web]\nadress = '127.1.0.2'", "guest.web: there is no key 'adress'"),
        ("[guest.web]\nname = 'db'", "guest.web: there is no key 'name'"),
        ("[guest.web]\norigin = 'x'", "guest.web: there is no key 'origin'"),
        ("[guest.Web]", "'Web' is not a guest name"),
        ("[guest.'a.b']", "'a.b' is not a guest name"),
        ("[guest.a.b]", "guest.a: there is no key 'b'"),
        (f"[guest.{'x' * 5000}]", "xxx'... is not a guest name"),
        ("[guests.web]", "there is no key 'guests'"),
        ("kind = 'tap'", "there is no key 'kind'"),
        ("guest = 7", "guest = 7 is no table of guests"),
        ("[[guest]]\nname = 'web'", "guest = [{'name': 'web'}] is no table of guests"),
        ("guest.web = 'tap'", "guest.web = 'tap' is no guest"),
        ("[[guest.web]]", "guest.web = [{}] is no guest"),
    ],
)
def test_what_is_no_guest_is_told(text: str, told: str) -> None:
    error = refusal(text)
    assert told in error.message
    assert error.hint


@pytest.mark.parametrize("content", [b"guest", b"[guest.web]\n[guest.web]", b"\xff\xfe", b"a = " + b"[" * 60_000])
def test_what_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / FILE
    file.write_bytes(content)
    with pytest.raises(UsageError, match="is not TOML") as caught:
        read_guests(str(file))
    assert caught.value.message.startswith(str(file))


@pytest.mark.parametrize(
    ("make", "told"), [(lambda _: None, "there is no file"), (Path.mkdir, "cannot be read: Is a directory")]
)
def test_what_cannot_be_read_is_told(tmp_path: Path, make: Callable[[Path], object], told: str) -> None:
    file = tmp_path / FILE
    make(file)
    with pytest.raises(UsageError, match=told) as caught:
        read_guests(str(file))
    assert str(file) in caught.value.message


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "kind": st.sampled_from(["tap", "veth", "tun", "alias"]),
    "mode": st.sampled_from(["native", "mapped"]),
    "netns": st.text(min_size=1, max_size=20),
    "address": st.ip_addresses().map(str),
    "mac": st.binary(min_size=4, max_size=4).map(lambda some: f"02:01:{some.hex(':')}"),
    "mtu": st.integers(576, 65535),
    "owner": st.integers(0, 0xFFFFFFFE),
    "queues": st.integers(1, 256),
}
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)


@given(st.dictionaries(NAMES, st.fixed_dictionaries({}, optional=GOOD), max_size=4))
def test_what_is_right_is_taken_as_it_is(tables: dict[str, dict[str, Any]]) -> None:
    specs = parse_guests(FILE, {"guest": tables})
    assert [spec.name for spec in specs] == list(tables)
    for spec, table in zip(specs, tables.values(), strict=True):
        for key in KEYS:
            wanted = table.get(key)
            assert getattr(spec, key) == (IPAddress(wanted) if key == "address" and wanted else wanted)


@given(
    st.dictionaries(st.just("guest") | st.text(max_size=9), VALUES, max_size=2)
    | st.builds(
        lambda tables: {"guest": tables},
        st.dictionaries(
            NAMES | st.text(max_size=5),
            VALUES | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), VALUES, max_size=3),
            max_size=3,
        ),
    )
)
def test_anything_is_taken_or_refused_by_name(document: dict[str, Any]) -> None:
    try:
        specs = parse_guests(FILE, document)
    except VmnetError as error:
        assert isinstance(error, UsageError)  # noqa: PT017 - nothing else comes of it
        assert error.message.startswith(f"{FILE}: ")  # noqa: PT017
        return
    assert [spec.name for spec in specs] == list(document.get("guest", {}))
