"""A ledger in a folder, and what receiver, worker and sender would tell it."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from dicom_xai.commitment import CommitmentRequest
from dicom_xai.ledger import Disposition, Ledger, Outgoing, Recorded, Wanted
from dicom_xai.study import (
    Candidate,
    Instance,
    Job,
    ObjectKind,
    Per,
    Priority,
    Purpose,
    Reference,
    Result,
    Sender,
    Unit,
)

SENDER = Sender("PACS", "DICOM_XAI", "127.0.0.1", 0, "DICOM_XAI")
#: A claim or a transfer with this lease has lost it already: no test waits for a clock.
OVER = -1.0
LEASE_S = 60.0
CT = "1.2.840.10008.5.1.4.1.1.2"


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'ledger.db'}"


def an_instance(number: int = 1, *, series: int = 1, study: int = 1, content: str = "") -> Instance:
    """The `number`-th instance of a series; other `content` is another file with the same UID."""
    uid = f"1.2.{study}.{series}.{number}"
    sha256 = hashlib.sha256(f"{uid} {content}".encode()).hexdigest()
    return Instance(
        sop_instance_uid=uid,
        sop_class_uid=CT,
        series_instance_uid=f"1.2.{study}.{series}",
        study_instance_uid=f"1.2.{study}",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        spool_key=sha256[:32],
        sha256=sha256,
        size_bytes=100,
        sender=SENDER,
    )


def wanted(
    instance: Instance,
    per: Per = Per.SERIES,
    *,
    route: str = "head-ct",
    digest: str = "m1",
    quiet_s: float | None = None,
    max_wait_s: float = 60.0,
    priority: Priority = Priority.ROUTINE,
    budget_s: float = 2.0,
) -> Wanted:
    """What a route says about an instance's unit; per instance it fires at once."""
    return Wanted(
        unit=Unit(
            per,
            instance.study_instance_uid,
            instance.series_instance_uid if per is not Per.STUDY else "",
            instance.sop_instance_uid if per is Per.INSTANCE else "",
        ),
        route=route,
        route_json=f'{{"name": "{route}"}}',
        model="phantom",
        model_digest=digest,
        fires_at_once=per is Per.INSTANCE,
        quiet_s=quiet_s,
        max_wait_s=max_wait_s,
        priority=priority,
        budget_s=budget_s,
    )


def receive(
    ledger: Ledger,
    instance: Instance,
    *wants: Wanted,
    transfer: int | None = None,
    disposition: Disposition = Disposition.ROUTED,
) -> Recorded:
    """Record an instance, in a transfer of its own unless one is given."""
    if transfer is None:
        transfer = ledger.arrivals.open_transfer(SENDER, LEASE_S)
    return ledger.arrivals.record(instance, disposition, transfer, wants, "{}")


def waiting(ledger: Ledger) -> list[Candidate]:
    """The units that wait; their `max_wait_s` must be 0, so that they are due."""
    return ledger.arrivals.due()


def make_ready(ledger: Ledger, candidate: Candidate, budget_s: float = 2.0) -> bool:
    return ledger.arrivals.make_ready(candidate, "test", ledger.now(), Priority.ROUTINE, budget_s)


def a_job(ledger: Ledger, number: int = 1, lease_s: float = LEASE_S, **wants: object) -> Job:
    """A claimed job about one instance, which fires at once."""
    instance = an_instance(number)
    receive(ledger, instance, wanted(instance, Per.INSTANCE, **wants))  # type: ignore[arg-type]
    return claimed(ledger, lease_s)


def claimed(ledger: Ledger, lease_s: float = LEASE_S) -> Job:
    job = ledger.jobs.claim(lease_s)
    assert job is not None
    return job


def a_result(
    job: Job,
    ordinal: int = 0,
    kind: ObjectKind = ObjectKind.SC,
    to: Sequence[str] = ("pacs",),
    *,
    uid: str = "",
    key: str = "",
) -> Result:
    """A result whose UID follows from job, kind and ordinal, as a retry's does."""
    uid = uid or f"2.25.{job.job_id}.{list(ObjectKind).index(kind)}.{ordinal}"
    return Result(
        kind=kind,
        ordinal=ordinal,
        purpose=Purpose(job.purpose),
        sop_class_uid="1.2.840.10008.5.1.4.1.1.7",
        sop_instance_uid=uid,
        series_instance_uid="2.25.1",
        study_instance_uid=job.unit.study_instance_uid,
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        spool_key=key or hashlib.sha256(uid.encode()).hexdigest()[:32],
        sha256=hashlib.sha256(b"result" + uid.encode()).hexdigest(),
        size_bytes=200,
        source=job.instances[0],
        destinations=tuple(to),
    )


def outgoing(ledger: Ledger, destination: str = "pacs", lease_s: float = LEASE_S) -> Outgoing:
    item = ledger.deliveries.claim(destination, lease_s)
    assert item is not None
    return item


def a_request(ledger: Ledger, *uids: str, hold_s: float = 0.0) -> int:
    """MODALITY asks for storage commitment; gives the number of the report that is owed."""
    references = tuple(Reference(CT, uid) for uid in uids or (an_instance().sop_instance_uid,))
    return ledger.reports.owe(
        CommitmentRequest("2.25.1", references), "MODALITY", "DICOM_XAI", hold_s
    )


def rows(folder: Path, query: str, *values: object) -> list[tuple[object, ...]]:
    """What the database file says, seen by another connection."""
    connection = sqlite3.connect(folder / "ledger.db")
    try:
        return connection.execute(query, values).fetchall()
    finally:
        connection.close()


def change(folder: Path, statement: str, *values: object) -> None:
    """Change the file behind the ledger's back: time gone by, another boot, another version."""
    connection = sqlite3.connect(folder / "ledger.db")
    try:
        with connection:
            connection.execute(statement, values)
    finally:
        connection.close()
