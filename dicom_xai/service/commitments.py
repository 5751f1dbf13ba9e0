"""Storage commitment where we ask: when a destination is asked, and what its report does.

A thread of its own for each destination that commits, so that no result waits for a promise.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from functools import partial

from dicom_xai.commitment import CommitmentReport
from dicom_xai.config import Destination
from dicom_xai.deliver.backoff import delay_s
from dicom_xai.deliver.commitment import Asker
from dicom_xai.dimse import Status
from dicom_xai.errors import DestinationUnavailableError, LedgerBusyError
from dicom_xai.service.loop import DestinationLoop
from dicom_xai.service.role import Context, report_rotation
from dicom_xai.telemetry import Event

#: Longest wait for a report before an object is asked about again.
LONGEST_WAIT_S = 3600.0
#: So many requests without a report: about a day where `commitment_wait_s` is a minute.
ASKS_AT_MOST = 28
#: Before an object that a destination lost is sent again; twice as long each time.
RESEND_S = 5.0


def take_report(context: Context, report: CommitmentReport, reporters: Collection[str]) -> bool:
    """Apply a destination's report, by whichever association it came; durable when this returns.

    Parameters
    ----------
    context : Context
    report : CommitmentReport
    reporters : collection of str
        The destinations for which the peer may speak.

    Returns
    -------
    bool
        False where none of them was ever asked under this transaction UID.

    Raises
    ------
    LedgerBusyError
        Nothing was changed.
    """
    done = context.ledger.commitments.reconcile(report, reporters, RESEND_S)
    if done is None:
        context.log.warning(Event.COMMITMENT_UNKNOWN, count=len(reporters))
        return False
    counts = context.metrics.commitments
    for outcome, uids in (
        ("committed", done.committed),
        ("lost", done.resent),
        ("dead", done.dead),
    ):
        counts.labels(done.destination, outcome).inc(len(uids))
    context.log.info(
        Event.COMMITTED,
        destination=done.destination,
        count=len(done.committed),
        outcome="repeated" if done.is_repeated else "reported",
    )
    for uid, code in done.resent:
        context.log.warning(
            Event.COMMITMENT_LOST,
            destination=done.destination,
            sop_instance_uid=uid,
            reason=f"0x{code:04X}",
        )
    for uid, code in done.dead:
        context.log.error(
            Event.DELIVERY_DEAD,
            destination=done.destination,
            sop_instance_uid=uid,
            reason=f"not committed: 0x{code:04X}",
        )
    if done.resent:
        context.ledger.ring("sender")
    return True


class Committer(DestinationLoop):
    """Asks one destination for commitment, and hears what it reports on the same association.

    Parameters
    ----------
    context : Context
    name : str
        The destination's.
    destination : Destination
    rng : Random
        Jitters the pauses.
    """

    def __init__(
        self, context: Context, name: str, destination: Destination, rng: random.Random
    ) -> None:
        rotated = partial(report_rotation, context.metrics, context.log)
        self._asker = Asker(name, destination, self._heard, rotated=rotated)
        super().__init__(context, "commitment", name, destination, self._asker)
        self._rng = rng
        self._failures = 0
        self._not_before = float("-inf")

    def _heard(self, report: CommitmentReport) -> Status:
        try:
            is_known = take_report(self._context, report, [self._name])
        except LedgerBusyError:
            return Status.RESOURCE_LIMITATION
        return Status.SUCCESS if is_known else Status.INVALID_ARGUMENT_VALUE

    def _step(self) -> bool:
        context, commitments = self._context, self._context.ledger.commitments
        self._asker.close_if_silent()
        at = self._next_at()
        if at is None or at > context.ledger.now():
            return False
        for uid in commitments.give_up(self._name, ASKS_AT_MOST):
            context.metrics.commitments.labels(self._name, "dead").inc()
            context.log.error(
                Event.DELIVERY_DEAD,
                destination=self._name,
                sop_instance_uid=uid,
                reason="not committed: no report",
            )
        asking = commitments.ask(self._name, self._wait_s)
        if asking is None:
            return False
        outcome = "asked"
        try:
            self._asker.ask(asking.request)
            self._failures = 0
        except DestinationUnavailableError as error:
            outcome = "not-taken"
            self._failures += 1
            pause_s = delay_s(self._failures, self._rng)
            self._not_before = context.ledger.now() + pause_s
            commitments.not_taken(asking, str(error), pause_s)
            context.log.warning(
                Event.COMMITMENT_NOT_TAKEN,
                destination=self._name,
                reason=str(error),
                attempts=asking.asks,
                delay_s=round(pause_s, 2),
            )
        context.metrics.commitments.labels(self._name, outcome).inc(len(asking.request.references))
        return True

    def _wait_s(self, asks: int) -> float:
        """For the report of the n-th request."""
        longest = self.destination.commitment_wait_s * 2.0 ** min(asks - 1, 32)
        return min(max(LONGEST_WAIT_S, self.destination.commitment_wait_s), longest)

    def _next_at(self) -> float | None:
        at = self._context.ledger.commitments.next_ask_at(self._name)
        return None if at is None else max(at, self._not_before)
