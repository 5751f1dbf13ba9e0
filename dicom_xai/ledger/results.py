"""The rows of what a job made: each result once, and each on its way to its destinations."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, insert, select, update

from dicom_xai.ledger.engine import insert_row, utc_now
from dicom_xai.ledger.schema import DeliveryState, delivery, instance, result
from dicom_xai.study import Job, Result


def put(connection: Connection, claimed: Job, made: Result, now: float) -> None:
    """Make a result known, and queue it for each of its destinations."""
    result_id = _put_result(connection, claimed, made)
    for destination in made.destinations:
        _put_delivery(connection, claimed, result_id, destination, now)


def _put_result(connection: Connection, claimed: Job, made: Result) -> int:
    """Insert a result; the same one again (a forced retry) only gets its new file."""
    known = connection.execute(
        select(result.c.id).where(result.c.sop_instance_uid == made.sop_instance_uid)
    ).first()
    if known is not None:
        connection.execute(
            update(result)
            .where(result.c.id == known.id)
            .values(spool_key=made.spool_key, sha256=made.sha256, size_bytes=made.size_bytes)
        )
        return int(known.id)
    source_id = connection.scalar(
        select(instance.c.id).where(
            instance.c.sop_instance_uid == made.source.sop_instance_uid,
            instance.c.sha256 == made.source.sha256,
        )
    )
    return insert_row(
        connection,
        result,
        job_id=claimed.job_id,
        kind=made.kind,
        ordinal=made.ordinal,
        sop_class_uid=made.sop_class_uid,
        sop_instance_uid=made.sop_instance_uid,
        series_instance_uid=made.series_instance_uid,
        study_instance_uid=made.study_instance_uid,
        transfer_syntax_uid=made.transfer_syntax_uid,
        spool_key=made.spool_key,
        sha256=made.sha256,
        size_bytes=made.size_bytes,
        source_instance_id=source_id,
        created_utc=utc_now(),
    )


def _put_delivery(
    connection: Connection, claimed: Job, result_id: int, destination: str, now: float
) -> None:
    # attempts go on counting: a destination that holds the object may answer 0x0111 to a resend
    values = {
        "state": DeliveryState.PENDING,
        "not_before": now,
        "queued_at": now,
        "reason": "",
    }
    changed = connection.execute(
        update(delivery)
        .where(delivery.c.result_id == result_id, delivery.c.destination == destination)
        .values(values)
    )
    if changed.rowcount == 0:
        connection.execute(
            insert(delivery).values(
                result_id=result_id,
                job_id=claimed.job_id,
                destination=destination,
                rank=claimed.priority.rank,
                **values,
            )
        )


def has_others(connection: Connection, claimed: Job, results: Sequence[Result]) -> bool:
    """Whether the job has a result already where one with another UID was made now."""
    uids = {(made.kind, made.ordinal): made.sop_instance_uid for made in results}
    rows = connection.execute(
        select(result.c.kind, result.c.ordinal, result.c.sop_instance_uid).where(
            result.c.job_id == claimed.job_id
        )
    )
    return any(
        uids.get((row.kind, row.ordinal), row.sop_instance_uid) != row.sop_instance_uid
        for row in rows
    )


def files_of(connection: Connection, job_id: int) -> dict[str, str]:
    """The spool keys of a job's results, by SOP Instance UID."""
    made = connection.execute(
        select(result.c.sop_instance_uid, result.c.spool_key).where(result.c.job_id == job_id)
    )
    return {row.sop_instance_uid: row.spool_key or "" for row in made}
