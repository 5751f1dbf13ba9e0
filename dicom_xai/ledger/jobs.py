"""Verbs about work: claim with a lease and a fencing token, finish by compare-and-set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Row, and_, func, insert, or_, select, update

from dicom_xai.ledger.engine import Database, earliest, insert_row, note_event, utc_now
from dicom_xai.ledger.schema import (
    JOB_IS_LIVE,
    CandidateState,
    DeliveryState,
    JobState,
    candidate,
    delivery,
    instance,
    job,
    member,
    result,
)
from dicom_xai.study import (
    Candidate,
    Instance,
    Job,
    Per,
    Priority,
    Purpose,
    Reference,
    Result,
    Sender,
    Unit,
)

#: So long a ready unit waits for the process that has prepared its images.
HOLDER_FIRST_S = 0.1


@dataclass(frozen=True, slots=True)
class Overdue:
    """A unit whose deadline passed, reported once."""

    job_id: int
    route: str
    stage: str


@dataclass(frozen=True, slots=True)
class Incoming:
    """An instance of a unit that waits for more."""

    number: int
    instance: Instance
    priority: Priority  #: the most urgent of the routes that want its units


class Jobs:
    """Everything the worker asks and tells.

    Parameters
    ----------
    database : Database
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def incoming(self, after: int, limit: int) -> list[Incoming]:
        """Instances of units that wait for more, to be prepared by the caller meanwhile.

        A unit's first caller becomes its holder, and `claim` then prefers it for the unit's job.

        Parameters
        ----------
        after : int
            The last number given before; 0 at first.
        limit : int
            At most so many.

        Returns
        -------
        list of Incoming
            By ascending number.
        """

        def run(connection: Connection) -> list[Incoming]:
            newer = (
                select(member.c.candidate_id)
                .where(member.c.instance_id > after, candidate.c.id == member.c.candidate_id)
                .exists()
            )
            connection.execute(
                update(candidate)
                .where(candidate.c.state == CandidateState.WAITING, candidate.c.holder == "", newer)
                .values(holder=self._db.owner)
            )
            is_stat = func.json_extract(candidate.c.route_json, "$.priority") == Priority.STAT
            rows = connection.execute(
                select(instance, func.max(is_stat).label("is_stat"))
                .join(member, member.c.instance_id == instance.c.id)
                .join(candidate, candidate.c.id == member.c.candidate_id)
                .where(
                    instance.c.id > after,
                    candidate.c.holder == self._db.owner,
                    candidate.c.state == CandidateState.WAITING,
                )
                .group_by(instance.c.id)
                .order_by(instance.c.id)
                .limit(limit)
            )
            return [
                Incoming(
                    row.id, instance_of(row), Priority.STAT if row.is_stat else Priority.ROUTINE
                )
                for row in rows
            ]

        return self._db.write(run)

    def claim(
        self, lease_s: float, *, only: Priority | None = None, like: Job | None = None
    ) -> Job | None:
        """Take the most urgent job: STAT before routine, then what was not tried yet, then the
        earliest deadline: a job that ends its worker each time holds up none but itself.

        A job whose lease ran out counts as queued; `attempts` tells how often that happened. One
        whose images another process has prepared is left to that one for `HOLDER_FIRST_S`.

        Parameters
        ----------
        lease_s : float
        only : Priority, optional
            Nothing of another priority.
        like : Job, optional
            Nothing of another route, model, purpose, priority or level.
        """

        def run(connection: Connection) -> Job | None:
            now = self._db.now()
            free = or_(
                and_(job.c.state == JobState.QUEUED, job.c.not_before <= now),
                and_(job.c.state == JobState.RUNNING, job.c.lease_until < now),
            )
            mine = or_(
                job.c.holder.in_(["", self._db.owner]), job.c.ready_at < now - HOLDER_FIRST_S
            )
            wanted = [] if only is None else [job.c.priority == only]
            if like is not None:
                wanted += [
                    job.c.route == like.route,
                    job.c.model_digest == like.model_digest,
                    job.c.purpose == like.purpose,
                    job.c.priority == like.priority,
                    job.c.unit_key.startswith(f"{like.unit.per}:", autoescape=True),
                ]
            row = connection.execute(
                select(job)
                .where(JOB_IS_LIVE, free, mine, *wanted)
                .order_by(job.c.rank, job.c.attempts > 0, job.c.deadline_at)
                .limit(1)
            ).first()
            if row is None:
                return None
            connection.execute(
                update(job)
                .where(job.c.id == row.id)
                .values(
                    state=JobState.RUNNING,
                    token=row.token + 1,
                    attempts=row.attempts + 1,
                    owner=self._db.owner,
                    lease_until=now + lease_s,
                )
            )
            return _job(connection, row)

        return self._db.write(run)

    def next_at(self) -> float | None:
        """When this process can claim a job at the earliest, or None when there is none."""
        holder_first = func.iif(
            job.c.holder.in_(["", self._db.owner]), 0.0, job.c.ready_at + HOLDER_FIRST_S
        )
        free_at = func.iif(job.c.state == JobState.QUEUED, job.c.not_before, job.c.lease_until)
        with self._db.read() as connection:
            return earliest(
                connection, select(func.min(func.max(free_at, holder_first))).where(JOB_IS_LIVE)
            )

    def renew(self, claimed: Job, lease_s: float) -> bool:
        """Keep a claim; False when somebody else has it now."""
        return self._change(claimed, lease_until=self._db.now() + lease_s)

    def fix_explainer(self, claimed: Job, explainer: str) -> bool:
        """Write down the explainer before it runs, so that a retry uses the same one."""
        return self._change(claimed, explainer=explainer)

    def use_model(self, claimed: Job, model_digest: str) -> bool:
        """Move a job to the model that is live now, when its own is gone after a restart."""
        return self._change(claimed, model_digest=model_digest)

    def finish(
        self,
        claimed: Job,
        results: Sequence[Result],
        note: str = "",
        *,
        findings: str = "[]",
        stages: str = "{}",
        amend_because: str = "",
        is_failure: bool = False,
    ) -> bool:
        """Make the results and their deliveries known and end the job, in one transaction.

        Parameters
        ----------
        claimed : Job
        results : sequence of Result
            Their files are durable in the spool.
        note : str
            Why it failed, or what was left out.
        findings, stages : str
            JSON, for the admin's views: what the model said, seconds in each stage.
        amend_because : str
            When not empty, another job of the same unit is queued as an amendment.
        is_failure : bool
            The results are failure notes; the job ends as failed.

        Returns
        -------
        bool
            False when the results were not taken: the claim was lost meanwhile and nothing is
            changed; or an earlier try of the job, before the model or this program changed, gave
            other ones. Those stand, and an amendment is queued.
        """

        def run(connection: Connection) -> bool:
            now = self._db.now()
            if _has_other_results(connection, claimed, results):
                if not self._end_as_it_was(connection, claimed, now):
                    return False
                _queue_amendment(
                    connection, claimed.job_id, now, "another model or program version"
                )
                return False
            ended = connection.execute(
                update(job)
                .where(
                    job.c.id == claimed.job_id,
                    job.c.token == claimed.token,
                    job.c.state == JobState.RUNNING,
                )
                .values(
                    state=JobState.FAILED if is_failure else JobState.DONE,
                    note=note,
                    findings=findings,
                    stages=stages,
                    done_at=now,
                    lease_until=None,
                )
            )
            if ended.rowcount != 1:
                return False
            if not is_failure and not any(made.destinations for made in results):
                # nothing was planned for anybody: there is no delivery whose answer could end it
                connection.execute(
                    update(job)
                    .where(job.c.id == claimed.job_id, job.c.triaged_at.is_(None))
                    .values(triaged_at=now)
                )
            for made in results:
                result_id = _put_result(connection, claimed, made)
                for destination in made.destinations:
                    _put_delivery(connection, claimed, result_id, destination, now)
            if note:
                kind = "job-failed" if is_failure else "job-note"
                note_event(connection, kind, str(claimed.job_id), note)
            if amend_because:
                _queue_amendment(connection, claimed.job_id, now, amend_because)
            return True

        return self._db.write(run)

    def retry_later(self, claimed: Job, delay_s: float, reason: str) -> bool:
        """Give a job back after a transient error; the attempt counts."""
        return self._change(
            claimed,
            state=JobState.QUEUED,
            not_before=self._db.now() + delay_s,
            lease_until=None,
            note=reason,
        )

    def retry(self, job_id: int) -> bool:
        """Queue an ended job again, as an admin asks.

        Where it failed and its note is on its way or there, the answer must amend that note: then
        an amendment is queued instead.

        False when there is none that has ended, or another of its unit and purpose is under way.
        """

        def run(connection: Connection) -> bool:
            row = connection.execute(select(job).where(job.c.id == job_id)).first()
            if row is None or row.state not in (JobState.DONE, JobState.FAILED):
                return False
            has_note = row.state == JobState.FAILED and _earlier_files(connection, job_id)
            purpose = Purpose.AMENDMENT if has_note else row.purpose
            if _has_live_job(connection, row.unit_key, row.route, purpose):
                return False
            if has_note:
                _queue_amendment(connection, job_id, self._db.now(), "retry of a failed job")
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

    def note_overdue(self, claimed: Job) -> bool:
        """Mark a claimed job's deadline as passed; False when noted before, or met before."""

        def run(connection: Connection) -> bool:
            changed = connection.execute(
                update(job)
                .where(
                    job.c.id == claimed.job_id,
                    job.c.overdue_at.is_(None),
                    job.c.triaged_at.is_(None),
                )
                .values(overdue_at=self._db.now())
            )
            return changed.rowcount == 1

        return self._db.write(run)

    def live_model_digests(self) -> set[str]:
        """The models that queued and running jobs were made for."""
        with self._db.read() as connection:
            rows = connection.scalars(select(job.c.model_digest).where(JOB_IS_LIVE).distinct())
            return set(rows)

    @staticmethod
    def _end_as_it_was(connection: Connection, claimed: Job, now: float) -> bool:
        ended = connection.execute(
            update(job)
            .where(
                job.c.id == claimed.job_id,
                job.c.token == claimed.token,
                job.c.state == JobState.RUNNING,
            )
            .values(state=JobState.DONE, done_at=now, lease_until=None)
        )
        return ended.rowcount == 1

    def _change(self, claimed: Job, **values: object) -> bool:
        def run(connection: Connection) -> bool:
            changed = connection.execute(
                update(job)
                .where(
                    job.c.id == claimed.job_id,
                    job.c.token == claimed.token,
                    job.c.state == JobState.RUNNING,
                )
                .values(values)
            )
            return changed.rowcount == 1

        return self._db.write(run)


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
    if _has_live_job(connection, row.unit_key, row.route, Purpose.TRIAGE, Purpose.AMENDMENT):
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
            rank=list(Priority).index(priority),
            state=JobState.QUEUED,
            not_before=not_before,
            ready_at=ready_at,
            deadline_at=deadline_at,
            created_at=datetime.now().astimezone().strftime("%Y%m%d%H%M%S.%f%z"),
        )
    )


def _queue_amendment(connection: Connection, job_id: int, now: float, reason: str) -> None:
    """Queue a better answer to the unit of an ended job, unless one is on its way."""
    row = connection.execute(select(job).where(job.c.id == job_id)).one()
    if _has_live_job(connection, row.unit_key, row.route, Purpose.AMENDMENT):
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


def _next_generation(connection: Connection, unit_key: str, route: str) -> int:
    """0 for the first job about a unit, then 1, 2, ..."""
    latest = connection.scalar(
        select(func.max(job.c.generation)).where(job.c.unit_key == unit_key, job.c.route == route)
    )
    return 0 if latest is None else int(latest) + 1


def _has_live_job(connection: Connection, unit_key: str, route: str, *purposes: str) -> bool:
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


def _job(connection: Connection, row: Row[tuple[object, ...]]) -> Job:
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
        token=row.token + 1,
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
        attempts=row.attempts + 1,
        instances=tuple(instance_of(item) for item in instances),
        predecessors=tuple(
            Reference(
                item.sop_class_uid, item.sop_instance_uid, item.series_instance_uid, item.kind
            )
            for item in latest
        ),
        earlier_files=_earlier_files(connection, row.id),
    )


def _earlier_files(connection: Connection, job_id: int) -> dict[str, str]:
    """The spool keys of a job's results, by SOP Instance UID."""
    made = connection.execute(
        select(result.c.sop_instance_uid, result.c.spool_key).where(result.c.job_id == job_id)
    )
    return {row.sop_instance_uid: row.spool_key or "" for row in made}


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


def _has_other_results(connection: Connection, claimed: Job, results: Sequence[Result]) -> bool:
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
                rank=list(Priority).index(claimed.priority),
                **values,
            )
        )
