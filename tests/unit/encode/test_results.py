"""Explanation in, objects out: what is made, what it says, whose it is."""

from __future__ import annotations

import dataclasses
from io import BytesIO

import imagecodecs
import numpy as np
import pytest
import torch
from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import generate_frames
from pydicom.multival import MultiValue
from pydicom.uid import UID

from dicom_xai import identity, uids
from dicom_xai.config import Compression, InputKind, Layout, SegmentationKind
from dicom_xai.encode.captures import MAX_PICTURES
from dicom_xai.encode.color import OUTLINES
from dicom_xai.encode.note import encode_note
from dicom_xai.encode.objects import Encoded, EncodedResults, Planned
from dicom_xai.encode.results import encode_results
from dicom_xai.errors import EncodeError, IdentityError
from dicom_xai.study import ObjectKind, Purpose, Reference
from tests.make.results import (
    Case,
    as_file,
    card,
    case,
    described,
    enhanced_header,
    header,
    stacked,
)

SC = Planned(ObjectKind.SC, Compression.NONE, ("pacs",))
SEG = Planned(ObjectKind.SEG, Compression.NONE, ("pacs",))


def encode(given: Case, *plan: Planned) -> EncodedResults:
    return encode_results(
        given.job,
        given.card,
        given.volume,
        given.explanation,
        plan or (SC, SEG),
        given.described,
        given.display_of,
        given.heat_of,
        given.probability_of,
    )


def read(encoded: Encoded) -> Dataset:
    return dcmread(BytesIO(encoded.file))


def cr(rows: int = 96, columns: int = 80, **options) -> Case:
    return case([as_file(header("CR", rows, columns))], **options)


def ct(slices: int = 6, hot: tuple[int, ...] = (2, 3), **options) -> Case:
    files = [as_file(header("CT", 64, 64, n + 1)) for n in range(slices)]
    return stacked(files, heat_frames=hot, **options)


def kinds(results: EncodedResults) -> list[str]:
    return [str(encoded.kind) for encoded in results.objects]


def test_a_positive_radiograph_gives_a_picture_and_a_region():
    results = encode(cr())
    assert kinds(results) == ["sc", "seg"]
    assert results.skipped == ()


def test_the_image_lies_pixel_for_pixel_at_the_top_left():
    given = cr(positives=0)
    picture = read(encode(given).objects[0]).pixel_array
    expected = (given.display_of([0])[0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    for channel in range(3):
        assert np.array_equal(picture[:96, :80, channel], expected)


def test_the_overlay_covers_exactly_what_the_segmentation_says():
    given = cr(200, 150)
    picture, region = map(read, encode(given).objects)
    shown = picture.pixel_array[:200, :150].astype(int)
    colored = np.ptp(shown, axis=2) > 0
    assert np.array_equal(colored, region.pixel_array.astype(bool))
    assert np.array_equal(
        colored, (given.heat_of(given.explanation.findings[0], [0])[0] >= 0.35).numpy()
    )


def test_a_picture_says_what_it_is():
    ds = read(encode(cr()).objects[0])
    assert list(ds.ImageType) == ["DERIVED", "SECONDARY"]
    assert ds.ConversionType == "WSD"
    assert ds.BurnedInAnnotation == "YES"
    assert ds.ContentQualification == "RESEARCH"
    assert ds.SeriesNumber == 9001
    assert ds.SeriesDescription.startswith("AI RESEARCH")
    assert ds.Modality == "OT"
    assert ds.LossyImageCompression == "00"
    assert list(ds.PatientOrientation) == ["L", "F"]
    assert ds.BodyPartExamined == "CHEST"
    assert ds.Columns >= 512
    assert "PixelSpacing" not in ds
    assert identity.is_ours(ds)
    equipment = ds.ContributingEquipmentSequence[0]
    assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
    assert equipment.DeviceUID == uids.device_uid(card().sha256)
    assert (equipment.ManufacturerModelName, equipment.SoftwareVersions) == ("tiny", "1.2.0")


def test_the_legend_shows_the_outline_of_what_is_drawn_only():
    given = cr(positives=2)
    first, second, *rest = given.explanation.findings
    assert second.attribution is not None
    cold = dataclasses.replace(second.attribution, heat=torch.zeros_like(second.attribution.heat))
    findings = (first, dataclasses.replace(second, attribution=cold), *rest)
    one = dataclasses.replace(
        given, explanation=dataclasses.replace(given.explanation, findings=findings)
    )
    for case_, outlines in ((given, OUTLINES[:2]), (one, OUTLINES[:1])):
        picture = read(encode(case_).objects[0]).pixel_array
        legend = picture[:, 80:]  # right of the image
        shown = [bool((legend == outline).all(axis=2).any()) for outline in OUTLINES[:2]]
        assert shown == [outline in outlines for outline in OUTLINES[:2]]


def test_a_picture_refers_to_its_source():
    given = cr()
    ds = read(encode(given).objects[0])
    source = given.job.instances[0]
    (image,) = ds.SourceImageSequence
    assert image.ReferencedSOPInstanceUID == source.sop_instance_uid
    assert image.ReferencedSOPClassUID == source.sop_class_uid
    assert image.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    (series,) = ds.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == source.series_instance_uid


def test_every_image_of_a_unit_gets_a_picture_up_to_a_limit():
    files = [as_file(header("CR", 32, 32, n + 1)) for n in range(MAX_PICTURES + 1)]
    results = encode(case(files, positives=0), SC)
    assert kinds(results) == ["sc"] * MAX_PICTURES
    assert [encoded.ordinal for encoded in results.objects] == list(range(MAX_PICTURES))
    ((kind, reason),) = results.skipped
    assert kind is ObjectKind.SC
    assert str(MAX_PICTURES + 1) in reason


def test_a_series_gets_pictures_of_its_best_slices_in_slice_order():
    results = encode(ct(6, (4, 1)), Planned(ObjectKind.SC, Compression.NONE, ("pacs",), 2))
    heights = [float(read(encoded).ImagePositionPatient[2]) for encoded in results.objects]
    assert heights == [5.0, 12.5]
    assert [read(encoded).InstanceNumber for encoded in results.objects] == [1, 2]
    series = {encoded.series_instance_uid for encoded in results.objects}
    assert len(series) == 1


def test_a_slice_picture_stays_in_its_place():
    given = ct()
    source = dcmread(BytesIO(given.read_source(given.job.instances[2])))
    ds = read(encode(given, SC).objects[0])
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        assert ds[keyword].value == source[keyword].value
    assert ds.FrameOfReferenceUID == source.FrameOfReferenceUID


def test_a_negative_study_has_no_red_and_no_segmentation():
    results = encode(cr(500, 400, positives=0))
    assert kinds(results) == ["sc"]
    assert results.skipped == ((ObjectKind.SEG, "no finding above threshold"),)
    picture = read(results.objects[0]).pixel_array.astype(int)
    assert (picture[..., 0] - picture[..., 1]).max() <= 40  # the yellow of the banner has 20


def test_a_positive_finding_without_a_map_gives_a_picture_with_the_reason_only():
    silent = encode(cr(method="", note=""))
    told = encode(cr(method="", note="the deadline left no time for a heat map"))
    assert kinds(told) == ["sc"]
    assert told.skipped == ((ObjectKind.SEG, "no heat map was made"),)
    assert not np.array_equal(*(read(r.objects[0]).pixel_array for r in (silent, told)))


def test_a_map_below_its_threshold_gives_no_segmentation():
    given = cr()
    (finding, *others) = given.explanation.findings
    assert finding.attribution is not None
    faint = dataclasses.replace(finding.attribution, heat=finding.attribution.heat * 0.2)
    findings = (dataclasses.replace(finding, attribution=faint), *others)
    explanation = dataclasses.replace(given.explanation, findings=findings)
    results = encode(dataclasses.replace(given, explanation=explanation))
    assert kinds(results) == ["sc"]
    assert results.skipped == ((ObjectKind.SEG, "no pixel at or above the heat threshold"),)


@pytest.mark.parametrize("rows", [96, 97])
def test_run_length_encoding_keeps_every_pixel(rows):
    plain = read(encode(cr(rows, 81), SC).objects[0])
    packed = read(
        encode(cr(rows, 81), dataclasses.replace(SC, compression=Compression.RLE)).objects[0]
    )
    assert packed.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.5"
    assert np.array_equal(plain.pixel_array, packed.pixel_array)
    assert packed.LossyImageCompression == "00"


def test_jpeg_says_that_it_is_lossy_and_how():
    jpeg = dataclasses.replace(SC, compression=Compression.JPEG)
    plain, packed = read(encode(cr(), SC).objects[0]), read(encode(cr(), jpeg).objects[0])
    assert packed.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.50"
    assert packed.LossyImageCompression == "01"
    assert packed.LossyImageCompressionMethod == "ISO_10918_1"
    (stream,) = generate_frames(packed.PixelData, number_of_frames=1)
    ratio = plain.pixel_array.size / len(stream)
    assert float(packed.LossyImageCompressionRatio) == pytest.approx(ratio, rel=0.02)
    assert packed.PhotometricInterpretation == "YBR_FULL_422"
    start_of_frame = stream.index(b"\xff\xc0")
    assert stream[start_of_frame + 11] == 0x21, "luminance is sampled 2 x 1: 4:2:2"
    decoded = imagecodecs.jpeg8_decode(stream).astype(int)
    # text edges under quality 90 and halved colour: a few grey levels on average
    assert np.abs(decoded - plain.pixel_array).mean() < 4


def test_a_lossy_source_stays_lossy():
    ds = header("CR", 64, 64)
    ds.LossyImageCompression = "01"
    ds.LossyImageCompressionRatio, ds.LossyImageCompressionMethod = "12", "ISO_10918_1"
    jpeg = dataclasses.replace(SC, compression=Compression.JPEG)
    for encoded in encode(case([as_file(ds)]), SC, jpeg, SEG).objects:
        made = read(encoded)
        assert made.LossyImageCompression == "01"
        ratios = np.atleast_1d(made.LossyImageCompressionRatio)
        assert ratios[0] == 12
        assert len(ratios) == (2 if encoded.ordinal == 1 else 1)


#: Ratio and method of each lossy compression, in their order; None is lossless.
HISTORIES = {
    "none": None,
    "once": (["12"], ["ISO_10918_1"]),
    "twice": (["10", "2"], ["ISO_10918_1", "ISO_15444_1"]),
    "untold": ([], []),
}


def slices_compressed(*histories: str, **options) -> Case:
    """Slices that each went through these lossy compressions before they came."""
    files = []
    for number, name in enumerate(histories, 1):
        ds = header("CT", 64, 64, number)
        if HISTORIES[name] is not None:
            ds.LossyImageCompression = "01"
            ds.LossyImageCompressionRatio, ds.LossyImageCompressionMethod = HISTORIES[name]
        files.append(as_file(ds))
    return stacked(files, **options)


def all_of(ds: Dataset, keyword: str) -> list[str]:
    value = ds.get(keyword) or []
    return [str(each) for each in (value if isinstance(value, list | MultiValue) else [value])]


@pytest.mark.parametrize(
    ("histories", "kept"),
    [
        (("none", "once"), "once"),
        (("once", "none"), "once"),
        (("once", "twice"), "twice"),
        (("twice", "once"), "twice"),
        (("untold", "none", "once"), "once"),
        (("none", "untold"), "untold"),
    ],
)
def test_one_lossy_frame_makes_the_object_lossy_and_the_worst_loss_is_told(histories, kept):
    stack = dataclasses.replace(SC, layout=Layout.STACK)
    jpeg = dataclasses.replace(stack, compression=Compression.JPEG)
    ratios, methods = HISTORIES[kept]
    plain, packed, region = map(
        read, encode(slices_compressed(*histories), stack, jpeg, SEG).objects
    )
    for made in (plain, packed, region):
        assert made.LossyImageCompression == "01"
    for made in (plain, region):
        assert all_of(made, "LossyImageCompressionRatio") == ratios
        assert all_of(made, "LossyImageCompressionMethod") == methods
    assert all_of(packed, "LossyImageCompressionRatio")[:-1] == ratios
    assert all_of(packed, "LossyImageCompressionMethod") == [*methods, "ISO_10918_1"]


def test_a_region_is_as_lossless_as_the_slices_it_lies_on():
    given = slices_compressed("none", "none", "once", heat_frames=(0, 1))
    assert read(encode(given, SEG).objects[0]).LossyImageCompression == "00"


def test_each_compression_is_another_object_for_its_own_destinations():
    plan = [
        Planned(ObjectKind.SC, compression, (compression.value,)) for compression in Compression
    ]
    plan += [Planned(ObjectKind.SEG, c, (c.value,)) for c in (Compression.NONE, Compression.RLE)]
    objects = encode(cr(), *plan).objects
    assert [(str(o.kind), o.ordinal) for o in objects] == [
        ("sc", 0),
        ("sc", 1),
        ("sc", 2),
        ("seg", 0),
    ]
    assert [o.destinations for o in objects] == [("none",), ("rle",), ("jpeg",), ("none", "rle")]
    assert len({o.sop_instance_uid for o in objects}) == 4
    assert len({o.series_instance_uid for o in objects}) == 4


def test_a_segmentation_says_what_and_how():
    ds = read(encode(cr(positives=2)).objects[1])
    assert ds.SegmentationType == "BINARY"
    assert [s.SegmentLabel for s in ds.SegmentSequence] == ["Nodule", "Consolidation"]
    segment = ds.SegmentSequence[0]
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "27925004"
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("tiny", "1.2.0")
    assert "heat_threshold=0.35" in algorithm.AlgorithmParameters
    assert "grad-cam heat >= 0.35" in ds.ContentDescription
    assert ds.SeriesNumber == 9002
    assert identity.is_ours(ds)


def test_a_series_gets_one_segmentation_of_its_hot_slices():
    given = ct(6, (1, 2, 4))
    picture, region = encode(given).objects
    ds = read(region)
    assert ds.NumberOfFrames == 3
    indices = {given.job.instances[i].sop_instance_uid: i for i in (1, 2, 4)}
    assert {str(i.ReferencedSOPInstanceUID) for i in ds.SourceImageSequence} == {*indices}
    for frame, pixels in zip(ds.PerFrameFunctionalGroupsSequence, ds.pixel_array, strict=True):
        (item,) = frame.DerivationImageSequence[0].SourceImageSequence
        i = indices.pop(str(item.ReferencedSOPInstanceUID))
        mask = (given.heat_of(given.explanation.findings[0], [i])[0] >= 0.35).numpy()
        assert np.array_equal(pixels.astype(bool), mask)
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        assert position == given.volume.frames[i].header.ImagePositionPatient
    assert not indices
    assert region.series_instance_uid != picture.series_instance_uid
    measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SpacingBetweenSlices == 2.5


def test_frames_of_an_enhanced_image_are_referred_to_by_number():
    given = case(
        [as_file(enhanced_header())], kind=InputKind.SLICES, heat_frames=(1, 2), positives=2
    )
    picture, region = map(read, encode(given).objects)
    assert picture.SourceImageSequence[0].ReferencedFrameNumber == 2
    assert list(region.SourceImageSequence[0].ReferencedFrameNumber) == [2, 3]
    items = [
        frame.DerivationImageSequence[0].SourceImageSequence[0]
        for frame in region.PerFrameFunctionalGroupsSequence
    ]
    numbers = [int(item.ReferencedFrameNumber) for item in items]
    assert sorted(numbers) == [2, 2, 3, 3]
    for n, frame in zip(numbers, region.PerFrameFunctionalGroupsSequence, strict=True):
        assert frame.PlanePositionSequence[0].ImagePositionPatient[2] == 3 * (n - 1)
    assert {str(item.ReferencedSOPInstanceUID) for item in items} == {
        given.job.instances[0].sop_instance_uid
    }


def test_slices_of_two_orientations_get_a_segmentation_each():
    files = []
    for n in range(4):
        ds = header("CT", 48, 48, n + 1)
        if n >= 2:
            ds.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]
            ds.ImagePositionPatient = [str(n), "0", "0"]
        files.append(as_file(ds))
    results = encode(case(files, kind=InputKind.SLICES))
    assert kinds(results) == ["sc", "seg", "seg"]
    assert len({encoded.series_instance_uid for encoded in results.objects}) == 3
    assert [read(encoded).NumberOfFrames for encoded in results.objects[1:]] == [2, 2]


def test_two_views_get_a_segmentation_each():
    files = [as_file(header("CR", 64, 48, n + 1)) for n in range(2)]
    results = encode(case(files))
    assert kinds(results) == ["sc", "sc", "seg", "seg"]
    assert [o.source.sop_instance_uid for o in results.objects[2:]] == [
        o.source.sop_instance_uid for o in results.objects[:2]
    ]


def duplicated_positions() -> list[bytes]:
    files = []
    for n in range(3):
        ds = header("CT", 48, 48, n + 1)
        ds.ImagePositionPatient = ["0", "0", "0"]
        files.append(as_file(ds))
    return files


def frames_without_positions() -> list[bytes]:
    ds = enhanced_header()
    del ds.PerFrameFunctionalGroupsSequence
    return [as_file(ds)]


def test_what_cannot_be_segmented_is_still_pictured_and_the_reason_told():
    results = encode(case(duplicated_positions(), kind=InputKind.SLICES))
    assert kinds(results) == ["sc"]
    assert results.skipped == ((ObjectKind.SEG, "several frames at one position"),)


def test_frames_of_one_instance_without_positions_are_segmented_in_their_order():
    results = encode(case(frames_without_positions(), kind=InputKind.SLICES))
    made = read(results.objects[1])
    frames = made.PerFrameFunctionalGroupsSequence
    assert "PlanePositionSequence" not in frames[0]
    contents = [item.FrameContentSequence[0] for item in frames]
    numbers = [content.InStackPositionNumber for content in contents]
    sources = [
        item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
        for item in frames
    ]
    assert numbers == sources
    assert len(numbers) > 1
    ranks = [content.DimensionIndexValues[-1] for content in contents]
    assert ranks == list(range(1, len(frames) + 1))
    pointers = [item.DimensionIndexPointer for item in made.DimensionIndexSequence]
    assert pointers[-1] == tag_for_keyword("InStackPositionNumber")
    assert results.skipped == ()


def test_a_single_frame_without_a_place_is_segmented_without_spatial_groups():
    ds = header("CT", 48, 48)
    del ds.ImagePositionPatient
    results = encode(case([as_file(ds)], kind=InputKind.SLICES))
    made = read(results.objects[1])
    assert "PlanePositionSequence" not in made.PerFrameFunctionalGroupsSequence[0]
    assert "PatientOrientation" in made


@pytest.mark.parametrize(("rows", "columns"), [(33, 35), (9, 7), (64, 48)])
def test_bits_of_odd_sized_frames_are_padded_with_zero(rows, columns):
    given = cr(rows, columns, positives=2)
    ds = read(encode(given).objects[1])
    used = (rows * columns * 2 + 7) // 8
    assert len(ds.PixelData) == used + used % 2
    if used % 2:
        assert ds.PixelData[-1] == 0
    for frame, finding in zip(ds.pixel_array, given.explanation.findings, strict=False):
        assert np.array_equal(frame.astype(bool), (given.heat_of(finding, [0])[0] >= 0.35).numpy())


def regions(*kinds: SegmentationKind, compression: Compression = Compression.NONE):
    return [Planned(ObjectKind.SEG, compression, ("pacs",), region=kind) for kind in kinds]


def test_each_kind_of_segmentation_is_an_object_of_its_own():
    given = ct(segmenting=True)
    made = encode(given, *regions(*SegmentationKind)).objects
    assert [read(one).SegmentationType for one in made] == ["BINARY", "FRACTIONAL", "LABELMAP"]
    assert [one.ordinal for one in made] == [0, 1, 2]
    assert len({one.series_instance_uid for one in made}) == 3


def test_a_segmenting_models_region_is_told_as_its_probability():
    binary, fractional, _ = map(
        read, encode(ct(segmenting=True), *regions(*SegmentationKind)).objects
    )
    assert binary.ContentDescription == "Model probability >= 0.5"
    assert fractional.ContentDescription == "Model probability, 255 = 1"
    for ds in (binary, fractional):
        (segment,) = ds.SegmentSequence
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert "heat" not in algorithm.AlgorithmParameters
        assert "robability" in segment.SegmentDescription


def test_heat_is_never_stored_as_a_fraction():
    results = encode(ct(), *regions(SegmentationKind.FRACTIONAL, SegmentationKind.BINARY))
    assert [read(one).SegmentationType for one in results.objects] == ["BINARY"]
    assert results.skipped == ((ObjectKind.SEG, "the model gives no probability of each pixel"),)


@pytest.mark.parametrize(
    ("kind", "wanted", "syntax"),
    [
        (SegmentationKind.BINARY, Compression.RLE, "1.2.840.10008.1.2.1"),
        (SegmentationKind.BINARY, Compression.JPEG, "1.2.840.10008.1.2.1"),
        (SegmentationKind.LABELMAP, Compression.RLE, "1.2.840.10008.1.2.5"),
        (SegmentationKind.FRACTIONAL, Compression.RLE, "1.2.840.10008.1.2.5"),
        (SegmentationKind.FRACTIONAL, Compression.JPEG, "1.2.840.10008.1.2.1"),
    ],
)
def test_a_segmentation_is_compressed_without_loss_or_not_at_all(kind, wanted, syntax):
    plan = regions(kind, compression=wanted) + regions(kind)
    made = encode(ct(segmenting=True), *plan).objects
    assert made[0].transfer_syntax_uid == syntax
    assert len(made) == len({one.transfer_syntax_uid for one in made})


def test_a_label_map_tells_overlapping_heat_apart_by_the_strongest():
    given = cr(60, 50, positives=3)
    (made,) = encode(given, *regions(SegmentationKind.LABELMAP)).objects
    ds = read(made)
    heat = np.stack([given.heat_of(f, [0])[0].numpy() for f in given.explanation.findings])
    labels = np.where(heat.max(axis=0) >= 0.35, heat.argmax(axis=0) + 1, 0)
    assert np.array_equal(ds.pixel_array, labels)
    assert ds.SegmentsOverlap == "NO"
    assert [item.SegmentNumber for item in ds.SegmentSequence] == [0, 1, 2, 3]


def test_segments_are_numbered_without_gaps_where_a_finding_has_no_pixel():
    given = cr(60, 50, positives=3)
    first, second, third = given.explanation.findings
    assert second.attribution is not None
    cold = dataclasses.replace(second.attribution, heat=torch.zeros_like(second.attribution.heat))
    findings = (first, dataclasses.replace(second, attribution=cold), third)
    changed = dataclasses.replace(
        given, explanation=dataclasses.replace(given.explanation, findings=findings)
    )
    for made in encode(
        changed, *regions(SegmentationKind.BINARY, SegmentationKind.LABELMAP)
    ).objects:
        ds = read(made)
        labels = [(s.SegmentNumber, s.SegmentLabel) for s in ds.SegmentSequence]
        assert labels[-2:] == [(1, "Nodule"), (2, "Pneumothorax")]
        if made.sop_class_uid.endswith("66.7"):
            assert set(np.unique(ds.pixel_array)) == {0, 1, 2}


def test_every_object_carries_its_sources_identity():
    given = ct()
    for encoded in encode(given).objects:
        source = identity.read_block(given.read_source(encoded.source))
        result = identity.read_block(encoded.file)
        identity.compare(source, result)
        ds = read(encoded)
        assert str(ds.PatientName) == "M\xfcller^J\xf6rg"
        assert ds.IssuerOfPatientID == "Ward 9"
        assert ds.StudyDescription == "Made-up study"
        assert ds.StudyInstanceUID == encoded.study_instance_uid
        assert ds.Manufacturer == "dicom_xai"
        assert not any(tag.is_private for tag in ds)


def test_a_source_without_a_study_makes_nothing():
    given = cr()
    stored = given.read_source(given.job.instances[0])
    ds = dcmread(BytesIO(stored))
    del ds.StudyInstanceUID
    bare = as_file(ds)
    with pytest.raises(IdentityError, match="StudyInstanceUID"):
        encode(dataclasses.replace(given, described={ds.SOPInstanceUID: described(bare)}))


def test_an_amendment_says_so_and_refers_to_its_predecessors():
    before = (
        Reference("1.2.840.10008.5.1.4.1.1.7", "1.2.3.4", "1.2.3", "sc"),
        Reference("1.2.840.10008.5.1.4.1.1.66.4", "1.2.5.4", "1.2.5", "seg"),
    )
    given = cr(purpose=Purpose.AMENDMENT, generation=2, predecessors=before)
    first = encode(cr())
    for encoded, former in zip(encode(given).objects, first.objects, strict=True):
        ds = read(encoded)
        assert "AMENDED 2" in ds.SeriesDescription
        referred = [item.ReferencedSOPInstanceUID for item in ds.ReferencedImageSequence]
        assert referred == ["1.2.3.4", "1.2.5.4"]
        series = {item.SeriesInstanceUID for item in ds.ReferencedSeriesSequence}
        assert {"1.2.3", "1.2.5"} < series
        assert encoded.references == before
        assert encoded.sop_instance_uid != former.sop_instance_uid
        assert encoded.series_instance_uid != former.series_instance_uid


def test_the_same_job_makes_the_same_bytes():
    plan = [Planned(ObjectKind.SC, c, ("pacs",), 2) for c in Compression]
    once, again = encode(ct(), *plan, SEG), encode(ct(), *plan, SEG)
    assert [o.file for o in once.objects] == [o.file for o in again.objects]
    assert len(once.objects) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"route": "another"},
        {"model_digest": "cd" * 32},
        {"generation": 3},
        {"purpose": Purpose.AUDIT},
    ],
)
def test_what_decides_a_result_decides_its_uid(change):
    given = cr()
    changed = dataclasses.replace(given, job=dataclasses.replace(given.job, **change))
    for a, b in zip(encode(given).objects, encode(changed).objects, strict=True):
        assert a.sop_instance_uid != b.sop_instance_uid


def test_other_bytes_under_the_same_source_uid_make_another_result():
    given = cr()
    instances = tuple(dataclasses.replace(i, sha256="0" * 64) for i in given.job.instances)
    changed = dataclasses.replace(given, job=dataclasses.replace(given.job, instances=instances))
    a, b = encode(given).objects[0], encode(changed).objects[0]
    assert a.sop_instance_uid != b.sop_instance_uid


def test_all_uids_are_valid_and_ours():
    for encoded in encode(ct()).objects:
        ds = read(encoded)
        assert ds.file_meta.ImplementationClassUID == uids.IMPLEMENTATION_CLASS_UID
        assert ds.file_meta.MediaStorageSOPInstanceUID == encoded.sop_instance_uid
        assert ds.SOPInstanceUID == encoded.sop_instance_uid
        for element in ds.iterall():
            if element.VR == "UI":
                values = [element.value] if isinstance(element.value, UID) else element.value
                assert all(uids.is_valid(str(value)) for value in values)


@pytest.mark.parametrize(
    ("zone", "time"),
    [(None, "101600.250000"), ("+0900", "181600.250000"), ("-0500", "041600.250000")],
)
def test_times_are_the_jobs_in_the_zone_of_the_source(zone, time):
    ds = header("CR", 32, 32)
    if zone:
        ds.TimezoneOffsetFromUTC = zone
    for encoded in encode(case([as_file(ds)])).objects:
        made = read(encoded)
        for keyword in ("ContentTime", "SeriesTime", "InstanceCreationTime"):
            assert made[keyword].value == time
        assert made.ContentDate == "20260102"


@pytest.mark.parametrize("created_at", ["", "yesterday", "20260102101600"])
def test_a_job_without_a_moment_in_time_is_refused(created_at):
    given = cr()
    job = dataclasses.replace(given.job, created_at=created_at)
    with pytest.raises(EncodeError, match="created_at"):
        encode(dataclasses.replace(given, job=job))


def note(given: Case, reason: str, *plan: Planned) -> list[Encoded]:
    source = given.job.instances[0]
    block = identity.read_block(given.read_source(source))
    return encode_note(given.job, reason, source, block, plan or (SC, SEG))


def test_a_note_joins_the_study_and_refers_to_the_source():
    given = cr()
    (made,) = note(given, "the image has no pixels")
    ds = read(made)
    assert made.kind is ObjectKind.NOTE
    assert made.destinations == ("pacs",)
    assert ds.SeriesNumber == 9003
    assert "SourceImageSequence" not in ds
    assert (
        ds.ReferencedImageSequence[0].ReferencedSOPInstanceUID
        == given.job.instances[0].sop_instance_uid
    )
    assert "ContributingEquipmentSequence" not in ds
    identity.compare(
        identity.read_block(given.read_source(made.source)), identity.read_block(made.file)
    )


def test_a_note_is_made_once_for_each_compression():
    plan = (
        SC,
        dataclasses.replace(SC, destinations=("archive",), slices=3),
        dataclasses.replace(SC, compression=Compression.JPEG, destinations=("far",)),
    )
    notes = note(cr(), "too few slices", *plan)
    assert [made.destinations for made in notes] == [("pacs", "archive"), ("far",)]
    assert len({made.sop_instance_uid for made in notes}) == 2


def test_a_note_goes_everywhere_where_no_picture_is_sent():
    (made,) = note(cr(), "too few slices", SEG)
    assert made.destinations == ("pacs",)


def test_the_same_note_makes_the_same_bytes():
    assert note(cr(), "why")[0].file == note(cr(), "why")[0].file
