"""Verbs about work: claim with a lease and a fencing token, finish by compare-and-set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, func, or_, select, update

from dicom_xai.ledger.claims import JOBS
from dicom_xai.ledger.engine import Database, earliest, note_event
from dicom_xai.ledger.queueing import queue_amendment
from dicom_xai.ledger.results import has_others, put
from dicom_xai.ledger.rows import instance_of, job_of
from dicom_xai.ledger.schema import (
    JOB_IS_LIVE,
    CandidateState,
    JobState,
    candidate,
    instance,
    job,
    member,
)
from dicom_xai.study import Instance, Job, Priority, Result

#: So long a ready unit waits for the process that has prepared its images.
HOLDER_FIRST_S = 0.1
#: The note of a job whose claim was not ended by its holder.
NO_WORD = "its worker ended without a word"


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
        """Take the most urgent job: STAT first, then what was not tried yet, then by deadline.

        So a job that ends its worker each time holds up none but itself.
        A job whose lease ran out counts as queued; `attempts` tells how often that happened, and
        how often it was given back for what would not pass by itself; `note` is the last reason.
        One whose images another process has prepared is left to that one for `HOLDER_FIRST_S`.

        Parameters
        ----------
        lease_s : float
        only : Priority, optional
            Nothing of another priority.
        like : Job, optional
            Nothing of another route, model, purpose, priority or level, and nothing that used up
            an attempt.
        """

        def run(connection: Connection) -> Job | None:
            now = self._db.now()
            mine = or_(
                job.c.holder.in_(["", self._db.owner]), job.c.ready_at < now - HOLDER_FIRST_S
            )
            wanted = [JOBS.is_free(now), mine]
            if only is not None:
                wanted.append(job.c.rank == only.rank)
            if like is not None:
                wanted += [
                    job.c.route == like.route,
                    job.c.model_digest == like.model_digest,
                    job.c.purpose == like.purpose,
                    job.c.priority == like.priority,
                    job.c.attempts == 0,  # one that may have ended its worker is tried alone
                    job.c.unit_key.startswith(f"{like.unit.per}:", autoescape=True),
                ]
            was_tried = or_(job.c.attempts > 0, job.c.note != "")
            order = (job.c.rank, was_tried, job.c.deadline_at)
            note = func.iif(job.c.state == JobState.RUNNING, NO_WORD, job.c.note)
            row = JOBS.claim(connection, self._db, lease_s, *wanted, order=order, note=note)
            return None if row is None else job_of(connection, row)

        return self._db.write(run)

    def next_at(self, *, only: Priority | None = None) -> float | None:
        """When this process can claim a job at the earliest, or None when there is none.

        A look costs a fraction of a `claim`, which writes whether it finds one or not.

        Parameters
        ----------
        only : Priority, optional
            No job of another priority.
        """
        wanted = [JOB_IS_LIVE] if only is None else [JOB_IS_LIVE, job.c.rank == only.rank]
        holder_first = func.iif(
            job.c.holder.in_(["", self._db.owner]), 0.0, job.c.ready_at + HOLDER_FIRST_S
        )
        claimable_at = func.max(JOBS.free_at(), holder_first)
        with self._db.read() as connection:
            return earliest(connection, select(func.min(claimable_at)).where(*wanted))

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
            if has_others(connection, claimed, results):
                if _change(connection, claimed, state=JobState.DONE, done_at=now, lease_until=None):
                    reason = "another model or program version"
                    queue_amendment(connection, claimed.job_id, now, reason)
                return False
            if not _change(
                connection,
                claimed,
                state=JobState.FAILED if is_failure else JobState.DONE,
                note=note,
                findings=findings,
                stages=stages,
                done_at=now,
                lease_until=None,
            ):
                return False
            if not is_failure and not any(made.destinations for made in results):
                # nothing was planned for anybody: there is no delivery whose answer could end it
                connection.execute(
                    update(job)
                    .where(job.c.id == claimed.job_id, job.c.triaged_at.is_(None))
                    .values(triaged_at=now)
                )
            for made in results:
                put(connection, claimed, made, now)
            if note:
                kind = "job-failed" if is_failure else "job-note"
                note_event(connection, kind, str(claimed.job_id), note)
            if amend_because:
                queue_amendment(connection, claimed.job_id, now, amend_because)
            return True

        return self._db.write(run)

    def retry_later(
        self, claimed: Job, delay_s: float, reason: str, *, is_counted: bool = True
    ) -> bool:
        """Give a job back, to be tried again; False when somebody else has it now.

        Parameters
        ----------
        claimed : Job
        delay_s : float
            Nobody can claim it for so long.
        reason : str
            Kept as its note.
        is_counted : bool
            False takes the attempt back: nothing about the job was at fault.
        """
        return self._change(
            claimed,
            attempts=job.c.attempts if is_counted else job.c.attempts - 1,
            state=JobState.QUEUED,
            not_before=self._db.now() + delay_s,
            lease_until=None,
            note=reason,
        )

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

    def _change(self, claimed: Job, **values: object) -> bool:
        return self._db.write(lambda connection: _change(connection, claimed, **values))


def _change(connection: Connection, claimed: Job, **values: object) -> bool:
    return JOBS.change(connection, claimed.job_id, claimed.token, **values)
