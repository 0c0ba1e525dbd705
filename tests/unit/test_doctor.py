"""What is found in what was seen: nothing in what is right, and of each thing that is not, the words that help."""

import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet.doctor import Asked, Guest, Reply, Resolver, Server, Sight, examine, questions
from vmnet.questions import _parse, _question

WEB = Guest("web.vmnet.internal", "127.1.0.2", "247.1.0.2")
PIDS = {"dhcp": 71, "mapped": 72, "native": 73}
RIGHT = Reply(0, (WEB.address,))


def sight(**seen: object) -> Sight:
    """Return what is seen on a host with one guest where all is right, but for `seen`."""
    asked = questions([WEB], "vmnet.internal")
    right: dict[str, object] = {
        "guests": [WEB],
        "found": {WEB.name: RIGHT},
        "listed": frozenset({WEB.name}),
        "wanted": True,
        "servers": PIDS,
        "answers": {one: one.right for one in asked},
        "resolver": Resolver("127.0.0.53", True, "resolved", {WEB.name: RIGHT}),
        "parts": {"systemd": frozenset({"current"})},
    }
    return Sight(**{**right, **seen})  # type: ignore[arg-type]


def resolver(part: str, reply: Reply) -> Resolver:
    return Resolver("127.0.0.1", True, part, {WEB.name: reply})


GONE, ELSEWHERE = Reply(3), Reply(0, ("198.18.0.9",))
CURRENT, MISSING = frozenset({"current"}), frozenset({"missing"})
CASES: dict[str, tuple[dict[str, object], str, str, str]] = {
    "trouble": ({"trouble": ("the records are another's", "go there")}, "error", "cannot look", "go there"),
    "not root": ({"privileged": False}, "note", "not all could be seen", "sudo vmnet doctor"),
    "drift": ({"drift": ["+ link vmn-web"]}, "error", "not as recorded", "vmnet watch --once"),
    "in the way": ({"stuck": [("web: a device is there", "delete it")]}, "error", "a guest cannot", "delete it"),
    "a warning": ({"warnings": ["/etc/hosts cannot be written"]}, "warning", "in the way", ""),
    "no dnsmasq": ({"has_dnsmasq": False}, "error", "no DHCP", "apt-get install dnsmasq-base"),
    "no keeper": ({"keeper": False}, "error", "keeps DHCP", "vmnet watch --once"),
    "no server": ({"servers": {**PIDS, "dhcp": None}}, "error", "(dhcp) does not run", "vmnet watch --once"),
    "a problem": (
        {"servers": {**PIDS, "native": None}, "problems": ["native: failed: Address already in use"]},
        "error", "(native) does not start", "another dns_port",
    ),
    "not in the hosts file": (
        {"found": {WEB.name: Reply(trouble="Name or service not known")}, "listed": frozenset()},
        "error", "find guests by name", "vmnet watch --once",
    ),
    "not by nsswitch": (
        {"found": {WEB.name: Reply(trouble="Name or service not known")}}, "error", "by name", "/etc/nsswitch.conf",
    ),
    "two addresses": (
        {"found": {WEB.name: Reply(0, ("127.1.0.2", "::1"))}}, "error", "by name", "out of /etc/hosts",
    ),
    "another hosts file": (
        {"found": {}, "hosts": "/tmp/hosts", "hosts_read": False}, "note", "where programs look", "VMNET_HOSTS_FILE",
    ),
    "not on this host": (
        {"resolver": Resolver("10.0.0.1", False)}, "note", "by wire do not find", "docs/how-to/names.md",
    ),
    "NetworkManager": (
        {"resolver": resolver("networkmanager-dns", GONE), "parts": {"networkmanager-dns": MISSING}},
        "note", "by wire do not find", "vmnet hooks install networkmanager-dns",
    ),
    "NetworkManager, which has not heard": (
        {"resolver": resolver("networkmanager-dns", GONE), "parts": {"networkmanager-dns": CURRENT}},
        "note", "by wire do not find", "nmcli general reload dns-full",
    ),
    "sent elsewhere": (
        {"resolver": resolver("dnsmasq", ELSEWHERE), "parts": {"dnsmasq": MISSING}},
        "warning", "sent elsewhere", "vmnet hooks install dnsmasq",
    ),
    "resolved without the hosts file": (
        {"resolver": resolver("resolved", GONE)}, "note", "by wire do not find", "ReadEtcHosts=yes",
    ),
    "somebody at 127.0.0.1": ({"resolver": resolver("", GONE)}, "note", "do not find", "docs/how-to/names.md"),
    "route_localnet": ({"open_devices": ["all"]}, "error", "127.0.0.1", "sysctl -w net/ipv4/conf/all/route_localnet=0"),
    "docker's": ({"open_devices": ["docker0"]}, "warning", "behind docker0", "docker0/route_localnet=0"),
    "forwarding": ({"forwards": True}, "note", "as a router", "ip_forward=0"),
    "no service": ({"installed": False}, "note", "at boot", "vmnet hooks install"),
    "no watcher": ({"watcher": False}, "note", "what others undo", "vmnet hooks install"),
    "no server that listens": (
        {"server": Server("/run/vmnet/server.sock", False, True)},
        "note", "take a tenth", "restart vmnet-server.socket",
    ),
    "a server of a watcher's": (
        {"server": Server("/run/vmnet/server.sock", False, False)}, "note", "take a tenth", "end the watcher",
    ),
    "a group that came later": (
        {"server": Server("/run/vmnet/server.sock", True, False, heeds_group=False)}, "warning", "members of group",
        "end the watcher",
    ),
    "a fight": ({"left_alone": ["+ route"]}, "warning", "leaves something alone", "who undoes it"),
    "outdated": ({"parts": {"udev": frozenset({"outdated"})}}, "warning", "of hooks", "vmnet hooks install udev"),
    "others' aliases": (
        {"wide": ["10.0.0.1/8"], "version": "15.1", "aliases": 0}, "note", "other programs' aliases", "as /32",
    ),
    "aliases that count": (
        {"version": "14.0", "aliases": 1}, "note", "one more interface", "update to macOS 14.1",
    ),
    "a hosts file that macOS has not read": (
        {"aliases": 1, "found": {WEB.name: GONE}}, "error", "do not find guests by name", "dscacheutil -flushcache",
    ),
    "not fitted": ({"parts": {"firewalld": MISSING}}, "note", "not fitted", "vmnet hooks install firewalld"),
}  # fmt: skip


def test_nothing_is_found_where_all_is_right() -> None:
    assert examine(sight()) == []
    assert examine(Sight()) == []


@pytest.mark.parametrize("name", CASES)
def test_each_thing_is_found_once_with_what_helps(name: str) -> None:
    seen, severity, what, fix = CASES[name]
    [found] = examine(sight(**seen))
    assert (found.severity, what in found.what, fix in found.fix) == (severity, True, True), found
    assert (fix == "") == (found.fix == "")
    assert found.evidence


@pytest.mark.parametrize("place", range(8))
def test_a_wrong_answer_of_our_own_is_found_whichever_it_is(place: int) -> None:
    asked = questions([WEB], "vmnet.internal")
    assert len(asked) == 8
    answers = {one: one.right for one in asked} | {asked[place]: Reply(trouble="no answer within 1.5 s")}
    [found] = examine(sight(answers=answers))
    assert found.severity == "error"
    assert found.evidence == f"{asked[place]}: no answer within 1.5 s"
    assert found.fix.startswith(f"kill -KILL {PIDS[asked[place].server]}  #")


def test_questions_are_for_both_spellings() -> None:
    right = {(one.server, one.name, one.kind, one.tcp): one.right for one in questions([WEB], "vmnet.internal")}
    assert right["mapped", WEB.name, "A", True] == Reply(0, (WEB.shadow,))
    assert right["native", WEB.name, "A", False] == Reply(0, (WEB.address,))
    assert right["native", WEB.name, "AAAA", False] == Reply(0)
    assert right["mapped", "_doctor.vmnet.internal", "A", False] == Reply(3)


def test_of_many_things_a_few_are_named_and_the_rest_counted() -> None:
    [found] = examine(sight(drift=[f"+ link vmn-g{number}" for number in range(9)]))
    assert found.evidence.endswith("vmn-g4; and 4 more")


@given(st.lists(st.sampled_from(sorted(CASES)), unique=True, max_size=6))
def test_the_worst_comes_first(names: list[str]) -> None:
    seen = {key: value for name in names for key, value in CASES[name][0].items()}
    order = ["error", "warning", "note"]
    ranks = [order.index(one.severity) for one in examine(sight(**seen))]
    assert ranks == sorted(ranks)


# By wire


def records(*parts: tuple[int, bytes]) -> bytes:
    return b"".join(b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, 0, len(data)) + data for kind, data in parts)


def answer(question: bytes, count: int, rest: bytes, code: int = 0) -> bytes:
    return question[:2] + struct.pack(">5H", 0x8180 | code, 1, count, 0, 0) + question[12:] + rest


def cases() -> Iterator[tuple[bytes, Reply]]:
    question = _question("web.vmnet.internal", 1)
    one, alias = (1, bytes([127, 1, 0, 2])), (5, b"\x03www\xc0\x10")
    yield answer(question, 1, records(one)), Reply(0, ("127.1.0.2",))
    yield answer(question, 2, records(alias, one)), Reply(0, ("127.1.0.2",))
    yield answer(question, 1, records((28, bytes(15) + b"\1"))), Reply(0, ("::1",))
    yield answer(question, 0, b""), Reply(0)
    yield answer(question, 0, b"", 3), Reply(3)


def test_answers_are_read() -> None:
    for message, reply in cases():
        question = message[:2] + _question("web.vmnet.internal", 1)[2:]
        assert _parse(message, question) == reply


def test_answers_that_make_no_sense_are_told_from_others() -> None:
    dice = random.Random(4)
    for message, _ in cases():
        question = message[:2] + _question("web.vmnet.internal", 1)[2:]
        for _ in range(500):
            place = dice.randrange(len(message))
            torn = (
                message[:place] if dice.random() < 0.5 else message[:place] + dice.randbytes(3) + message[place + 3 :]
            )
            try:
                assert isinstance(_parse(torn, question), Reply)
            except (ValueError, IndexError, struct.error):
                continue


def test_an_answer_to_another_question_is_none() -> None:
    question, other = _question("web.vmnet.internal", 1), _question("www.vmnet.internal", 1)
    with pytest.raises(ValueError, match="another question"):
        _parse(answer(other, 0, b""), question)


def test_what_is_asked_can_be_told() -> None:
    assert str(Asked("native", WEB.name, "AAAA", True, Reply(0))) == "web.vmnet.internal AAAA by TCP"
    assert [str(one) for one in (Reply(0), Reply(3), Reply(9), RIGHT, Reply(trouble="no"))] == [
        "no such record", "NXDOMAIN", "code 9", "127.1.0.2", "no",
    ]  # fmt: skip
