"""What may come by the thousand: how often each kind of it came, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

#: So many kinds are told apart between two takings; those that come then share their `rest`.
MOST_KINDS = 50

Kind = TypeVar("Kind", bound=Hashable)


class Gathered(Generic[Kind]):
    """Counts by kind until they are taken; for one thread at a time.

    Parameters
    ----------
    rest_of : callable
        The kind under which one is counted that finds no place of its own. It may have few values
        only, for these are not bounded.
    """

    def __init__(self, rest_of: Callable[[Kind], Kind]) -> None:
        self._rest_of = rest_of
        self._counts: Counter[Kind] = Counter()

    def __bool__(self) -> bool:
        """Whether anything came."""
        return bool(self._counts)

    def add(self, kind: Kind) -> tuple[Kind, int]:
        """Count one; gives the kind under which it is counted, and how often that has come."""
        if kind not in self._counts and len(self._counts) >= MOST_KINDS:
            kind = self._rest_of(kind)
        self._counts[kind] += 1
        return kind, self._counts[kind]

    def take(self) -> Counter[Kind]:
        """What has come, by kind in the order of their first; from here on it is counted anew."""
        taken, self._counts = self._counts, Counter()
        return taken
