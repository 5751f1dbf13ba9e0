"""Delays grow, spread and stay bounded."""

from __future__ import annotations

import random

import pytest

from dicom_xai.deliver.backoff import LONGEST_S, delay_s


def test_the_first_retry_comes_within_a_second() -> None:
    rng = random.Random(1)
    assert all(0.5 <= delay_s(1, rng) <= 1.0 for _ in range(100))


def test_delays_double_until_the_cap() -> None:
    class Middle(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return 1.0

    assert [delay_s(n, Middle()) for n in range(1, 6)] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert delay_s(10, Middle()) == LONGEST_S


@pytest.mark.parametrize("attempt", [10, 100, 100_000])
def test_after_hours_it_is_still_tried_every_few_minutes(attempt: int) -> None:
    assert LONGEST_S / 2 <= delay_s(attempt, random.Random(2)) <= LONGEST_S


def test_what_failed_together_does_not_come_back_together() -> None:
    rng = random.Random(3)
    delays = [delay_s(8, rng) for _ in range(200)]
    assert max(delays) - min(delays) > 0.4 * max(delays)
