"""What is undone again and again is left alone, longer each time, and taken up again."""

from hypothesis import given
from hypothesis import strategies as st

from vmnet.truces import LIMIT, Truces


def test_five_times_a_minute_is_no_fight_and_six_are() -> None:
    truces = Truces()
    assert [truces.note("op", now) for now in range(LIMIT)] == [None] * LIMIT
    assert truces.note("op", LIMIT) == 60
    assert truces.holds("op", 60)
    assert not truces.holds("another", 60)
    assert truces.held(60) == ["op"]
    assert not truces.holds("op", LIMIT + 60)


def test_each_truce_is_twice_as_long_up_to_a_quarter_of_an_hour() -> None:
    truces, now, lengths = Truces(), 0.0, []
    for _ in range(7):
        while (truce := truces.note("op", now)) is None:
            now += 1
        lengths.append(truce)
        now += truce
    assert lengths == [60, 120, 240, 480, 900, 900, 900]


def test_what_was_quiet_for_long_begins_anew() -> None:
    truces = Truces()
    for now in range(LIMIT + 1):
        truces.note("op", now)
    truces.forget(10_000)
    for now in range(10_000, 10_000 + LIMIT):
        assert truces.note("op", now) is None
    assert truces.note("op", 10_010) == 60


@given(st.lists(st.floats(0, 100), max_size=200))
def test_nothing_is_done_more_often_than_it_may_be(steps: list[float]) -> None:
    """Whoever does only what is not held back never does it more than six times in any minute."""
    truces, now, done = Truces(), 0.0, []
    for step in steps:
        now += step
        if not truces.holds("op", now):
            truces.note("op", now)
            done.append(now)
    for first, last in zip(done, done[LIMIT + 1 :], strict=False):
        assert last - first > 59.9
