"""The one check after a round: lost 0, duplicated 0, misattached 0, stuck 0.

It reads ledger, spool and destinations, and compares them with what the senders were told; no code
of the service takes part but the comparison of identities, which has judges of its own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import yaml
from pydicom import dcmread

from dicom_xai import identity
from dicom_xai.deliver.storage_scu import parse
from dicom_xai.errors import IdentityError
from dicom_xai.pipeline import PREDICTION_ONLY
from dicom_xai.study import ObjectKind
from tests.make.books import left_lying, rows, wait_until
from tests.make.marks import is_marked, mark_shown
from tests.make.scripted_peer import ScriptedPeer
from tests.make.studies import header_of

#: What one answer of a route is: each kind of object, a destination that must get it, and how often
#: at most: never more pictures than images.
Sends = Counter[tuple[str, str]]

#: A kill may keep a role waiting for its supervisor's longest pause; then it loads its models, and
#: that takes a minute where the machine has much else to do.
SETTLED_S = 300.0


@dataclass
class Counts:
    """What was played, and what was found; the last four must stay 0."""

    rounds: int = 0
    studies: int = 0
    acknowledged: int = 0
    results: int = 0
    deliveries: int = 0
    resends: int = 0
    repeated: int = 0
    corrected: int = 0
    broken_off: int = 0
    pictures: int = 0  #: of which the pixels were read, and were their source's
    mixed: int = 0  #: units of two patients, stopped with that reason
    orphans: int = 0  #: files of deaths between file and row; retention sweeps them
    faults: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    duplicated: int = 0
    misattached: int = 0
    stuck: int = 0

    def add(self, other: Counts) -> None:
        """Add another site's."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        for fault, count in other.faults.items():
            self.faults[fault] = self.faults.get(fault, 0) + count

    def __str__(self) -> str:
        return (
            ", ".join(f"{name} {value}" for name, value in vars(self).items() if name != "faults")
            + "\n"
            + ", ".join(f"{name}: {value}" for name, value in sorted(self.faults.items()))
        )


def sends_of(routes: str) -> dict[str, Sends]:
    """What each route of a routes.yaml makes of a unit of one patient, if something is found."""
    return {
        str(route["name"]): Sends(
            {
                (str(rule["object"]), str(name)): int(rule.get("slices", 1))
                for rule in route["send"]
                for name in rule["to"]
            }
        )
        for route in yaml.safe_load(routes)["routes"]
    }


def wait_until_settled(folder: Path, studies: Sequence[Mapping[str, bytes]]) -> None:
    """Return when nothing waits and every study has an answer for all of its instances."""
    wanted = {_study_uid(files): len(files) for files in studies if files}

    def is_settled() -> bool:
        return not left_lying(folder) and all(
            _answered(folder, study) >= count for study, count in wanted.items()
        )

    wait_until(is_settled, f"settled; left: {left_lying(folder)}", SETTLED_S)


def check_round(
    folder: Path,
    peers: Mapping[str, ScriptedPeer],
    studies: Sequence[Mapping[str, bytes]],
    sends: Mapping[str, Sends],
    counts: Counts,
) -> None:
    """Hold ledger, spool and destinations against what one round's senders were told.

    Parameters
    ----------
    folder : Path
        The site's, when nothing waits.
    peers : mapping of str to ScriptedPeer
        All destinations by name.
    studies : sequence of mappings
        For each study, every file answered with Success, by SOP Instance UID.
    sends : mapping of str to Sends
        What each route makes of a unit, by its name.
    counts : Counts
        Added to.
    """
    problems: list[str] = []
    lying = left_lying(folder)
    counts.stuck += len(lying)
    problems += [f"stuck: {each}" for each in lying]
    for files in studies:
        counts.studies += 1
        counts.acknowledged += len(files)
        problems += _problems_of(folder, peers, files, sends, counts)
    assert problems == [], "\n".join(problems)


def _problems_of(
    folder: Path,
    peers: Mapping[str, ScriptedPeer],
    files: Mapping[str, bytes],
    sends: Mapping[str, Sends],
    counts: Counts,
) -> list[str]:
    study = _study_uid(files)
    patients = {uid: str(header_of(file).PatientID) for uid, file in files.items()}
    problems = []
    stored = {
        str(row["sop_instance_uid"]): row
        for row in rows(
            folder,
            "SELECT * FROM instance WHERE study_instance_uid = ? AND disposition = 'routed'",
            study,
        )
    }
    for uid, file in files.items():
        if uid not in stored or _data_set(_spooled(folder, stored[uid])) != _data_set(file):
            counts.lost += 1
            problems.append(f"lost: {uid}")
    jobs = rows(
        folder,
        "SELECT job.*, candidate.generation AS about FROM job JOIN candidate"
        " ON candidate.id = job.candidate_id WHERE candidate.study_instance_uid = ?",
        study,
    )
    if len({tuple(job[key] for key in _ONE_OF_EACH) for job in jobs}) != len(jobs):
        counts.duplicated += 1
        problems.append(f"study {study} has two jobs of one generation")
    made = rows(folder, "SELECT * FROM result WHERE study_instance_uid = ?", study)
    counts.results += len(made)
    by_id = {row["id"]: str(row["sop_instance_uid"]) for row in stored.values()}
    for job in jobs:
        results = [row for row in made if row["job_id"] == job["id"]]
        members = [
            by_id.get(row["instance_id"], "")
            for row in rows(
                folder,
                "SELECT instance_id FROM candidate_instance WHERE candidate_id = ?",
                job["candidate_id"],
            )
        ]
        whose = {patients.get(uid, "") for uid in members}
        if len(whose) > 1:
            problems += _problems_mixed(job, results, counts)
        else:
            wanted = sends[str(job["route"])]
            wanted = Sends({key: min(n, len(members)) for key, n in wanted.items()})
            problems += _problems_done(folder, job, wanted, counts)
        for row in results:
            source = by_id.get(row["source_instance_id"], "")
            file = files.get(source) if source in members else None
            problems += _problems_with(folder, peers, file, row, counts)
    return problems


_ONE_OF_EACH = ("unit_key", "route", "generation", "purpose")


def _problems_mixed(
    job: Mapping[str, object], results: Sequence[Mapping[str, object]], counts: Counts
) -> list[str]:
    """Two patients in one unit: it is stopped, says so, and nothing but that is sent."""
    kinds = {str(row["kind"]) for row in results} - {"note"}
    if job["state"] == "failed" and "differ in PatientID" in str(job["note"]) and not kinds:
        counts.mixed += 1
        return []
    counts.misattached += 1
    return [f"job {job['id']} of two patients is {job['state']} with {kinds}: {job['note']}"]


def _problems_done(
    folder: Path, job: Mapping[str, object], wanted: Sends, counts: Counts
) -> list[str]:
    """One patient's unit: done, and each object that its route sends is there once."""
    if job["state"] != "done":
        counts.lost += 1
        return [f"job {job['id']} is {job['state']}: {job['note']}"]
    if job["explainer"] == PREDICTION_ONLY:  # the map, and what is segmented of it, follows
        wanted = Counter({key: n for key, n in wanted.items() if key[0] != ObjectKind.SEG})
    found = Counter(
        (str(row["kind"]), str(row["destination"]))
        for row in rows(
            folder,
            "SELECT result.kind, delivery.destination FROM result"
            " LEFT JOIN delivery ON delivery.result_id = result.id WHERE result.job_id = ?",
            job["id"],
        )
    )
    missing, more = wanted - found, found - wanted
    counts.lost += missing.total()
    counts.duplicated += more.total()
    return [f"job {job['id']} of {job['route']} lacks {key}" for key in missing] + [
        f"job {job['id']} of {job['route']} has {key} beyond what it sends" for key in more
    ]


def _problems_with(
    folder: Path,
    peers: Mapping[str, ScriptedPeer],
    source: bytes | None,
    row: Mapping[str, object],
    counts: Counts,
) -> list[str]:
    """One result: whole, its source's patient's, and the same at every destination.

    `source` is the file that it says it is of, where that is one of its unit.
    """
    uid = str(row["sop_instance_uid"])
    file = _spooled(folder, row)
    problems = []
    if hashlib.sha256(file).hexdigest() != row["sha256"]:
        counts.lost += 1
        problems.append(f"result {uid} is not what was made")
    if source is None or not _is_same_patient(source, file):
        counts.misattached += 1
        problems.append(f"misattached: {uid}")
    elif row["kind"] == ObjectKind.SC and is_marked(source):
        counts.pictures += 1
        if mark_shown(dcmread(BytesIO(file))) != mark_shown(dcmread(BytesIO(source))):
            counts.misattached += 1
            problems.append(f"misattached: the picture of {uid} is not of its source")
    for delivery in rows(folder, "SELECT * FROM delivery WHERE result_id = ?", row["id"]):
        counts.deliveries += 1
        counts.resends += max(0, int(str(delivery["attempts"])) - 1)
        kept = peers[str(delivery["destination"])].kept.get(uid)
        if delivery["state"] != "sent":
            counts.stuck += 1
            problems.append(f"delivery {delivery['id']}: {delivery['state']} {delivery['reason']}")
        elif kept != _data_set(file):
            counts.lost += 1
            problems.append(f"{delivery['destination']} does not hold {uid} as it was made")
    return problems


def check_site(folder: Path, peers: Mapping[str, ScriptedPeer], counts: Counts) -> None:
    """Over all rounds: no destination holds more or other things, and nothing lies about.

    What a role had half written when it was killed goes when it starts again.
    """
    spool = folder / "spool"
    wait_until(lambda: not list(spool.rglob("*.tmp")), "no temporary file is left", SETTLED_S)
    problems = []
    for name, peer in peers.items():
        sent = {
            str(row["sop_instance_uid"])
            for row in rows(
                folder,
                "SELECT result.sop_instance_uid FROM result JOIN delivery"
                " ON delivery.result_id = result.id WHERE delivery.destination = ?",
                name,
            )
        }
        more = peer.kept.keys() - sent
        counts.duplicated += len(more) + len(peer.conflicts)
        problems += [f"{name} holds {uid}, which the ledger does not know" for uid in more]
        problems += [f"{name} got other bytes under {uid}" for uid in peer.conflicts]
    known = {
        str(row["spool_key"])
        for table in ("instance", "result")
        for row in rows(folder, f"SELECT spool_key FROM {table}")
    }
    counts.orphans += sum(path.is_file() and path.name not in known for path in spool.rglob("*"))
    lying = left_lying(folder)
    counts.stuck += len(lying)
    assert problems + lying == [], "\n".join(problems + lying)


def _answered(folder: Path, study: str) -> int:
    """How many of a study's instances the newest ended answers of its units are about."""
    found = rows(
        folder,
        "WITH ended AS (SELECT candidate.* FROM candidate JOIN job ON job.candidate_id ="
        " candidate.id WHERE candidate.study_instance_uid = ? AND job.state IN ('done', 'failed'))"
        " SELECT count(DISTINCT instance_id) AS n FROM candidate_instance JOIN ended"
        " ON ended.id = candidate_id WHERE generation = (SELECT max(newest.generation)"
        " FROM ended AS newest WHERE newest.unit_key = ended.unit_key"
        " AND newest.route = ended.route)",
        study,
    )
    return int(str(found[0]["n"]))


def _is_same_patient(source: bytes, result: bytes) -> bool:
    try:
        identity.compare(identity.read_block(source), identity.read_block(result))
    except IdentityError:
        return False
    ours, theirs = dcmread(BytesIO(result), stop_before_pixels=True), header_of(source)
    return (ours.PatientID, ours.PatientName, ours.StudyInstanceUID) == (
        theirs.PatientID,
        theirs.PatientName,
        theirs.StudyInstanceUID,
    )


def _study_uid(files: Mapping[str, bytes]) -> str:
    return str(header_of(next(iter(files.values()))).StudyInstanceUID)


def _spooled(folder: Path, row: Mapping[str, object]) -> bytes:
    key = str(row["spool_key"])
    return (folder / "spool" / key[:2] / key).read_bytes()


def _data_set(file: bytes) -> bytes:
    return file[parse(file).data_set_at :]
