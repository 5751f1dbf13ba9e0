"""Ten thousand studies in the queue: what the next one costs does not grow with them."""

from __future__ import annotations

import sqlite3
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from dicom_xai.ledger import Ledger
from dicom_xai.study import Per, Priority
from tests.make.ledger import LEASE_S, a_result, an_instance, receive, wanted

QUEUED = 10_000
SHORT = 20
#: What a turn may hold beyond what it holds of a short queue; a job's row takes 2 kB.
MORE_BYTES = 100_000


def add_copies(folder: Path, count: int) -> None:
    """Copies of the newest job, each of a study of its own."""
    copied = {
        "instance": ("sop_instance_uid", "series_instance_uid", "study_instance_uid"),
        "candidate": ("unit_key", "sop_instance_uid", "series_instance_uid", "study_instance_uid"),
        "candidate_instance": (),
        "job": ("unit_key",),
    }
    numbers = {"id", "candidate_id", "instance_id"}
    with closing(sqlite3.connect(folder / "ledger.db")) as connection, connection:
        for table, texts in copied.items():
            names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            values = [
                f"{name} + n"
                if name in numbers
                else f"{name} || '.' || n"
                if name in texts
                else name
                for name in names
            ]
            connection.execute(
                "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers"
                f" WHERE n < {count}) INSERT INTO {table} ({', '.join(names)})"
                f" SELECT {', '.join(values)} FROM {table}, numbers"
                f" WHERE {table}.rowid = (SELECT max(rowid) FROM {table})"
            )


def a_turn(ledger: Ledger, number: int) -> None:
    """What worker, receiver and supervisor ask while a study comes and one is answered."""
    job = ledger.jobs.claim(LEASE_S)
    assert job is not None
    assert ledger.jobs.claim(LEASE_S, like=job) is not None
    assert ledger.jobs.renew(job, LEASE_S)
    assert ledger.jobs.finish(job, [a_result(job)])
    assert ledger.jobs.next_at() is not None
    assert ledger.jobs.next_at(only=Priority.STAT) is None
    assert ledger.jobs.claim(LEASE_S, only=Priority.STAT) is None
    assert ledger.upkeep.next_deadline_at() is not None
    assert ledger.upkeep.depths().rows["queued"] == ledger.upkeep.waiting() - number
    late = an_instance(number, study=2)
    receive(ledger, late, wanted(late, Per.INSTANCE))


def peak_bytes(turn: Callable[[], None]) -> int:
    """The most that it holds at once."""
    tracemalloc.start()
    try:
        turn()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.promise("N3")
def test_ten_thousand_studies_wait_and_the_next_one_costs_no_more_memory(
    ledger: Ledger, tmp_path: Path
) -> None:
    first = an_instance()
    receive(ledger, first, wanted(first, Per.INSTANCE))
    add_copies(tmp_path, SHORT)
    a_turn(ledger, 1)  # statements are compiled once
    short = peak_bytes(lambda: a_turn(ledger, 2))
    add_copies(tmp_path, QUEUED)
    statements: dict[str, object] = {}

    def note(_c: object, _d: object, sql: str, values: object, *_: object) -> None:
        statements.setdefault(sql, values)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        long = peak_bytes(lambda: a_turn(ledger, 3))
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert ledger.upkeep.waiting() > QUEUED
    assert long < short + MORE_BYTES
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        steps = [
            str(step[3])
            for sql, values in statements.items()
            if sql.split()[0] in ("SELECT", "UPDATE", "DELETE")
            for step in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)  # type: ignore[arg-type]
        ]
    assert [step for step in steps if step.startswith("SCAN job") and "USING" not in step] == []
    assert any("job_queue" in step for step in steps)
    # whether STAT has come is asked many times a second
    assert [step for step in steps if step.endswith("job_queue (rank=?)")]
