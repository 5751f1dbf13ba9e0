"""The sender: one thread for each destination, so that a dead one never slows another.

An object is checked once more before it leaves: its bytes hash to what the worker wrote, and its
identity block equals that of its source, value byte by value byte. A difference is never sent.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

from dicom_xai import dimse, identity
from dicom_xai.audit import Participant
from dicom_xai.config import Config, Destination, Requester
from dicom_xai.deliver.backoff import Breaker
from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.errors import (
    CannotUnderstandError,
    DestinationUnavailableError,
    IdentityError,
    LedgerBusyError,
    NotNowError,
)
from dicom_xai.ledger import Outgoing, Triaged
from dicom_xai.service.audited import Tally, note_sent
from dicom_xai.service.commitments import Committer, Debtor, drop_unaddressed
from dicom_xai.service.role import Context, report_rotation, watch_certificate
from dicom_xai.stages import Stage
from dicom_xai.study import Purpose
from dicom_xai.telemetry import Event

T = TypeVar("T")

#: Longer than the longest send; then another sender may try.
LEASE_S = 120.0
#: A burst that does not end is told to the audit trail after so many objects.
NOTE_AFTER = 64
#: Safety net under the bell.
POLL_S = 0.5
#: How long a reload lets a changed destination finish the object under way.
RELOAD_GRACE_S = 5.0
#: Between asking an outlet to stop and cutting its connection: the part of the grace it gets.
POLITE = 0.6


class Sender:
    """The role.

    Parameters
    ----------
    context : Context
    rng : Random
        Jitters the pauses.
    """

    def __init__(self, context: Context, rng: random.Random | None = None) -> None:
        self._context = context
        self._rng = rng or random.Random()
        self._outlets: dict[str, _Outlet] = {}
        self._committers: dict[str, Committer] = {}
        self._debtors: dict[str, Debtor] = {}
        self._released: set[str] = set()  # destinations that need not commit
        self._requesters = context.config.service.receive.commitment

    def start(self) -> None:
        """Open one outlet for each destination, and what storage commitment needs."""
        self._open(self._context.config.service.destinations)
        self._owe(self._requesters)

    def tick(self) -> None:
        """End the role when an outlet has ended."""
        for outlet in self._outlets.values():
            if outlet.failure is not None:
                raise outlet.failure
            outlet.watch_certificate()
        for committer in self._committers.values():
            committer.watch_certificate()
        for loop in (*self._committers.values(), *self._debtors.values()):
            if loop.failure is not None:
                raise loop.failure
        try:
            self._settle()
        except LedgerBusyError as error:  # the next tick tries again
            self._context.log.exception(Event.LEDGER_BUSY, error)

    def _settle(self) -> None:
        """Let go of promises that nobody is asked for, and of reports that nobody can be told."""
        commitments = self._context.ledger.commitments
        for name in self._outlets.keys() - self._committers.keys() - self._released:
            commitments.release(name)
            self._released.add(name)
        drop_unaddressed(self._context, list(self._requesters))

    def use(self, config: Config) -> None:
        """Close the outlets that changed or went, open the new ones."""
        wanted = config.service.destinations
        changed = [
            name for name, outlet in self._outlets.items() if wanted.get(name) != outlet.destination
        ]
        asked = config.service.receive.commitment
        ending: list[_Ending] = [self._outlets.pop(name) for name in changed]
        ending += [self._committers.pop(name) for name in changed if name in self._committers]
        self._released -= set(changed)
        gone = [ae for ae in self._debtors if asked.get(ae) != self._requesters[ae]]
        ending += [self._debtors.pop(ae) for ae in gone]
        _end(ending, RELOAD_GRACE_S)
        self._open({n: d for n, d in wanted.items() if n not in self._outlets})
        self._owe({ae: each for ae, each in asked.items() if ae not in self._debtors})
        self._requesters = asked

    def stop(self, grace_s: float) -> None:
        """Finish the objects under way; what is left waits in the ledger."""
        _end(
            [*self._outlets.values(), *self._committers.values(), *self._debtors.values()], grace_s
        )

    def _open(self, destinations: Mapping[str, Destination]) -> None:
        for name, destination in destinations.items():
            self._outlets[name] = _Outlet(self._context, name, destination, self._rng)
            self._outlets[name].start()
            if destination.commitment:
                self._committers[name] = Committer(self._context, name, destination, self._rng)
                self._committers[name].start()

    def _owe(self, requesters: Mapping[str, Requester]) -> None:
        for ae_title, requester in requesters.items():
            self._debtors[ae_title] = Debtor(self._context, ae_title, requester, self._rng)
            self._debtors[ae_title].start()


class _Outlet:
    """One destination's thread."""

    def __init__(
        self, context: Context, name: str, destination: Destination, rng: random.Random
    ) -> None:
        self.destination = destination
        self.failure: BaseException | None = None
        self._context = context
        self._name = name
        self._scu = StorageSCU(
            name, destination, rotated=partial(report_rotation, context.metrics, context.log)
        )
        self._sent = Tally()
        self._breaker = Breaker(context.ledger.now, rng)
        self._stopping = threading.Event()
        self._bell = context.ledger.listen("sender")
        # a daemon: a peer that holds it must not hold the process
        self._thread = threading.Thread(
            target=self._send_forever, name=f"outlet-{name}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def watch_certificate(self) -> None:
        if self._scu.credentials is not None:
            watch_certificate(self._context, self._scu.credentials)

    def ask_to_stop(self) -> None:
        self._stopping.set()
        self._context.ledger.ring("sender")

    def hang_up(self) -> None:
        self._scu.hang_up()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; False when it still runs."""
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _send_forever(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._step()
                except LedgerBusyError as error:
                    self._wait_for_ledger(error)
        except BaseException as error:  # noqa: BLE001  # handed to tick, which ends the role
            self.failure = error
        finally:
            self._note_sent()
            self._scu.close()
            self._bell.close()

    def _step(self) -> None:
        if not self._send_next():
            self._note_sent()
            self._scu.close_if_idle()
            if self._bell.wait(self._pause_s()):
                self._open_early()

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

    def _wait_for_ledger(self, error: LedgerBusyError) -> bool:
        """Wait a little, for a restart would empty no disk; True when asked to stop."""
        self._context.log.exception(Event.LEDGER_BUSY, error, destination=self._name)
        return self._stopping.wait(POLL_S)

    def _note_sent(self) -> None:
        """Tell the audit trail what went out; after a burst, not between its objects."""
        sent, self._sent = self._sent, Tally()
        place = self.destination
        source = Participant(place.calling_ae_title, address=self._context.audit.process.address)
        note_sent(self._context, source, Participant(place.ae_title, address=place.host), sent)

    def _pause_s(self) -> float:
        """Until something can be sent, at most `POLL_S`."""
        now = self._context.ledger.now()
        next_at = self._context.ledger.deliveries.next_at(self._name)
        if next_at is None:
            return POLL_S
        return max(0.01, min(POLL_S, max(next_at, self._breaker.open_until) - now))

    def _open_early(self) -> None:
        """Associate while the worker still computes, so that the first send need not."""
        if self._breaker.is_trusted and not self._stopping.is_set():
            try:
                self._scu.open()
            except DestinationUnavailableError:
                self._breaker.failed()

    def _send_next(self) -> bool:
        """Send one object; False when there is none that may go now."""
        ledger = self._context.ledger
        if self._breaker.is_open:
            return False
        outgoing = ledger.deliveries.claim(self._name, LEASE_S)
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
            self._retry(outgoing, str(error), self._breaker.failed())
            return True
        except (IdentityError, CannotUnderstandError, OSError) as error:
            reason = f"not sent: {error}" if not isinstance(error, OSError) else "bytes are gone"
            self._give_up(outgoing, reason, None)
            return True
        self._breaker.succeeded()
        elapsed_s = ledger.now() - started
        metrics.stage_seconds.labels(Stage.DELIVER, outgoing.model).observe(elapsed_s)
        answer = dimse.answer_of(receipt.status, is_resend=outgoing.attempts + receipt.sends > 2)
        if not answer.is_delivered:
            comment = f"status 0x{receipt.status:04X}"
            self._give_up(outgoing, comment, receipt.status)
            return True
        triaged = self._tell(
            lambda: ledger.deliveries.sent(
                outgoing, receipt.status, wants_commitment=self.destination.commitment
            )
        )
        source = outgoing.source
        self._sent.add(source.study_instance_uid, outgoing.sop_class_uid, source.spool_key)
        if len(self._sent) >= NOTE_AFTER:
            self._note_sent()
        metrics.deliveries.labels(self._name, answer).inc()
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
        return True

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
        source = self._context.spool.read(outgoing.source.spool_key)
        identity.compare(identity.read_block(source), identity.read_block(file))
        return file

    def _retry(self, outgoing: Outgoing, reason: str, pause_s: float) -> None:
        """Put one object back for so long."""
        deliveries = self._context.ledger.deliveries
        self._tell(lambda: deliveries.retry_later(outgoing, pause_s, reason))
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


class _Ending(Protocol):
    """A thread that can be asked to end."""

    def ask_to_stop(self) -> None: ...

    def hang_up(self) -> None: ...

    def join(self, timeout_s: float) -> bool: ...


def _end(outlets: Sequence[_Ending], grace_s: float) -> None:
    """Let outlets finish, then cut their connections; all within one grace time.

    One that does not even end then is left to its deadlines, or to the end of the process. What it
    holds is claimed: nobody else sends that before the lease is over.
    """
    start_s = time.monotonic()
    for outlet in outlets:
        outlet.ask_to_stop()
    held = [o for o in outlets if not o.join(start_s + POLITE * grace_s - time.monotonic())]
    for outlet in held:
        outlet.hang_up()
    for outlet in held:
        outlet.join(start_s + grace_s - time.monotonic())
