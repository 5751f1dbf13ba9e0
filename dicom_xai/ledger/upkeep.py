"""Verbs beside the flow: deadlines, retention, dead processes, the state for metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import (
    Connection,
    Select,
    Table,
    and_,
    delete,
    exists,
    func,
    or_,
    select,
    union_all,
    update,
)

from dicom_xai import processes
from dicom_xai.ledger.claims import QUEUES
from dicom_xai.ledger.engine import Database, earliest, set_meta
from dicom_xai.ledger.schema import (
    DELIVERY_IS_OPEN,
    DELIVERY_IS_UNCOMMITTED,
    JOB_IS_LIVE,
    REPORT_IS_ENDED,
    TRANSFER_IS_OPEN,
    CandidateState,
    Commitment,
    DeliveryState,
    Disposition,
    JobState,
    TransferState,
    candidate,
    commitment,
    commitment_delivery,
    commitment_report,
    delivery,
    instance,
    job,
    member,
    result,
    transfer,
)
from dicom_xai.stages import Stage
from dicom_xai.study import Purpose

#: An orphan younger than this may belong to a transaction under way, even if the clock jumps.
ORPHAN_AGE_S = 86400.0
EXPIRE_AT_MOST = 10_000


@dataclass(frozen=True, slots=True)
class Overdue:
    """A unit whose deadline passed, reported once."""

    job_id: int
    route: str
    stage: str


@dataclass(frozen=True, slots=True)
class Depths:
    """How much waits where, and how long already; seconds of the ledger's clock."""

    rows: Mapping[str, int]
    oldest_s: Mapping[str, float]
    outbox: Mapping[str, int]
    dead: Mapping[str, int]
    uncommitted: Mapping[str, int]
    quarantined: int


@dataclass(frozen=True, slots=True)
class Expired:
    """What retention took out of the ledger; the bytes are the caller's to delete."""

    spool_keys: list[str]
    unanswered_units: int  #: failed or held ones that can no longer be tried again


class Upkeep:
    """What is nobody's turn in the flow.

    Parameters
    ----------
    database : Database
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def tick(self) -> None:
        """Note that the clock runs, so that it can go on from here after a reboot."""

        def run(connection: Connection) -> None:
            set_meta(connection, "last_now", repr(self._db.now()))
            set_meta(connection, "last_wall", repr(time.time()))

        self._db.write(run)

    def overdue(self) -> list[Overdue]:
        """The triage jobs whose deadline passed since the last call, each reported once.

        Running jobs are left to their worker, which knows the stage; those without a live worker
        are reported as queued.
        """

        ended = (JobState.DONE, JobState.FAILED)

        def run(connection: Connection) -> list[Overdue]:
            now = self._db.now()
            rows = connection.execute(
                update(job)
                .where(
                    job.c.deadline_at < now,
                    job.c.triaged_at.is_(None),
                    job.c.overdue_at.is_(None),
                    job.c.purpose == Purpose.TRIAGE,
                    or_(job.c.state != JobState.RUNNING, job.c.lease_until < now),
                )
                .values(overdue_at=now)
                .returning(job.c.id, job.c.route, job.c.state)
            )
            return [
                Overdue(row.id, row.route, Stage.OUTBOX if row.state in ended else Stage.QUEUE)
                for row in rows
            ]

        return self._db.write(run)

    def next_deadline_at(self) -> float | None:
        """When the next deadline passes."""
        with self._db.read() as connection:
            return earliest(
                connection,
                select(func.min(job.c.deadline_at)).where(
                    job.c.triaged_at.is_(None),
                    job.c.overdue_at.is_(None),
                    job.c.purpose == Purpose.TRIAGE,
                ),
            )

    def waiting(self) -> int:
        """How many units and jobs are not done."""
        with self._db.read() as connection:
            units = connection.scalar(
                select(func.count())
                .select_from(candidate)
                .where(candidate.c.state == CandidateState.WAITING)
            )
            jobs = connection.scalar(select(func.count()).select_from(job).where(JOB_IS_LIVE))
        return int(units or 0) + int(jobs or 0)

    def stored_bytes(self) -> int:
        """What the files of all instances and results take."""
        with self._db.read() as connection:
            return sum(
                int(
                    connection.scalar(
                        select(func.sum(table.c.size_bytes)).where(table.c.spool_key.is_not(None))
                    )
                    or 0
                )
                for table in (instance, result)
            )

    def depths(self) -> Depths:
        """Queue lengths and ages."""
        now = self._db.now()
        with self._db.read() as connection:
            waiting = connection.execute(
                select(func.count(), func.min(candidate.c.first_at)).where(
                    candidate.c.state == CandidateState.WAITING
                )
            ).one()
            held = connection.scalar(
                select(func.count()).where(candidate.c.state == CandidateState.HELD)
            )
            jobs = {
                row.state: (row.n, row.oldest)
                for row in connection.execute(
                    select(
                        job.c.state,
                        func.count().label("n"),
                        func.min(job.c.ready_at).label("oldest"),
                    )
                    .where(JOB_IS_LIVE)
                    .group_by(job.c.state)
                )
            }
            failed = connection.scalar(
                select(func.count()).select_from(job).where(job.c.state == JobState.FAILED)
            )
            open_by_destination = connection.execute(
                select(
                    delivery.c.destination,
                    func.count().label("n"),
                    func.min(delivery.c.queued_at).label("oldest"),
                )
                .where(DELIVERY_IS_OPEN)
                .group_by(delivery.c.destination)
            ).all()
            dead = connection.execute(
                select(delivery.c.destination, func.count().label("n"))
                .where(delivery.c.state == DeliveryState.DEAD)
                .group_by(delivery.c.destination)
            ).all()
            uncommitted = connection.execute(
                select(delivery.c.destination, func.count().label("n"))
                .where(DELIVERY_IS_UNCOMMITTED)
                .group_by(delivery.c.destination)
            ).all()
            quarantined = connection.scalar(
                select(func.count()).where(instance.c.disposition == Disposition.QUARANTINED)
            )
        outbox = {row.destination: int(row.n) for row in open_by_destination}
        oldest_outbox = min((row.oldest for row in open_by_destination), default=now)
        queued = jobs.get(JobState.QUEUED, (0, now))
        running = jobs.get(JobState.RUNNING, (0, now))
        return Depths(
            rows={
                "waiting": int(waiting[0]),
                "held": int(held or 0),
                "queued": queued[0],
                "running": running[0],
                "failed": int(failed or 0),
                "outbox": sum(outbox.values()),
            },
            oldest_s={
                "waiting": now - waiting[1] if waiting[0] else 0.0,
                "queued": now - queued[1],
                "running": now - running[1],
                "outbox": now - oldest_outbox,
            },
            outbox=outbox,
            dead={row.destination: int(row.n) for row in dead},
            uncommitted={row.destination: int(row.n) for row in uncommitted},
            quarantined=int(quarantined or 0),
        )

    def release_dead(self) -> int:
        """End the leases of processes of this host that are gone; give how many claims that frees.

        A lease would run out by itself; this saves the wait after a crash.
        """

        def run(connection: Connection) -> int:
            freed = 0
            for table, state, is_open in (
                (transfer, TransferState.OPEN, TRANSFER_IS_OPEN),
                *((queue.table, queue.taken, queue.is_open) for queue in QUEUES),
            ):
                owners = connection.scalars(
                    select(table.c.owner)
                    .where(is_open, table.c.state == state, table.c.lease_until > 0)
                    .distinct()
                ).all()
                dead = [owner for owner in owners if not processes.is_alive(owner)]
                if dead:
                    freed += connection.execute(
                        update(table)
                        .where(is_open, table.c.state == state, table.c.owner.in_(dead))
                        .values(lease_until=0.0)
                    ).rowcount
            return freed

        return self._db.write(run)

    def expire(self, keep_days: float, keep_failed_days: float) -> Expired:
        """Forget the bytes that nobody needs any more, and requests for promises that are over.

        A result may go when it is older than `keep_days` and, everywhere, sent (and committed to,
        where that is wanted), skipped or never to be sent. An instance may go when it is as old and
        no unit that waits or runs, and no object still to be sent, needs it; one of a unit that
        failed or is held not before it is older than `keep_failed_days`. The hashes stay in the
        ledger. Requests for storage commitment go `keep_days` after they were made, ours not while
        an object that they named waits for a promise, others' not before they are reported or given
        up. At most `EXPIRE_AT_MOST` of each go at once, the oldest first, so that nobody waits long
        for the database.
        """
        now = datetime.now(UTC)
        before, long_before = (
            (now - timedelta(days=days)).isoformat(timespec="microseconds")
            for days in (keep_days, keep_failed_days)
        )
        # bytes that a destination has not committed to may have to be sent again
        unsent = or_(
            delivery.c.state.not_in([DeliveryState.SENT, DeliveryState.SKIPPED]),
            delivery.c.commitment == Commitment.WANTED,
        )
        is_unanswered = or_(
            candidate.c.state == CandidateState.HELD, job.c.state == JobState.FAILED
        )

        def run(connection: Connection) -> Expired:
            results = _release(
                connection,
                select(result.c.id)
                .where(
                    result.c.spool_key.is_not(None),
                    result.c.created_utc < before,
                    ~exists().where(delivery.c.result_id == result.c.id, unsent),
                )
                .order_by(result.c.created_utc),
                result,
            )
            needed = (
                select(member.c.instance_id)
                .join(candidate, candidate.c.id == member.c.candidate_id)
                .outerjoin(job, job.c.candidate_id == candidate.c.id)
                .where(
                    member.c.instance_id == instance.c.id,
                    or_(
                        candidate.c.state == CandidateState.WAITING,
                        job.c.state.in_([JobState.QUEUED, JobState.RUNNING]),
                        exists().where(delivery.c.job_id == job.c.id, unsent),
                        and_(is_unanswered, instance.c.received_utc >= long_before),
                    ),
                )
            )
            instances = _release(
                connection,
                select(instance.c.id)
                .where(
                    instance.c.spool_key.is_not(None),
                    instance.c.received_utc < before,
                    ~needed.exists(),
                )
                .order_by(instance.c.received_utc),
                instance,
            )
            unanswered = connection.execute(
                select(candidate.c.id)
                .distinct()
                .join(member, member.c.candidate_id == candidate.c.id)
                .outerjoin(job, job.c.candidate_id == candidate.c.id)
                .where(member.c.instance_id.in_(list(instances)), is_unanswered)
            ).all()
            _forget_our_requests(connection, before)
            _forget_others_requests(connection, before)
            return Expired([*results.values(), *instances.values()], len(unanswered))

        return self._db.write(run)

    def is_known_key(self, key: str) -> bool:
        """Whether an instance or a result owns these bytes."""
        with self._db.read() as connection:
            found = connection.scalar(
                select(func.count()).select_from(
                    union_all(
                        select(instance.c.id).where(instance.c.spool_key == key),
                        select(result.c.id).where(result.c.spool_key == key),
                    ).subquery()
                )
            )
        return bool(found)


def _release(connection: Connection, expired: Select[tuple[int]], table: Table) -> dict[int, str]:
    """Take the spool keys off the expired rows of a table and give them by row."""
    rows = connection.execute(
        select(table.c.id, table.c.spool_key).where(table.c.id.in_(expired.limit(EXPIRE_AT_MOST)))
    ).all()
    keys = {int(row.id): str(row.spool_key) for row in rows}
    connection.execute(update(table).where(table.c.id.in_(list(keys))).values(spool_key=None))
    return keys


def _forget_our_requests(connection: Connection, before: str) -> None:
    waits = (
        select(delivery.c.id)
        .join(commitment_delivery, commitment_delivery.c.delivery_id == delivery.c.id)
        .where(
            commitment_delivery.c.commitment_id == commitment.c.id,
            delivery.c.commitment == Commitment.WANTED,
        )
    )
    over = connection.scalars(
        select(commitment.c.id)
        .where(commitment.c.asked_utc < before, ~waits.exists())
        .order_by(commitment.c.asked_utc)
        .limit(EXPIRE_AT_MOST)
    ).all()
    named = select(commitment_delivery.c.delivery_id).where(
        commitment_delivery.c.commitment_id.in_(over)
    )
    # a later request may get the same number
    connection.execute(
        update(delivery)
        .where(delivery.c.id.in_(named), delivery.c.commitment_id.in_(over))
        .values(commitment_id=None)
    )
    connection.execute(
        delete(commitment_delivery).where(commitment_delivery.c.commitment_id.in_(over))
    )
    connection.execute(delete(commitment).where(commitment.c.id.in_(over)))


def _forget_others_requests(connection: Connection, before: str) -> None:
    over = (
        select(commitment_report.c.id)
        .where(REPORT_IS_ENDED, commitment_report.c.requested_utc < before)
        .order_by(commitment_report.c.requested_utc)
        .limit(EXPIRE_AT_MOST)
    )
    connection.execute(delete(commitment_report).where(commitment_report.c.id.in_(over)))
