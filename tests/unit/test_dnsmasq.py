"""What dnsmasq reads: each guest once, in the right spelling, and nothing that a guest could say of another."""

import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_plan import KINDS, lease_of
from vmnet.dnsmasq.files import Where, render_settings, render_tables
from vmnet.dnsmasq.held import holders, with_holders
from vmnet.plan import Plane

PLANE = Plane()
WHERE = Where("/run/vmnet/dns", "/var/lib/vmnet/dhcp.leases", "/etc/resolv.conf")
HOSTS = re.compile(r"(\d+\.\d+\.\d+\.\d+) ([a-z0-9.-]+)( [a-z0-9-]+)?\n")

octets = st.integers(0, 255)
macs = st.lists(octets, min_size=6, max_size=6).map(lambda mac: ":".join(f"{one:02x}" for one in mac))
addresses = st.integers(0, 50).map(lambda number: f"247.1.0.{4 * number + 2}")
lines = st.builds("{},*:*:*:*:*:*,tag:vmn-x,{},x\n".format, macs, addresses)
words = st.text(st.characters(codec="ascii", exclude_characters="\n\r\v\f\x1c\x1d\x1e"), max_size=20)


def test_each_guest_has_its_names_and_its_address_in_both_spellings() -> None:
    leases = [lease_of(kind, mode) for kind, mode in KINDS]
    tables = render_tables(leases, "vmnet.internal", PLANE)
    for name, first in (("mapped.hosts", "247."), ("native.hosts", "127.")):
        found = [HOSTS.fullmatch(line) for line in tables[name].splitlines(keepends=True)]
        assert len(found) == len(leases)
        for match, lease in zip(found, leases, strict=True):
            assert match
            assert match[1] == first + str(lease.block.address).partition(".")[2]
            assert (match[2], match[3]) == (f"{lease.name}.vmnet.internal", f" {lease.name}")
    served = [lease for lease in leases if lease.mode == "mapped" and lease.mac]
    assert tables["dhcp.hosts"].count("\n") == len(served) > 0


def test_a_guest_called_localhost_has_no_short_name() -> None:
    lease = replace(lease_of("veth", "native"), name="localhost")
    assert render_tables([lease], "lan", PLANE)["native.hosts"] == f"{lease.block.address} localhost.lan\n"


def test_settings_have_no_gap_and_each_mtu_once() -> None:
    leases = [replace(lease_of("tap", "mapped"), mtu=mtu) for mtu in (1500, 1400, 1400, 9000)]
    texts = {"dns": "port=$port $folder $mode $domain $shadow $resolv", "dhcp": "$folder $leases $domain $shadow\n"}
    settings = render_settings(texts, WHERE, "lan", PLANE, leases)
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
