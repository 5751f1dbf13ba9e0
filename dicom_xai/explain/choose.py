"""Which explainer the deadline allows: the route's order of preference, never silently less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """The explainer to run (empty: the prediction alone, now), and why not the first choice."""

    explainer: str
    degraded: str = ""


def choose(
    preferred: Sequence[str],
    explained_s: Mapping[str, float],
    plain_s: float,
    rest_s: float,
    remaining_s: float,
) -> Choice:
    """The first preferred explainer that leaves enough of the budget.

    When even the prediction alone cannot meet the deadline, nothing is gained by doing less: the
    first choice runs, late.

    Parameters
    ----------
    preferred : sequence of str
        Names, best first.
    explained_s : mapping
        Expected seconds for the unit's images, by explainer.
    plain_s : float
        The same without explanation.
    rest_s : float
        Expected seconds from here to triage without inference.
    remaining_s : float
        Seconds until the deadline.
    """
    room_s = remaining_s - rest_s
    if plain_s > room_s:
        return Choice(preferred[0])
    for name in preferred:
        if explained_s[name] <= room_s:
            degraded = "" if name == preferred[0] else f"{name} instead of {preferred[0]}"
            return Choice(name, degraded)
    return Choice("", f"no time for {preferred[-1]}: prediction first, map to follow")
