"""What dnsmasq reads: each guest once, in the right spelling, and nothing that a guest could say of another."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_plan import KINDS, lease_of
from vmnet.dnsmasq.files import Where, amend_tables, render_settings, render_tables, tables_of
from vmnet.dnsmasq.held import holders, with_holders
from vmnet.dnsmasq.keeper import Keeper
from vmnet.dnsmasq.processes import TELLS_OF_NAMES, follows_folders
from vmnet.model import Block, Lease
from vmnet.ondisk import replace as replace_file
from vmnet.plan import Plane

PLANE = Plane()
WHERE = Where("/run/vmnet/dns", "/var/lib/vmnet/dhcp.leases", "/etc/resolv.conf")
HOSTS = re.compile(r"(\d+\.\d+\.\d+\.\d+) ([a-z0-9.-]+)( [a-z0-9-]+)?\n")

octets = st.integers(0, 255)
macs = st.lists(octets, min_size=6, max_size=6).map(lambda mac: ":".join(f"{one:02x}" for one in mac))
addresses = st.integers(0, 50).map(lambda number: f"247.1.0.{4 * number + 2}")
lines = st.builds("{},*:*:*:*:*:*,tag:vmn-x,{},x\n".format, macs, addresses)
guests = st.sampled_from([lease_of(kind, mode)._replace(mtu=mtu) for kind, mode in KINDS for mtu in (1500, 1400)])
blocks = st.integers(0, 200).map(Block)
words = st.text(st.characters(codec="ascii", exclude_characters="\n\r\v\f\x1c\x1d\x1e"), max_size=20)


def test_each_guest_has_its_names_and_its_address_in_both_spellings() -> None:
    leases = [lease_of(kind, mode) for kind, mode in KINDS]
    tables = render_tables(leases, "vmnet.internal", PLANE)
    for folder, first in (("mapped", "247."), ("native", "127.")):
        found = []
        for name, text in tables.items():
            if name.startswith(f"{folder}/"):
                lines = [HOSTS.fullmatch(line) for line in text.splitlines(keepends=True)]
                assert all(line and f"{folder}/{line[1].rpartition('.')[0]}" == name for line in lines)
                found += lines
        assert len(found) == len(leases)
        for match, lease in zip(found, leases, strict=True):
            assert match
            assert match[1] == first + str(lease.block.address).partition(".")[2]
            assert (match[2], match[3]) == (f"{lease.name}.vmnet.internal", f" {lease.name}")
    served = [lease for lease in leases if lease.mode == "mapped" and lease.mac]
    assert tables["dhcp.hosts"].count("\n") == len(served) > 0


@given(st.dictionaries(blocks, guests, max_size=8), st.dictionaries(blocks, guests | st.none(), max_size=4))
def test_changed_tables_are_those_of_the_changed_guests(
    before: dict[Block, Lease], changes: dict[Block, Lease | None]
) -> None:
    def tables(leases: dict[Block, Lease]) -> dict[str, str]:
        return render_tables([leases[one]._replace(block=one) for one in sorted(leases)], "lan", PLANE)

    new = [lease._replace(block=block) for block, lease in changes.items() if lease]
    after = tables({block: lease for block, lease in (before | changes).items() if lease})
    held = tables(before)
    touched = tables_of(changes, PLANE)
    amended = amend_tables({name: held.get(name, "") for name in touched}, changes, new, "lan", PLANE)
    assert {name: text for name, text in (held | amended).items() if text} == {
        name: text for name, text in after.items() if text
    }


@pytest.mark.parametrize("text", ["nonsense\n", ",\n", "300.1.2.3 x\n"])
@pytest.mark.parametrize("name", ["mapped/247.1.0", "native/127.1.0", "dhcp.hosts"])
def test_what_is_no_table_is_not_changed(name: str, text: str) -> None:
    tables = {**dict.fromkeys(tables_of([Block(0)], PLANE), ""), name: text}
    with pytest.raises(ValueError, match="not as it was made"):
        amend_tables(tables, [Block(0)], [], "lan", PLANE)


def test_a_guest_called_localhost_has_no_short_name() -> None:
    lease = lease_of("veth", "native")._replace(name="localhost", block=Block(0))
    assert render_tables([lease], "lan", PLANE)["native/127.1.0"] == "127.1.0.2 localhost.lan\n"


@pytest.mark.parametrize(
    ("words", "follows"),
    [
        ("Dnsmasq version 2.90  Copyright (c) 2000-2024 Simon Kelley\n", True),
        ("Dnsmasq version 2.88rc1  Copyright", True),
        ("Dnsmasq version 2.100-3  Copyright", True),
        ("Dnsmasq version 3.1", True),
        ("Dnsmasq version UNKNOWN  Copyright", True),
        ("", True),
        ("Dnsmasq version 2.87  Copyright", False),
        ("Dnsmasq version 2.85-16.el9_4  Copyright", False),
    ],
)
def test_an_older_dnsmasq_has_to_be_told_what_has_gone(words: str, follows: bool) -> None:
    assert follows_folders(words) == follows


@pytest.mark.parametrize("version", ["2.87", "2.90"])
def test_only_an_older_dnsmasq_is_told_of_names(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmnet.dnsmasq.keeper._version_of_dnsmasq", lambda: f"Dnsmasq version {version}  Copyright")
    keeper = Keeper(tmp_path, tmp_path / "leases", tmp_path / "resolv.conf")
    (tmp_path / "native").mkdir()
    before = keeper._stamps("native")
    replace_file(tmp_path / "native/127.1.0", "127.1.0.2 web.lan web\n")
    assert (keeper._stamps("native") != before) == (version == "2.87")
    replace_file(tmp_path / "resolv.conf", "nameserver 192.0.2.1\n")
    assert keeper._stamps("native") != before


@pytest.mark.parametrize(("version", "fitted"), [("2.87", False), ("2.90", True), ("2.90", False)])
def test_names_are_told_where_somebody_would_not_hear_of_them(
    version: str, fitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmnet.dnsmasq.keeper._version_of_dnsmasq", lambda: f"Dnsmasq version {version}  Copyright")
    monkeypatch.setattr("vmnet.dnsmasq.keeper._FITTED", tmp_path / "fitted")
    keeper = Keeper(tmp_path, tmp_path / "leases", tmp_path / "resolv.conf")
    replace_file(tmp_path / TELLS_OF_NAMES, "")  # of a keeper before
    keeper._stamps("native")
    keeper._ask_for_word()
    assert (tmp_path / TELLS_OF_NAMES).exists() == (version == "2.87")
    if fitted:
        replace_file(tmp_path / "fitted", "")
        keeper._ask_for_word()
    assert (tmp_path / TELLS_OF_NAMES).exists() == (version == "2.87" or fitted)


def test_settings_have_no_gap_and_each_mtu_once() -> None:
    texts = {"dns": "port=$port $folder $mode $domain $shadow $resolv", "dhcp": "$folder $leases $domain $shadow\n"}
    settings = render_settings(texts, WHERE, "lan", PLANE, [1500, 1400, 1400, 9000])
    assert settings["mapped.conf"].startswith("port=12753 ")
    assert settings["native.conf"].startswith("port=12754 ")
    assert [line.rpartition(",")[2] for line in settings["dhcp.conf"].splitlines()[1:]] == ["1400", "9000"]


@given(st.lists(lines), st.dictionaries(addresses, macs))
def test_whoever_holds_an_address_is_named_first_and_once(hosts: list[str], holding: dict[str, str]) -> None:
    text = "".join(hosts)
    live = with_holders(text, holding)
    for before, after in zip(hosts, live.splitlines(keepends=True), strict=True):
        assert after.endswith(before)
        holder = holding.get(before.split(",")[3])
        assert after.split(",")[0] == (holder or before.split(",")[0])
        assert after.count(",") - before.count(",") == (holder is not None and holder != before.split(",")[0])


@given(st.lists(st.tuples(words, words, words, words, words).map(" ".join) | words))
def test_no_word_of_a_client_is_taken_for_a_mac(said: list[str]) -> None:
    for mac in holders("\n".join(said)).values():
        assert re.fullmatch(r"[0-9a-f:-]+", mac)
        assert "." not in mac


def test_a_client_without_hardware_address_says_nothing_of_others() -> None:
    """Its line has an empty field, and a name that it has chosen."""
    assert holders("0  247.1.0.2 247.1.0.6 01:02") == {}
    assert holders("0 52:54:00:12:34:56 247.1.0.2 * *") == {"247.1.0.2": "52:54:00:12:34:56"}
    assert holders("0 06-aa:bb 247.1.0.2 web ff:00") == {"247.1.0.2": "06-aa:bb"}
