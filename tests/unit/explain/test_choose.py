"""Which explainer the deadline allows."""

from __future__ import annotations

import pytest

from dicom_xai.explain.choose import Choice, choose

COSTS = {"slow": 0.5, "fast": 0.05}


@pytest.mark.parametrize(
    ("remaining_s", "expected"),
    [
        (2.0, Choice("slow")),
        (0.7, Choice("slow")),
        (0.69, Choice("fast", "fast instead of slow")),
        (0.25, Choice("fast", "fast instead of slow")),
        (0.24, Choice("", "no time for fast: prediction first, map to follow")),
        (0.21, Choice("", "no time for fast: prediction first, map to follow")),
        (0.20, Choice("slow")),
        (-5.0, Choice("slow")),
    ],
)
def test_the_first_preference_that_leaves_time_for_the_rest_runs(remaining_s, expected):
    made = choose(["slow", "fast"], COSTS, 0.01, 0.2, remaining_s + 1e-9)
    assert made == expected


def test_when_even_the_prediction_is_late_nothing_is_gained_by_doing_less():
    assert choose(["fast"], COSTS, 0.4, 0.0, 0.1) == Choice("fast")
