"""The typed protocol: whatever is sent is a question or is refused, and a question says what was meant."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet.model import UsageError
from vmnet.requests import LARGEST, MOST_NAMES, Answer, Question, encode_refusal, parse_question

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
PLAIN = Question("look", ("web",), "/var/lib/vmnet", "0.1.0")
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from([*Question.__slots__, "owner", "path", "env"])


@st.composite
def creations(draw: st.DrawFn) -> Question:
    """Return a right question for guests."""
    return Question(
        verb="create",
        names=tuple(draw(st.lists(NAMES, min_size=1, max_size=1))),
        place=draw(st.text(max_size=40)),
        version=draw(st.text(max_size=10)),
        dry_run=draw(st.booleans()),
        steps=draw(st.booleans()),
        kind=draw(st.sampled_from([None, "tap", "veth", "tun", "alias"])),
        mode=draw(st.sampled_from([None, "native", "mapped"])),
        address=draw(st.sampled_from([None, "127.1.0.2", "127.63.255.254"])),
        mac=draw(st.sampled_from([None, "02:00:00:00:00:01"])),
        mtu=draw(st.none() | st.integers(576, 65535)),
        queues=draw(st.none() | st.integers(1, 256)),
        netns=draw(st.booleans()),
    )


@given(creations())
def test_a_question_says_what_it_said(question: Question) -> None:
    assert parse_question(question.encode()) == question


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(UsageError):
        parse_question(data)


@given(st.dictionaries(FIELDS, JUNK, max_size=6))
def test_any_object_is_a_question_or_refused(fields: dict[str, Any]) -> None:
    try:
        question = parse_question(json.dumps(fields).encode())
    except UsageError:
        return
    assert parse_question(question.encode()) == question


@given(FIELDS, JUNK)
def test_one_field_that_is_wrong_makes_it_all_wrong(field: str, value: Any) -> None:
    found = {**json.loads(PLAIN.encode()), field: value}
    try:
        question = parse_question(json.dumps(found).encode())
    except UsageError as error:
        assert len(error.message) < 200  # noqa: PT017 -- what it says, if it does
    else:
        assert getattr(question, field) in (value, tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    "wrong",
    [
        b"[" * 10_000,
        b'{"a":' * 10_000,
        b"null",
        b'{"verb": "look", "names": ["web"], "place": "", "version": ""' + b" " * LARGEST + b"}",
        replace(PLAIN, names=("web", "web")).encode(),
        replace(PLAIN, names=()).encode(),
        replace(PLAIN, every=True).encode(),
        replace(PLAIN, verb="up", names=(), every=True).encode(),
        replace(PLAIN, verb="delete", mtu=1500).encode(),
        replace(PLAIN, verb="down", netns=True).encode(),
        replace(PLAIN, verb="create", names=("a", "b"), mac="02:00:00:00:00:01").encode(),
        replace(PLAIN, verb="create", names=("a", "b"), netns=True).encode(),
        replace(PLAIN, names=tuple(f"n{number}" for number in range(MOST_NAMES + 1))).encode(),
        replace(PLAIN, names=("../web",)).encode(),
        replace(PLAIN, names=("a" * 64,)).encode(),
        replace(PLAIN, verb="create", address="127.0.0.1").encode(),
        replace(PLAIN, verb="create", address="127.1.2").encode(),
        replace(PLAIN, verb="create", mac="01:00:00:00:00:01").encode(),
        replace(PLAIN, verb="create", mac="00:00:00:00:00:00").encode(),
        replace(PLAIN, verb="create", mtu=575).encode(),
        replace(PLAIN, verb="create", queues=257).encode(),
        json.dumps({**json.loads(PLAIN.encode()), "mtu": True, "verb": "create"}).encode(),
        json.dumps({**json.loads(PLAIN.encode()), "owner": 0}).encode(),
        json.dumps({**json.loads(PLAIN.encode()), "verb": "restore"}).encode(),
    ],
    ids=lambda wrong: wrong[:30].decode(),
)
def test_what_is_no_question(wrong: bytes) -> None:
    with pytest.raises(UsageError):
        parse_question(wrong)


def test_answers_and_refusals_are_json() -> None:
    answer = Answer(guests=({"name": "web"},), steps=("ip link",))
    assert json.loads(answer.encode())["guests"] == [{"name": "web"}]
    assert json.loads(encode_refusal(6, "no", "yes")) == {"error": {"code": 6, "message": "no", "hint": "yes"}}
