"""What a service's ledger, spool and PACS say, read without the service's own code.

A flow test waits here for what must become true, and proves that nothing was lost, made twice or
left lying, and that every result belongs to its source's patient.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pydicom import Dataset, dcmread

from dicom_xai import identity
from dicom_xai.deliver.storage_scu import parse
from dicom_xai.demo.pacs import StandInPACS
from dicom_xai.demo.site import Site

PATIENCE_S = 60.0  #: of a busy machine; nothing here takes so long by itself

Row = dict[str, object]


def wait_until(is_true: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return when the condition holds; fail with `what` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}"
        time.sleep(0.02)


def rows(folder: Path, query: str, *values: object) -> list[Row]:
    """Rows of the ledger in a site's folder."""
    with closing(sqlite3.connect(f"file:{folder / 'ledger.db'}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query, values)]


def jobs_of(site: Site, study: str) -> list[Row]:
    """The jobs of one study, oldest first."""
    return rows(
        site.folder,
        "SELECT job.* FROM job JOIN candidate ON candidate.id = job.candidate_id"
        " WHERE candidate.study_instance_uid = ? ORDER BY job.id",
        study,
    )


def deliveries_of(site: Site, study: str) -> list[Row]:
    """The deliveries of one study's results, oldest first."""
    return rows(
        site.folder,
        "SELECT delivery.*, result.kind, result.sop_instance_uid FROM delivery"
        " JOIN result ON result.id = delivery.result_id"
        " WHERE result.study_instance_uid = ? ORDER BY delivery.id",
        study,
    )


def wait_for_jobs(site: Site, study: str, count: int = 1) -> list[Row]:
    """The study's jobs, once so many have ended and nothing of them waits to be sent."""

    def is_over() -> bool:
        ended = [job for job in jobs_of(site, study) if job["state"] in ("done", "failed")]
        unsent = [row for row in deliveries_of(site, study) if row["state"] in _OPEN_DELIVERIES]
        return len(ended) >= count and not unsent

    wait_until(is_over, f"{count} jobs of study {study} ended and delivered")
    jobs = jobs_of(site, study)
    assert len(jobs) == count
    return jobs


_OPEN_DELIVERIES = ("pending", "sending")


@dataclass(frozen=True, slots=True)
class Answer:
    """One object of ours, as a PACS keeps it."""

    file: bytes
    ds: Dataset

    @property
    def is_seg(self) -> bool:
        """Segmentation rather than Secondary Capture."""
        return bool(self.ds.Modality == "SEG")


def answers(pacs: StandInPACS, study: str) -> list[Answer]:
    """What a PACS holds of a study, in order of arrival."""
    found = []
    for kept in pacs.kept:
        file = kept.path.read_bytes()
        ds = dcmread(BytesIO(file))
        if study == ds.StudyInstanceUID:
            found.append(Answer(file, ds))
    return found


def metric(site: Site, name: str, **labels: str) -> float:
    """The sum over a metric's series that have these labels; 0 when there is none."""
    total = 0.0
    for line in site.http("metrics")[1].splitlines():
        series, _, value = line.rpartition(" ")
        if series.partition("{")[0] == name and all(
            f'{key}="{wanted}"' in series for key, wanted in labels.items()
        ):
            total += float(value)
    return total


def left_lying(folder: Path) -> list[str]:
    """What still waits for something to happen."""
    tables = {
        "transfer": ("open",),
        "candidate": ("waiting",),
        "job": ("queued", "running"),
        "delivery": _OPEN_DELIVERIES,
    }
    found = []
    for table, states in tables.items():
        marks = ",".join("?" * len(states))
        for row in rows(folder, f"SELECT id, state FROM {table} WHERE state IN ({marks})", *states):
            found.append(f"{table} {row['id']} is {row['state']}")
    return found


def wait_until_idle(folder: Path, timeout_s: float = PATIENCE_S) -> None:
    """Return when nothing waits any more."""
    deadline = time.monotonic() + timeout_s
    while lying := left_lying(folder):
        assert time.monotonic() < deadline, f"left lying after {timeout_s:g} s: {lying}"
        time.sleep(0.02)


def check_nothing_lost_or_doubled(
    folder: Path, pacs: StandInPACS, acknowledged: Mapping[str, bytes], units: Iterable[str]
) -> None:
    """Hold ledger, spool and PACS against what a sender was told.

    Parameters
    ----------
    folder : Path
        A site's, when nothing waits any more.
    pacs : StandInPACS
        The only destination; it answers 0x0111 to other bytes under a known UID.
    acknowledged : mapping of str to bytes
        Every file answered with Success, by SOP Instance UID.
    units : iterable of str
        The Study Instance UID of each study that must have been triaged.
    """
    assert left_lying(folder) == []
    stored = {
        str(row["sop_instance_uid"]): row
        for row in rows(folder, "SELECT * FROM instance WHERE disposition <> 'quarantined'")
    }
    for uid, file in acknowledged.items():
        assert uid in stored, f"acknowledged and lost: {uid}"
        assert _data_set(_spooled(folder, stored[uid])) == _data_set(file)
    triaged = rows(
        folder,
        "SELECT candidate.study_instance_uid AS study, count(*) AS jobs FROM job"
        " JOIN candidate ON candidate.id = job.candidate_id"
        " WHERE job.purpose = 'triage' AND job.state = 'done'"
        " GROUP BY job.unit_key, job.route",
    )
    assert {str(row["study"]) for row in triaged} >= set(units), "not triaged"
    assert all(row["jobs"] == 1 for row in triaged), "triaged twice"
    sent = rows(folder, "SELECT * FROM delivery")
    # Success to a resend: the PACS compared the bytes
    assert all(row["state"] == "sent" and row["status"] == 0 for row in sent), sent
    made = {str(row["sop_instance_uid"]): row for row in rows(folder, "SELECT * FROM result")}
    kept = {item.sop_instance_uid: item for item in pacs.kept}
    assert kept.keys() == made.keys(), "the PACS does not hold exactly what was made"
    by_id = {row["id"]: row for row in stored.values()}
    for uid, row in made.items():
        file = _spooled(folder, row)
        assert hashlib.sha256(file).hexdigest() == row["sha256"]
        assert _data_set(kept[uid].path.read_bytes()) == _data_set(file)
        source = _spooled(folder, by_id[row["source_instance_id"]])
        identity.compare(identity.read_block(source), identity.read_block(file))


def _spooled(folder: Path, row: Row) -> bytes:
    key = str(row["spool_key"])
    return (folder / "spool" / key[:2] / key).read_bytes()


def _data_set(file: bytes) -> bytes:
    return file[parse(file).data_set_at :]
