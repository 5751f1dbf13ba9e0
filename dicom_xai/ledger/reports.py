"""Verbs about storage commitment where we are asked: the reports that we owe.

A request of somebody is a row before it is answered, and what to report on it is looked up when it
is reported, by whoever claimed it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, and_, func, select, update

from dicom_xai.commitment import CommitmentReport, CommitmentRequest, Failure, FailureReason
from dicom_xai.ledger.claims import REPORTS
from dicom_xai.ledger.engine import Database, earliest, insert_row, utc_now
from dicom_xai.ledger.schema import (
    REPORT_IS_OPEN,
    Disposition,
    ReportState,
    commitment_report,
    instance,
)
from dicom_xai.study import Reference


@dataclass(frozen=True, slots=True)
class Owed:
    """A report to send, claimed."""

    report_id: int
    token: int
    ae_title: str
    called_ae_title: str
    attempts: int
    report: CommitmentReport


class Reports:
    """What receiver and sender ask and tell about reports to others.

    Parameters
    ----------
    database : Database
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def owe(
        self, request: CommitmentRequest, ae_title: str, called_ae_title: str, hold_s: float
    ) -> int:
        """Note a request of somebody; gives the number of the report that is owed for it.

        The same transaction again is reported again. The report is the receiver's to send for
        `hold_s`, on the association of the request; then it is the sender's.
        """
        objects = json.dumps(
            [[each.sop_class_uid, each.sop_instance_uid] for each in request.references]
        )

        def run(connection: Connection) -> int:
            now = self._db.now()
            values = {
                "called_ae_title": called_ae_title,
                "objects": objects,
                "state": ReportState.OWED,
                "attempts": 0,
                "not_before": now + hold_s,
                "requested_at": now,
                "requested_utc": utc_now(),
                "reason": "",
            }
            is_same = and_(
                commitment_report.c.ae_title == ae_title,
                commitment_report.c.transaction_uid == request.transaction_uid,
            )
            known = connection.scalar(select(commitment_report.c.id).where(is_same))
            if known is None:
                return insert_row(
                    connection,
                    commitment_report,
                    transaction_uid=request.transaction_uid,
                    ae_title=ae_title,
                    **values,
                )
            connection.execute(
                update(commitment_report)
                .where(commitment_report.c.id == known)
                .values(token=commitment_report.c.token + 1, **values)
            )
            return int(known)

        return self._db.write(run)

    def claim(
        self, lease_s: float, *, ae_title: str | None = None, report_id: int | None = None
    ) -> Owed | None:
        """Take a report to send it now: one by its number, or the next for an AE title.

        What it says is looked up now: an object that is here under its UID and SOP class, with its
        bytes, is committed.
        """

        def run(connection: Connection) -> Owed | None:
            if report_id is not None:
                wanted = and_(
                    commitment_report.c.id == report_id,
                    commitment_report.c.state == ReportState.OWED,
                )
            else:
                wanted = and_(
                    commitment_report.c.ae_title == ae_title, REPORTS.is_free(self._db.now())
                )
            order = (commitment_report.c.not_before,)
            row = REPORTS.claim(connection, self._db, lease_s, wanted, order=order)
            if row is None:
                return None
            return Owed(
                report_id=row.id,
                token=row.token,
                ae_title=row.ae_title,
                called_ae_title=row.called_ae_title,
                attempts=row.attempts,
                report=_looked_up(connection, row.transaction_uid, json.loads(row.objects)),
            )

        return self._db.write(run)

    def reported(self, owed: Owed) -> bool:
        """Note that who asked has the report."""
        return self._end(owed, ReportState.REPORTED)

    def retry_later(self, owed: Owed, delay_s: float, reason: str) -> bool:
        """Put a report back."""
        return self._end(owed, ReportState.OWED, delay_s, reason)

    def give_up(self, owed: Owed, reason: str) -> bool:
        """Give a report up; whoever wants it may ask again."""
        return self._end(owed, ReportState.DEAD, 0.0, reason)

    def _end(self, owed: Owed, state: ReportState, delay_s: float = 0.0, reason: str = "") -> bool:
        def run(connection: Connection) -> bool:
            return REPORTS.change(
                connection,
                owed.report_id,
                owed.token,
                state=state,
                reason=reason,
                lease_until=None,
                not_before=self._db.now() + delay_s,
            )

        return self._db.write(run)

    def hand_over(self, report_ids: Sequence[int]) -> None:
        """Leave reports to the sender: the association on which they were asked for is over."""

        def run(connection: Connection) -> None:
            connection.execute(
                update(commitment_report)
                .where(
                    commitment_report.c.id.in_(report_ids),
                    commitment_report.c.state == ReportState.OWED,
                    commitment_report.c.not_before > self._db.now(),
                )
                .values(not_before=self._db.now())
            )

        if report_ids:
            self._db.write(run)

    def give_up_but_to(self, ae_titles: Collection[str], reason: str) -> list[str]:
        """Give up the reports that are due to others than these; gives the others' AE titles."""

        def run(connection: Connection) -> list[str]:
            dropped = connection.scalars(
                update(commitment_report)
                .where(
                    REPORT_IS_OPEN,
                    commitment_report.c.state == ReportState.OWED,
                    commitment_report.c.not_before <= self._db.now(),
                    commitment_report.c.ae_title.not_in(ae_titles),
                )
                .values(state=ReportState.DEAD, reason=reason)
                .returning(commitment_report.c.ae_title)
            ).all()
            return [str(each) for each in dropped]

        return self._db.write(run)

    def next_at(self, ae_title: str) -> float | None:
        """When a report can be sent to an AE title at the earliest, or None when none is owed."""
        with self._db.read() as connection:
            return earliest(
                connection,
                select(func.min(REPORTS.free_at())).where(
                    commitment_report.c.ae_title == ae_title, REPORT_IS_OPEN
                ),
            )


def _looked_up(
    connection: Connection, transaction_uid: str, objects: Sequence[Sequence[str]]
) -> CommitmentReport:
    """What we can say about these objects now."""
    held: list[Reference] = []
    failed: list[Failure] = []
    for sop_class_uid, sop_instance_uid in objects:
        reference = Reference(sop_class_uid, sop_instance_uid)
        found = connection.scalar(
            select(instance.c.sop_class_uid).where(
                instance.c.sop_instance_uid == sop_instance_uid,
                instance.c.disposition != Disposition.QUARANTINED,
                instance.c.spool_key.is_not(None),
            )
        )
        if found is None:
            failed.append(Failure(reference, FailureReason.NO_SUCH_OBJECT_INSTANCE))
        elif found != sop_class_uid:
            failed.append(Failure(reference, FailureReason.CLASS_INSTANCE_CONFLICT))
        else:
            held.append(reference)
    return CommitmentReport(transaction_uid, tuple(held), tuple(failed))
