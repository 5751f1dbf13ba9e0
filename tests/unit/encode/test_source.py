"""What a header may tell: well formed or absent, never repaired, never an exception."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
)

from dicom_xai.encode.source import Source, normalise
from dicom_xai.errors import EncodeError
from tests.make.results import as_file, described, enhanced_header, header


def said(
    modality: str = "CT", transfer_syntax: UID = ExplicitVRLittleEndian, **raw: bytes
) -> Source:
    """A header with these received bytes."""
    ds = header(modality, 8, 6)
    ds.file_meta.TransferSyntaxUID = transfer_syntax
    for keyword, value in raw.items():
        tag = Tag(keyword)
        ds[tag] = RawDataElement(tag, "LO", len(value), value, 0, False, True, True, None)
    return normalise(ds)[0]


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


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless])
@pytest.mark.parametrize("word", [{}, {"LossyImageCompression": b"00"}])
def test_a_lossy_codec_is_lossy_whatever_the_header_says(syntax, word):
    assert said(transfer_syntax=syntax, **word).is_lossy


@pytest.mark.parametrize("syntax", [JPEG2000, HTJ2K])
def test_where_the_codec_may_be_lossless_the_header_is_believed(syntax):
    assert said(transfer_syntax=syntax).is_lossy
    assert not said(transfer_syntax=syntax, LossyImageCompression=b"00").is_lossy


def test_a_lossless_source_without_a_word_is_not_lossy():
    assert not said(transfer_syntax=JPEG2000Lossless).is_lossy
    assert said(transfer_syntax=JPEG2000Lossless, LossyImageCompression=b"01").is_lossy


def test_planes_of_an_enhanced_image_come_from_its_functional_groups():
    ds = enhanced_header(8, 6, frames=3)
    sources = normalise(ds)
    assert [source.position[2] for source in sources] == ["0", "3", "6"]
    assert all(source.has_plane and source.is_multi_frame for source in sources)
    assert sources[0].pixel_spacing == ("0.5", "0.5")


def test_a_frame_without_its_functional_group_has_no_place():
    ds = enhanced_header(8, 6, frames=3)
    del ds.PerFrameFunctionalGroupsSequence[2]
    assert [source.has_plane for source in normalise(ds)] == [True, True, False]


def test_a_frames_own_groups_win_over_shared_ones_and_these_over_the_root():
    ds = enhanced_header(8, 6, frames=2)
    own, measures = ds.PerFrameFunctionalGroupsSequence[1], Dataset()
    measures.SliceThickness = "1.5"
    own.PixelMeasuresSequence = [measures]
    ds.SliceThickness = "9"
    first, second = normalise(ds)
    assert (first.slice_thickness, second.slice_thickness) == ("3", "1.5")
    assert second.pixel_spacing == ("0.5", "0.5")


@pytest.mark.parametrize("keyword", ["Rows", "Columns"])
@pytest.mark.parametrize("value", [None, 0])
def test_an_image_of_no_size_is_refused(keyword, value):
    ds = header("CR", 8, 6)
    setattr(ds, keyword, value)
    with pytest.raises(EncodeError, match=keyword):
        normalise(ds)


def test_a_description_travels_between_processes_and_loads_no_model_library():
    file = as_file(enhanced_header(8, 6, frames=2))
    program = (
        "import io, pickle, sys, pydicom; from dicom_xai.encode.source import describe; "
        "data = sys.stdin.buffer.read(); "
        "header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True); "
        "sys.stdout.buffer.write(pickle.dumps(describe(data, header))); "
        "sys.exit(bool({'torch', 'highdicom', 'onnx'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], input=file, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert pickle.loads(done.stdout) == described(file)


def test_classes_with_one_frame_are_never_referred_to_by_frame_number():
    assert not said("CR", NumberOfFrames=b"2 ").is_multi_frame
