"""Our Segmentations hold what highdicom builds from the same headers and values, all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np
import pytest
from highdicom.seg import Segmentation, SegmentDescription, segread
from pydicom import DataElement, Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.tag import BaseTag
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from dicom_xai import identity
from dicom_xai.config import Compression, SegmentationKind
from dicom_xai.encode.objects import Planned
from dicom_xai.encode.results import encode_results
from dicom_xai.study import ObjectKind
from tests.make.results import Case, as_file, case, enhanced_header, header, stacked

#: What travels as received bytes; highdicom has no parameter for the part of the body.
IDENTITY_TAGS = {*identity.BLOCK_TAGS, *map(tag_for_keyword, identity.PLACE_KEYWORDS)}

#: Ours are of the job's time, and say what made them and what they are for.
OURS = {
    *("InstanceCreationDate", "InstanceCreationTime", "ContentDate", "ContentTime"),
    *("SeriesDate", "SeriesTime", "SeriesDescription", "ContentQualification"),
    *("ContributingEquipmentSequence", "ContentCreatorName"),
    # type 2C without a plane, and left out by highdicom
    "PatientOrientation",
    # highdicom draws it by lot
    "DimensionOrganizationUID",
    # highdicom refers to all sources, we to those with a frame in the object: compared apart
    *("SourceImageSequence", "ReferencedSeriesSequence"),
    "PixelData",
}


def series(
    numbers: Sequence[int] = range(1, 7),
    hot: Sequence[int] | None = (1, 2, 3),
    change: Callable[[Dataset, int], object] = lambda ds, number: None,
    **options,
) -> Case:
    files = []
    for number in numbers:
        ds = header("CT", 30, 28, number)
        change(ds, number)
        files.append(as_file(ds))
    return stacked(files, heat_frames=hot, segmenting=True, **options)


def oblique(ds: Dataset, number: int) -> None:
    ds.ImageOrientationPatient = ["0.8", "0.6", "0", "0", "0", "-1"]
    ds.ImagePositionPatient = [f"{1.5 * number:g}", f"{-2 * number}", "7"]


def tilted(ds: Dataset, number: int) -> None:
    ds.ImagePositionPatient = ["-120", f"{0.4 * number:g}", f"{2.5 * number:g}"]


def uneven(ds: Dataset, number: int) -> None:
    ds.ImagePositionPatient = ["-120", "-120", str(2.5 * number + (number > 3))]


def lossy(ds: Dataset, number: int) -> None:
    ds.LossyImageCompression = "01"
    ds.LossyImageCompressionRatio, ds.LossyImageCompressionMethod = "12", "ISO_10918_1"


def enhanced(hot: Sequence[int] | None, **options) -> Case:
    files = [as_file(enhanced_header(24, 20, 5))]
    return stacked(files, heat_frames=hot, segmenting=True, **options)


CASES: dict[str, Callable[[], Case]] = {
    "slices in a row": series,
    "all slices": lambda: series(hot=None),
    "one slice": lambda: series(hot=(4,)),
    "slices with a gap": lambda: series(hot=(0, 1, 4)),
    "every other slice": lambda: series(hot=(0, 2, 4)),
    "slices in falling order": lambda: series(range(6, 0, -1), hot=(0, 1, 2)),
    "oblique": lambda: series(change=oblique),
    "gantry tilt": lambda: series(change=tilted),
    "uneven": lambda: series(change=uneven, hot=None),
    "uneven beyond the region": lambda: series(change=uneven, hot=(0, 1, 2)),
    "one slice of uneven ones": lambda: series(change=uneven, hot=(4,)),
    "a slice never sent": lambda: series((1, 2, 3, 5, 6), hot=None),
    "two slices of two": lambda: series((1, 2), hot=None),
    "a series of one slice": lambda: series((1,), hot=None),
    "lossy source": lambda: series(change=lossy),
    "two findings": lambda: series(positives=2),
    "overlapping findings": lambda: series(positives=3),
    "radiograph": lambda: case([as_file(header("CR", 33, 35))], segmenting=True),
    "radiograph, two findings": lambda: case(
        [as_file(header("CR", 33, 35))], positives=2, segmenting=True
    ),
    "enhanced": lambda: enhanced((1, 2, 4)),
    "enhanced, two findings": lambda: enhanced(None, positives=2),
}

SPACING = "SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices"
#: Where we mean to say something else.
INTENDED = {
    # 3D, and a slice spacing that is half the distance of the frames
    "every other slice": ["DimensionOrganizationType only in theirs"],
    # 1 mm, by stipulation
    "a series of one slice": [f"{SPACING} only in theirs"],
}


def ours(given: Case, kind: SegmentationKind, compression: Compression) -> Dataset:
    (made,) = encode_results(
        given.job,
        given.card,
        given.volume,
        given.explanation,
        [Planned(ObjectKind.SEG, compression, ("pacs",), region=kind)],
        given.described,
        given.display_of,
        given.heat_of,
        given.probability_of,
    ).objects
    return dcmread(BytesIO(made.file))


def values_of(given: Case, kind: SegmentationKind) -> np.ndarray:
    """``(frames, rows, columns, segments)``, by numpy alone: 0 or 1, or probabilities."""
    frames = range(len(given.volume.frames))
    positives = [finding for finding in given.explanation.findings if finding.is_positive]
    each = [given.probability_of(finding, frames).numpy() for finding in positives]
    stacked = np.stack(each, axis=-1)
    if kind is SegmentationKind.FRACTIONAL:
        return stacked
    masks = stacked >= 0.5
    if kind is SegmentationKind.LABELMAP:
        strongest = stacked == stacked.max(axis=-1, keepdims=True)
        masks &= strongest & (strongest.cumsum(axis=-1) == 1)
    return masks.astype(np.uint8)


def theirs(given: Case, kind: SegmentationKind, made: Dataset) -> Dataset:
    """What highdicom builds of the sources' own headers, with our names and numbers."""
    sources = [
        dcmread(BytesIO(given.read_source(instance)), stop_before_pixels=True)
        for instance in given.job.instances
    ]
    described = [item for item in made.SegmentSequence if item.SegmentNumber > 0]
    values = values_of(given, kind)
    return Segmentation(
        source_images=sources,
        pixel_array=values if values.shape[-1] > 1 else values[..., 0],
        segmentation_type=kind.name,
        segment_descriptions=[SegmentDescription.from_dataset(item) for item in described],
        fractional_type="PROBABILITY",
        max_fractional_value=255,
        series_instance_uid=made.SeriesInstanceUID,
        series_number=made.SeriesNumber,
        sop_instance_uid=made.SOPInstanceUID,
        instance_number=made.InstanceNumber,
        manufacturer=made.Manufacturer,
        manufacturer_model_name=made.ManufacturerModelName,
        software_versions=made.SoftwareVersions,
        device_serial_number=made.DeviceSerialNumber,
        content_label=made.ContentLabel,
        content_description=made.ContentDescription,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=True,
    )


def differences(mine: Dataset, other: Dataset, path: str = "") -> list[str]:
    """Every element that only one of them has, or that has another value."""
    found = []
    for tag in sorted({*mine.keys(), *other.keys()}):
        name = mine[tag].keyword if tag in mine else other[tag].keyword
        if name in OURS or (not path and is_identity(tag)):
            continue
        if tag not in mine or tag not in other:
            found.append(f"{path}{name} only in {'ours' if tag in mine else 'theirs'}")
        elif mine[tag].VR == "SQ":
            if len(mine[tag].value) != len(other[tag].value):
                found.append(f"{path}{name}: other number of items")
            for n, pair in enumerate(zip(mine[tag].value, other[tag].value, strict=False)):
                found += differences(*pair, f"{path}{name}[{n}].")
        elif not is_equal(mine[tag], other[tag]):
            found.append(f"{path}{name}: {mine[tag].value} and {other[tag].value}")
    return found


def is_identity(tag: BaseTag) -> bool:
    """Ours is compared with the source, byte by byte, wherever it is made."""
    return int(tag) in IDENTITY_TAGS


def is_equal(mine: DataElement, other: DataElement) -> bool:
    if mine.VR in ("DS", "IS"):
        # a decimal string has 16 characters: highdicom may write a rounded one
        return np.allclose(
            np.atleast_1d(np.array(mine.value or [], float)),
            np.atleast_1d(np.array(other.value or [], float)),
            rtol=1e-12,
        )
    return mine.value == other.value or (not mine.value and not other.value)


@pytest.mark.parametrize("kind", SegmentationKind)
@pytest.mark.parametrize("name", CASES)
def test_every_element_is_what_highdicom_builds(name, kind):
    given = CASES[name]()
    made = ours(given, kind, Compression.NONE)
    other = theirs(given, kind, made)
    assert differences(made, other) == INTENDED.get(name, [])
    mine, expected = made.PixelData, other.PixelData
    used = -(-made.NumberOfFrames * made.Rows * made.Columns * made.BitsAllocated // 8)
    assert len(mine) == len(expected)
    assert mine[:used] == expected[:used]
    assert mine[used:] == b"\0" * (len(mine) - used)  # highdicom pads with the character 0


@pytest.mark.parametrize("kind", SegmentationKind)
@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_the_sources_of_the_frames_are_referred_to(make, kind):
    given = make()
    made = ours(given, kind, Compression.NONE)
    named = {
        str(image.ReferencedSOPInstanceUID)
        for item in made.PerFrameFunctionalGroupsSequence
        for image in item.DerivationImageSequence[0].SourceImageSequence
    }
    assert named == {str(image.ReferencedSOPInstanceUID) for image in made.SourceImageSequence}
    (in_series,) = made.ReferencedSeriesSequence
    assert in_series.SeriesInstanceUID == given.job.instances[0].series_instance_uid
    assert named == {
        str(image.ReferencedSOPInstanceUID) for image in in_series.ReferencedInstanceSequence
    }


@pytest.mark.parametrize("compression", [Compression.NONE, Compression.RLE])
@pytest.mark.parametrize("kind", SegmentationKind)
@pytest.mark.parametrize(
    "make", [CASES["slices with a gap"], CASES["overlapping findings"]], ids=["gap", "overlap"]
)
def test_highdicom_reads_the_same_pixels_back(make, kind, compression, tmp_path):
    given = make()
    made = ours(given, kind, compression)
    is_rle = compression is Compression.RLE and kind is not SegmentationKind.BINARY
    syntax = RLELossless if is_rle else ExplicitVRLittleEndian
    assert made.file_meta.TransferSyntaxUID == syntax
    path = tmp_path / "seg.dcm"
    made.save_as(path)
    read = segread(path).get_pixels_by_source_instance(
        [instance.sop_instance_uid for instance in given.job.instances],
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    expected = values_of(given, kind)
    present = expected.any(axis=(0, 1, 2))
    # one step of a byte
    tolerance = 0.5 / 255 + 1e-6 if kind is SegmentationKind.FRACTIONAL else 0
    assert read.shape == expected[..., present].shape
    assert np.abs(read.astype(float) - expected[..., present]).max() <= tolerance
