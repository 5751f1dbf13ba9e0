"""Every row of the table in `completion`, and what holds whatever arrives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_xai.config import Route
from dicom_xai.receive.completion import Step, Verdict, decide
from dicom_xai.study import Candidate, Per, Unit

QUIET_S, MAX_WAIT_S = 0.75, 60.0


def a_policy(trigger: str, when_incomplete: str = "partial", **fields: object) -> Route:
    return Route.model_validate(
        {
            "name": "r",
            "when": {},
            "trigger": trigger,
            "quiet_s": QUIET_S,
            "max_wait_s": MAX_WAIT_S,
            "when_incomplete": when_incomplete,
            "model": "m",
            "explain": ["grad-cam"],
            "send": [{"object": "sc", "to": ["pacs"]}],
            **fields,
        }
    )


def a_unit(
    last_at: float = 100.0,
    *,
    first_at: float = 100.0,
    still_open: int = 0,
    last_end_at: float | None = None,
    is_abnormal: bool = False,
) -> Candidate:
    return Candidate(
        candidate_id=1,
        unit=Unit(Per.SERIES, "1.2", "1.2.3"),
        route="r",
        route_json="{}",
        generation=0,
        first_at=first_at,
        last_at=last_at,
        open_transfers=still_open,
        last_end_at=last_end_at,
        has_abnormal_end=is_abnormal,
    )


READY, WAIT, HOLD = Step.READY, Step.WAIT, Step.HOLD
OPEN = a_unit(still_open=1)
RELEASED = a_unit(last_end_at=100.5)
ABORTED = a_unit(last_end_at=100.5, is_abnormal=True)
AFTER_ABORT = a_unit(101.0, last_end_at=100.5, is_abnormal=True)
ABORT_AND_OPEN = a_unit(still_open=1, last_end_at=100.5, is_abnormal=True)


@pytest.mark.parametrize(
    ("trigger", "unit", "now", "expected"),
    [
        # instance: the instance is durable
        ("instance", OPEN, 100.0, Verdict(READY, "instance", 100.0)),
        ("instance", OPEN, 170.0, Verdict(READY, "instance", 100.0)),
        # association_release: every association that brought one of its instances was released
        ("association_release", OPEN, 100.6, Verdict(WAIT, "association_release", 160.0)),
        ("association_release", RELEASED, 100.6, Verdict(READY, "association_release", 100.5)),
        ("association_release", RELEASED, 100.5, Verdict(READY, "association_release", 100.5)),
        (
            "association_release",
            a_unit(still_open=1, last_end_at=100.5),
            100.6,
            Verdict(WAIT, "association_release", 160.0),
        ),
        # an instance of an association that ended before it was recorded
        (
            "association_release",
            a_unit(101.0, last_end_at=100.5),
            101.0,
            Verdict(READY, "association_release", 101.0),
        ),
        # quiet: nothing came for quiet_s, whoever is still connected
        ("quiet", OPEN, 100.5, Verdict(WAIT, "quiet", 100.75)),
        ("quiet", OPEN, 100.75, Verdict(READY, "quiet", 100.75)),
        ("quiet", RELEASED, 100.6, Verdict(WAIT, "quiet", 100.75)),
        ("quiet", a_unit(159.5, still_open=1), 159.6, Verdict(WAIT, "quiet", 160.0)),
        # any, after an abort: nothing came and no association ended for quiet_s
        ("association_release", ABORTED, 100.6, Verdict(WAIT, "quiet after abort", 101.25)),
        ("association_release", ABORTED, 101.25, Verdict(READY, "quiet after abort", 101.25)),
        ("association_release", AFTER_ABORT, 101.3, Verdict(WAIT, "quiet after abort", 101.75)),
        ("association_release", ABORT_AND_OPEN, 110.0, Verdict(WAIT, "quiet after abort", 160.0)),
        ("quiet", ABORTED, 101.0, Verdict(WAIT, "quiet after abort", 101.25)),
        ("quiet", ABORTED, 101.3, Verdict(READY, "quiet after abort", 101.25)),
        # any, at max_wait_s
        ("association_release", OPEN, 159.99, Verdict(WAIT, "association_release", 160.0)),
        ("association_release", OPEN, 160.0, Verdict(READY, "max_wait_s", 160.0)),
        ("association_release", ABORT_AND_OPEN, 161.0, Verdict(READY, "max_wait_s", 160.0)),
        ("quiet", a_unit(159.9, still_open=1), 160.0, Verdict(READY, "max_wait_s", 160.0)),
        ("quiet", a_unit(160.5, still_open=1), 160.6, Verdict(READY, "max_wait_s", 160.5)),
    ],
)
def test_a_unit_is_ready_when_its_trigger_says(
    trigger: str, unit: Candidate, now: float, expected: Verdict
) -> None:
    assert decide(unit, a_policy(trigger), now) == expected


@pytest.mark.parametrize(("trigger", "unit"), [("association_release", OPEN), ("quiet", OPEN)])
def test_an_incomplete_unit_is_held_only_at_its_longest_wait(trigger: str, unit: Candidate) -> None:
    policy = a_policy(trigger, "hold", quiet_s=100)
    assert decide(unit, policy, 159.9).step is WAIT
    assert decide(unit, policy, 160.0) == Verdict(HOLD, "max_wait_s", 160.0)


def test_a_complete_unit_is_never_held() -> None:
    policy = a_policy("association_release", "hold")
    assert decide(RELEASED, policy, 1000.0).step is READY


def test_an_abort_alone_is_neither_completion_nor_loss() -> None:
    policy = a_policy("association_release")
    assert decide(ABORTED, policy, 100.5).step is WAIT
    assert decide(ABORTED, policy, 101.25).step is READY


moments = st.floats(0, 1000, allow_nan=False)


@st.composite
def units(draw: st.DrawFn) -> Candidate:
    first_at = draw(moments)
    last_at = first_at + draw(st.floats(0, 100))
    return a_unit(
        last_at,
        first_at=first_at,
        still_open=draw(st.integers(0, 3)),
        last_end_at=draw(st.none() | st.floats(first_at, first_at + 200)),
        is_abnormal=draw(st.booleans()),
    )


policies = st.builds(
    a_policy,
    st.sampled_from(["instance", "association_release", "quiet"]),
    st.sampled_from(["partial", "hold"]),
    quiet_s=st.floats(0.01, 10),
    max_wait_s=st.floats(0.1, 100),
)


@given(units(), policies, st.floats(0, 500))
def test_a_unit_is_never_ready_before_its_last_instance_nor_in_the_future(
    unit: Candidate, policy: Route, later_s: float
) -> None:
    now = unit.last_at + later_s
    verdict = decide(unit, policy, now)
    if verdict.step is READY:
        assert unit.last_at <= verdict.at <= now


@given(units(), policies, st.floats(-50, 500))
def test_to_wait_always_names_a_later_moment(
    unit: Candidate, policy: Route, later_s: float
) -> None:
    now = unit.last_at + later_s
    verdict = decide(unit, policy, now)
    if verdict.step is WAIT:
        assert now < verdict.at <= max(unit.first_at + policy.max_wait_s, now)


@given(units(), policies, st.floats(0, 500), st.floats(0, 500))
def test_what_is_ready_stays_ready_since_the_same_moment(
    unit: Candidate, policy: Route, later_s: float, still_later_s: float
) -> None:
    now = unit.last_at + later_s
    first = decide(unit, policy, now)
    again = decide(unit, policy, now + still_later_s)
    if first.step is READY:
        assert again.step is READY
        assert again.at == first.at


@given(units(), policies)
def test_waiting_until_the_named_moment_ends_the_waiting_when_nothing_more_comes(
    unit: Candidate, policy: Route
) -> None:
    verdict = decide(unit, policy, unit.last_at)
    if verdict.step is WAIT:
        assert decide(unit, policy, verdict.at).step is not WAIT
