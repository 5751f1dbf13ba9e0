"""When to try again: seconds at first, minutes in the end, never all at once."""

from __future__ import annotations

import random
from collections.abc import Callable

FIRST_S = 1.0
LONGEST_S = 300.0
FACTOR = 2.0
#: So many objects that a destination does not take now, none taken between, and it rests itself.
REFUSALS_IN_A_ROW = 3


def delay_s(attempt: int, rng: random.Random) -> float:
    """How long to wait after the `attempt`-th failure (1, 2, ...), seconds.

    Exponential with the upper half drawn at random, so that what failed together does not come
    back together: 0.5 to 1 s after the first failure, 2.5 to 5 minutes from the tenth on.

    Parameters
    ----------
    attempt : int
        How often it failed, at least 1.
    rng : Random
        The sender's generator.
    """
    # beyond this exponent the cap holds anyway, and 2.0 ** 1024 is an OverflowError
    exponent = min(max(attempt, 1) - 1, 32)
    longest = min(LONGEST_S, FIRST_S * FACTOR**exponent)
    return longest * rng.uniform(0.5, 1.0)


class Breaker:
    """One destination's circuit breaker: open after failures, and for longer after each.

    When its pause is over one object may go. That one closes the breaker or opens it again.

    Parameters
    ----------
    clock : callable
        Seconds that only grow.
    rng : Random
        Jitters the pauses.
    """

    def __init__(self, clock: Callable[[], float], rng: random.Random) -> None:
        self._clock = clock
        self._rng = rng
        self._failures = 0
        self._refused: set[int] = set()
        self.open_until = float("-inf")  #: on that clock

    @property
    def is_open(self) -> bool:
        """Nothing may be sent now."""
        return self._clock() < self.open_until

    @property
    def is_trusted(self) -> bool:
        """The last that was heard of the destination was good."""
        return self._failures == 0

    def succeeded(self) -> None:
        """It took or finally refused an object: it works."""
        self._failures = 0
        self._refused.clear()

    def failed(self) -> float:
        """It did not answer; gives how long to leave it alone, seconds."""
        self._failures += 1
        pause_s = delay_s(self._failures, self._rng)
        self.open_until = self._clock() + pause_s
        return pause_s

    def refused(self, number: int, attempt: int) -> float:
        """It answered that it cannot take an object now; gives how long to keep that object.

        An object that a destination never takes must not hold up those that it does: it waits by
        itself. Only several that are refused in a row are about the destination.

        Parameters
        ----------
        number : int
            The object's, so that one tried again and again counts once.
        attempt : int
            How often it was tried.
        """
        self._refused.add(number)
        is_about_all = len(self._refused) >= REFUSALS_IN_A_ROW
        pause_s = self.failed() if is_about_all else 0.0
        return max(pause_s, delay_s(attempt, self._rng))
