"""A stack of pictures as one object: every slice, in its place, as it looks alone."""

from __future__ import annotations

import dataclasses
import itertools
from io import BytesIO

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import generate_frames

from dicom_xai.config import Compression, InputKind, Layout
from dicom_xai.encode import unit
from dicom_xai.encode.objects import EncodedResults, Planned
from dicom_xai.encode.results import encode_results
from dicom_xai.study import ObjectKind
from tests.make.results import Case, as_file, case, enhanced_header, header

STACK = Planned(ObjectKind.SC, Compression.NONE, ("pacs",), layout=Layout.STACK)


def encode(given: Case, *plan: Planned) -> EncodedResults:
    return encode_results(
        given.job,
        given.card,
        given.volume,
        given.explanation,
        plan or (STACK,),
        given.described,
        given.display_of,
        given.heat_of,
        given.probability_of,
    )


def only(results: EncodedResults) -> Dataset:
    (made,) = results.objects
    return dcmread(BytesIO(made.file))


def ct(slices: int = 5, hot: tuple[int, ...] = (1, 3), **options) -> Case:
    files = [as_file(header("CT", 64, 48, n + 1)) for n in range(slices)]
    return case(files, kind=InputKind.SLICES, heat_frames=hot, **options)


def test_a_stack_holds_the_same_image_and_overlay_as_each_picture_alone():
    given = ct(positives=2)
    stacked = only(encode(given)).pixel_array
    alone = encode(given, dataclasses.replace(STACK, layout=Layout.SINGLE, slices=5)).objects
    assert len(stacked) == len(alone) == 5
    for frame, single in zip(stacked, alone, strict=True):
        picture = dcmread(BytesIO(single.file)).pixel_array
        assert np.array_equal(frame[:64, :48], picture[:64, :48])


def test_batches_make_no_difference(monkeypatch):
    given = ct(7, (1, 2, 5), positives=2, segmenting=True)
    plan = [
        STACK,
        Planned(ObjectKind.SC, Compression.RLE, ("pacs",), 3),
        Planned(ObjectKind.SEG, Compression.NONE, ("pacs",)),
    ]
    together = [made.file for made in encode(given, *plan).objects]
    monkeypatch.setattr(unit, "BATCH_PIXELS", 2 * 64 * 48)
    assert [made.file for made in encode(given, *plan).objects] == together


def test_each_frame_says_which_slice_it_is():
    frames = only(encode(ct())).pixel_array
    band = frames[:, :, 48:]
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(band))
    differing = (band != band[0]).any(axis=(0, 2, 3))
    rows = np.flatnonzero(differing)
    assert rows[-1] - rows[0] < 64, "only the strip differs"


def test_a_stack_says_what_it_is_and_where():
    given = ct()
    ds = only(encode(given))
    assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7.4"
    assert ds.NumberOfFrames == 5
    assert list(ds.PageNumberVector) == [1, 2, 3, 4, 5]
    assert ds.FrameIncrementPointer == 0x00182001
    assert ds.BurnedInAnnotation == "YES"
    heights = [
        float(item.PlanePositionSequence[0].ImagePositionPatient[2])
        for item in ds.PerFrameFunctionalGroupsSequence
    ]
    assert heights == [2.5, 5.0, 7.5, 10.0, 12.5]
    (shared,) = ds.SharedFunctionalGroupsSequence
    assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == [0.4688, 0.4688]
    sources = [str(image.ReferencedSOPInstanceUID) for image in ds.SourceImageSequence]
    assert sources == [instance.sop_instance_uid for instance in given.job.instances]


def test_a_stack_of_an_enhanced_image_refers_to_its_frames():
    given = case([as_file(enhanced_header())], kind=InputKind.SLICES)
    (image,) = only(encode(given)).SourceImageSequence
    assert list(image.ReferencedFrameNumber) == [1, 2, 3]


def test_slices_of_two_sizes_become_two_stacks():
    files = [as_file(header("CT", 64, 48 + 8 * (n % 2), n + 1)) for n in range(4)]
    made = encode(case(files, kind=InputKind.SLICES, heat_frames=())).objects
    assert [dcmread(BytesIO(one.file)).NumberOfFrames for one in made] == [2, 2]
    assert len({one.sop_instance_uid for one in made}) == 2
    assert [one.ordinal for one in made] == [0, 1]


def test_slices_in_two_directions_tell_no_planes():
    files = []
    for n in range(2):
        ds = header("CT", 64, 48, n + 1)
        ds.ImageOrientationPatient = ["1", "0", "0", "0", str(1 - n), str(-n)]
        files.append(as_file(ds))
    ds = only(encode(case(files, kind=InputKind.SLICES)))
    assert "PerFrameFunctionalGroupsSequence" not in ds
    assert "FrameOfReferenceUID" not in ds


@pytest.mark.parametrize("compression", [Compression.RLE, Compression.JPEG])
def test_a_compressed_stack_shows_the_same(compression):
    given = ct()
    plain = only(encode(given)).pixel_array
    packed = only(encode(given, dataclasses.replace(STACK, compression=compression)))
    difference = np.abs(packed.pixel_array.astype(int) - plain)
    # JPEG at quality 90 moves grey levels at the edges of text; run lengths not at all
    assert difference.mean() <= (4 if compression is Compression.JPEG else 0)
    assert packed.LossyImageCompression == ("01" if compression is Compression.JPEG else "00")
    if compression is Compression.JPEG:
        sizes = sum(map(len, generate_frames(packed.PixelData, number_of_frames=5)))
        ratio = plain.size / sizes
        assert float(packed.LossyImageCompressionRatio) == pytest.approx(ratio, rel=0.02)


def test_pictures_and_stacks_are_counted_through():
    single = dataclasses.replace(STACK, layout=Layout.SINGLE, slices=2)
    jpeg = dataclasses.replace(STACK, compression=Compression.JPEG, destinations=("far",))
    made = encode(ct(), STACK, single, jpeg).objects
    assert [one.ordinal for one in made] == [0, 1, 2, 3]
    assert [one.destinations for one in made] == [("pacs",), ("pacs",), ("pacs",), ("far",)]
    assert len({one.sop_instance_uid for one in made}) == 4
    assert len({one.series_instance_uid for one in made}) == 3


def test_probabilities_are_drawn_where_there_is_no_heat():
    given = ct(method="", segmenting=True)
    frames = only(encode(given)).pixel_array
    finding = given.explanation.findings[0]
    for i, frame in enumerate(frames):
        colored = np.ptp(frame[:64, :48].astype(int), axis=2) > 0
        probable = given.probability_of(finding, [i])[0] >= 0.5
        assert np.array_equal(colored, probable.numpy())
