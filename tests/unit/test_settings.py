"""The settings: what is left out has its default, what is there is right or named, and nothing else happens."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from netaddr import IPNetwork

from vmnet.ipam import Pool
from vmnet.model import UsageError
from vmnet.plan import Plane
from vmnet.settings import KEYS, Paths, Settings, load_settings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def loaded(config: Path, text: str) -> Settings:
    config.write_text(text)
    return load_settings(config)


def refusal(config: Path, text: str) -> UsageError:
    config.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_settings(config)
    assert str(config) in caught.value.message
    return caught.value


@pytest.mark.parametrize("text", [None, "", "# nothing\n"], ids=["no-file", "empty", "comment"])
def test_without_a_word_all_is_default(config: Path, text: str | None) -> None:
    if text is not None:
        config.write_text(text)
    assert load_settings(config) == Settings()


RIGHT: list[tuple[str, Settings]] = [
    ('domain = "lan"', Settings(domain="lan")),
    ('domain = "a-b.c9.internal"', Settings(domain="a-b.c9.internal")),
    ("alias_budget = 1", Settings(alias_budget=1)),
    ("alias_budget = 10000", Settings(alias_budget=10_000)),
    ("user_guests = 0", Settings(user_guests=0)),
    ("user_guests = 1000000", Settings(user_guests=1_000_000)),
    ("dns_port = 1024", Settings(plane=Plane(dns_port=1024))),
    ("dns_port = 65534", Settings(plane=Plane(dns_port=65534))),
    ("mtu = 576", Settings(mtu=576)),
    ("mtu = 65535", Settings(mtu=65535)),
    ("guard_forwarding = false", Settings(guard_forwarding=False)),
    ("libvirt_grace = 0.5", Settings(libvirt_grace=0.5)),
    ("libvirt_grace = 3650", Settings(libvirt_grace=3650)),
    ('pool = ["127.9.0.0/16"]', Settings(pool=Pool((IPNetwork("127.9.0.0/16"),)))),
    ('reserved = ["127.1.27.0/24", "127.2.0.1"]', Settings(pool=Pool.parse([], ["127.1.27.0/24", "127.2.0.1"]))),
    ("shadow = 240", Settings(plane=Plane(shadow=240))),
    ("shadow = 254", Settings(plane=Plane(shadow=254))),
    ("mark = 0x80000000", Settings(plane=Plane(mark=1 << 31))),
    ("mark = 1", Settings(plane=Plane(mark=1))),
    ("group_mapped = 1\ngroup_native = 4294967295", Settings(plane=Plane(group_mapped=1, group_native=0xFFFFFFFF))),
]


@pytest.mark.parametrize(("text", "settings"), RIGHT, ids=[text for text, _ in RIGHT])
def test_a_value_that_is_right_is_taken_and_the_rest_stays(config: Path, text: str, settings: Settings) -> None:
    assert loaded(config, text) == settings


def test_every_key_has_a_right_value_above() -> None:
    assert {line.partition(" = ")[0] for text, _ in RIGHT for line in text.splitlines()} == set(KEYS)


# A key, a value as TOML, and how the refusal shows it (Python's way, or the network that is wrong).
WRONG: list[tuple[str, str, str]] = [
    *[("domain", f'"{text}"', repr(text)) for text in ("", ".", "a..b", "-a", "a-", "A", "a_b", "a b", "ä")],
    ("domain", '"a\\nb"', r"'a\nb'"),
    ("domain", "7", "7"),
    ("domain", '["a"]', "['a']"),
    ("domain", f'"{"a." * 91}a"', f"'{'a.' * 38}..."),
    *[("alias_budget", number, number) for number in ("0", "10001", "-1", "254.0")],
    ("alias_budget", "true", "True"),
    *[("user_guests", number, number) for number in ("-1", "1000001", "1.5")],
    *[("dns_port", number, number) for number in ("53", "1023", "65535", "-1")],
    ("dns_port", '"12753"', "'12753'"),
    *[("mtu", number, number) for number in ("575", "65536", "0", "-1", "1500.0")],
    ("mtu", '"1500"', "'1500'"),
    ("mtu", "true", "True"),
    ("guard_forwarding", "1", "1"),
    ("guard_forwarding", '"true"', "'true'"),
    ("guard_forwarding", "[]", "[]"),
    *[("libvirt_grace", number, number) for number in ("-1", "3650.5", "nan", "inf")],
    ("libvirt_grace", "true", "True"),
    ("libvirt_grace", '"7d"', "'7d'"),
    ("pool", '"127.1.0.0/16"', "'127.1.0.0/16'"),
    ("pool", "[1]", "[1]"),
    *[
        (key, f'["{network}"]', network)
        for key, networks in (
            ("pool", ("nonsense", "127.1.0.1/16", "10.0.0.0/8", "127.0.0.0/16", "127.64.0.0/16", "::/0")),
            ("reserved", ("127.1.0", "10.0.0.1", "127.1.0.1/24", "127.1.0.0/33", "::1")),
        )
        for network in networks
    ],
    ("reserved", '"127.1.0.0"', "'127.1.0.0'"),
    *[("shadow", number, number) for number in ("239", "255", "127")],
    ("shadow", '"247"', "'247'"),
    ("shadow", "true", "True"),
    *[("mark", number, number) for number in ("0", "3", "4294967296", "-1")],
    ("mark", '"8"', "'8'"),
    *[("group_mapped", number, number) for number in ("0", "4294967296", "-1")],
    ("group_mapped", '"web"', "'web'"),
    *[("group_native", number, number) for number in ("0", "4294967296", "32001")],
]


@pytest.mark.parametrize(("key", "value", "shown"), WRONG, ids=[f"{key} = {value[:20]}" for key, value, _ in WRONG])
def test_a_wrong_value_is_named_with_its_file_and_key(config: Path, key: str, value: str, shown: str) -> None:
    error = refusal(config, f"{key} = {value}")
    assert key in error.message
    assert shown in error.message
    assert len(error.message) < 300 + len(str(config))


def test_every_key_has_wrong_values_above() -> None:
    assert {key for key, _, _ in WRONG} == set(KEYS)


def test_a_group_that_equals_the_others_default_is_refused(config: Path) -> None:
    assert "group_native = 32002 is not another group" in refusal(config, "group_mapped = 32002").message


def test_an_unknown_key_is_named_and_those_that_exist_are_told(config: Path) -> None:
    error = refusal(config, 'mtu = 1400\ndomian = "lan"')
    assert "'domian'" in error.message
    assert all(key in error.hint for key in KEYS)


def test_a_table_is_no_setting(config: Path) -> None:
    assert "'network'" in refusal(config, "[network]\nmtu = 1400").message
    assert "mtu = {'size': 1400}" in refusal(config, "[mtu]\nsize = 1400").message


@pytest.mark.parametrize(
    "content",
    [b"mtu", b"mtu = ", b"mtu = 1\nmtu = 2", b"\xff\xfe", b"\0", b"mtu = 1" + b"0" * 5000, b"pool = " + b"[" * 60_000],
    ids=["half", "no-value", "twice", "not-utf8", "nul", "digits", "nesting"],
)  # fmt: skip
def test_what_is_not_toml_is_refused_with_the_place(config: Path, content: bytes) -> None:
    config.write_bytes(content)
    with pytest.raises(UsageError, match="is not TOML") as caught:
        load_settings(config)
    assert caught.value.message.startswith(f"{config} ")


def test_a_number_that_cannot_even_be_written_is_refused(config: Path) -> None:
    assert "mtu = a number without end" in refusal(config, "mtu = 0x" + "f" * 5000).message


def test_a_folder_in_its_place_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load_settings(tmp_path)


TEXTS = st.text(st.characters(codec="ascii", exclude_characters='"\\'), max_size=20)
VALUES = st.recursive(
    st.booleans() | st.integers(-(1 << 40), 1 << 40) | TEXTS,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


def as_toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, str):
        return (
            '"' + "".join(f"\\u{ord(char):04x}" if ord(char) < 32 or ord(char) == 127 else char for char in value) + '"'
        )
    return str(value).lower()


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_value_is_taken_as_it_is_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    config = tmp_path_factory.mktemp("config", numbered=True) / "config.toml"
    config.write_text("".join(f"{key} = {as_toml(value)}\n" for key, value in values.items()))
    try:
        settings = load_settings(config)
    except UsageError as error:
        assert any(key in error.message for key in (*values, "group_native"))  # noqa: PT017 - what it says, if it does
        return
    held = {**settings.plane._asdict(), **settings._asdict()}
    for key, value in values.items():
        if key not in ("pool", "reserved"):
            assert held[key] == value


# The environment


DEFAULTS = Paths(
    state=Path("/var/lib/vmnet"),
    run=Path("/run/vmnet"),
    config=Path("/etc/vmnet/config.toml"),
    hosts=Path("/etc/hosts"),
)


@pytest.mark.parametrize(
    ("environment", "paths"),
    [
        ({}, DEFAULTS),
        ({"VMNET_STATE_DIR": "/s"}, DEFAULTS._replace(state=Path("/s"))),
        ({"VMNET_RUN_DIR": "/r"}, DEFAULTS._replace(run=Path("/r"))),
        ({"VMNET_CONFIG": "/c"}, DEFAULTS._replace(config=Path("/c"))),
        ({"VMNET_HOSTS_FILE": "/h"}, DEFAULTS._replace(hosts=Path("/h"))),
        ({"VMNET_HOSTS_FILE": ""}, DEFAULTS._replace(hosts=None)),
        ({"VMNET_STATE_DIR": "", "VMNET_RUN_DIR": "", "VMNET_CONFIG": ""}, DEFAULTS),
    ],
    ids=["none", "state", "run", "config", "hosts", "no-hosts", "empty"],
)
def test_the_environment_names_the_places(environment: dict[str, str], paths: Paths) -> None:
    assert Paths.from_environment(environment) == paths


def test_the_environment_is_the_process_own_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMNET_STATE_DIR", "/elsewhere")
    assert Paths.from_environment().state == Path("/elsewhere")


@pytest.mark.parametrize(
    ("platform", "state", "run"),
    [("linux", "/var/lib/vmnet", "/run/vmnet"), ("darwin", "/var/db/vmnet", "/var/run/vmnet"),
     ("freebsd14", "/var/db/vmnet", "/var/run/vmnet")],
)  # fmt: skip
def test_each_system_has_its_folders(platform: str, state: str, run: str) -> None:
    paths = Paths.from_environment({"VMNET_PLATFORM": platform})
    assert (str(paths.state), str(paths.run)) == (state, run)
    own = Paths.from_environment({"VMNET_PLATFORM": platform, "VMNET_STATE_DIR": "/s", "VMNET_RUN_DIR": "/r"})
    assert (str(own.state), str(own.run)) == ("/s", "/r")
