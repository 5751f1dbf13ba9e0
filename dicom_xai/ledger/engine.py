"""The database behind the ledger: group commit, a clock, and bells.

Writes of a process take turns: whose turn it is runs all that has gathered, each piece of work in a
savepoint of one ``BEGIN IMMEDIATE`` transaction, and commits once. Who waited meanwhile finds its
piece done. A caller returns when the commit is on disk (WAL, ``synchronous=FULL``), so that
associations share an fsync, and one alone waits for no other thread.

The clock is CLOCK_BOOTTIME plus an offset kept in the database: jumps of the wall clock cannot move
it, and after a reboot it goes on where it stopped.

A bell is a named pipe beside the database: a hint to look, never a message. Losing one costs a poll
interval.
"""

from __future__ import annotations

import errno
import os
import queue
import select
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    Connection,
    Engine,
    Select,
    Table,
    UpdateBase,
    create_engine,
    event,
    insert,
    update,
)
from sqlalchemy import select as sql_select
from sqlalchemy.dialects.sqlite import dialect
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError, SQLAlchemyError

from dicom_xai import processes
from dicom_xai.errors import ConfigError, InvariantError, LedgerBusyError
from dicom_xai.ledger import schema

T = TypeVar("T")

BUSY_TIMEOUT_S = 10.0
#: At most so many pieces of work share one commit.
GROUP_SIZE = 256
#: A gap between two boots longer than this is not believed (the wall clock may be wrong).
LONGEST_GAP_S = 30 * 86400.0


def utc_now() -> str:
    """The wall clock as text, for people and for retention by days."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@dataclass
class _Work:
    run: Callable[[Connection], object]
    done: Future[object] = field(default_factory=Future)


class Database:
    """Connections to one ledger.

    Parameters
    ----------
    url : str
        ``sqlite:///`` and an absolute path on a local disk.

    Raises
    ------
    ConfigError
        Another engine, no database, or a schema version that this code does not know.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith("sqlite:///"):
            scheme = url.partition(":")[0]
            raise ConfigError(
                f"ledger.url: found {scheme}, wanted sqlite:///PATH; other engines are not served"
            )
        self.path = Path(url.removeprefix("sqlite:///"))
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.path.exists():
            self.path.touch(mode=0o600)
        self._engine = _engine(url)
        self.owner = processes.name_of(os.getpid())
        self._is_closed = False
        self._queue: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._turn = threading.Lock()
        self._writer: Connection | None = None  # whose turn it is uses it
        try:
            self._offset_s = self._prepare()
        except OperationalError as error:
            raise LedgerBusyError(f"the ledger {self.path.name} cannot be opened") from error
        except DatabaseError as error:
            raise ConfigError(f"ledger.url: {self.path.name} is no SQLite database") from error

    def now(self) -> float:
        """Seconds of the ledger's clock; the same in all processes of this host."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) + self._offset_s

    def write(self, run: Callable[[Connection], T]) -> T:
        """Run `run` in a transaction and give what it gave, once it is durable.

        Raises
        ------
        LedgerBusyError
            The database was held for too long, or its disk failed; nothing was changed.
        """
        if self._is_closed:
            raise InvariantError("the ledger is closed")
        work = _Work(run)
        self._queue.put(work)
        with self._turn:
            while not work.done.done():
                self._commit(self._gathered())
        return work.done.result()  # type: ignore[return-value]  # T by construction

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Give a connection that sees one consistent state.

        Raises
        ------
        LedgerBusyError
            The database cannot be read now.
        """
        try:
            with self._engine.connect() as connection:
                connection.exec_driver_sql("BEGIN")
                yield connection
        except DBAPIError as error:
            raise LedgerBusyError(f"the ledger {self.path.name} cannot be read") from error

    def close(self) -> None:
        """Finish what is queued and close all connections."""
        self._is_closed = True
        with self._turn:
            while batch := self._gathered():
                self._commit(batch)
            if self._writer is not None:
                self._writer.close()
        self._engine.dispose()

    def _prepare(self) -> float:
        """Create or check the tables; give the clock's offset for this boot."""
        boot_id = processes.boot_id()
        with self._engine.connect() as connection, _immediate(connection):
            schema.metadata.create_all(connection)
            rows = connection.execute(sql_select(schema.meta))
            known: dict[str, str] = {row.key: row.value for row in rows}
            self._migrate(connection, known.get("schema_version", str(schema.SCHEMA_VERSION)))
            if known.get("boot_id") == boot_id:
                return float(known["offset_s"])
            boottime = time.clock_gettime(time.CLOCK_BOOTTIME)
            last_now = float(known.get("last_now", boottime))
            gap = time.time() - float(known.get("last_wall", time.time()))
            offset = last_now + min(max(gap, 0.0), LONGEST_GAP_S) - boottime
            values = {
                "schema_version": str(schema.SCHEMA_VERSION),
                "boot_id": boot_id,
                "offset_s": repr(offset),
                "last_now": repr(last_now),
                "last_wall": repr(time.time()),
            }
            for key, value in values.items():
                set_meta(connection, key, value)
            return offset

    def _migrate(self, connection: Connection, version: str) -> None:
        """Bring an older database to our schema; refuse one from the future."""
        steps = {str(number): number for number in schema.MIGRATIONS}
        while version != str(schema.SCHEMA_VERSION):
            if version not in steps:
                raise ConfigError(
                    f"ledger {self.path.name} has schema version {version}, this program knows "
                    f"{schema.SCHEMA_VERSION}; run the program that wrote it, or a newer one"
                )
            for statement in schema.MIGRATIONS[steps[version]]:
                connection.exec_driver_sql(statement)
            version = str(steps[version] + 1)
            set_meta(connection, "schema_version", version)

    def _gathered(self) -> list[_Work]:
        batch: list[_Work] = []
        while len(batch) < GROUP_SIZE and not self._queue.empty():
            batch.append(self._queue.get())
        return batch

    def _commit(self, batch: list[_Work]) -> None:
        """Run a batch in one transaction; each caller learns only of its own piece."""
        try:
            if self._writer is None:
                self._writer = self._engine.connect()
            with _immediate(self._writer):
                answers = [_run_alone(self._writer, work) for work in batch]
        except BaseException as error:
            if self._writer is not None:
                self._writer.invalidate()
                self._writer.close()
                self._writer = None
            for work in batch:
                work.done.set_exception(_not_taken(error))
            if not isinstance(error, SQLAlchemyError):
                raise
            return
        for work, (value, failure) in zip(batch, answers, strict=True):
            if failure is None:
                work.done.set_result(value)
            else:
                work.done.set_exception(failure)


def _run_alone(connection: Connection, work: _Work) -> tuple[object, Exception | None]:
    """One piece in its savepoint: what it gave, or why it was undone.

    Raises
    ------
    DBAPIError
        SQLite undid the whole transaction, as it may on a full disk or an I/O error
        (sqlite.org/lang_transaction.html, section 3): the pieces before this one are gone too.
    """
    try:
        with _savepoint(connection):
            return work.run(connection), None
    except DBAPIError as error:
        if not _is_in_transaction(connection):
            raise
        return None, _not_taken(error) if isinstance(error, OperationalError) else error
    except Exception as error:  # noqa: BLE001  # handed to the caller whose it is
        return None, error


@contextmanager
def _savepoint(connection: Connection) -> Iterator[None]:
    _execute(connection, "SAVEPOINT piece")
    try:
        yield
    except BaseException:
        if _is_in_transaction(connection):
            _execute(connection, "ROLLBACK TO piece")
            _execute(connection, "RELEASE piece")
        raise
    _execute(connection, "RELEASE piece")


def _is_in_transaction(connection: Connection) -> bool:
    return bool(_driver(connection).in_transaction)


def _not_taken(cause: BaseException) -> LedgerBusyError:
    busy = LedgerBusyError("the ledger did not take a write: locked, full or failing disk")
    busy.__cause__ = cause
    return busy


class Statement:
    """A statement that every arriving object asks: compiled once, and run by the driver itself.

    SQLAlchemy takes several times as long to hand a statement on as SQLite takes to run it. Columns
    that it would convert are none of these statements'.

    Parameters
    ----------
    made : select, insert or update
        With `bindparam` for each value.
    columns : sequence of str
        Of an insert: those that are given.
    """

    def __init__(
        self, made: Select[Any] | UpdateBase, columns: Sequence[str] | None = None
    ) -> None:
        compiled = made.compile(dialect=dialect(paramstyle="named"), column_keys=columns)
        self._sql = str(compiled)
        self._fixed = {
            name: bind.value for name, bind in compiled.binds.items() if not bind.required
        }

    def run(self, connection: Connection, values: Mapping[str, object]) -> sqlite3.Cursor:
        """Run it; rows are tuples in the order of the columns.

        Raises
        ------
        DBAPIError
            As any other statement on `connection`.
        """
        return _execute(connection, self._sql, {**self._fixed, **values})


def _execute(
    connection: Connection, sql: str, values: Mapping[str, object] | None = None
) -> sqlite3.Cursor:
    try:
        return _driver(connection).execute(sql, values or {})
    except sqlite3.Error as error:
        raise DBAPIError.instance(sql, None, error, sqlite3.Error) from error


def _driver(connection: Connection) -> sqlite3.Connection:
    driver: sqlite3.Connection | None = connection.connection.driver_connection
    assert driver is not None  # only an invalidated connection has none
    return driver


def set_meta(connection: Connection, key: str, value: str) -> None:
    """Write one row of the meta table."""
    changed = connection.execute(
        update(schema.meta).where(schema.meta.c.key == key).values(value=value)
    )
    if changed.rowcount == 0:
        connection.execute(insert(schema.meta).values(key=key, value=value))


def insert_row(connection: Connection, table: Table, **values: object) -> int:
    """Insert one row and give its id."""
    key = connection.execute(insert(table).values(**values)).inserted_primary_key
    if key is None:
        raise InvariantError(f"table {table.name} gave no id")
    return int(key[0])


def earliest(connection: Connection, query: Select[float]) -> float | None:
    """A query's one time, or None when it found no row."""
    value = connection.scalar(query)
    return None if value is None else float(value)


def note_event(connection: Connection, kind: str, subject: str, detail: str = "") -> None:
    """Append to the history."""
    connection.execute(
        insert(schema.event).values(at_utc=utc_now(), kind=kind, subject=subject, detail=detail)
    )


@contextmanager
def _immediate(connection: Connection) -> Iterator[None]:
    """A transaction that holds the write lock from its first statement."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.commit()


def _engine(url: str) -> Engine:
    engine = create_engine(
        url, connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False}
    )

    @event.listens_for(engine, "connect")
    def _on_connect(dbapi_connection: Any, _record: object) -> None:
        # the driver's own implicit BEGIN would take no write lock: we begin by hand
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"busy_timeout={int(BUSY_TIMEOUT_S * 1000)}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


class Bells:
    """Wake-up hints between the processes that share a ledger.

    Parameters
    ----------
    folder : Path
        Where the named pipes are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def listen(self, name: str) -> Bell:
        """A bell that rings when anybody calls ``ring(name)``."""
        return Bell(self._folder / f"{name}.{os.getpid()}.{time.monotonic_ns()}")

    def ring(self, name: str) -> None:
        """Wake all who listen; nobody listening is no error."""
        for pipe in os.listdir(self._folder):  # rung for each object: pathlib takes 0.1 ms
            if not pipe.startswith(f"{name}."):
                continue
            try:
                fd = os.open(self._folder / pipe, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                # ENXIO: nobody has it open for reading, its process is gone (fifo(7)); anything
                # else is our own trouble, and the listener looks by itself before long
                if error.errno == errno.ENXIO:
                    (self._folder / pipe).unlink(missing_ok=True)
                continue
            with suppress(BlockingIOError, BrokenPipeError):  # full means rung already
                os.write(fd, b"!")
            os.close(fd)


class Bell:
    """One listener's end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        hidden = path.with_name(f".{path.name}")
        os.mkfifo(hidden, 0o600)
        # read and write: the pipe never reaches end of file when a ringer closes its end
        self._fd = os.open(hidden, os.O_RDWR | os.O_NONBLOCK)
        os.rename(hidden, path)

    def wait(self, timeout_s: float) -> bool:
        """Wait until it rings; False when the time ran out first."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        if not poller.poll(max(0.0, timeout_s) * 1000):
            return False
        with suppress(BlockingIOError):
            while os.read(self._fd, 4096):
                pass
        return True

    def close(self) -> None:
        """Stop listening."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
