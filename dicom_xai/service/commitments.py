"""Storage commitment in the sender's process: what destinations promise us, what we owe to others.

One thread for each destination that commits and for each AE title that may ask us, so that a dead
one delays nobody, and no result waits for a promise.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Collection
from functools import partial

from dicom_xai.commitment import CommitmentReport
from dicom_xai.config import Destination, Requester
from dicom_xai.deliver.backoff import delay_s
from dicom_xai.deliver.commitment import Asker, Reporter
from dicom_xai.dimse import Status
from dicom_xai.errors import DestinationUnavailableError, LedgerBusyError
from dicom_xai.ledger import Owed
from dicom_xai.service.role import Context, report_rotation, watch_certificate
from dicom_xai.telemetry import Event

#: Safety net under the bell.
POLL_S = 0.5
#: Longest wait for a report before an object is asked about again.
LONGEST_WAIT_S = 3600.0
#: So many requests without a report: about a day where `commitment_wait_s` is a minute.
ASKS_AT_MOST = 28
#: Before an object that a destination lost is sent again; twice as long each time.
RESEND_S = 5.0
#: So many attempts to report, about a day.
REPORTS_AT_MOST = 300
#: Longer than the longest attempt; then another sender may try.
REPORT_LEASE_S = 120.0


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


class _Loop:
    """A thread that does what is due, and waits for the bell."""

    def __init__(self, context: Context, name: str) -> None:
        self.failure: BaseException | None = None
        self._context = context
        self._stopping = threading.Event()
        self._bell = context.ledger.listen("sender")
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Let the thread end when it may."""
        self._stopping.set()
        self._context.ledger.ring("sender")

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; False when it still runs."""
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def hang_up(self) -> None:
        """Cut the connection under the thread."""
        raise NotImplementedError

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    if not self._step():
                        self._bell.wait(self._pause_s())
                except LedgerBusyError as error:
                    self._context.log.exception(Event.LEDGER_BUSY, error)
                    self._stopping.wait(POLL_S)
        except BaseException as error:  # noqa: BLE001  # handed to tick, which ends the role
            self.failure = error
        finally:
            self._close()
            self._bell.close()

    def _step(self) -> bool:
        raise NotImplementedError

    def _pause_s(self) -> float:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def _until(self, at: float | None) -> float:
        if at is None:
            return POLL_S
        return max(0.01, min(POLL_S, at - self._context.ledger.now()))


class Committer(_Loop):
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
        super().__init__(context, f"commitment-{name}")
        self._name = name
        self._destination = destination
        self._rng = rng
        self._failures = 0
        self._not_before = float("-inf")
        rotated = partial(report_rotation, context.metrics, context.log)
        self._asker = Asker(name, destination, self._heard, rotated=rotated)

    def watch_certificate(self) -> None:
        """Show how long the destination's certificate lasts."""
        if self._asker.credentials is not None:
            watch_certificate(self._context, self._asker.credentials)

    def hang_up(self) -> None:
        """Cut the connection under the thread."""
        self._asker.hang_up()

    def _heard(self, report: CommitmentReport) -> Status:
        try:
            is_known = take_report(self._context, report, [self._name])
        except LedgerBusyError:
            return Status.RESOURCE_LIMITATION
        return Status.SUCCESS if is_known else Status.INVALID_ARGUMENT_VALUE

    def _step(self) -> bool:
        context, commitments = self._context, self._context.ledger.commitments
        self._asker.close_if_silent()
        at = commitments.next_ask_at(self._name)
        if at is None or max(at, self._not_before) > context.ledger.now():
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
        longest = self._destination.commitment_wait_s * 2.0 ** min(asks - 1, 32)
        return min(max(LONGEST_WAIT_S, self._destination.commitment_wait_s), longest)

    def _pause_s(self) -> float:
        at = self._context.ledger.commitments.next_ask_at(self._name)
        return self._until(None if at is None else max(at, self._not_before))

    def _close(self) -> None:
        self._asker.close()


class Debtor(_Loop):
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
        super().__init__(context, f"reports-{ae_title}")
        self._ae_title = ae_title
        self._requester = requester
        self._rng = rng
        self._lock = threading.Lock()
        self._reporter: Reporter | None = None
        self._is_hung_up = False

    def hang_up(self) -> None:
        """Cut the connection under the thread."""
        with self._lock:
            self._is_hung_up = True
            if self._reporter is not None:
                self._reporter.hang_up()

    def _step(self) -> bool:
        reports = self._context.ledger.reports
        at = reports.next_at(self._ae_title)
        if at is None or at > self._context.ledger.now():
            return False
        owed = reports.claim(REPORT_LEASE_S, ae_title=self._ae_title)
        if owed is None:
            return False
        try:
            self._report(owed)
        except DestinationUnavailableError as error:
            self._put_back(owed, str(error))
        else:
            reports.reported(owed)
            note_reported(self._context, owed)
        return True

    def _report(self, owed: Owed) -> None:
        """One association for each report: they are rare, and our AE title may differ."""
        place = Destination(
            type="dimse",
            ae_title=self._ae_title,
            host=self._requester.host,
            port=self._requester.port,
            tls=self._requester.tls,
            calling_ae_title=owed.called_ae_title,
        )
        rotated = partial(report_rotation, self._context.metrics, self._context.log)
        reporter = Reporter(self._ae_title, place, rotated=rotated)
        with self._lock:
            if self._is_hung_up:
                raise DestinationUnavailableError("the sender stops")
            self._reporter = reporter
        try:
            reporter.report(owed.report)
        finally:
            reporter.close()
            with self._lock:
                self._reporter = None

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

    def _pause_s(self) -> float:
        return self._until(self._context.ledger.reports.next_at(self._ae_title))

    def _close(self) -> None:
        """Nothing is held between two reports."""


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
