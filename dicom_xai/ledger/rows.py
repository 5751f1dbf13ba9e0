"""Rows as the values that flow."""

from __future__ import annotations

from sqlalchemy import Connection, Row, select

from dicom_xai.ledger.results import files_of
from dicom_xai.ledger.schema import candidate, instance, job, member, result
from dicom_xai.study import Instance, Job, Per, Priority, Purpose, Reference, Sender, Unit


def job_of(connection: Connection, row: Row[tuple[object, ...]]) -> Job:
    """The claimed job with its instances and the results it amends."""
    wanted = connection.execute(select(candidate).where(candidate.c.id == row.candidate_id)).one()
    instances = connection.execute(
        select(instance)
        .join(member, member.c.instance_id == instance.c.id)
        .where(member.c.candidate_id == row.candidate_id)
        .order_by(instance.c.id)
    )
    before = connection.execute(
        select(result)
        .join(job, job.c.id == result.c.job_id)
        .where(
            job.c.unit_key == row.unit_key,
            job.c.route == row.route,
            job.c.generation < row.generation,
        )
        .order_by(job.c.generation.desc(), result.c.kind, result.c.ordinal)
    ).all()
    latest = [item for item in before if item.job_id == before[0].job_id]
    return Job(
        job_id=row.id,
        token=row.token,
        unit=Unit(
            Per(wanted.per),
            wanted.study_instance_uid,
            wanted.series_instance_uid,
            wanted.sop_instance_uid,
        ),
        route=row.route,
        route_json=wanted.route_json,
        model=row.model,
        model_digest=row.model_digest,
        purpose=Purpose(row.purpose),
        generation=row.generation,
        priority=Priority(row.priority),
        ready_at=row.ready_at,
        deadline_at=row.deadline_at,
        created_at=row.created_at,
        explainer=row.explainer,
        attempts=row.attempts,
        instances=tuple(instance_of(item) for item in instances),
        predecessors=tuple(
            Reference(
                item.sop_class_uid, item.sop_instance_uid, item.series_instance_uid, item.kind
            )
            for item in latest
        ),
        earlier_files=files_of(connection, row.id),
        note=row.note,
    )


def instance_of(row: Row[tuple[object, ...]]) -> Instance:
    """A row of the instance table as the value that flows."""
    return Instance(
        sop_instance_uid=row.sop_instance_uid,
        sop_class_uid=row.sop_class_uid,
        series_instance_uid=row.series_instance_uid,
        study_instance_uid=row.study_instance_uid,
        transfer_syntax_uid=row.transfer_syntax_uid,
        spool_key=row.spool_key or "",
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        sender=Sender(
            row.calling_ae_title,
            row.called_ae_title,
            row.source_address,
            row.store_priority,
            row.listener,
        ),
    )
