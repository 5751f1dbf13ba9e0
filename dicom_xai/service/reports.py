"""Storage commitment where we are asked: reports that the association of the request did not take.

The receiver reports on that association while it stands; then it is the sender's turn, on one of
ours, where `receive.commitment` says at which address.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from functools import partial

from dicom_xai.config import Destination, Requester
from dicom_xai.deliver.backoff import delay_s
from dicom_xai.deliver.commitment import Reporter
from dicom_xai.errors import DestinationUnavailableError
from dicom_xai.ledger import Owed
from dicom_xai.service.loop import Loop
from dicom_xai.service.role import Context, report_rotation
from dicom_xai.telemetry import Event

#: So many attempts to report, about a day.
REPORTS_AT_MOST = 300
#: Longer than the longest attempt; then another sender may try.
REPORT_LEASE_S = 120.0


class Debtor(Loop):
    """Reports to one AE title that asked us for commitment and has hung up since.

    Parameters
    ----------
    context : Context
    ae_title : str
        Who asked.
    requester : Requester
        Where it listens.
    rng : Random
        Jitters the pauses.
    """

    def __init__(
        self, context: Context, ae_title: str, requester: Requester, rng: random.Random
    ) -> None:
        place = Destination(
            type="dimse",
            ae_title=ae_title,
            host=requester.host,
            port=requester.port,
            tls=requester.tls,
        )
        rotated = partial(report_rotation, context.metrics, context.log)
        self._reporter = Reporter(ae_title, place, rotated=rotated)
        super().__init__(context, f"reports-{ae_title}", self._reporter, ae_title=ae_title)
        self._ae_title = ae_title
        self._rng = rng

    def _step(self) -> bool:
        reports = self._context.ledger.reports
        at = self._next_at()
        if at is None or at > self._context.ledger.now():
            return False
        owed = reports.claim(REPORT_LEASE_S, ae_title=self._ae_title)
        if owed is None:
            return False
        try:
            self._reporter.report(owed.report, owed.called_ae_title)
        except DestinationUnavailableError as error:
            self._put_back(owed, str(error))
        else:
            reports.reported(owed)
            note_reported(self._context, owed)
        return True

    def _put_back(self, owed: Owed, reason: str) -> None:
        reports = self._context.ledger.reports
        if owed.attempts >= REPORTS_AT_MOST:
            reports.give_up(owed, reason)
            note_dropped(self._context, self._ae_title, reason)
            return
        pause_s = delay_s(owed.attempts, self._rng)
        reports.retry_later(owed, pause_s, reason)
        self._context.metrics.commitment_reports.labels("retried").inc()
        self._context.log.warning(
            Event.COMMITMENT_REPORT_RETRIED,
            ae_title=self._ae_title,
            reason=reason,
            attempts=owed.attempts,
            delay_s=round(pause_s, 2),
        )

    def _next_at(self) -> float | None:
        return self._context.ledger.reports.next_at(self._ae_title)


def note_reported(context: Context, owed: Owed) -> None:
    """A peer that asked for commitment has its report."""
    context.metrics.commitment_reports.labels("reported").inc()
    context.log.info(
        Event.COMMITMENT_REPORTED,
        ae_title=owed.ae_title,
        count=len(owed.report.committed),
        outcome=f"{len(owed.report.failed)} not committed",
        attempts=owed.attempts,
    )


def note_dropped(context: Context, ae_title: str, reason: str) -> None:
    """A peer that asked for commitment will not hear of it."""
    context.metrics.commitment_reports.labels("dead").inc()
    context.log.error(Event.COMMITMENT_REPORT_DEAD, ae_title=ae_title, reason=reason)


def drop_unaddressed(context: Context, ae_titles: Collection[str]) -> None:
    """Give up the reports to AE titles without an address, once their association is over."""
    reason = "its association is over, and receive.commitment has no address for it"
    for ae_title in context.ledger.reports.give_up_but_to(ae_titles, reason):
        note_dropped(context, ae_title, reason)
