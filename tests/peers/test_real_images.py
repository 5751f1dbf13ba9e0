"""Real images go the same way, and every one of them has a stated outcome.

`real_images.tsv` is the agreed table: one line for each file, one for each series. It is made again
here from what the service and the validators say, and compared. Where a change is right, copy the
new table, whose path a failure names, over it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydicom.uid import ExplicitVRLittleEndian

from dicom_xai import identity
from dicom_xai.demo.site import Site
from dicom_xai.dimse import Status
from tests.make.books import metric, rows, wait_until_idle
from tests.make.dcmtk import dump_complaints, storescu
from tests.make.orthanc import Orthanc
from tests.make.real_images import RealImage, real_images
from tests.make.validators import dcentvfy_findings, dciodvfy_errors

pytestmark = [pytest.mark.peers, pytest.mark.slow]

AGREED = Path(__file__).with_name("real_images.tsv")
COLUMNS = ("image", "transfer syntax", "answer", "objects", "errors", "reason")

#: Every image on its own, and the series that DCMTK sends. A budget that no busy machine passes.
ROUTES = """
routes:
  - name: image
    when: {Modality: {in: [CR, CT, MR]}}
    per: instance
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}, {object: seg, to: [pacs]}]
    budget_s: 600
  - name: series
    when: {Modality: {in: [CT, MR]}, calling_ae_title: {equals: STORESCU}}
    per: series
    trigger: association_release
    model: phantom-ct-head
    explain: [grad-cam]
    send: [{object: sc, to: [pacs], slices: 2}, {object: seg, to: [pacs]}]
    budget_s: 600
"""
ANSWERS = {
    "Success": "0x0000",
    "Error: CannotUnderstand": "0xC000",
    Status.SUCCESS: "0x0000",
    Status.CANNOT_UNDERSTAND: "0xC000",
    Status.SOP_CLASS_NOT_SUPPORTED: "no presentation context",
}
REASONS = {
    "no pixels": "no pixels: refused as unreadable",
    "truncated": "truncated: refused as unreadable",
    "compressed": "compressed: not served yet",
}


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """One real image, and how it went out."""

    image: RealImage
    file: Path  #: what was sent
    uid: str
    answer: str
    has_new_uid: bool


@dataclass(frozen=True, slots=True, eq=False)
class Returned:
    """One object that came back, and what the validators say."""

    kind: str
    route: str
    job: int
    path: Path
    sources: tuple[Sent, ...]
    errors: tuple[str, ...]
    findings: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Trip:
    """All that was sent and came back."""

    site: Site
    sent: tuple[Sent, ...]
    returned: tuple[Returned, ...]


@pytest.fixture(scope="module")
def trip(tmp_path_factory: pytest.TempPathFactory, seeing_models: Path) -> Iterator[Trip]:
    folder = tmp_path_factory.mktemp("real-images")
    with Orthanc(folder / "orthanc") as orthanc:
        place = f"type: dimse, ae_title: ORTHANC, host: 127.0.0.1, port: {orthanc.port}"
        site = Site(
            folder / "site",
            routes=ROUTES,
            models=seeing_models,
            settings={"destinations": f"  pacs: {{{place}}}"},
            environment={"OMP_NUM_THREADS": "1"},
        )
        with site:
            sent = _send(site, folder)
            wait_until_idle(site.folder, timeout_s=120)
            yield Trip(site, sent, _fetch(orthanc, site, sent, folder))


def _send(site: Site, folder: Path) -> tuple[Sent, ...]:
    """All plain files over one association of DCMTK's; what it would convert, over one of ours.

    A file whose SOP Instance UID another one has gets its own, by a change of digits in place.
    """
    by_dcmtk: list[tuple[RealImage, Path, str, bool]] = []
    by_us: list[tuple[RealImage, Path, str, bool]] = []
    used: set[str] = set()
    for number, image in enumerate(real_images()):
        uid, path = image.uid, image.path
        is_taken = not image.syntax.is_compressed and uid in used
        if is_taken:
            uid = f"{uid[:-4]}{9000 + number}"
            path = folder / f"{number}.dcm"
            path.write_bytes(image.path.read_bytes().replace(image.uid.encode(), uid.encode()))
        if not image.syntax.is_compressed:
            used.add(uid)
        is_plain = image.syntax == ExplicitVRLittleEndian and not is_taken
        (by_dcmtk if is_plain else by_us).append((image, path, uid, is_taken))
    words = storescu(site.port, [path for _, path, _, _ in by_dcmtk])
    statuses = site.send([path.read_bytes() for _, path, _, _ in by_us])
    answers = [words[path] for _, path, _, _ in by_dcmtk], statuses
    return tuple(
        Sent(image, path, uid, ANSWERS[answer], is_taken)
        for group, said in zip((by_dcmtk, by_us), answers, strict=True)
        for (image, path, uid, is_taken), answer in zip(group, said, strict=True)
    )


def _fetch(
    orthanc: Orthanc, site: Site, sent: tuple[Sent, ...], folder: Path
) -> tuple[Returned, ...]:
    """Every object of the ledger as Orthanc serves it, judged; two judges at a time."""
    served = folder / "served"
    served.mkdir()
    taken = {item.uid: item for item in sent if item.answer == "0x0000"}
    members: dict[object, list[Sent]] = {}
    for row in rows(
        site.folder,
        "SELECT job.id, instance.sop_instance_uid FROM job"
        " JOIN candidate_instance USING (candidate_id)"
        " JOIN instance ON instance.id = candidate_instance.instance_id ORDER BY instance.id",
    ):
        members.setdefault(row["id"], []).append(taken[str(row["sop_instance_uid"])])

    def judged(row: dict[str, object]) -> Returned:
        path = served / f"{row['sop_instance_uid']}.dcm"
        path.write_bytes(orthanc.file(str(row["sop_instance_uid"])))
        sources = tuple(members[row["job_id"]])
        return Returned(
            kind=str(row["kind"]),
            route=str(row["route"]),
            job=int(str(row["job_id"])),
            path=path,
            sources=sources,
            errors=tuple(sorted(map(_plain, dciodvfy_errors(path)))),
            findings=tuple(dcentvfy_findings([item.file for item in sources], [path])),
        )

    made = rows(
        site.folder,
        "SELECT result.*, job.route FROM result JOIN job ON job.id = result.job_id"
        " ORDER BY result.id",
    )
    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(judged, made))


def _plain(error: str) -> str:
    """An error without where it stands and which value it found."""
    found = re.fullmatch(r"Error - (?:<[^>]*?(\w+)\([^>]*> - )?(.*)", error)
    assert found is not None, error
    keyword, text = found[1] or "", found[2].partition(" = ")[0].strip()
    return text if keyword in text else f"{keyword}: {text}"


# ------------------------------------------------------------------ the table


def test_every_image_and_series_comes_to_the_agreed_outcome(trip: Trip, tmp_path: Path) -> None:
    lines = ["\t".join(COLUMNS), *_image_lines(trip), *_series_lines(trip)]
    table = tmp_path / AGREED.name
    table.write_text("\n".join(lines) + "\n")
    assert table.read_text().splitlines() == AGREED.read_text().splitlines(), f"see {table}"


def _image_lines(trip: Trip) -> list[str]:
    notes = _notes(trip.site, "image")
    lines = []
    for item in sorted(trip.sent, key=lambda item: item.image.name):
        objects = [o for o in trip.returned if o.route == "image" and item in o.sources]
        reasons = [REASONS[item.image.defect]] if item.image.defect else []
        reasons += ["sent with a UID of its own: another file has the same"] * item.has_new_uid
        reasons += _error_words(objects)
        reasons += [notes[objects[0].job]] if objects and notes[objects[0].job] else []
        lines.append(_line(item.image.name, item.image.syntax.name, item.answer, objects, reasons))
    return lines


def _series_lines(trip: Trip) -> list[str]:
    lines = []
    for job, note in _notes(trip.site, "series").items():
        objects = [o for o in trip.returned if o.job == job]
        names = sorted(item.image.name for item in objects[0].sources)
        title = f"series of {len(names)} from {names[0]}"
        reasons = [*_error_words(objects), *([note] if note else [])]
        lines.append(_line(title, "Explicit VR Little Endian", "", objects, reasons))
    return sorted(lines)


def _line(title: str, syntax: str, answer: str, objects: list[Returned], reasons: list[str]) -> str:
    kinds = Counter(item.kind for item in objects)
    made = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    errors = str(sum(len(item.errors) for item in objects)) if objects else ""
    return "\t".join((title, syntax, answer, made, errors, "; ".join(reasons)))


def _error_words(objects: list[Returned]) -> list[str]:
    """Each error once: they are the source's own, as another test proves."""
    return [f"as the source: {error}" for error in sorted({e for o in objects for e in o.errors})]


def _notes(site: Site, route: str) -> dict[int, str]:
    """What the ledger says about each job of a route."""
    found = rows(site.folder, "SELECT id, note FROM job WHERE route = ? ORDER BY id", route)
    return {int(str(row["id"])): str(row["note"]) for row in found}


# ------------------------------------------------------------------ what holds for all


def test_two_dozen_images_and_more_come_back_without_any_error(trip: Trip) -> None:
    clean = [
        item.image.name
        for item in trip.sent
        if (objects := [o for o in trip.returned if o.route == "image" and item in o.sources])
        and {o.kind for o in objects} >= {"sc"}
        and not any(o.errors for o in objects)
    ]
    assert len(clean) >= 24, clean


def test_no_object_has_an_error_that_its_source_has_not(trip: Trip) -> None:
    own: dict[str, set[str]] = {}
    for item in trip.returned:
        if item.errors:
            for source in item.sources:
                if source.uid not in own:
                    own[source.uid] = set(map(_plain, dciodvfy_errors(source.file)))
            inherited = set.intersection(*(own[source.uid] for source in item.sources))
            assert set(item.errors) <= inherited, (item.path, item.sources[0].image.name)


def test_dcentvfy_finds_each_object_in_its_sources_study(trip: Trip) -> None:
    assert [finding for item in trip.returned for finding in item.findings] == []


def test_dcmdump_reads_every_object_without_complaint(trip: Trip) -> None:
    with ThreadPoolExecutor(2) as pool:
        complaints = pool.map(dump_complaints, [item.path for item in trip.returned])
        assert [line for lines in complaints for line in lines] == []


def test_the_identity_block_is_the_sources_byte_for_byte(trip: Trip) -> None:
    for item in trip.returned:
        block = identity.read_block(item.path.read_bytes())
        for source in item.sources[:1]:
            identity.compare(identity.read_block(source.file.read_bytes()), block)


def test_no_image_stops_a_role_or_needs_a_second_attempt(trip: Trip) -> None:
    assert metric(trip.site, "dicom_xai_role_restarts_total") == 0
    log = trip.site.log.read_text()
    assert not re.search('"(role-crashed|job-retried|job-failed)"', log)
