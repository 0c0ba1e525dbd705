"""Who is freed when domains are gone: nobody whose domain is there, or whom a person made, or at first sight."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from vmnet.absence import notes, overdue
from vmnet.store import DomainRecord

UUIDS = ("one", "two", "three")
TIMES = st.floats(0, 1000)
RECORDS = st.lists(
    st.builds(
        DomainRecord,
        name=st.text("abc", min_size=1, max_size=3),
        uuid=st.sampled_from(UUIDS),
        mac=st.just("02:00:00:00:00:01"),
        domain=st.just("web"),
        made=st.booleans(),
        gone=st.none() | TIMES,
    ),
    unique_by=lambda one: one.name,
)
SEEN = st.tuples(TIMES, st.sets(st.sampled_from(UUIDS)))


@dataclass
class Host:
    """Records as the engine keeps them."""

    records: list[DomainRecord]

    def see(self, there: set[str], now: float, grace: float) -> list[DomainRecord]:
        """Take note of the domains there; return who is freed."""
        freed = overdue(self.records, there, now - grace)
        times = notes(self.records, there, now)
        gone = [one for one in self.records if one.name in freed]
        self.records = [
            one._replace(gone=times.get(one.name, one.gone)) for one in self.records if one.name not in freed
        ]
        return gone


@given(RECORDS, SEEN)
def test_what_was_noted_is_not_noted_again(records: list[DomainRecord], seen: tuple[float, set[str]]) -> None:
    now, there = seen
    host = Host(records)
    host.see(there, now, grace=5000)
    assert notes(host.records, there, now) == {}
    for one in host.records:
        assert (one.gone is None) == (one.uuid in there)
        assert one.gone is None or one.gone <= now


@given(RECORDS.map(lambda found: [one._replace(gone=None) for one in found]), st.lists(SEEN), st.floats(0, 100))
def test_a_guest_is_freed_once_its_domain_was_gone_for_all_of_the_grace(
    records: list[DomainRecord], seen: list[tuple[float, set[str]]], grace: float
) -> None:
    host = Host(records)
    history: list[tuple[float, set[str]]] = []
    for now, there in sorted(seen, key=lambda one: one[0]):
        before = host.records
        freed = host.see(there, now, grace)
        for one in before:
            last_there = max((number for number, (_, all_) in enumerate(history) if one.uuid in all_), default=-1)
            absent_since = [time for time, _ in history[last_there + 1 :]]
            is_due = one.made and one.uuid not in there and absent_since and absent_since[0] <= now - grace
            assert (one in freed) == bool(is_due)
        history.append((now, there))


def test_a_clock_that_was_set_back_frees_nobody() -> None:
    host = Host([DomainRecord("web", "one", "", "web", made=True, gone=900.0)])
    assert host.see(set(), 10.0, grace=100) == []
    assert host.see(set(), 100.0, grace=100) == []
    assert [one.name for one in host.see(set(), 110.0, grace=100)] == ["web"]
