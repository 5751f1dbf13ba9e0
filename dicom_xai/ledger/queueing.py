"""How a job comes to be: a complete unit, or a better answer to one that was answered."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, func, insert, select, update

from dicom_xai.ledger.engine import note_event
from dicom_xai.ledger.schema import JOB_IS_LIVE, CandidateState, JobState, candidate, job
from dicom_xai.study import Candidate, Priority, Purpose


def make_ready(
    connection: Connection,
    waiting: Candidate,
    fired: str,
    ready_at: float,
    now: float,
    priority: Priority,
    budget_s: float,
) -> bool:
    """Turn a waiting candidate into a job; False when it changed or an older job still runs."""
    row = connection.execute(
        select(candidate).where(
            candidate.c.id == waiting.candidate_id,
            candidate.c.state == CandidateState.WAITING,
            candidate.c.last_at == waiting.last_at,
        )
    ).first()
    if row is None:
        return False
    purpose = Purpose.TRIAGE if row.generation == 0 else Purpose.AMENDMENT
    # an amendment references what it amends: the earlier answer must be there first
    if has_live_job(connection, row.unit_key, row.route, Purpose.TRIAGE, Purpose.AMENDMENT):
        return False
    connection.execute(
        update(candidate)
        .where(candidate.c.id == row.id)
        .values(state=CandidateState.READY, fired=fired)
    )
    _insert_job(
        connection,
        {
            "candidate_id": row.id,
            "unit_key": row.unit_key,
            "route": row.route,
            "model": row.model,
            "model_digest": row.model_digest,
            "holder": row.holder,
            "first_byte_at": row.first_at,
            "last_byte_at": row.last_at,
        },
        purpose=purpose,
        generation=_next_generation(connection, row.unit_key, row.route),
        priority=priority,
        ready_at=ready_at,
        deadline_at=ready_at + budget_s,
        not_before=now,
    )
    note_event(connection, "unit-ready", row.unit_key, f"{row.route}: {fired}")
    return True


def queue_amendment(connection: Connection, job_id: int, now: float, reason: str) -> None:
    """Queue a better answer to the unit of an ended job, unless one is on its way."""
    row = connection.execute(select(job).where(job.c.id == job_id)).one()
    if has_live_job(connection, row.unit_key, row.route, Purpose.AMENDMENT):
        return
    names = ("candidate_id", "unit_key", "route", "model", "model_digest")
    copied: dict[str, object] = {name: getattr(row, name) for name in names}
    copied |= {"first_byte_at": row.first_byte_at, "last_byte_at": row.last_byte_at}
    _insert_job(
        connection,
        copied,
        purpose=Purpose.AMENDMENT,
        generation=_next_generation(connection, row.unit_key, row.route),
        priority=Priority.ROUTINE,
        ready_at=now,
        deadline_at=now + (row.deadline_at - row.ready_at),
        not_before=now,
    )
    note_event(connection, "amendment-queued", row.unit_key, reason)


def has_live_job(connection: Connection, unit_key: str, route: str, *purposes: str) -> bool:
    """Whether a job of one of these purposes about the unit is queued or runs."""
    return (
        connection.scalar(
            select(job.c.id).where(
                job.c.unit_key == unit_key,
                job.c.route == route,
                job.c.purpose.in_(purposes),
                JOB_IS_LIVE,
            )
        )
        is not None
    )


def _insert_job(
    connection: Connection,
    copied: dict[str, object],
    *,
    purpose: Purpose,
    generation: int,
    priority: Priority,
    ready_at: float,
    deadline_at: float,
    not_before: float,
) -> None:
    connection.execute(
        insert(job).values(
            **copied,
            purpose=purpose,
            generation=generation,
            priority=priority,
            rank=priority.rank,
            state=JobState.QUEUED,
            not_before=not_before,
            ready_at=ready_at,
            deadline_at=deadline_at,
            created_at=datetime.now().astimezone().strftime("%Y%m%d%H%M%S.%f%z"),
        )
    )


def _next_generation(connection: Connection, unit_key: str, route: str) -> int:
    """0 for the first job about a unit, then 1, 2, ..."""
    latest = connection.scalar(
        select(func.max(job.c.generation)).where(job.c.unit_key == unit_key, job.c.route == route)
    )
    return 0 if latest is None else int(latest) + 1
