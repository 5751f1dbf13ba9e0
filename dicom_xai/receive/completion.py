"""Is a unit complete? A pure function of what arrived, the route's trigger and the clock.

=====================  =========================================================================
trigger                ready when
=====================  =========================================================================
instance               the instance is durable
association_release    every association that brought one of its instances was released
quiet                  nothing came for `quiet_s`
any, after an abort    nothing came and no association ended for `quiet_s`: an abort is neither
                       completion nor loss
any, at `max_wait_s`   at once (`when_incomplete: partial`), or held for the next instance
=====================  =========================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dicom_xai.config import Route, TriggerKind
from dicom_xai.study import Candidate


class Step(StrEnum):
    """What to do with a waiting unit."""

    READY = "ready"
    WAIT = "wait"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The step, why, and the moment on the ledger's clock: of completion, or to look again."""

    step: Step
    fired: str
    at: float


def decide(candidate: Candidate, policy: Route, now: float) -> Verdict:
    """Whether the unit may go on, and since when it could.

    Parameters
    ----------
    candidate : Candidate
    policy : Route
        As it was when the unit's first instance came.
    now : float
        Seconds of the ledger's clock.
    """
    complete_at, fired = _completion(candidate, policy)
    latest = candidate.first_at + policy.max_wait_s
    forced_at = max(latest, candidate.last_at)
    is_held = policy.when_incomplete == "hold"
    # the moment must not depend on when somebody looks: a late look would hide lost time
    if complete_at is not None and complete_at <= now and (is_held or complete_at <= forced_at):
        return Verdict(Step.READY, fired, complete_at)
    if latest <= now:
        if is_held:
            return Verdict(Step.HOLD, "max_wait_s", latest)
        return Verdict(Step.READY, "max_wait_s", forced_at)
    return Verdict(Step.WAIT, fired, latest if complete_at is None else min(latest, complete_at))


def _completion(candidate: Candidate, policy: Route) -> tuple[float | None, str]:
    """When the trigger fires if nothing more happens (None: never by itself), and its name."""
    if policy.trigger is TriggerKind.INSTANCE:
        return candidate.last_at, "instance"
    last_at = max(candidate.last_at, candidate.last_end_at or candidate.last_at)
    if candidate.has_abnormal_end:
        silent_at = last_at + policy.quiet_s
        return (None if candidate.open_transfers else silent_at), "quiet after abort"
    if policy.trigger is TriggerKind.QUIET:
        return candidate.last_at + policy.quiet_s, "quiet"
    return (None if candidate.open_transfers else last_at), "association_release"
