"""Claims: what makes a table a queue that several processes take from.

A row waits until `not_before`; claimed, it is its holder's until `lease_until`, and then anybody's
again. Each claim has a token of its own, and what the holder says later is compare-and-set on it:
one who was overtaken changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Table,
    TextClause,
    and_,
    func,
    or_,
    select,
    update,
)

from dicom_xai.ledger.engine import Database
from dicom_xai.ledger.schema import (
    DELIVERY_IS_OPEN,
    JOB_IS_LIVE,
    REPORT_IS_OPEN,
    DeliveryState,
    JobState,
    ReportState,
    commitment_report,
    delivery,
    job,
)


@dataclass(frozen=True, slots=True)
class Queue:
    """A table with `state`, `not_before`, `owner`, `token`, `lease_until` and `attempts`.

    Parameters
    ----------
    table : Table
    waiting, taken : StrEnum
        The states of a row that may be claimed and of one that is.
    is_open : TextClause
        Either of them, as the table's partial index says it.
    """

    table: Table
    waiting: StrEnum
    taken: StrEnum
    is_open: TextClause

    def is_free(self, now: float) -> ColumnElement[bool]:
        """The row's time has come, or its holder's is over."""
        row = self.table.c
        return or_(
            and_(row.state == self.waiting, row.not_before <= now),
            and_(row.state == self.taken, row.lease_until < now),
        )

    def free_at(self) -> ColumnElement[float]:
        """When an open row is free at the earliest."""
        row = self.table.c
        return func.iif(row.state == self.waiting, row.not_before, row.lease_until)

    def claim(
        self,
        connection: Connection,
        database: Database,
        lease_s: float,
        *wanted: ColumnElement[bool],
        order: tuple[ColumnElement[Any], ...],
        **also: ColumnElement[Any],
    ) -> Row[tuple[object, ...]] | None:
        """Take the first open row for this process; give it as it is now, or None.

        `also` is set with it, from the row as it was before.
        """
        first = (
            select(self.table.c.id)
            .where(self.is_open, *wanted)
            .order_by(*order)
            .limit(1)
            .correlate(None)
            .scalar_subquery()
        )
        return connection.execute(
            update(self.table)
            .where(self.table.c.id == first)
            .values(
                state=self.taken,
                token=self.table.c.token + 1,
                attempts=self.table.c.attempts + 1,
                owner=database.owner,
                lease_until=database.now() + lease_s,
                **also,
            )
            .returning(*self.table.c)
        ).first()

    def change(self, connection: Connection, row_id: int, token: int, /, **values: object) -> bool:
        """Change a row as the holder of its claim; False when somebody else has it now."""
        changed = connection.execute(
            update(self.table)
            .where(
                self.table.c.id == row_id,
                self.table.c.token == token,
                self.table.c.state == self.taken,
            )
            .values(values)
        )
        return changed.rowcount == 1


JOBS = Queue(job, JobState.QUEUED, JobState.RUNNING, JOB_IS_LIVE)
DELIVERIES = Queue(delivery, DeliveryState.PENDING, DeliveryState.SENDING, DELIVERY_IS_OPEN)
REPORTS = Queue(commitment_report, ReportState.OWED, ReportState.REPORTING, REPORT_IS_OPEN)
QUEUES = (JOBS, DELIVERIES, REPORTS)
