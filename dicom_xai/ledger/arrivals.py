"""Verbs about what came in: transfers, instances, candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Connection, Row, Select, bindparam, func, insert, literal, select, update

from dicom_xai.ledger import queueing
from dicom_xai.ledger.engine import (
    Database,
    Statement,
    earliest,
    insert_row,
    note_event,
    utc_now,
)
from dicom_xai.ledger.schema import (
    CandidateState,
    Disposition,
    TransferState,
    candidate,
    instance,
    member,
    result,
    transfer,
)
from dicom_xai.study import Candidate, Instance, Per, Priority, Sender, Unit

_KNOWN = Statement(
    select(instance.c.id, instance.c.sha256, instance.c.disposition, instance.c.spool_key).where(
        instance.c.sop_instance_uid == bindparam("uid")
    )
)
_IS_RESULT = Statement(select(result.c.id).where(result.c.sop_instance_uid == bindparam("uid")))
_LAST_GENERATION = Statement(
    select(candidate.c.id, candidate.c.generation, candidate.c.state, candidate.c.first_at)
    .where(
        candidate.c.unit_key == bindparam("wanted_unit"),
        candidate.c.route == bindparam("wanted_route"),
    )
    .order_by(candidate.c.generation.desc())
    .limit(1)
)
_KEEP_WAITING = Statement(
    update(candidate)
    .where(candidate.c.id == bindparam("candidate_id"))
    .values(
        state=CandidateState.WAITING,
        first_at=bindparam("first_at"),
        last_at=bindparam("last_at"),
        fire_at=bindparam("fire_at"),
    )
)
_INSERT_INSTANCE = Statement(
    insert(instance),
    [c.name for c in instance.c if c.name not in ("id", "duplicates")],
)
_INSERT_MEMBER = Statement(insert(member), ["candidate_id", "instance_id"])


class Recorded(StrEnum):
    """What the ledger made of an instance."""

    STORED = "stored"
    DUPLICATE = "duplicate"  #: the same bytes are here already; the new file may go
    RESTORED = "restored"  #: the same bytes were here and are deleted since; the new file stays
    CONFLICT = "conflict"  #: the UID is here with other content; the new file is quarantined
    KNOWN_CONFLICT = "known-conflict"  #: as before, and quarantined already; the new file may go
    OWN = "own"  #: one of our results, come back


@dataclass(frozen=True, slots=True)
class Wanted:
    """A route that wants the unit of an arriving instance."""

    unit: Unit
    route: str
    route_json: str
    model: str
    model_digest: str
    fires_at_once: bool  #: the unit is complete with this instance
    quiet_s: float | None  #: silence that completes it; None where silence means nothing
    max_wait_s: float
    priority: Priority
    budget_s: float


class Arrivals:
    """Everything the receiver tells the ledger.

    Parameters
    ----------
    database : Database
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def open_transfer(self, sender: Sender, lease_s: float) -> int:
        """Note that an association is open; give its id."""

        def run(connection: Connection) -> int:
            now = self._db.now()
            return insert_row(
                connection,
                transfer,
                state=TransferState.OPEN,
                calling_ae_title=sender.calling_ae_title,
                called_ae_title=sender.called_ae_title,
                source_address=sender.source_address,
                listener=sender.listener,
                opened_at=now,
                owner=self._db.owner,
                lease_until=now + lease_s,
            )

        return self._db.write(run)

    def renew_transfers(self, ids: Sequence[int], lease_s: float) -> None:
        """Say that these associations are still open."""

        def run(connection: Connection) -> None:
            connection.execute(
                update(transfer)
                .where(transfer.c.id.in_(ids), transfer.c.state == TransferState.OPEN)
                .values(lease_until=self._db.now() + lease_s)
            )

        if ids:
            self._db.write(run)

    def close_transfer(self, transfer_id: int, *, is_released: bool) -> list[Candidate]:
        """Note that an association ended; give the units that it held and that still wait.

        They are due from now on, so that they go on even if the caller dies before it decides.
        """
        state = TransferState.RELEASED if is_released else TransferState.ABORTED

        def run(connection: Connection) -> list[Candidate]:
            now = self._db.now()
            closed = connection.execute(
                update(transfer)
                .where(transfer.c.id == transfer_id, transfer.c.state == TransferState.OPEN)
                .values(state=state, closed_at=now)
            )
            if closed.rowcount:
                _make_due(connection, [transfer_id], now)
            return _candidates(connection, candidate.c.id.in_(_held_by([transfer_id])))

        return self._db.write(run)

    def lose_transfers(self) -> int:
        """Close the associations whose receiver stopped renewing them; give how many."""

        def run(connection: Connection) -> int:
            now = self._db.now()
            stale = list(
                connection.scalars(
                    update(transfer)
                    .where(transfer.c.state == TransferState.OPEN, transfer.c.lease_until < now)
                    .values(state=TransferState.LOST, closed_at=now)
                    .returning(transfer.c.id)
                )
            )
            if stale:
                _make_due(connection, stale, now)
            return len(stale)

        return self._db.write(run)

    def record(
        self,
        arrival: Instance,
        disposition: Disposition,
        transfer_id: int,
        wanted: Sequence[Wanted],
        trace: str,
    ) -> Recorded:
        """Make an instance known, with the units it belongs to; durable when this returns.

        Parameters
        ----------
        arrival : Instance
            Its file is durable in the spool already.
        disposition : Disposition
            ROUTED, UNROUTED, IGNORED or OWN, as the header says; a UID among our results makes
            it OWN whatever the header says.
        transfer_id : int
        wanted : sequence of Wanted
            The routes that matched; empty unless ROUTED.
        trace : str
            JSON: for each route, why it matched or did not.
        """

        def run(connection: Connection) -> Recorded:
            uid = {"uid": arrival.sop_instance_uid}
            known = _KNOWN.run(connection, uid).fetchall()
            for row_id, sha256, known_as, spool_key in known:
                if sha256 == arrival.sha256:
                    connection.execute(
                        update(instance)
                        .where(instance.c.id == row_id)
                        .values(duplicates=instance.c.duplicates + 1)
                    )
                    if known_as == Disposition.QUARANTINED:
                        return Recorded.KNOWN_CONFLICT
                    if spool_key is not None:
                        return Recorded.DUPLICATE
                    # Success promises that it is here again; what was made of it stays made
                    connection.execute(
                        update(instance)
                        .where(instance.c.id == row_id)
                        .values(spool_key=arrival.spool_key, received_utc=utc_now())
                    )
                    return Recorded.RESTORED
            if known:
                _insert_instance(
                    connection, self._db, arrival, Disposition.QUARANTINED, transfer_id, trace
                )
                note_event(connection, "instance-conflict", arrival.sop_instance_uid)
                return Recorded.CONFLICT
            is_ours = _IS_RESULT.run(connection, uid).fetchone() is not None
            final = Disposition.OWN if is_ours else disposition
            instance_id = _insert_instance(connection, self._db, arrival, final, transfer_id, trace)
            if final is Disposition.ROUTED:
                for want in wanted:
                    self._join(connection, want, instance_id)
            return Recorded.OWN if final is Disposition.OWN else Recorded.STORED

        return self._db.write(run)

    def _join(self, connection: Connection, want: Wanted, instance_id: int) -> None:
        """Put an instance into its unit's candidate; open the next generation when it is late."""
        now = self._db.now()
        last = _LAST_GENERATION.run(
            connection, {"wanted_unit": want.unit.key, "wanted_route": want.route}
        ).fetchone()
        last_id, generation, state, last_first_at = last or (0, -1, CandidateState.READY, now)
        if state == CandidateState.READY:
            candidate_id = _insert_candidate(connection, want, generation + 1, now)
            if last is not None:
                # an amendment is about the whole unit, not about the late instance alone
                connection.execute(
                    insert(member).from_select(
                        ["candidate_id", "instance_id"],
                        select(literal(candidate_id), member.c.instance_id).where(
                            member.c.candidate_id == last_id
                        ),
                    )
                )
        else:
            candidate_id = last_id
            first_at = now if state == CandidateState.HELD else last_first_at
            _KEEP_WAITING.run(
                connection,
                {
                    "candidate_id": candidate_id,
                    "first_at": first_at,
                    "last_at": now,
                    "fire_at": _fire_at(want, first_at, now),
                },
            )
        _INSERT_MEMBER.run(connection, {"candidate_id": candidate_id, "instance_id": instance_id})
        if want.fires_at_once:
            waiting = _candidates(connection, candidate.c.id == candidate_id)
            if waiting:
                queueing.make_ready(
                    connection, waiting[0], "instance", now, now, want.priority, want.budget_s
                )

    def due(self) -> list[Candidate]:
        """The waiting units whose timers must be looked at now."""
        with self._db.read() as connection:
            due = select(candidate.c.id).where(
                candidate.c.state == CandidateState.WAITING,
                candidate.c.fire_at <= self._db.now(),
            )
            return _candidates(connection, candidate.c.id.in_(due))

    def next_due_at(self) -> float | None:
        """When the next timer runs out, or None when nothing waits."""
        with self._db.read() as connection:
            return earliest(
                connection,
                select(func.min(candidate.c.fire_at)).where(
                    candidate.c.state == CandidateState.WAITING
                ),
            )

    def look_again(self, waiting: Candidate, at: float) -> None:
        """Put off looking at a unit until `at`."""

        def run(connection: Connection) -> None:
            connection.execute(
                update(candidate)
                .where(
                    candidate.c.id == waiting.candidate_id,
                    candidate.c.state == CandidateState.WAITING,
                )
                .values(fire_at=at)
            )

        self._db.write(run)

    def make_ready(
        self,
        waiting: Candidate,
        fired: str,
        ready_at: float,
        priority: Priority,
        budget_s: float,
    ) -> bool:
        """Turn a complete unit into a job; False when it changed meanwhile or must still wait."""

        def run(connection: Connection) -> bool:
            return queueing.make_ready(
                connection, waiting, fired, ready_at, self._db.now(), priority, budget_s
            )

        return self._db.write(run)

    def hold(self, waiting: Candidate, reason: str) -> bool:
        """Keep an incomplete unit until another instance comes; False when it changed meanwhile."""

        def run(connection: Connection) -> bool:
            held = connection.execute(
                update(candidate)
                .where(
                    candidate.c.id == waiting.candidate_id,
                    candidate.c.state == CandidateState.WAITING,
                    candidate.c.last_at == waiting.last_at,
                )
                .values(state=CandidateState.HELD, fired=reason)
            )
            if held.rowcount:
                note_event(connection, "unit-held", waiting.unit.key, reason)
            return held.rowcount == 1

        return self._db.write(run)


def _held_by(transfers: Sequence[int]) -> Select[tuple[int]]:
    """The candidates that have an instance of these associations."""
    return (
        select(member.c.candidate_id)
        .join(instance, instance.c.id == member.c.instance_id)
        .where(instance.c.transfer_id.in_(transfers))
    )


def _make_due(connection: Connection, transfers: Sequence[int], now: float) -> None:
    connection.execute(
        update(candidate)
        .where(
            candidate.c.id.in_(_held_by(transfers)),
            candidate.c.state == CandidateState.WAITING,
        )
        .values(fire_at=now)
    )


def _fire_at(want: Wanted, first_at: float, last_at: float) -> float:
    """When a unit's timers must be looked at, unless something else happens first."""
    latest = first_at + want.max_wait_s
    return latest if want.quiet_s is None else min(latest, last_at + want.quiet_s)


def _insert_instance(
    connection: Connection,
    database: Database,
    arrival: Instance,
    disposition: Disposition,
    transfer_id: int,
    trace: str,
) -> int:
    row = {
        "sop_instance_uid": arrival.sop_instance_uid,
        "sop_class_uid": arrival.sop_class_uid,
        "series_instance_uid": arrival.series_instance_uid,
        "study_instance_uid": arrival.study_instance_uid,
        "transfer_syntax_uid": arrival.transfer_syntax_uid,
        "spool_key": arrival.spool_key,
        "sha256": arrival.sha256,
        "size_bytes": arrival.size_bytes,
        "calling_ae_title": arrival.sender.calling_ae_title,
        "called_ae_title": arrival.sender.called_ae_title,
        "source_address": arrival.sender.source_address,
        "store_priority": arrival.sender.priority,
        "listener": arrival.sender.listener,
        "disposition": disposition,
        "transfer_id": transfer_id,
        "received_at": database.now(),
        "received_utc": utc_now(),
        "trace": trace,
    }
    inserted = _INSERT_INSTANCE.run(connection, row).lastrowid
    assert inserted is not None  # of an insert it is set (sqlite3.Cursor.lastrowid)
    return inserted


def _insert_candidate(connection: Connection, want: Wanted, generation: int, now: float) -> int:
    return insert_row(
        connection,
        candidate,
        unit_key=want.unit.key,
        per=want.unit.per,
        study_instance_uid=want.unit.study_instance_uid,
        series_instance_uid=want.unit.series_instance_uid,
        sop_instance_uid=want.unit.sop_instance_uid,
        route=want.route,
        route_json=want.route_json,
        model=want.model,
        model_digest=want.model_digest,
        generation=generation,
        state=CandidateState.WAITING,
        first_at=now,
        last_at=now,
        fire_at=_fire_at(want, now, now),
    )


def _candidates(connection: Connection, condition: object) -> list[Candidate]:
    """Waiting candidates with what is known of the associations that brought their instances."""
    rows = connection.execute(
        select(
            candidate,
            func.sum(transfer.c.state == TransferState.OPEN).label("open_transfers"),
            func.max(transfer.c.closed_at).label("last_end_at"),
            func.sum(transfer.c.state.in_([TransferState.ABORTED, TransferState.LOST])).label(
                "abnormal_ends"
            ),
        )
        .join(member, member.c.candidate_id == candidate.c.id)
        .join(instance, instance.c.id == member.c.instance_id)
        .join(transfer, transfer.c.id == instance.c.transfer_id)
        .where(condition, candidate.c.state == CandidateState.WAITING)  # type: ignore[arg-type]
        .group_by(candidate.c.id)
    )
    return [_candidate(row) for row in rows]


def _candidate(row: Row[tuple[object, ...]]) -> Candidate:
    return Candidate(
        candidate_id=row.id,
        unit=Unit(
            Per(row.per), row.study_instance_uid, row.series_instance_uid, row.sop_instance_uid
        ),
        route=row.route,
        route_json=row.route_json,
        generation=row.generation,
        first_at=row.first_at,
        last_at=row.last_at,
        open_transfers=int(row.open_transfers),
        last_end_at=row.last_end_at,
        has_abnormal_end=bool(row.abnormal_ends),
    )
