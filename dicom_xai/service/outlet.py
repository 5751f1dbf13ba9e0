"""One destination's results on their way: claim, check, send, and tell what it answered.

An object is checked once more before it leaves: its bytes hash to what the worker wrote, and its
identity block equals that of its source, value byte by value byte. A difference is never sent.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from dicom_xai import dimse, identity
from dicom_xai.audit import Participant
from dicom_xai.config import Destination
from dicom_xai.deliver.backoff import Breaker
from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.errors import (
    CannotUnderstandError,
    DestinationUnavailableError,
    IdentityError,
    LedgerBusyError,
    NotNowError,
    NotReachedError,
)
from dicom_xai.ledger import Outgoing, Triaged
from dicom_xai.service.audited import Tally, note_sent
from dicom_xai.service.loop import DestinationLoop
from dicom_xai.service.role import Context, report_rotation
from dicom_xai.stages import Stage
from dicom_xai.study import Purpose, Receipt
from dicom_xai.telemetry import Event

T = TypeVar("T")

#: Longer than the longest send, by `Timeouts`; then another sender may try. Where an association
#: was lost that was open before, the object is sent twice, and each takes its bytes' time.
LEASE_S, LEASE_S_PER_MB = 180.0, 2.0
#: A burst that does not end is told to the audit trail after so many objects.
NOTE_AFTER = 64


class Outlet(DestinationLoop):
    """One destination's thread.

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
        self._scu = StorageSCU(name, destination, rotated=rotated)
        super().__init__(context, "outlet", name, destination, self._scu)
        self._sent = Tally()
        self._breaker = Breaker(context.ledger.now, rng)

    def _step(self) -> bool:
        if self._send_next():
            return True
        self._note_sent()
        self._scu.close_if_idle()
        return False

    def _next_at(self) -> float | None:
        at = self._context.ledger.deliveries.next_at(self._name)
        return None if at is None else max(at, self._breaker.open_until)

    def _rest(self, pause_s: float) -> None:
        """When rung for, associate while the worker still computes, so that no send need."""
        is_rung = self._bell.wait(pause_s)
        if is_rung and self._breaker.is_trusted and not self._stopping.is_set():
            try:
                self._scu.open()
            except DestinationUnavailableError:
                self._breaker.failed()

    def _close(self) -> None:
        self._note_sent()
        super()._close()

    def _tell(self, verb: Callable[[], T]) -> T:
        """Tell the ledger what the destination said; a ledger that is busy is told again.

        Raises
        ------
        LedgerBusyError
            Still busy when the outlet was asked to stop; the object will be sent again.
        """
        while True:
            try:
                return verb()
            except LedgerBusyError as error:
                if self._wait_for_ledger(error):
                    raise

    def _note_sent(self) -> None:
        """Tell the audit trail what went out; after a burst, not between its objects."""
        sent, self._sent = self._sent, Tally()
        place = self.destination
        source = Participant(place.calling_ae_title, address=self._context.audit.process.address)
        note_sent(self._context, source, Participant(place.ae_title, address=place.host), sent)

    def _send_next(self) -> bool:
        """Send one object; False when there is none that may go now."""
        ledger = self._context.ledger
        if self._breaker.is_open:
            return False
        outgoing = ledger.deliveries.claim(self._name, LEASE_S, LEASE_S_PER_MB)
        if outgoing is None:
            return False
        metrics = self._context.metrics
        if outgoing.attempts == 1:
            metrics.stage_seconds.labels(Stage.OUTBOX, outgoing.model).observe(outgoing.outbox_s)
        started = ledger.now()
        try:
            file = self._checked(outgoing)
            receipt = self._scu.send(file)
        except NotNowError as error:
            pause_s = self._breaker.refused(outgoing.delivery_id, outgoing.attempts)
            self._retry(outgoing, str(error), pause_s)
            return True
        except DestinationUnavailableError as error:
            # nothing overtakes what found nobody; what may itself break associations makes room
            has_place = isinstance(error, NotReachedError)
            self._retry(outgoing, str(error), self._breaker.failed(), keeps_place=has_place)
            return True
        except (IdentityError, CannotUnderstandError, OSError) as error:
            reason = f"not sent: {error}" if not isinstance(error, OSError) else "bytes are gone"
            self._give_up(outgoing, reason, None)
            return True
        self._breaker.succeeded()
        elapsed_s = ledger.now() - started
        metrics.stage_seconds.labels(Stage.DELIVER, outgoing.model).observe(elapsed_s)
        answer = dimse.answer_of(receipt.status, is_resend=outgoing.attempts + receipt.sends > 2)
        if answer.is_delivered:
            self._note_delivered(outgoing, receipt, answer, elapsed_s)
        else:
            self._give_up(outgoing, f"status 0x{receipt.status:04X}", receipt.status)
        return True

    def _note_delivered(
        self, outgoing: Outgoing, receipt: Receipt, answer: dimse.Answer, elapsed_s: float
    ) -> None:
        """The destination holds the object: tell ledger, audit trail, metrics and log."""
        triaged = self._tell(
            lambda: self._context.ledger.deliveries.sent(
                outgoing, receipt.status, wants_commitment=self.destination.commitment
            )
        )
        source = outgoing.source
        self._sent.add(source.study_instance_uid, outgoing.sop_class_uid, source.spool_key)
        if len(self._sent) >= NOTE_AFTER:
            self._note_sent()
        self._context.metrics.deliveries.labels(self._name, answer).inc()
        self._context.log.info(
            Event.DELIVERED,
            destination=self._name,
            kind=outgoing.kind,
            sop_instance_uid=outgoing.sop_instance_uid,
            status=f"0x{receipt.status:04X}",
            attempts=outgoing.attempts,
            elapsed_s=round(elapsed_s, 4),
        )
        if triaged is not None:
            self._report(triaged)

    def _checked(self, outgoing: Outgoing) -> bytes:
        """The object's bytes, once they are what was made and belong to whom they should.

        Raises
        ------
        IdentityError
            They differ; nothing may be sent.
        """
        file = self._context.spool.read(outgoing.spool_key)
        if hashlib.sha256(file).hexdigest() != outgoing.sha256:
            raise IdentityError(
                f"result {outgoing.sop_instance_uid} changed on disk since it was made"
            )
        with self._context.spool.view(outgoing.source.spool_key) as source:
            identity.compare(identity.read_block(source), identity.read_block(file))
        return file

    def _retry(
        self, outgoing: Outgoing, reason: str, pause_s: float, *, keeps_place: bool = False
    ) -> None:
        """Put one object back for so long, or where it was while its destination rests so long."""
        deliveries, own_s = self._context.ledger.deliveries, 0.0 if keeps_place else pause_s
        self._tell(lambda: deliveries.retry_later(outgoing, own_s, reason))
        self._context.metrics.deliveries.labels(self._name, "transient").inc()
        self._context.log.warning(
            Event.DELIVERY_RETRIED,
            destination=self._name,
            sop_instance_uid=outgoing.sop_instance_uid,
            reason=reason,
            attempts=outgoing.attempts,
            delay_s=round(pause_s, 2),
        )

    def _give_up(self, outgoing: Outgoing, reason: str, status: int | None) -> None:
        deliveries = self._context.ledger.deliveries
        self._tell(lambda: deliveries.give_up(outgoing, reason, status))
        self._context.metrics.deliveries.labels(self._name, "dead").inc()
        self._context.log.error(
            Event.DELIVERY_DEAD,
            destination=self._name,
            sop_instance_uid=outgoing.sop_instance_uid,
            reason=reason,
        )

    def _report(self, triaged: Triaged) -> None:
        if triaged.purpose == Purpose.TRIAGE:
            metrics = self._context.metrics
            labels = (triaged.route, triaged.priority)
            metrics.triage_seconds.labels(*labels).observe(triaged.latency_s)
            metrics.last_byte_seconds.labels(*labels).observe(triaged.last_byte_s)
            metrics.first_byte_seconds.labels(*labels).observe(triaged.first_byte_s)
        self._context.log.info(
            Event.TRIAGED,
            job=triaged.job_id,
            route=triaged.route,
            purpose=triaged.purpose,
            latency_s=round(triaged.latency_s, 4),
            outcome="in time" if triaged.is_within_budget else "late",
        )
