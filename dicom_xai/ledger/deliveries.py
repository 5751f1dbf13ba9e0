"""Verbs about results on their way to a destination."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, func, select, update

from dicom_xai.ledger.claims import DELIVERIES
from dicom_xai.ledger.engine import Database, earliest, note_event
from dicom_xai.ledger.rows import instance_of
from dicom_xai.ledger.schema import (
    DELIVERY_IS_OPEN,
    Commitment,
    DeliveryState,
    delivery,
    instance,
    job,
    result,
)
from dicom_xai.study import Instance


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One object for one destination, claimed."""

    delivery_id: int
    token: int
    job_id: int
    destination: str
    attempts: int
    route: str
    model: str
    kind: str
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    spool_key: str
    sha256: str
    source: Instance
    outbox_s: float  #: seconds it waited since it was queued


@dataclass(frozen=True, slots=True)
class Triaged:
    """A unit whose first destination holds all of its objects."""

    job_id: int
    route: str
    priority: str
    purpose: str
    latency_s: float  #: since ready
    last_byte_s: float
    first_byte_s: float
    is_within_budget: bool


class Deliveries:
    """Everything the sender asks and tells.

    Parameters
    ----------
    database : Database
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def claim(
        self, destination: str, lease_s: float, lease_s_per_mb: float = 0.0
    ) -> Outgoing | None:
        """Take the next object for a destination: STAT before routine, then in order.

        Parameters
        ----------
        destination : str
        lease_s, lease_s_per_mb : float
            How long it is the caller's, and how much longer for each million of its bytes.
        """

        def run(connection: Connection) -> Outgoing | None:
            now = self._db.now()
            row = DELIVERIES.claim(
                connection,
                self._db,
                lease_s,
                delivery.c.destination == destination,
                DELIVERIES.is_free(now),
                order=(delivery.c.rank, delivery.c.id),
            )
            if row is None:
                return None
            made = connection.execute(
                select(result, job.c.route, job.c.model)
                .join(job, job.c.id == result.c.job_id)
                .where(result.c.id == row.result_id)
            ).one()
            longer_s = lease_s_per_mb * made.size_bytes / 1e6
            if longer_s > 1.0:  # most objects are small
                until = now + lease_s + longer_s
                DELIVERIES.change(connection, row.id, row.token, lease_until=until)
            source = connection.execute(
                select(instance).where(instance.c.id == made.source_instance_id)
            ).one()
            return Outgoing(
                delivery_id=row.id,
                token=row.token,
                job_id=row.job_id,
                destination=destination,
                attempts=row.attempts,
                route=made.route,
                model=made.model,
                kind=made.kind,
                sop_class_uid=made.sop_class_uid,
                sop_instance_uid=made.sop_instance_uid,
                transfer_syntax_uid=made.transfer_syntax_uid,
                spool_key=made.spool_key or "",
                sha256=made.sha256,
                source=instance_of(source),
                outbox_s=now - row.queued_at,
            )

        return self._db.write(run)

    def next_at(self, destination: str) -> float | None:
        """When something can be sent at the earliest, or None when nothing waits."""
        with self._db.read() as connection:
            return earliest(
                connection,
                select(func.min(DELIVERIES.free_at())).where(
                    delivery.c.destination == destination, DELIVERY_IS_OPEN
                ),
            )

    def sent(
        self, outgoing: Outgoing, status: int, *, wants_commitment: bool = False
    ) -> Triaged | None:
        """Note an accepted object; gives the unit when this completed its triage.

        With `wants_commitment` the destination is to be asked to commit to it from now on.
        """
        commitment = Commitment.WANTED if wants_commitment else Commitment.NONE

        def run(connection: Connection) -> Triaged | None:
            now = self._db.now()
            values = {
                "status": status,
                "sent_at": now,
                "commitment": commitment,
                "asks": 0,
                "ask_at": now if wants_commitment else None,
            }
            if not _end(connection, outgoing, DeliveryState.SENT, **values):
                return None
            if holds_all_at(connection, outgoing.job_id, outgoing.destination) is None:
                return None
            first = connection.execute(
                update(job)
                .where(job.c.id == outgoing.job_id, job.c.triaged_at.is_(None))
                .values(triaged_at=now)
                .returning(job)
            ).first()
            if first is None:
                return None
            return Triaged(
                job_id=first.id,
                route=first.route,
                priority=first.priority,
                purpose=first.purpose,
                latency_s=now - first.ready_at,
                last_byte_s=now - first.last_byte_at,
                first_byte_s=now - first.first_byte_at,
                is_within_budget=now <= first.deadline_at,
            )

        return self._db.write(run)

    def retry_later(self, outgoing: Outgoing, delay_s: float, reason: str) -> bool:
        """Put an object back after a transient answer."""

        def run(connection: Connection) -> bool:
            return _end(
                connection,
                outgoing,
                DeliveryState.PENDING,
                not_before=self._db.now() + delay_s,
                reason=reason,
            )

        return self._db.write(run)

    def give_up(self, outgoing: Outgoing, reason: str, status: int | None = None) -> bool:
        """Move an object to the dead letters after a permanent answer."""

        def run(connection: Connection) -> bool:
            is_ended = _end(connection, outgoing, DeliveryState.DEAD, reason=reason, status=status)
            if is_ended:
                subject = outgoing.sop_instance_uid
                note_event(
                    connection, "delivery-dead", subject, f"{outgoing.destination}: {reason}"
                )
            return is_ended

        return self._db.write(run)


def holds_all_at(connection: Connection, job_id: int, destination: str) -> float | None:
    """Since when a destination holds all of a job's objects that it will ever get, if it does."""
    row = connection.execute(
        select(
            func.sum(delivery.c.state.not_in([DeliveryState.SENT, DeliveryState.SKIPPED])),
            func.max(delivery.c.sent_at),
        ).where(delivery.c.job_id == job_id, delivery.c.destination == destination)
    ).one()
    return None if row[0] else row[1]


def _end(
    connection: Connection, outgoing: Outgoing, state: DeliveryState, **values: object
) -> bool:
    return DELIVERIES.change(
        connection, outgoing.delivery_id, outgoing.token, state=state, lease_until=None, **values
    )
