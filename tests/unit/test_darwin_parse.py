"""What is read of ifconfig's text: recorded samples of many releases, and all that the fake one can show."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from netaddr import IPAddress

from tests.darwin.fakes.ifconfig import shown
from vmnet.darwin.parse import LinkAddress, parse_ifconfig
from vmnet.model import VmnetError

SAMPLES = Path(__file__).parent / "darwin"
LOCALHOST = ("127.0.0.1", 0xFF000000)
READ: dict[str, dict[str, list[tuple[str, int]]]] = {
    "lo0-stock": {"lo0": [LOCALHOST]},
    "lo0-classful": {
        "lo0": [
            LOCALHOST, ("127.0.0.2", 0xFF000000), ("172.30.0.1", 0xFFFF0000), ("192.168.127.12", 0xFFFFFF00),
        ],
    },
    "lo0-all-ones": {"lo0": [LOCALHOST, ("10.43.0.10", 0xFFFFFFFF)]},
    "lo0-up-to-10.13": {"lo0": [LOCALHOST]},
    "lo0-freebsd": {"lo0": [LOCALHOST]},
    "all": {
        "lo0": [LOCALHOST],
        "gif0": [],
        "stf0": [],
        "en0": [("192.168.77.2", 0xFFFFFF00)],
        "bridge0": [],
        "utun0": [("100.64.0.9", 0xFFFFFFFF)],
    },
}  # fmt: skip
"""What each sample shows. All are recorded but `all`, which has one link of each shape that Apple's source prints."""

WORDS = ["lo0:", "\n", "\r", "\n\tinet ", "inet", "netmask", " ", "0xff000000", "127.0.0.1", "-->"]

octets = st.tuples(*[st.integers(0, 255)] * 4)
addresses = octets.map(lambda four: ".".join(map(str, four)))
inet = st.fixed_dictionaries(
    {"fam": st.just("inet"), "addr": addresses, "mask": st.integers(0, 0xFFFFFFFF)},
    optional={"dest": addresses, "broadcast": addresses},
)
other = st.sampled_from(
    [
        {"fam": "inet6", "text": "::1 prefixlen 128"},
        {"fam": "inet6", "text": "fe80::1%lo0 prefixlen 64 scopeid 0x1"},
        {"fam": "ether", "text": "02:00:5e:10:00:01"},
    ]
)
tails = st.lists(
    st.sampled_from(["nd6 options=201<PERFORMNUD,DAD>", "groups: lo", "status: active", "media: <unknown type>"])
)
interfaces = st.fixed_dictionaries(
    {
        "flags": st.sampled_from(["8049<UP,LOOPBACK,RUNNING,MULTICAST>", "0<>"]),
        "mtu": st.integers(0, 65536),
        "options": st.none() | st.just("3<RXCSUM,TXCSUM>"),
        "addrs": st.lists(inet | other, max_size=6),
        "tail": tails,
    }
)
states = st.fixed_dictionaries(
    {
        "trailing_space": st.booleans(),
        "ifaces": st.dictionaries(st.from_regex(r"[a-z]{1,6}[0-9]{1,3}", fullmatch=True), interfaces, max_size=4),
    }
)


def read(text: str) -> dict[str, list[tuple[str, int]]]:
    """Return what is read, plainer."""
    return {link: [(str(one.address), one.mask) for one in found] for link, found in parse_ifconfig(text).items()}


@pytest.mark.parametrize("spaces", [False, True], ids=["as-recorded", "trailing-spaces"])
@pytest.mark.parametrize("name", READ)
def test_a_sample_is_read(name: str, spaces: bool) -> None:
    text = (SAMPLES / f"{name}.txt").read_text()
    assert read(text.replace("\n", " \n") if spaces else text) == READ[name]


def test_every_sample_of_ifconfig_is_read() -> None:
    assert {path.stem for path in SAMPLES.glob("*.txt")} - set(READ) == {"netstat-rn", "route-get"}


def test_an_address_is_one_of_its_own_end() -> None:
    assert parse_ifconfig("utun3: flags=8051<UP>\n  inet 10.0.0.1 --> 10.0.0.2 netmask 0xFFFFFF00 vhid 1\n") == {
        "utun3": [LinkAddress(IPAddress("10.0.0.1"), 0xFFFFFF00)]
    }


def test_nothing_is_read_of_nothing() -> None:
    assert parse_ifconfig("\n") == {}


@given(states)
def test_what_is_shown_of_any_machine_is_read(state: dict[str, Any]) -> None:
    assert read("".join(shown(state, name) for name in state["ifaces"])) == {
        name: [(one["addr"], one["mask"]) for one in interface["addrs"] if one["fam"] == "inet"]
        for name, interface in state["ifaces"].items()
    }


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("\tinet 127.0.0.1 netmask 255.0.0.0", "255.0.0.0 is no mask"),
        ("\tinet 127.0.0.1 netmask 0x1ffffffff", "0x1ffffffff is no mask"),
        ("\tinet 127.0.0.1 netmask 0xff00000g", "0xff00000g is no mask"),
        ("\tinet 127.0.0.1 netmask", "nothing is no mask"),
        ("\tinet 127.0.0.1 broadcast 127.255.255.255", "it has no netmask"),
        ("\tinet 127.1 netmask 0xff000000", "inet comes before an IPv4 address"),
        ("\tinet ::1 netmask 0xff000000", "inet comes before an IPv4 address"),
        ("\tinet", "inet comes before an IPv4 address"),
        ("ifconfig went wrong", "a link's name and a colon are missing"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(line: str, why: str) -> None:
    with pytest.raises(VmnetError) as caught:
        parse_ifconfig(f"lo0: flags=8049<UP> mtu 16384\n{line}\n")
    assert repr(line.strip()) in caught.value.message
    assert why in caught.value.message


def test_an_address_of_no_link_is_refused() -> None:
    with pytest.raises(VmnetError, match="no link comes before it"):
        parse_ifconfig("\tinet 127.0.0.1 netmask 0xff000000\n")


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=3)).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(VmnetError):
        parse_ifconfig(text)
