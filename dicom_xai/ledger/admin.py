"""Verbs of an admin, who overrules what the flow decided; each leaves a line in the history."""

from __future__ import annotations

from sqlalchemy import Connection, select, update

from dicom_xai.ledger.deliveries import holds_all_at
from dicom_xai.ledger.engine import Database, note_event
from dicom_xai.ledger.queueing import has_live_job, queue_amendment
from dicom_xai.ledger.results import files_of
from dicom_xai.ledger.schema import Commitment, DeliveryState, JobState, delivery, job
from dicom_xai.study import Purpose


class Admin:
    """What an admin tells the ledger.

    Parameters
    ----------
    database : Database
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def retry(self, job_id: int) -> bool:
        """Queue an ended job again.

        Where it failed and its note is on its way or there, the answer must amend that note: then
        an amendment is queued instead.

        False when there is none that has ended, or another of its unit and purpose is under way.
        """

        def run(connection: Connection) -> bool:
            row = connection.execute(select(job).where(job.c.id == job_id)).first()
            if row is None or row.state not in (JobState.DONE, JobState.FAILED):
                return False
            has_note = row.state == JobState.FAILED and files_of(connection, job_id)
            purpose = Purpose.AMENDMENT if has_note else row.purpose
            if has_live_job(connection, row.unit_key, row.route, purpose):
                return False
            if has_note:
                queue_amendment(connection, job_id, self._db.now(), "retry of a failed job")
            else:
                connection.execute(
                    update(job)
                    .where(job.c.id == job_id)
                    .values(
                        state=JobState.QUEUED,
                        attempts=0,
                        not_before=self._db.now(),
                        note="",
                        done_at=None,
                    )
                )
            note_event(connection, "job-retried", str(job_id), "asked for")
            return True

        return self._db.write(run)

    def requeue(self, delivery_id: int) -> bool:
        """Send a dead letter again; False when there is none."""

        def run(connection: Connection) -> bool:
            changed = connection.execute(
                update(delivery)
                .where(delivery.c.id == delivery_id, delivery.c.state == DeliveryState.DEAD)
                .values(
                    state=DeliveryState.PENDING,
                    not_before=self._db.now(),
                    commitment=Commitment.NONE,
                    resends=0,
                )
            )
            if changed.rowcount:
                note_event(connection, "delivery-requeued", str(delivery_id), "asked for")
            return changed.rowcount == 1

        return self._db.write(run)

    def skip(self, delivery_id: int) -> bool:
        """Close a delivery that is dead or waits, without sending it; False when there is none.

        Its unit counts as triaged when the destination holds all the others, since the last of
        them came.
        """

        def run(connection: Connection) -> bool:
            closed = connection.execute(
                update(delivery)
                .where(
                    delivery.c.id == delivery_id,
                    delivery.c.state.in_([DeliveryState.DEAD, DeliveryState.PENDING]),
                )
                .values(state=DeliveryState.SKIPPED, commitment=Commitment.NONE)
                .returning(delivery.c.job_id, delivery.c.destination)
            ).first()
            if closed is None:
                return False
            at = holds_all_at(connection, closed.job_id, closed.destination)
            if at is not None:
                connection.execute(
                    update(job)
                    .where(job.c.id == closed.job_id, job.c.triaged_at.is_(None))
                    .values(triaged_at=at)
                )
            note_event(connection, "delivery-skipped", str(delivery_id), "asked for")
            return True

        return self._db.write(run)
