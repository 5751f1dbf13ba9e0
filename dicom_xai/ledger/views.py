"""What people ask: jobs, deliveries, promises, what is quarantined, the history, and why a study
went as it did.

Lists for a person, at most some hundreds of rows; they may read a whole table, which no verb of
the flow does.
"""

from __future__ import annotations

from sqlalchemy import Connection, Select, and_, or_, select

from dicom_xai.ledger.engine import Database
from dicom_xai.ledger.schema import (
    Disposition,
    candidate,
    commitment,
    commitment_report,
    delivery,
    event,
    instance,
    job,
    member,
    result,
)


class Views:
    """What the ledger shows to people.

    Parameters
    ----------
    database : Database
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def why(self, uid: str) -> list[dict[str, object]]:
        """Everything known about a study, series, SOP instance or result, oldest first."""
        with self._db.read() as connection:
            instances = _rows(
                connection,
                select(
                    instance.c.id,
                    instance.c.sop_instance_uid,
                    instance.c.series_instance_uid,
                    instance.c.disposition,
                    instance.c.received_utc,
                    instance.c.duplicates,
                    instance.c.trace,
                ).where(
                    or_(
                        instance.c.study_instance_uid == uid,
                        instance.c.series_instance_uid == uid,
                        instance.c.sop_instance_uid == uid,
                    )
                ),
            )
            units = _rows(
                connection,
                select(
                    candidate.c.unit_key,
                    candidate.c.route,
                    candidate.c.state,
                    candidate.c.fired,
                    job.c.id.label("job"),
                    job.c.state.label("job_state"),
                    job.c.purpose,
                    job.c.findings,
                    job.c.note,
                )
                .outerjoin(job, job.c.candidate_id == candidate.c.id)
                .where(
                    candidate.c.id.in_(
                        select(member.c.candidate_id).where(
                            member.c.instance_id.in_([row["id"] for row in instances])
                        )
                    )
                ),
            )
            deliveries = _rows(
                connection,
                select(
                    result.c.kind,
                    result.c.sop_instance_uid,
                    delivery.c.id.label("delivery"),
                    delivery.c.destination,
                    delivery.c.state,
                    delivery.c.attempts,
                    delivery.c.commitment,
                    delivery.c.reason,
                )
                .join(delivery, delivery.c.result_id == result.c.id)
                .where(
                    or_(
                        result.c.job_id.in_([row["job"] for row in units if row["job"]]),
                        result.c.sop_instance_uid == uid,
                    )
                ),
            )
        return [*instances, *units, *deliveries]

    def study(self, study_instance_uid: str) -> list[dict[str, object]]:
        """The jobs of one study, oldest first, with what they found and how long each part took."""
        query = (
            select(
                job.c.id,
                job.c.route,
                job.c.model,
                job.c.purpose,
                job.c.state,
                job.c.note,
                job.c.findings,
                job.c.explainer,
                job.c.stages,
                (job.c.triaged_at - job.c.done_at).label("deliver_s"),
                (job.c.triaged_at - job.c.ready_at).label("triage_s"),
                (job.c.deadline_at - job.c.ready_at).label("budget_s"),
            )
            .join(candidate, candidate.c.id == job.c.candidate_id)
            .where(candidate.c.study_instance_uid == study_instance_uid)
            .order_by(job.c.id)
        )
        with self._db.read() as connection:
            return _rows(connection, query)

    def jobs(self, states: tuple[str, ...] = ()) -> list[dict[str, object]]:
        """Jobs in these states (all when empty), newest first, at most 200."""
        query = select(
            job.c.id,
            job.c.route,
            job.c.model,
            job.c.purpose,
            job.c.priority,
            job.c.state,
            job.c.attempts,
            job.c.note,
            (job.c.triaged_at - job.c.ready_at).label("triage_s"),
        ).order_by(job.c.id.desc())
        if states:
            query = query.where(job.c.state.in_(states))
        with self._db.read() as connection:
            return _rows(connection, query.limit(200))

    def deliveries(self, states: tuple[str, ...] = ()) -> list[dict[str, object]]:
        """Deliveries in these states (all when empty), newest first, at most 200."""
        query = (
            select(
                delivery.c.id,
                delivery.c.destination,
                result.c.kind,
                result.c.sop_instance_uid,
                delivery.c.state,
                delivery.c.attempts,
                delivery.c.status,
                delivery.c.commitment,
                delivery.c.reason,
            )
            .join(result, result.c.id == delivery.c.result_id)
            .order_by(delivery.c.id.desc())
        )
        if states:
            query = query.where(delivery.c.state.in_(states))
        with self._db.read() as connection:
            return _rows(connection, query.limit(200))

    def quarantined(self) -> list[dict[str, object]]:
        """What came under a known UID with other content, newest first, at most 200.

        `first_*` tell of the content that the UID stands for.
        """
        first = instance.alias()
        query = (
            select(
                instance.c.received_utc,
                instance.c.sop_instance_uid,
                instance.c.calling_ae_title,
                instance.c.source_address,
                first.c.received_utc.label("first_received_utc"),
                first.c.calling_ae_title.label("first_calling_ae_title"),
            )
            .outerjoin(
                first,
                and_(
                    first.c.sop_instance_uid == instance.c.sop_instance_uid,
                    first.c.disposition != Disposition.QUARANTINED,
                ),
            )
            .where(instance.c.disposition == Disposition.QUARANTINED)
            .order_by(instance.c.id.desc())
        )
        with self._db.read() as connection:
            return _rows(connection, query.limit(200))

    def events(self, limit: int = 50) -> list[dict[str, object]]:
        """The history's newest lines."""
        with self._db.read() as connection:
            return _rows(connection, select(event).order_by(event.c.id.desc()).limit(limit))

    def commitments(self) -> list[dict[str, object]]:
        """The newest requests, ours and others', at most 200 of each."""
        ours = select(
            commitment.c.id,
            commitment.c.asked_utc.label("at_utc"),
            commitment.c.destination.label("peer"),
            commitment.c.transaction_uid,
            commitment.c.state,
            commitment.c.reason,
        ).order_by(commitment.c.id.desc())
        others = select(
            commitment_report.c.id,
            commitment_report.c.requested_utc.label("at_utc"),
            commitment_report.c.ae_title.label("peer"),
            commitment_report.c.transaction_uid,
            commitment_report.c.state,
            commitment_report.c.reason,
        ).order_by(commitment_report.c.id.desc())
        with self._db.read() as connection:
            return [
                {"asked": who, **dict(row)}
                for who, query in (("by us", ours), ("of us", others))
                for row in connection.execute(query.limit(200)).mappings()
            ]


def _rows(connection: Connection, query: Select[tuple[object, ...]]) -> list[dict[str, object]]:
    return [dict(row) for row in connection.execute(query).mappings()]
