"""When to try again: seconds at first, minutes in the end, never all at once."""

from __future__ import annotations

import random

FIRST_S = 1.0
LONGEST_S = 300.0
FACTOR = 2.0


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
