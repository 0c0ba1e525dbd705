"""What guests need in the chains of other firewalls: laws, and what a packet between two devices meets there."""

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.replay import on_host
from vmnet.firewalls import OFFERED, Bridge, Chain, plan_chains, plan_chains_removal
from vmnet.ops import Op, PutRules
from vmnet.plan import HostView

PORT = 12753
FORWARD = ("DOCKER-USER", "ufw-after-forward")
LAPTOP = tuple(Bridge(name, name in ("br0", "br-lan")) for name in ("docker0", "br-5f3a", "mine", "br0", "br-lan"))

names = st.text(st.characters(codec="ascii", exclude_characters="/ \t\n\v\f\r\0"), min_size=1, max_size=15)
bridges = st.lists(
    st.builds(Bridge, names | st.sampled_from([one.name for one in LAPTOP]), st.booleans()),
    max_size=6,
    unique_by=lambda one: one.name,
)
chains = st.lists(
    st.builds(
        Chain,
        st.sampled_from(["iptables-nft", "iptables-legacy"]),
        st.sampled_from(sorted(OFFERED)),
        st.sampled_from([(), ("-i vmn-+ -m comment --comment vmnet -j DROP",)]),
    ),
    unique_by=lambda one: one[:2],
    max_size=6,
)


def verdict(chain: str, present: list[Bridge] | tuple[Bridge, ...], came_by: str, goes_by: str) -> str:
    """Return what the rules of a chain say of a packet; RETURN where they say nothing."""
    for rule in OFFERED[chain](present, PORT):
        words = rule.split()
        tests = [
            (words[words.index(flag) + 1], device)
            for flag, device in (("-i", came_by), ("-o", goes_by))
            if flag in words
        ]
        if all(fnmatch.fnmatchcase(device, fnmatch_of(pattern)) for pattern, device in tests):
            return words[-1]
    return "RETURN"


def fnmatch_of(pattern: str) -> str:
    """Return a pattern of iptables in the spelling of fnmatch."""
    plain = "".join(f"[{letter}]" if letter in "[*?" else letter for letter in pattern.removesuffix("+"))
    return plain + ("*" if pattern.endswith("+") else "")


@pytest.mark.parametrize("chain", FORWARD)
@pytest.mark.parametrize(
    ("came_by", "goes_by", "said"),
    [
        ("vmn-web", "wlan0", "ACCEPT"),
        ("vmn-web", "tun0", "ACCEPT"),
        ("vmn-web", "vmn-db", "ACCEPT"),
        ("wlan0", "vmn-web", "ACCEPT"),
        ("docker0", "vmn-web", "ACCEPT"),
        ("vmn-web", "docker0", "RETURN"),
        ("vmn-web", "br-5f3a", "RETURN"),
        ("vmn-web", "br-not-there-yet", "RETURN"),
        ("vmn-web", "mine", "RETURN"),
        ("vmn-web", "br0", "ACCEPT"),
        ("vmn-web", "br-lan", "ACCEPT"),
        ("wlan0", "docker0", "RETURN"),
        ("wlan0", "eth1", "RETURN"),
        ("docker0", "wlan0", "RETURN"),
    ],
)
def test_guests_pass_and_what_others_keep_closed_is_left_to_them(
    chain: str, came_by: str, goes_by: str, said: str
) -> None:
    assert verdict(chain, LAPTOP, came_by, goes_by) == said


@given(st.sampled_from(FORWARD), bridges, names)
def test_no_bridge_is_opened_and_no_other_device_is_closed(chain: str, present: list[Bridge], device: str) -> None:
    closed = {one.name for one in present if not one.uplink} - {one.name for one in present if one.uplink}
    for name in closed:
        if not name.startswith("vmn-"):
            assert verdict(chain, present, "vmn-web", name) == "RETURN"
    assert verdict(chain, [], "vmn-web", "wlp3s0") == "ACCEPT"
    if not device.startswith("vmn-"):
        assert verdict(chain, present, device, "wlan0") == "RETURN"


@given(bridges)
def test_each_rule_is_one_of_plain_words_that_iptables_can_read(present: list[Bridge]) -> None:
    for rules in OFFERED.values():
        for rule in rules(present, PORT):
            assert rule.isascii()
            assert not set(rule) & set("'\"\\;|&$`#!<>()")
            assert " -m comment --comment vmnet -j " in rule
        assert len(set(rules(present, PORT))) == len(rules(present, PORT))


@given(chains, bridges, st.data())
def test_a_second_plan_is_empty_and_restore_leaves_none(
    there: list[Chain], present: list[Bridge], data: st.DataObject
) -> None:
    view = HostView((), True, frozenset(), None, 1, tuple(there), tuple(present))

    def after(view: HostView, steps: list[Op]) -> HostView:
        for op in steps:
            view = on_host(view, op, "")
        return view

    steps = plan_chains(view.chains, view.bridges, PORT)
    stopped = after(view, steps[: data.draw(st.integers(0, len(steps)))])
    healed = after(stopped, plan_chains(stopped.chains, stopped.bridges, PORT))
    assert plan_chains(healed.chains, healed.bridges, PORT) == []
    restored = after(healed, plan_chains_removal(healed.chains))
    assert not any(chain.rules for chain in restored.chains)
    assert plan_chains_removal(restored.chains) == []


def test_one_transaction_takes_the_old_rules_away_and_puts_the_new_ones_first() -> None:
    op = PutRules("iptables-nft", "DOCKER-USER", ("-i old",), ("-o a", "-o b"))
    assert op.script() == "*filter\n-D DOCKER-USER -i old\n-I DOCKER-USER 1 -o a\n-I DOCKER-USER 2 -o b\nCOMMIT\n"
    assert op.command() == f"iptables-nft-restore -w -n <<'END'\n{op.script()}END"
