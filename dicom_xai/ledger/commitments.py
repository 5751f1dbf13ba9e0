"""Verbs about storage commitment where we ask: what destinations promise us to keep.

Each of our requests is a row with a transaction UID of its own, written before it is sent: whatever
becomes of the request, a report about it finds its row, and one that never comes is asked for again
under another UID (PS3.4 J.3.2). A report is applied once; what it repeats changes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    exists,
    func,
    insert,
    select,
    update,
)

from dicom_xai.commitment import CommitmentReport, CommitmentRequest, FailureReason
from dicom_xai.ledger.engine import Database, earliest, insert_row, note_event, utc_now
from dicom_xai.ledger.schema import (
    DELIVERY_IS_UNCOMMITTED,
    Commitment,
    DeliveryState,
    TransactionState,
    commitment,
    commitment_delivery,
    delivery,
    result,
)
from dicom_xai.study import Reference

#: An object that a destination lost so often is not sent again by itself.
RESENDS_AT_MOST = 3
#: After these a resend changes nothing (PS3.3 C.14.1.1).
_PERMANENT = frozenset(
    [FailureReason.SOP_CLASS_NOT_SUPPORTED, FailureReason.CLASS_INSTANCE_CONFLICT]
)


@dataclass(frozen=True, slots=True)
class Asking:
    """One request to send."""

    commitment_id: int
    request: CommitmentRequest
    asks: int  #: how often these objects were asked about, this time included


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a report changed.

    `resent` and `dead` are SOP Instance UIDs with the reported reason.
    """

    destination: str
    is_repeated: bool = False
    committed: tuple[str, ...] = ()
    resent: tuple[tuple[str, int], ...] = ()
    dead: tuple[tuple[str, int], ...] = ()


class Commitments:
    """What the sender asks destinations to promise, and what they report.

    Parameters
    ----------
    database : Database
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def ask(self, destination: str, wait_s: Callable[[int], float]) -> Asking | None:
        """Note a request about the objects of one unit that a destination got; None without any.

        A unit is asked about when nothing of it is on its way to the destination any more.

        Parameters
        ----------
        destination : str
        wait_s : callable
            How long to wait for the report of the n-th request (1, 2, ...), seconds; then these
            objects are asked about again.
        """

        def run(connection: Connection) -> Asking | None:
            now = self._db.now()
            is_due = and_(
                delivery.c.destination == destination,
                DELIVERY_IS_UNCOMMITTED,
                delivery.c.state == DeliveryState.SENT,
                delivery.c.ask_at <= now,
            )
            job_id = connection.scalar(
                select(delivery.c.job_id)
                .where(is_due, _is_whole())
                .order_by(delivery.c.ask_at, delivery.c.id)
                .limit(1)
            )
            if job_id is None:
                return None
            rows = connection.execute(
                select(
                    delivery.c.id,
                    delivery.c.asks,
                    result.c.sop_class_uid,
                    result.c.sop_instance_uid,
                )
                .join(result, result.c.id == delivery.c.result_id)
                .where(is_due, delivery.c.job_id == job_id)
                .order_by(delivery.c.id)
            ).all()
            asks = max(row.asks for row in rows) + 1
            transaction_uid = f"2.25.{uuid.uuid4().int}"
            connection.execute(
                update(commitment)
                .where(
                    commitment.c.job_id == job_id,
                    commitment.c.destination == destination,
                    commitment.c.state == TransactionState.ASKED,
                )
                .values(state=TransactionState.OVERDUE)
            )
            commitment_id = insert_row(
                connection,
                commitment,
                transaction_uid=transaction_uid,
                job_id=job_id,
                destination=destination,
                state=TransactionState.ASKED,
                asked_at=now,
                asked_utc=utc_now(),
            )
            ids = [row.id for row in rows]
            connection.execute(
                insert(commitment_delivery),
                [{"commitment_id": commitment_id, "delivery_id": each} for each in ids],
            )
            connection.execute(
                update(delivery)
                .where(delivery.c.id.in_(ids))
                .values(asks=asks, ask_at=now + wait_s(asks), commitment_id=commitment_id)
            )
            references = tuple(Reference(row.sop_class_uid, row.sop_instance_uid) for row in rows)
            return Asking(commitment_id, CommitmentRequest(transaction_uid, references), asks)

        return self._db.write(run)

    def next_ask_at(self, destination: str) -> float | None:
        """When a destination is to be asked at the earliest, or None when there is nothing to."""
        with self._db.read() as connection:
            return earliest(
                connection,
                select(func.min(delivery.c.ask_at)).where(
                    delivery.c.destination == destination,
                    DELIVERY_IS_UNCOMMITTED,
                    delivery.c.state == DeliveryState.SENT,
                    _is_whole(),
                ),
            )

    def not_taken(self, asking: Asking, reason: str, delay_s: float) -> None:
        """Note that a request did not reach the destination, or was refused; ask again later."""

        def run(connection: Connection) -> None:
            connection.execute(
                update(commitment)
                .where(
                    commitment.c.id == asking.commitment_id,
                    commitment.c.state == TransactionState.ASKED,
                )
                .values(state=TransactionState.FAILED, reason=reason)
            )
            connection.execute(
                update(delivery)
                .where(delivery.c.commitment_id == asking.commitment_id, DELIVERY_IS_UNCOMMITTED)
                .values(ask_at=self._db.now() + delay_s)
            )

        self._db.write(run)

    def give_up(self, destination: str, asks_at_most: int) -> list[str]:
        """Make dead letters of what was asked about so often without a report; gives their UIDs.

        A report that comes after all still counts.
        """
        reason = f"not committed: no report to {asks_at_most} requests"

        def run(connection: Connection) -> list[str]:
            given_up = connection.scalars(
                update(delivery)
                .where(
                    delivery.c.destination == destination,
                    DELIVERY_IS_UNCOMMITTED,
                    delivery.c.state == DeliveryState.SENT,
                    delivery.c.asks >= asks_at_most,
                    delivery.c.ask_at <= self._db.now(),
                )
                .values(state=DeliveryState.DEAD, reason=reason)
                .returning(delivery.c.result_id)
            ).all()
            found = connection.scalars(
                select(result.c.sop_instance_uid).where(result.c.id.in_(given_up))
            ).all()
            for uid in found:
                note_event(connection, "delivery-dead", uid, f"{destination}: {reason}")
            return [str(uid) for uid in found]

        return self._db.write(run)

    def release(self, destination: str) -> int:
        """Want no commitment of a destination any more; gives how many objects waited for it."""

        def run(connection: Connection) -> int:
            return connection.execute(
                update(delivery)
                .where(delivery.c.destination == destination, DELIVERY_IS_UNCOMMITTED)
                .values(commitment=Commitment.NONE, ask_at=None)
            ).rowcount

        return self._db.write(run)

    def reconcile(
        self, report: CommitmentReport, reporters: Collection[str], resend_s: float
    ) -> Reconciled | None:
        """Apply a report: what is held, what is sent again, what is given up.

        Only objects that the request named count, and only as long as they wait for it. A negative
        word about an object that was asked about again since is out of date.

        Parameters
        ----------
        report : CommitmentReport
        reporters : collection of str
            The destinations for which the peer may speak.
        resend_s : float
            Pause before an object is sent again; doubled each time.

        Returns
        -------
        Reconciled or None
            None for a transaction that was never begun with one of them.
        """

        def run(connection: Connection) -> Reconciled | None:
            asked = connection.execute(
                select(commitment).where(
                    commitment.c.transaction_uid == report.transaction_uid,
                    commitment.c.destination.in_(reporters),
                )
            ).first()
            if asked is None:
                return None
            if asked.state == TransactionState.REPORTED:
                return Reconciled(asked.destination, is_repeated=True)
            connection.execute(
                update(commitment)
                .where(commitment.c.id == asked.id)
                .values(state=TransactionState.REPORTED)
            )
            waiting = {
                row.sop_instance_uid: row
                for row in connection.execute(
                    select(delivery, result.c.sop_class_uid, result.c.sop_instance_uid)
                    .join(result, result.c.id == delivery.c.result_id)
                    .join(commitment_delivery, commitment_delivery.c.delivery_id == delivery.c.id)
                    .where(
                        commitment_delivery.c.commitment_id == asked.id,
                        DELIVERY_IS_UNCOMMITTED,
                        delivery.c.state.in_([DeliveryState.SENT, DeliveryState.DEAD]),
                    )
                )
            }
            committed, resent, dead = [], [], []
            for failure in report.failed:
                row = waiting.pop(failure.reference.sop_instance_uid, None)
                if row is None or row.commitment_id != asked.id:
                    continue
                if failure.reason == FailureReason.DUPLICATE_TRANSACTION_UID:
                    continue  # it is about the request: the next one has another UID
                gone = (row.sop_instance_uid, failure.reason)
                if self._failed(connection, row, failure.reason, resend_s):
                    resent.append(gone)
                else:
                    dead.append(gone)
            for reference in report.committed:
                row = waiting.pop(reference.sop_instance_uid, None)
                if row is None or row.sop_class_uid != reference.sop_class_uid:
                    continue
                connection.execute(
                    update(delivery)
                    .where(delivery.c.id == row.id)
                    .values(
                        state=DeliveryState.SENT,
                        commitment=Commitment.COMMITTED,
                        committed_at=self._db.now(),
                        ask_at=None,
                        reason="",
                    )
                )
                committed.append(row.sop_instance_uid)
            return Reconciled(
                asked.destination, False, tuple(committed), tuple(resent), tuple(dead)
            )

        return self._db.write(run)

    def _failed(
        self, connection: Connection, lost: Row[tuple[object, ...]], code: int, resend_s: float
    ) -> bool:
        """Put an object back into the queue, or give it up; True when it is sent again."""
        reason = f"not committed: 0x{code:04X}"
        is_final = code in _PERMANENT or lost.resends >= RESENDS_AT_MOST
        if is_final:
            values: dict[str, object] = {
                "state": DeliveryState.DEAD,
                "commitment": Commitment.REFUSED,
            }
            note_event(
                connection, "delivery-dead", lost.sop_instance_uid, f"{lost.destination}: {reason}"
            )
        else:
            values = {
                "state": DeliveryState.PENDING,
                "commitment": Commitment.NONE,
                "resends": lost.resends + 1,
                "not_before": self._db.now() + resend_s * 2.0**lost.resends,
            }
            note_event(
                connection, "delivery-lost", lost.sop_instance_uid, f"{lost.destination}: {reason}"
            )
        connection.execute(
            update(delivery)
            .where(delivery.c.id == lost.id)
            .values(reason=reason, ask_at=None, **values)
        )
        return not is_final


def _is_whole() -> ColumnElement[bool]:
    """Nothing more of the delivery's unit is on its way to the destination."""
    other = delivery.alias()
    return ~exists().where(
        other.c.job_id == delivery.c.job_id,
        other.c.destination == delivery.c.destination,
        other.c.state.in_([DeliveryState.PENDING, DeliveryState.SENDING]),
    )
