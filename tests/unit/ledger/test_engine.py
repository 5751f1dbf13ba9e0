"""The writing thread, the clock, opening: what holds when a disk or a process fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, event, insert
from sqlalchemy.exc import IntegrityError

from dicom_xai.errors import ConfigError, InvariantError, LedgerBusyError
from dicom_xai.ledger import Database, Disposition, Ledger, schema
from dicom_xai.ledger.engine import Statement, note_event, set_meta
from tests.make.ledger import (
    LEASE_S,
    SENDER,
    a_job,
    a_result,
    an_instance,
    change,
    outgoing,
    receive,
    rows,
    url_in,
)

GATE_S = 10.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(url_in(tmp_path))
    yield opened
    opened.close()


def noting(subject: str) -> Callable[[Connection], str]:
    def run(connection: Connection) -> str:
        note_event(connection, "test", subject)
        return subject

    return run


def in_one_group(
    database: Database, first: Callable[[Connection], object], *rest: Callable[[Connection], object]
) -> list[Future[object]]:
    """Run pieces of work in one commit: `first` holds the writer until all others are queued."""
    open_gate, started = threading.Event(), threading.Event()

    def hold(_: Connection) -> None:
        started.set()
        assert open_gate.wait(GATE_S)

    with ThreadPoolExecutor(len(rest) + 2) as pool:
        holder = pool.submit(database.write, hold)
        assert started.wait(GATE_S)
        futures: list[Future[object]] = []
        for piece in (first, *rest):
            queued = database._queue.qsize()
            futures.append(pool.submit(database.write, piece))
            until = time.monotonic() + GATE_S
            while database._queue.qsize() == queued and time.monotonic() < until:
                os.sched_yield()
        open_gate.set()
        holder.result(GATE_S)
        for future in futures:
            future.exception(GATE_S)
    return futures


def subjects(folder: Path) -> set[object]:
    return {row[0] for row in rows(folder, "SELECT subject FROM event")}


@contextmanager
def counting_commits() -> Iterator[list[int]]:
    count = [0]

    def on_commit(_: Connection) -> None:
        count[0] += 1

    event.listen(Engine, "commit", on_commit)
    try:
        yield count
    finally:
        event.remove(Engine, "commit", on_commit)


def test_work_that_gathers_while_a_commit_runs_shares_the_next_commit(
    database: Database, tmp_path: Path
) -> None:
    with counting_commits() as commits:
        in_one_group(database, *[noting(str(i)) for i in range(20)])
    assert commits == [2]  # of the piece that held the writer, and of the twenty
    assert subjects(tmp_path) == {str(i) for i in range(20)}


def test_a_piece_that_breaks_a_unique_index_fails_alone(database: Database, tmp_path: Path) -> None:
    def twice(connection: Connection) -> None:
        note_event(connection, "test", "undone")
        for _ in range(2):
            connection.exec_driver_sql("INSERT INTO meta VALUES ('same', 'x')")

    good, bad, after = in_one_group(database, noting("a"), twice, noting("b"))
    assert isinstance(bad.exception(), IntegrityError)
    assert (good.result(), after.result()) == ("a", "b")
    assert subjects(tmp_path) == {"a", "b"}


def test_a_piece_that_raises_leaves_nothing_of_itself(database: Database, tmp_path: Path) -> None:
    def halfway(connection: Connection) -> None:
        note_event(connection, "test", "undone")
        raise ZeroDivisionError

    _, bad, _ = in_one_group(database, noting("a"), halfway, noting("b"))
    assert isinstance(bad.exception(), ZeroDivisionError)
    assert subjects(tmp_path) == {"a", "b"}


def test_a_statement_that_was_made_once_fails_alone_and_in_the_same_words(
    database: Database, tmp_path: Path
) -> None:
    row = Statement(insert(schema.meta), ["key", "value"])

    def twice(connection: Connection) -> None:
        for _ in range(2):
            row.run(connection, {"key": "same", "value": "x"})

    good, bad, after = in_one_group(database, noting("a"), twice, noting("b"))
    assert isinstance(bad.exception(), IntegrityError)
    assert (good.result(), after.result()) == ("a", "b")
    assert rows(tmp_path, "SELECT value FROM meta WHERE key = 'same'") == []


@pytest.mark.promise("D1")
def test_nobody_is_told_success_when_a_full_database_undoes_the_whole_group(
    database: Database, tmp_path: Path
) -> None:
    def leave_no_page(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def fill(connection: Connection) -> str:
        note_event(connection, "test", "big", "x" * 100_000)
        return "big"

    futures = in_one_group(database, leave_no_page, noting("a"), fill, noting("b"), fill)
    told = {future.result() for future in futures if future.exception() is None}
    assert told - {None} <= subjects(tmp_path)
    failures = [future.exception() for future in futures if future.exception() is not None]
    assert failures
    assert all(isinstance(failure, LedgerBusyError) for failure in failures)


def test_the_ledger_goes_on_after_a_full_database(database: Database, tmp_path: Path) -> None:
    def leave_no_page(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def fill(connection: Connection) -> None:
        note_event(connection, "test", "big", "x" * 100_000)

    in_one_group(database, leave_no_page, fill, fill)
    assert database.write(noting("after")) == "after"
    assert "after" in subjects(tmp_path)


LIMITED = """
import resource, sys
from dicom_xai.errors import LedgerBusyError
from dicom_xai.ledger import Disposition, Ledger
from tests.make.ledger import SENDER, an_instance, receive
ledger = Ledger(sys.argv[1])
transfer = ledger.arrivals.open_transfer(SENDER, 60)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
refused = 0
for number in range(60):
    try:
        receive(ledger, an_instance(number), transfer=transfer, disposition=Disposition.UNROUTED)
        print(number)
    except LedgerBusyError:
        refused += 1
print("refused", refused)
"""


def test_what_was_answered_is_there_when_the_disk_refuses_to_grow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, url_in(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *acknowledged, last = done.stdout.split("\n")[:-1]
    assert int(last.removeprefix("refused ")) > 0
    here = {row[0] for row in rows(tmp_path, "SELECT sop_instance_uid FROM instance")}
    assert acknowledged
    assert {an_instance(int(number)).sop_instance_uid for number in acknowledged} <= here


def test_eight_threads_lose_nothing_and_share_commits(tmp_path: Path) -> None:
    ledger = Ledger(url_in(tmp_path))
    transfer = ledger.arrivals.open_transfer(SENDER, LEASE_S)
    numbers = range(400)

    def record(number: int) -> None:
        receive(ledger, an_instance(number), transfer=transfer, disposition=Disposition.UNROUTED)

    with counting_commits() as commits, ThreadPoolExecutor(8) as pool:
        list(pool.map(record, numbers))
    ledger.close()
    assert rows(tmp_path, "SELECT count(*) FROM instance") == [(400,)]
    assert commits[0] < 400


def test_writing_after_close_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    database = Database(url_in(tmp_path))
    database.close()
    with pytest.raises(InvariantError, match="closed"):
        database.write(noting("late"))


def test_what_is_queued_is_written_before_close_returns(tmp_path: Path) -> None:
    database = Database(url_in(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(database.write, noting(str(i))) for i in range(50)]
        for future in futures:
            future.result()
        database.close()
    assert len(subjects(tmp_path)) == 50


@pytest.mark.parametrize("version", ["0", "5", "none"])
def test_another_schema_version_is_refused_and_left_alone(tmp_path: Path, version: str) -> None:
    Database(url_in(tmp_path)).close()
    change(tmp_path, "UPDATE meta SET value = ? WHERE key = 'schema_version'", version)
    change(tmp_path, "DROP TABLE delivery")
    with pytest.raises(ConfigError, match=f"schema version {version}, this program knows 4"):
        Database(url_in(tmp_path))
    assert rows(tmp_path, "SELECT name FROM sqlite_master WHERE name = 'delivery'") == []


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    file.write_bytes(b"not a database, but somebody's letter" * 100)
    with pytest.raises(ConfigError, match=r"ledger.db is no SQLite database"):
        Database(url_in(tmp_path))
    assert file.read_bytes().startswith(b"not a database")


def test_another_engine_is_refused_without_its_password() -> None:
    with pytest.raises(ConfigError, match="found postgresql, wanted sqlite:///PATH") as caught:
        Database("postgresql://ledger:secret@db/ledger")
    assert "secret" not in str(caught.value)


def test_the_database_file_is_for_its_owner_only(tmp_path: Path) -> None:
    Database(url_in(tmp_path / "var")).close()
    assert (tmp_path / "var").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "var/ledger.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.promise("D1")
def test_commits_are_synchronous_and_logged_ahead(database: Database) -> None:
    def settings(connection: Connection) -> tuple[object, ...]:
        names = ("journal_mode", "synchronous", "foreign_keys")
        return tuple(connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names)

    assert database.write(settings) == ("wal", 2, 1)


OPENER = """
import sys
from dicom_xai.ledger import Ledger
from tests.make.ledger import SENDER, an_instance, receive, Disposition
sys.stdin.read(1)
ledger = Ledger(sys.argv[1])
transfer = ledger.arrivals.open_transfer(SENDER, 60)
for number in range(60):
    instance = an_instance(number, series=int(sys.argv[2]))
    receive(ledger, instance, transfer=transfer, disposition=Disposition.UNROUTED)
ledger.close()
"""


def test_processes_that_open_and_write_at_once_lose_nothing(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER, url_in(tmp_path), str(series)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for series in range(3)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("!")
        child.stdin.flush()
    for child in children:
        _, errors = child.communicate(timeout=30)
        assert child.returncode == 0, errors
    counted = rows(
        tmp_path, "SELECT count(*) FROM instance GROUP BY series_instance_uid ORDER BY 1"
    )
    assert counted == [(60,), (60,), (60,)]


def test_two_processes_of_one_boot_have_one_clock(tmp_path: Path) -> None:
    ours, theirs = Database(url_in(tmp_path)), Database(url_in(tmp_path))
    moments = [ours.now(), theirs.now(), ours.now(), theirs.now()]
    ours.close()
    theirs.close()
    assert moments == sorted(moments)
    assert moments[-1] - moments[0] < 1.0


def reboot(folder: Path, last_now: float, down_s: float) -> None:
    """As if the machine had last ticked at `last_now` and been off since."""
    change(folder, "UPDATE meta SET value = 'another boot' WHERE key = 'boot_id'")
    change(folder, "UPDATE meta SET value = ? WHERE key = 'last_now'", repr(last_now))
    change(folder, "UPDATE meta SET value = ? WHERE key = 'last_wall'", repr(time.time() - down_s))


@pytest.mark.parametrize(
    ("down_s", "counted_s"),
    [(0.0, 0.0), (3600.0, 3600.0), (-3600.0, 0.0), (90 * 86400.0, 30 * 86400.0)],
    ids=["at once", "an hour", "wall clock set back", "wall clock far ahead"],
)
def test_after_a_reboot_the_clock_goes_on(tmp_path: Path, down_s: float, counted_s: float) -> None:
    Database(url_in(tmp_path)).close()
    reboot(tmp_path, 5_000_000.0, down_s)
    again = Database(url_in(tmp_path))
    now = again.now()
    again.close()
    # 5 s: this machine may be busy between writing the rows and reading the clock
    assert 5_000_000.0 + counted_s <= now + 1e-6
    assert now < 5_000_000.0 + counted_s + 5.0


def test_a_tick_is_where_the_clock_goes_on_from(tmp_path: Path) -> None:
    ledger = Ledger(url_in(tmp_path))
    before = ledger.now()
    ledger.upkeep.tick()
    ledger.close()
    stored = {str(key): value for key, value in rows(tmp_path, "SELECT key, value FROM meta")}
    assert before <= float(str(stored["last_now"])) <= before + 5.0
    change(tmp_path, "UPDATE meta SET value = 'another boot' WHERE key = 'boot_id'")
    again = Ledger(url_in(tmp_path))
    assert again.now() >= before
    again.close()


def test_a_third_process_of_the_new_boot_has_the_same_clock(tmp_path: Path) -> None:
    Database(url_in(tmp_path)).close()
    reboot(tmp_path, 100.0, 0.0)
    first, second = Database(url_in(tmp_path)), Database(url_in(tmp_path))
    assert second.now() - first.now() < 1.0
    assert first.now() >= 100.0
    first.close()
    second.close()


def test_meta_holds_one_value_for_each_key(database: Database, tmp_path: Path) -> None:
    for value in ("1", "2"):
        database.write(lambda connection, value=value: set_meta(connection, "k", value))
    assert rows(tmp_path, "SELECT value FROM meta WHERE key = 'k'") == [("2",)]


def test_a_reader_sees_one_state_while_others_write(database: Database) -> None:
    with database.read() as connection:
        count = "SELECT count(*) FROM event"
        before = connection.exec_driver_sql(count).scalar_one()
        database.write(noting("meanwhile"))
        assert connection.exec_driver_sql(count).scalar_one() == before


#: As version 2 made it.
DELIVERY_2 = """
CREATE TABLE delivery (
    id INTEGER NOT NULL PRIMARY KEY, result_id INTEGER NOT NULL, job_id INTEGER NOT NULL,
    destination TEXT NOT NULL, state TEXT NOT NULL, rank INTEGER NOT NULL,
    token INTEGER DEFAULT '0' NOT NULL, owner TEXT DEFAULT '' NOT NULL, lease_until FLOAT,
    attempts INTEGER DEFAULT '0' NOT NULL, not_before FLOAT NOT NULL, queued_at FLOAT NOT NULL,
    status INTEGER, reason TEXT DEFAULT '' NOT NULL, sent_at FLOAT,
    CONSTRAINT state_is_known
        CHECK (state IN ('pending', 'sending', 'sent', 'dead', 'skipped')),
    CONSTRAINT one_delivery_each UNIQUE (result_id, destination)
)
"""


def test_an_older_database_is_brought_to_our_schema(tmp_path: Path) -> None:
    Ledger(url_in(tmp_path)).close()
    for table in ("candidate", "job"):
        change(tmp_path, f"ALTER TABLE {table} DROP COLUMN holder")
    for table in ("delivery", "commitment_delivery", "commitment", "commitment_report"):
        change(tmp_path, f"DROP TABLE {table}")
    change(tmp_path, DELIVERY_2)
    old = (
        "INSERT INTO delivery VALUES (9, 99, 99, 'pacs', 'sent', 0, 1, '', NULL, 1, 0, 0, 0, '', 0)"
    )
    change(tmp_path, old)
    change(tmp_path, "UPDATE meta SET value = '1' WHERE key = 'schema_version'")
    ledger = Ledger(url_in(tmp_path))
    job = a_job(ledger)
    ledger.jobs.finish(job, [a_result(job)])
    ledger.deliveries.sent(outgoing(ledger), 0, wants_commitment=True)
    assert ledger.commitments.ask("pacs", lambda _: 1.0) is not None
    ledger.close()
    # what was sent before is not asked about
    assert rows(tmp_path, "SELECT commitment, asks FROM delivery") == [("none", 0), ("wanted", 1)]
    assert rows(tmp_path, "SELECT value FROM meta WHERE key = 'schema_version'") == [("4",)]


def test_an_older_database_of_promises_gets_the_indexes_by_which_they_are_forgotten(
    tmp_path: Path,
) -> None:
    Ledger(url_in(tmp_path)).close()
    named = "SELECT name FROM sqlite_master WHERE name LIKE 'commitment%_kept' ORDER BY name"
    wanted = [("commitment_kept",), ("commitment_report_kept",)]
    assert rows(tmp_path, named) == wanted
    for (name,) in wanted:
        change(tmp_path, f"DROP INDEX {name}")
    change(tmp_path, "UPDATE meta SET value = '3' WHERE key = 'schema_version'")
    Ledger(url_in(tmp_path)).close()
    assert rows(tmp_path, named) == wanted
