"""Know what somebody undoes again and again, and leave it to them for a while: a fight helps nobody."""

from collections import Counter, deque

LIMIT = 5
_SPAN = 60.0
_LONGEST = 15 * 60.0


class Truces:
    """What is done more than `limit` times within a minute is held back for a minute, then for two, four, up to 15.

    An op is known by its words; times are seconds of a clock that never goes back.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._times: dict[str, deque[float]] = {}
        self._levels: Counter[str] = Counter()
        self._until: dict[str, float] = {}

    def note(self, op: str, now: float) -> float | None:
        """Note that `op` was done; return for how many seconds it is left from now on, None for not at all."""
        times = self._times.setdefault(op, deque(maxlen=self._limit + 1))
        times.append(now)
        if len(times) <= self._limit or now - times[0] > _SPAN:
            return None
        times.clear()
        truce = min(_SPAN * (1 << self._levels[op]), _LONGEST)
        self._levels[op] += 1
        self._until[op] = now + truce
        return truce

    def holds(self, op: str, now: float) -> bool:
        """Say whether `op` is held back."""
        return self._until.get(op, 0.0) > now

    def held(self, now: float) -> list[str]:
        """Return what is held back."""
        return sorted(op for op, until in self._until.items() if until > now)

    def forget(self, now: float) -> None:
        """Forget what has been quiet for long, so that weeks of notes stay few."""
        for op, times in list(self._times.items()):
            if now - max(self._until.get(op, 0.0), times[-1] if times else 0.0) > _LONGEST:
                for notes in (self._times, self._until, self._levels):
                    notes.pop(op, None)
