"""Delays grow, spread and stay bounded."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from dicom_xai.deliver.backoff import LONGEST_S, REFUSALS_IN_A_ROW, Breaker, delay_s


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


class Clock:
    """Seconds that go on when told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.promise("P1")
def test_a_destination_that_is_down_for_days_is_tried_often_at_first_and_never_given_up() -> None:
    clock = Clock()
    breaker = Breaker(clock, random.Random(4))
    began, tries = clock.now, []
    while clock.now - began < 2 * 86_400:
        tries.append(clock.now - began)
        breaker.failed()
        assert breaker.is_open
        clock.now = breaker.open_until
        assert not breaker.is_open
    assert sum(at < 60 for at in tries) >= 5
    pauses = [later - sooner for sooner, later in pairwise(tries)]
    assert max(pauses) <= LONGEST_S
    assert len({round(pause, 3) for pause in pauses[12:]}) > 0.9 * len(pauses[12:])  # jittered
    breaker.succeeded()
    assert breaker.is_trusted
    assert breaker.failed() <= 1.0


@pytest.mark.promise("P5")
def test_an_object_that_is_never_taken_holds_up_no_other() -> None:
    clock = Clock()
    breaker = Breaker(clock, random.Random(5))
    waits = []
    for attempt in range(1, 30):
        waits.append(breaker.refused(7, attempt))
        assert not breaker.is_open
    assert waits[0] <= 1.0
    assert max(waits) > LONGEST_S / 2


def test_a_destination_that_takes_nothing_now_is_left_alone_for_longer_and_longer() -> None:
    clock = Clock()
    breaker = Breaker(clock, random.Random(6))
    for number in range(REFUSALS_IN_A_ROW):
        assert not breaker.is_open
        breaker.refused(number, 1)
    pauses = []
    for number in range(12):
        pauses.append(breaker.open_until - clock.now)
        clock.now = breaker.open_until
        breaker.refused(number, 2)
    assert pauses[-1] > 100 * pauses[0]
    breaker.succeeded()
    breaker.refused(1, 9)
    clock.now = breaker.open_until
    assert not breaker.is_open
