"""DCMTK sends phantoms, an Orthanc is the destination, and everything is judged by others."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import generate_frames
from pydicom.uid import JPEGBaseline8Bit, RLELossless, SegmentationStorage

from dicom_xai import identity
from dicom_xai.demo.phantom import Phantom, chest, head_ct
from dicom_xai.demo.site import Site
from dicom_xai.spool import Spool
from tests.make.books import deliveries_of, metric, rows, wait_for_jobs, wait_until_idle
from tests.make.dcmtk import dcmtk, dump_complaints, rendered, storescu
from tests.make.orthanc import Orthanc, data_set
from tests.make.studies import a_radiograph, changed, study_of
from tests.make.validators import dcentvfy_findings, dciodvfy_errors

pytestmark = [pytest.mark.peers, pytest.mark.slow]

#: Each way of compressing is a destination; all are the same Orthanc.
DESTINATIONS = "\n".join(
    f"  {name}: {{{{type: dimse, ae_title: ORTHANC, host: 127.0.0.1, port: {{port}}, "
    f"compress: {compress}}}}}"
    for name, compress in (("pacs", "none"), ("archive", "rle"), ("web", "jpeg"))
)
TO_ALL = "[{object: sc, to: [pacs, archive, web]}, {object: seg, to: [pacs, archive, web]}]"
#: A budget that no busy machine passes: what is left out to hold it is tested elsewhere.
ROUTES = f"""
routes:
  - name: chest
    when: {{Modality: {{in: [CR, DX]}}, calling_ae_title: {{equals: STORESCU}}}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: {TO_ALL}
    budget_s: 120
  - name: blind
    when: {{calling_ae_title: {{equals: BLIND}}}}
    trigger: instance
    model: blind-cxr
    explain: [grad-cam]
    send: {TO_ALL}
    budget_s: 120
  - name: head
    when: {{Modality: {{equals: CT}}}}
    trigger: association_release
    model: phantom-ct-head
    explain: [grad-cam]
    send: [{{object: sc, to: [pacs], slices: 2}}, {{object: seg, to: [pacs]}}]
    budget_s: 120
"""
CT_SLICES = 12


@dataclass(frozen=True, slots=True, eq=False)
class Returned:
    """One object that came back, and the files it was made from."""

    kind: str  #: sc, seg or note
    uid: str
    study: str  #: the test's name for it
    path: Path  #: as Orthanc serves it
    made: bytes  #: as we made it
    sources: tuple[Path, ...]

    @property
    def name(self) -> str:
        """For messages: a path of pytest's would say nothing."""
        return f"{self.study} {self.kind} {self.uid}"

    @property
    def served(self) -> Dataset:
        """Orthanc's file."""
        return data_set(self.path.read_bytes())


@dataclass(frozen=True, slots=True, eq=False)
class RoundTrip:
    """All that was sent and came back."""

    orthanc: Orthanc
    site: Site
    sources: Mapping[str, tuple[Path, ...]]
    returned: tuple[Returned, ...]

    def of(self, study: str, kind: str) -> list[Returned]:
        """Some of them."""
        return [item for item in self.returned if (item.study, item.kind) == (study, kind)]


@pytest.fixture(scope="module")
def trip(tmp_path_factory: pytest.TempPathFactory, seeing_models: Path) -> Iterator[RoundTrip]:
    folder = tmp_path_factory.mktemp("round-trip")
    models = shutil.copytree(seeing_models, folder / "models")
    _see_half(models)
    with Orthanc(folder / "orthanc") as orthanc:
        settings = {"destinations": DESTINATIONS.format(port=orthanc.port)}
        site = Site(
            folder / "site",
            routes=ROUTES,
            models=models,
            settings=settings,
            environment={"OMP_NUM_THREADS": "1"},
        )
        with site:
            sources = _send(site, folder)
            yield RoundTrip(orthanc, site, sources, _fetch(orthanc, site, sources, folder))


def _see_half(models: Path) -> None:
    """Put the cards' absolute scale where the untrained maps lie, so that regions have an edge."""
    for path in models.glob("*.yaml"):
        card = json.loads(path.read_text())
        card["heatmap"] = {"full_scale": "0.00012", "threshold": "0.00009"}
        path.write_text(json.dumps(card))


def _send(site: Site, folder: Path) -> dict[str, tuple[Path, ...]]:
    """One storescu an association; the files of each study by the test's name for it."""
    rng = np.random.default_rng(20261123)
    dx, negative, broken = (chest(rng, matrix=(300, 260)) for _ in range(3))
    cr = chest(rng, modality="CR", views=("PA", "AP"), matrix=(320, 280))
    ct = head_ct(rng, slices=CT_SLICES, matrix=160, tilt_degrees=0.0)
    head = _write(folder / "ct", ct)
    late = head[CT_SLICES // 2]
    sources = {
        "dx": _write(folder / "dx", dx),
        "cr": _write(folder / "cr", cr),
        "ct": head,
        "negative": _write(folder / "negative", negative),
        "broken": _write(folder / "broken", broken, HighBit=3),
    }
    for study, files in sources.items():
        aet = "BLIND" if study == "negative" else "STORESCU"
        wanted = [path for path in files if path != late]
        answers = storescu(site.port, wanted, "-aet", aet)
        assert set(answers.values()) == {"Success"}, answers
    wait_until_idle(site.folder)
    assert storescu(site.port, [late]) == {late: "Success"}
    wait_until_idle(site.folder)
    return sources


def _write(folder: Path, phantom: Phantom, **attributes: object) -> tuple[Path, ...]:
    folder.mkdir()
    paths = []
    for number, file in enumerate(phantom.files, start=1):
        path = folder / f"{number:02d}.dcm"
        path.write_bytes(changed(file, **attributes) if attributes else file)
        paths.append(path)
    return tuple(paths)


def _fetch(
    orthanc: Orthanc, site: Site, sources: Mapping[str, tuple[Path, ...]], folder: Path
) -> tuple[Returned, ...]:
    """Every object of the ledger, as Orthanc serves it."""
    spool = Spool(site.folder / "spool")
    studies = {
        str(data_set(paths[0].read_bytes()).StudyInstanceUID): paths for paths in sources.values()
    }
    names = {paths: name for name, paths in sources.items()}
    served = folder / "served"
    served.mkdir()
    returned = []
    for row in rows(site.folder, "SELECT * FROM result ORDER BY id"):
        uid, paths = str(row["sop_instance_uid"]), studies[str(row["study_instance_uid"])]
        path = served / f"{uid}.dcm"
        path.write_bytes(orthanc.file(uid))
        made = spool.read(str(row["spool_key"]))
        returned.append(Returned(str(row["kind"]), uid, names[paths], path, made, paths))
    return tuple(returned)


def test_echoscu_is_answered_and_a_wrong_called_ae_title_is_told(trip: RoundTrip) -> None:
    assert dcmtk("echoscu", "-aec", "DICOM_XAI", "127.0.0.1", trip.site.port).returncode == 0
    wrong = dcmtk("echoscu", "-aec", "SOMEBODY", "127.0.0.1", trip.site.port)
    assert wrong.returncode != 0
    assert "Called AE Title Not Recognized" in wrong.stderr
    source = trip.sources["dx"][0]
    wrong = dcmtk("storescu", "-aec", "SOMEBODY", "127.0.0.1", trip.site.port, source)
    assert wrong.returncode != 0
    assert "Called AE Title Not Recognized" in wrong.stderr


def test_the_same_file_again_is_a_success_and_no_second_result(trip: RoundTrip) -> None:
    before = len(rows(trip.site.folder, "SELECT id FROM result"))
    source = trip.sources["dx"][0]
    assert storescu(trip.site.port, [source]) == {source: "Success"}
    wait_until_idle(trip.site.folder)
    assert len(rows(trip.site.folder, "SELECT id FROM result")) == before


def test_other_content_under_a_known_uid_is_refused_and_changes_nothing(
    trip: RoundTrip, tmp_path: Path
) -> None:
    before = rows(trip.site.folder, "SELECT sha256 FROM result")
    other = tmp_path / "other.dcm"
    other.write_bytes(changed(trip.sources["dx"][0].read_bytes(), SeriesDescription="Another"))
    # DCMTK has no word for it in storage (PS3.7 C.5.6)
    assert storescu(trip.site.port, [other]) == {other: "Unknown Status: 0x111"}
    wait_until_idle(trip.site.folder)
    assert rows(trip.site.folder, "SELECT sha256 FROM result") == before
    kept = "SELECT id FROM instance WHERE disposition = 'quarantined'"
    assert len(rows(trip.site.folder, kept)) == 1


def test_three_senders_at_once_are_all_served(trip: RoundTrip, tmp_path: Path) -> None:
    phantoms = [a_radiograph() for _ in range(3)]
    files = [_write(tmp_path / str(number), each) for number, each in enumerate(phantoms)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda paths: storescu(trip.site.port, paths), files))
    assert [set(each.values()) for each in answers] == [{"Success"}] * 3
    for phantom in phantoms:
        (job,) = wait_for_jobs(trip.site, study_of(phantom))
        assert job["state"] == "done"
        assert {row["state"] for row in deliveries_of(trip.site, study_of(phantom))} == {"sent"}


def test_our_own_results_sent_back_are_taken_and_never_routed(trip: RoundTrip) -> None:
    before = len(rows(trip.site.folder, "SELECT id FROM result"))
    plain = [
        item.path
        for item in trip.returned
        if not item.served.file_meta.TransferSyntaxUID.is_compressed
    ]
    assert set(storescu(trip.site.port, plain).values()) == {"Success"}
    wait_until_idle(trip.site.folder)
    assert len(rows(trip.site.folder, "SELECT id FROM result")) == before


def test_every_study_comes_back_with_its_objects(trip: RoundTrip) -> None:
    found = Counter((item.study, item.kind) for item in trip.returned)
    assert found == {
        ("dx", "sc"): 3,  # one for each way of compressing
        ("dx", "seg"): 1,
        ("cr", "sc"): 6,
        ("cr", "seg"): 2,
        ("ct", "sc"): 4,  # two slices, and again with the late slice
        ("ct", "seg"): 2,
        ("negative", "sc"): 3,
        ("broken", "note"): 3,
    }


def test_dciodvfy_finds_no_error(trip: RoundTrip) -> None:
    errors = {item.name: dciodvfy_errors(item.path) for item in trip.returned}
    assert {name: lines for name, lines in errors.items() if lines} == {}


def test_dcentvfy_finds_each_object_in_its_sources_study(trip: RoundTrip) -> None:
    for study, sources in trip.sources.items():
        results = [item.path for item in trip.returned if item.study == study]
        assert dcentvfy_findings(sources, results) == []


def test_dcentvfy_would_find_a_changed_patient_and_a_lost_attribute(
    trip: RoundTrip, tmp_path: Path
) -> None:
    item = trip.of("dx", "sc")[0]
    other = tmp_path / "other.dcm"
    ds = item.served
    ds.PatientSex = "O" if ds.PatientSex != "O" else "F"
    del ds.StudyDescription
    ds.save_as(other)
    findings = "\n".join(dcentvfy_findings(item.sources, [other]))
    assert "different value - Element=<PatientSex> IE=<Patient>" in findings
    assert "present in one instance but not the other - Element=<StudyDescription>" in findings


def test_dcmdump_reads_every_object_without_complaint(trip: RoundTrip) -> None:
    complaints = {item.name: dump_complaints(item.path) for item in trip.returned}
    assert {name: lines for name, lines in complaints.items() if lines} == {}


def test_the_identity_block_is_the_sources_byte_for_byte(trip: RoundTrip) -> None:
    for item in trip.returned:
        block = identity.read_block(item.path.read_bytes())
        for source in item.sources:
            identity.compare(identity.read_block(source.read_bytes()), block)


def test_orthanc_serves_equal_pixels(trip: RoundTrip) -> None:
    for item in trip.returned:
        made, served = data_set(item.made), item.served
        assert served.file_meta.TransferSyntaxUID == made.file_meta.TransferSyntaxUID, item.name
        assert served.PixelData == made.PixelData, item.name
        frame = made.PixelData
        if made.file_meta.TransferSyntaxUID.is_compressed:
            frame = next(generate_frames(made.PixelData, number_of_frames=1))
        if made.SOPClassUID != SegmentationStorage:  # its frames do not end at a byte
            assert trip.orthanc.raw_frame(item.uid).rstrip(b"\0") == frame.rstrip(b"\0"), item.name


def test_orthanc_shows_what_we_drew(trip: RoundTrip) -> None:
    for item in trip.returned:
        if item.kind == "seg":
            continue
        shown = np.asarray(Image.open(io.BytesIO(trip.orthanc.preview(item.uid))))
        _assert_same_picture(shown, item)


def test_dcmj2pnm_draws_what_we_drew(trip: RoundTrip, tmp_path: Path) -> None:
    for item in trip.returned:
        if item.kind != "seg":
            _assert_same_picture(rendered(item.path, tmp_path / "sc.png"), item)


def _assert_same_picture(shown: np.ndarray, item: Returned) -> None:
    """Equal, but for JPEG: decoders round the colour transform differently (PS3.5 8.2.1)."""
    made = data_set(item.made)
    wanted = made.pixel_array
    assert shown.shape == wanted.shape, item.name
    is_jpeg = made.file_meta.TransferSyntaxUID == JPEGBaseline8Bit
    difference = np.abs(shown.astype(int) - wanted.astype(int))
    assert difference.max() <= (4 if is_jpeg else 0), (item.name, difference.max())


def test_dcmj2pnm_draws_each_segment_where_its_pixels_are(trip: RoundTrip, tmp_path: Path) -> None:
    regions = [item for item in trip.returned if item.kind == "seg"]
    for item in regions:
        wanted = np.atleast_3d(data_set(item.made).pixel_array)
        frames = wanted if wanted.shape[-1] != 1 else np.moveaxis(wanted, -1, 0)
        for number, frame in enumerate(frames, start=1):
            # black below a half, white above: the frame's own range is one value where it is full
            window = ("+Ww", "0.5", "1")
            drawn = rendered(item.path, tmp_path / "seg.png", *window, frame=number)
            np.testing.assert_array_equal(drawn, frame * np.uint8(255), err_msg=item.name)
            assert 0 < frame.mean() < 1, item.name


def test_each_destination_gets_its_own_compression(trip: RoundTrip) -> None:
    by_syntax = {
        data_set(item.made).file_meta.TransferSyntaxUID: data_set(item.made)
        for item in trip.of("dx", "sc")
    }
    plain = next(ds for uid, ds in by_syntax.items() if not uid.is_compressed)
    np.testing.assert_array_equal(by_syntax[RLELossless].pixel_array, plain.pixel_array)
    jpeg = by_syntax[JPEGBaseline8Bit]
    assert (jpeg.LossyImageCompression, jpeg.LossyImageCompressionMethod) == ("01", "ISO_10918_1")
    ratio = len(plain.PixelData) / len(next(generate_frames(jpeg.PixelData, number_of_frames=1)))
    assert float(jpeg.LossyImageCompressionRatio) == pytest.approx(ratio, rel=0.01)
    # the phantom's noise is what JPEG drops: 3 % of the range on average, at drawn edges more
    difference = np.abs(jpeg.pixel_array.astype(int) - plain.pixel_array.astype(int))
    assert difference.mean() < 8


def test_a_late_slice_gives_amended_objects_that_name_the_first_ones(trip: RoundTrip) -> None:
    served = [item.served for item in trip.returned if item.study == "ct"]
    amended = [ds for ds in served if "AMENDED 1" in ds.SeriesDescription]
    first = {ds.SOPInstanceUID for ds in served if ds not in amended}
    assert len(amended) == len(first) == 3
    for ds in amended:
        named = {item.ReferencedSOPInstanceUID for item in ds.ReferencedImageSequence}
        assert named == first


def test_no_role_was_restarted(trip: RoundTrip) -> None:
    assert metric(trip.site, "dicom_xai_role_restarts_total") == 0
    assert '"role-crashed"' not in trip.site.log.read_text()
