"""What a header may tell: well formed or absent, never repaired, never an exception."""

from __future__ import annotations

import pytest
import torch
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import EnhancedCTImageStorage

from dicom_xai.encode.source import Source, normalise
from dicom_xai.study import Frame
from tests.make.results import as_file, enhanced_header, header, instance


def said(modality: str = "CT", **raw: bytes) -> Source:
    """A header with these received bytes."""
    ds = header(modality, 8, 6)
    made = instance(as_file(ds))
    for keyword, value in raw.items():
        tag = Tag(keyword)
        ds[tag] = RawDataElement(tag, "LO", len(value), value, 0, False, True, True, None)
    return normalise(Frame(made, ds, 1, torch.zeros(8, 6)))


def test_a_good_header_is_taken_as_received():
    source = said(PixelSpacing=b"0.46880\\0.46880 ")
    assert source.has_plane
    assert (source.rows, source.columns) == (8, 6)
    assert source.pixel_spacing == ("0.46880", "0.46880")
    assert source.position == ("-120.0", "-120.0", "2.5")


@pytest.mark.parametrize(
    ("keyword", "value", "field"),
    [
        ("PixelSpacing", b"0\\0 ", "pixel_spacing"),
        ("PixelSpacing", b"0.5 ", "pixel_spacing"),
        ("PixelSpacing", b"-1\\1", "pixel_spacing"),
        ("PixelSpacing", b"0.5\\nan ", "pixel_spacing"),
        ("PixelSpacing", b"half\\half ", "pixel_spacing"),
        ("SliceThickness", b"0 ", "slice_thickness"),
        ("SliceThickness", b"thin", "slice_thickness"),
        ("ImagePositionPatient", b"0\\0 ", "position"),
        ("ImagePositionPatient", b"0\\0\\inf ", "position"),
        ("ImageOrientationPatient", b"1\\0\\0\\1\\0\\0 ", "orientation"),
        ("ImageOrientationPatient", b"0\\0\\0\\0\\0\\0 ", "orientation"),
        ("FrameOfReferenceUID", b"1.02.3", "frame_of_reference_uid"),
        ("FrameOfReferenceUID", b"none", "frame_of_reference_uid"),
        ("Modality", b"ct", "modality"),
        ("PatientOrientation", b"L ", "patient_orientation"),
        ("PatientOrientation", b"\xff\\F ", "patient_orientation"),
        ("LossyImageCompressionRatio", b"ten ", "lossy_ratios"),
    ],
)
def test_a_malformed_attribute_is_absent(keyword, value, field):
    assert not getattr(said(**{keyword: value}), field)


def test_oblique_patient_orientations_are_kept():
    assert said(PatientOrientation=b"PF\\LH ").patient_orientation == ("PF", "LH")


def test_a_number_too_long_for_a_decimal_string_is_shortened():
    (row, column) = said(PixelSpacing=b"0.468750000000000001\\0.46875 ").pixel_spacing
    assert len(row) <= 16
    assert float(row) == float(column)


def test_spacing_at_the_detector_is_not_spacing_in_the_patient():
    assert "ImagerPixelSpacing" in header("CR")
    assert said("CR").pixel_spacing == ()


def test_lossy_source_keeps_ratio_and_method():
    source = said(
        LossyImageCompression=b"01",
        LossyImageCompressionRatio=b"10\\2",
        LossyImageCompressionMethod=b"ISO_10918_1\\ISO_15444_1 ",
    )
    assert source.is_lossy
    assert source.lossy_ratios == ("10", "2")
    assert source.lossy_methods == ("ISO_10918_1", "ISO_15444_1")


def test_planes_of_an_enhanced_image_come_from_its_functional_groups():
    ds = enhanced_header(8, 6, frames=3)
    made = instance(as_file(ds))
    assert made.sop_class_uid == EnhancedCTImageStorage
    sources = [normalise(Frame(made, ds, n, torch.zeros(8, 6))) for n in (1, 2, 3)]
    assert [source.position[2] for source in sources] == ["0", "3", "6"]
    assert all(source.has_plane and source.is_multi_frame for source in sources)
    assert sources[0].pixel_spacing == ("0.5", "0.5")


def test_a_frame_without_its_functional_group_has_no_place():
    ds = enhanced_header(8, 6, frames=3)
    made = instance(as_file(ds))
    del ds.PerFrameFunctionalGroupsSequence[2]
    assert not normalise(Frame(made, ds, 3, torch.zeros(8, 6))).has_plane


def test_classes_with_one_frame_are_never_referred_to_by_frame_number():
    assert not said("CR", NumberOfFrames=b"2 ").is_multi_frame
