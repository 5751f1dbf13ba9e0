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
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicom_xai import identity
from dicom_xai.decode.pixels import decode, read_header
from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.site import Site
from dicom_xai.dimse import IMAGE_CLASSES, Status
from dicom_xai.errors import DecodeError
from dicom_xai.spool import Spool
from tests.make.books import metric, rows, wait_until_idle
from tests.make.dcmtk import dcmtk, dump_complaints, storescu
from tests.make.orthanc import Orthanc
from tests.make.real_images import RealImage, real_images
from tests.make.validators import dcentvfy_findings, dciodvfy_errors

pytestmark = [pytest.mark.peers, pytest.mark.slow]

AGREED = Path(__file__).with_name("real_images.tsv")
#: Errors of a Segmentation that follow from what its source lacks, and nobody may invent.
FOLLOWS = {
    "SharedFunctionalGroupsSequence: Missing attribute for Type 1C Conditional - "
    "Module=<PixelMeasuresMacro>": "SliceThickness"
}
COLUMNS = ("image", "transfer syntax", "answer", "objects", "errors", "reason")

#: Every image on its own, and the series that DCMTK sends. A budget that no busy machine passes.
ROUTES = """
routes:
  - name: image
    when: {}
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
#: Every accepted image that decodes; the others are refused.
SEGMENTED = 138
ANSWERS = {
    Status.SUCCESS: "0x0000",
    Status.CANNOT_UNDERSTAND: "0xC000",
    Status.SOP_CLASS_NOT_SUPPORTED: "no presentation context",
}


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """One real image, and how it went out."""

    image: RealImage
    file: Path  #: what was sent
    readable: Path  #: the same for dcentvfy, which cannot inflate
    uid: str
    answer: str
    comment: str  #: the refusal's
    has_new_uid: bool


@dataclass(frozen=True, slots=True, eq=False)
class Returned:
    """One object that came back, and what the validators say."""

    kind: str
    route: str
    job: int
    path: Path  #: as Orthanc serves it
    made: bytes  #: as we made it
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
            wait_until_idle(site.folder, timeout_s=400)
            yield Trip(site, sent, _fetch(orthanc, site, sent, folder))


def _send(site: Site, folder: Path) -> tuple[Sent, ...]:
    """Plain files over one association of DCMTK's; what it would convert or not send, over ours.

    A file whose SOP Instance UID another one has gets its own, by a change of digits in place.
    """
    used: set[str] = set()
    made: list[tuple[RealImage, Path, str, bool]] = []
    for number, image in enumerate(real_images()):
        uid, path = image.uid, image.path
        is_taken = uid in used
        if is_taken:
            uid = f"{uid[:-4]}{9000 + number}"
            path = folder / f"{number}.dcm"
            path.write_bytes(image.path.read_bytes().replace(image.uid.encode(), uid.encode()))
        used.add(uid)
        made.append((image, path, uid, is_taken))
    plain = [
        item
        for item in made
        if item[0].syntax == ExplicitVRLittleEndian
        and item[0].sop_class in IMAGE_CLASSES
        and not item[3]
    ]
    words = storescu(site.port, [path for _, path, _, _ in plain])
    scu = StorageSCU("service", site.address())
    try:
        return tuple(_sent(scu, folder, *item, words.get(item[1], "")) for item in made)
    finally:
        scu.close()


def _sent(
    scu: StorageSCU,
    folder: Path,
    image: RealImage,
    path: Path,
    uid: str,
    is_taken: bool,
    word: str,
) -> Sent:
    """Our own sender asks again where DCMTK was refused: it keeps the comment."""
    readable = path
    if image.syntax.is_deflated:
        readable = folder / "inflated.dcm"
        assert dcmtk("dcmconv", "+te", path, readable).returncode == 0
    if word == "Success":
        return Sent(image, path, readable, uid, "0x0000", "", is_taken)
    receipt = scu.send(path.read_bytes())
    assert word in ("", "Error: CannotUnderstand"), word
    answer = ANSWERS[Status(receipt.status)]
    return Sent(image, path, readable, uid, answer, receipt.comment, is_taken)


def _fetch(
    orthanc: Orthanc, site: Site, sent: tuple[Sent, ...], folder: Path
) -> tuple[Returned, ...]:
    """Every object of the ledger as Orthanc serves it, judged; two judges at a time."""
    spool = Spool(site.folder / "spool")
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
            made=spool.read(str(row["spool_key"])),
            sources=sources,
            errors=tuple(sorted(map(_plain, dciodvfy_errors(path)))),
            findings=tuple(dcentvfy_findings([item.readable for item in sources], [path])),
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


def test_every_image_and_series_comes_to_the_agreed_outcome(trip: Trip, tmp_path: Path) -> None:
    lines = ["\t".join(COLUMNS), *_image_lines(trip), *_series_lines(trip)]
    table = tmp_path / AGREED.name
    table.write_text("\n".join(lines) + "\n")
    assert table.read_text().splitlines() == AGREED.read_text().splitlines(), f"see {table}"


def _image_lines(trip: Trip) -> list[str]:
    notes, unrouted = _notes(trip.site, "image"), _unrouted(trip.site)
    lines = []
    for item in sorted(trip.sent, key=lambda item: item.image.name):
        objects = [o for o in trip.returned if o.route == "image" and item in o.sources]
        reasons = [item.comment] if item.comment else []
        reasons += ["sent with a UID of its own: another file has the same"] * item.has_new_uid
        if item.uid in unrouted:
            reasons.append(f"{unrouted[item.uid]}: {item.image.sop_class.name}")
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


def _unrouted(site: Site) -> dict[str, str]:
    """What became of each instance that no route got, in the ledger's word."""
    query = "SELECT sop_instance_uid, disposition FROM instance WHERE disposition <> 'routed'"
    return {str(r["sop_instance_uid"]): str(r["disposition"]) for r in rows(site.folder, query)}


def test_every_accepted_image_that_decodes_has_a_picture_and_most_have_a_region(trip: Trip) -> None:
    pictured, segmented = set(), set()
    for item in trip.returned:
        if item.route == "image":
            kept = {"sc": pictured, "seg": segmented}.get(item.kind, set())
            kept |= {source.uid for source in item.sources}
    for item in trip.sent:
        if item.answer == "0x0000" and item.image.sop_class in IMAGE_CLASSES:
            assert (item.uid in pictured) == _decodes(item), item.image.name
    assert len(segmented) >= SEGMENTED


def _decodes(item: Sent) -> bool:
    try:
        decode(item.file.read_bytes())
    except DecodeError:
        return False
    return True


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
            inherited |= {
                error
                for error, keyword in FOLLOWS.items()
                if any(not _header(source).get(keyword) for source in item.sources)
            }
            assert set(item.errors) <= inherited, (item.path, item.sources[0].image.name)


def test_dcentvfy_finds_each_object_in_its_sources_study(trip: Trip) -> None:
    assert [
        finding
        for item in trip.returned
        for finding in item.findings
        if not _is_the_sources_own(finding, item)
    ] == []


def _is_the_sources_own(finding: str, item: Returned) -> bool:
    """Whether it is about what some source lacks, or refers to and was not sent.

    Results must have some attributes that may be absent there, empty (identity.EMPTY_WHEN_ABSENT),
    and a Referenced Study Sequence travels with the study's identity.
    """
    lacks = re.search(r"present in one instance but not the other - Element=<(\w+)>", finding)
    if lacks and lacks[1] in identity.EMPTY_WHEN_ABSENT:
        return any(lacks[1] not in _header(source) for source in item.sources)
    refers = re.search(r"Missing SOPInstanceUID that was referenced - ([0-9.]+) ", finding)
    studies = [
        reference.get("ReferencedSOPInstanceUID")
        for source in item.sources
        for reference in _header(source).get("ReferencedStudySequence", ())
    ]
    return bool(refers and refers[1] in studies)


def _header(source: Sent) -> Dataset:
    return read_header(source.file.read_bytes())


def test_dcmdump_reads_every_object_without_complaint(trip: Trip) -> None:
    with ThreadPoolExecutor(2) as pool:
        complaints = pool.map(dump_complaints, [item.path for item in trip.returned])
        assert [line for lines in complaints for line in lines] == []


def test_the_identity_block_is_the_sources_byte_for_byte(trip: Trip) -> None:
    for item in trip.returned:
        # what left us: Orthanc strips the padding of a value that holds nothing else
        block = identity.read_block(item.made)
        for source in item.sources[:1]:
            identity.compare(identity.read_block(source.file.read_bytes()), block)


def test_no_image_stops_a_role_or_needs_a_second_attempt(trip: Trip) -> None:
    assert metric(trip.site, "dicom_xai_role_restarts_total") == 0
    log = trip.site.log.read_text()
    assert not re.search('"(role-crashed|job-retried|decoder-died)"', log)
    # a job that fails says why in a note
    assert log.count('"job-failed"') == sum(item.kind == "note" for item in trip.returned)
