"""Bytes to frames: real files against pydicom's own decoding, and one defect at a time."""

from __future__ import annotations

import pickle
import tracemalloc
import zlib
from io import BytesIO

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_modality_lut
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.pixels import Rescale, decode, read_header
from dicom_xai.deflate import MAX_INFLATED_BYTES
from dicom_xai.demo.phantom import to_bytes
from dicom_xai.errors import DecodeError
from dicom_xai.study import Frame
from tests.make.images import CPU, a_file, an_instance, an_object, real_file

RAMP = np.arange(12, dtype=np.uint16).reshape(3, 4)


def decoded(data: bytes, **options: int) -> tuple[Frame, ...]:
    return to_frames(an_instance(), decode(data, **options), CPU)


def values(data: bytes) -> np.ndarray:
    return np.stack([frame.values.numpy() for frame in decoded(data)])


GRAY_FILES = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_expb.dcm",
    "MR_small_implicit.dcm",
    "MR_small_padded.dcm",
    "examples_overlay.dcm",
    "dicomdirtests/77654033/CR1/6154",
    "dicomdirtests/77654033/CT2/17106",
    "dicomdirtests/98892003/MR1/15820",
    "693_UNCR.dcm",
    "RG1_UNCR.dcm",
    "RG3_UNCI.dcm",
    "MR2_UNCR.dcm",
    "MR-SIEMENS-DICOM-WithOverlays.dcm",
    "emri_small.dcm",
    "emri_small_big_endian.dcm",
    "mlut_18.dcm",
    "vlut_04.dcm",
)


@pytest.mark.parametrize("name", GRAY_FILES)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_real_grayscale_file_has_the_values_that_pydicom_gives(name: str) -> None:
    data = real_file(name)
    ds = dcmread(BytesIO(data))
    expected = apply_modality_lut(ds.pixel_array, ds).astype(np.float64)
    found = values(data)
    # float32 holds 24 bits; a rescale with a fractional slope rounds in the last of them
    np.testing.assert_allclose(found.squeeze(), expected, rtol=2e-7, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "examples_rgb_color.dcm",
        "SC_rgb_16bit_2frame.dcm",
        "SC_rgb_small_odd_big_endian.dcm",
        "ExplVR_BigEnd.dcm",
        "color-pl.dcm",
        "SC_rgb_expb.dcm",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_colour_becomes_luminance(name: str) -> None:
    data = real_file(name)
    ds = dcmread(BytesIO(data))
    assert ds.PhotometricInterpretation == "RGB"
    expected = ds.pixel_array.astype(np.float64) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(values(data).squeeze(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "full_422"])
def test_the_luminance_of_ybr_is_its_first_channel(kind: str) -> None:
    data = real_file(f"SC_ybr_{kind}_uncompressed.dcm")
    ds = dcmread(BytesIO(data))
    ds.pixel_array_options(raw=True)
    np.testing.assert_array_equal(values(data)[0], ds.pixel_array[..., 0])


def test_an_enhanced_ct_is_rescaled_by_its_functional_groups() -> None:
    data = real_file("eCT_Supplemental.dcm")
    ds = dcmread(BytesIO(data))
    group = ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0]
    expected = ds.pixel_array * float(group.RescaleSlope) + float(group.RescaleIntercept)
    np.testing.assert_array_equal(values(data), expected)


def test_a_frame_s_own_rescale_goes_before_the_shared_one() -> None:
    frames = np.stack([RAMP, RAMP])
    ds = an_object(frames.reshape(6, 4), Rows=3, NumberOfFrames=2)

    def group(slope: str) -> Dataset:
        item, transformation = Dataset(), Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = slope, "1"
        transformation.RescaleType = "US"
        item.PixelValueTransformationSequence = [transformation]
        return item

    ds.SharedFunctionalGroupsSequence = [group("2")]
    ds.PerFrameFunctionalGroupsSequence = [Dataset(), group("3")]
    found = values(to_bytes(ds))
    np.testing.assert_array_equal(found[0], RAMP * 2.0 + 1)
    np.testing.assert_array_equal(found[1], RAMP * 3.0 + 1)


def test_frames_are_numbered_from_one_and_share_the_header() -> None:
    frames = decoded(real_file("emri_small.dcm"))
    assert [frame.number for frame in frames] == list(range(1, 11))
    assert all(frame.header is frames[0].header for frame in frames)
    assert "PixelData" not in frames[0].header


def test_what_a_decoding_process_hands_over_pickles_as_cheaply_as_its_pixels() -> None:
    data = real_file("CT_small.dcm")
    made = decode(data)
    pickled = pickle.dumps(made)
    header_bytes = len(data) - made.stored.nbytes
    # each element is an object with tag and VR: some 2.5 times its bytes; no second copy of pixels
    assert len(pickled) < made.stored.nbytes + 3 * header_bytes
    again = pickle.loads(pickled)
    np.testing.assert_array_equal(again.stored, made.stored)
    assert again.header == made.header
    assert again.modality == made.modality == (Rescale(1.0, -1024.0),)


@pytest.mark.parametrize("name", ["gdcm-US-ALOKA-16.dcm", "mlut_18.dcm", "RG1_UNCR.dcm"])
def test_a_header_that_was_looked_at_pickles_with_its_values(name: str) -> None:
    made = decode(real_file(name))
    assert str(made.header)  # every value converted
    assert pickle.loads(pickle.dumps(made, protocol=5)).header == made.header


def test_bits_above_the_stored_ones_are_dropped_and_the_sign_is_extended() -> None:
    cells = np.array([[0x0FFF, 0xF7FF, 0x0800, 0x0001]], dtype=np.uint16)
    data = a_file(cells, BitsStored=12, HighBit=11, PixelRepresentation=1)
    assert values(data).ravel().tolist() == [-1, 2047, -2048, 1]


def test_single_bits_follow_each_other_across_frames() -> None:
    bits = np.random.default_rng(3).integers(0, 2, (3, 3, 5), dtype=np.uint8)
    for syntax, vr in ((ExplicitVRLittleEndian, "OB"), (ExplicitVRBigEndian, "OW")):
        ds = an_object(np.zeros((3, 5), np.uint16), NumberOfFrames=3)
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 1, 0
        packed = np.packbits(bits.ravel(), bitorder="little")
        if vr == "OW":
            packed = packed.reshape(-1, 2)[:, ::-1]
        ds.PixelData = packed.tobytes()
        ds["PixelData"].VR = vr
        ds.file_meta.TransferSyntaxUID = syntax
        np.testing.assert_array_equal(decode(to_bytes(ds)).stored, bits)


def test_real_single_bits_are_those_that_pydicom_gives() -> None:
    for name in ("liver.dcm", "liver_expb_1frame.dcm"):
        ds = dcmread(BytesIO(real_file(name)))
        np.testing.assert_array_equal(decode(real_file(name)).stored.squeeze(), ds.pixel_array)


def test_thirty_two_bits_keep_what_float32_can_hold() -> None:
    cells = np.array([[1, 2**24], [2**24 + 1, 2**32 - 1]], np.uint32)
    ds = an_object(np.zeros((2, 2), np.uint16))
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 32, 32, 31
    ds.PixelData = cells.tobytes()
    np.testing.assert_array_equal(decode(to_bytes(ds)).stored[0], cells)
    assert values(to_bytes(ds)).ravel().tolist() == [1, 2**24, 2**24, 2**32]


def test_a_high_bit_above_the_stored_bits_shifts_the_cell() -> None:
    data = a_file(np.array([[0x0120, 0x7FF0]], dtype=np.uint16), BitsStored=12, HighBit=15)
    assert values(data).ravel().tolist() == [0x012, 0x7FF]


def test_eight_bit_words_in_big_endian_are_unswapped() -> None:
    ds = an_object(np.zeros((1, 4), dtype=np.uint16))
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = bytes([2, 1, 4, 3])  # words 0x0201, 0x0403: low byte first in the image
    ds["PixelData"].VR = "OW"
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    assert values(to_bytes(ds)).ravel().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_the_transfer_syntax_does_not_change_the_values(syntax: str) -> None:
    ds = an_object(RAMP)
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = RAMP.astype(">u2").tobytes()
        ds["PixelData"].VR = "OW"
    np.testing.assert_array_equal(values(to_bytes(ds))[0], RAMP)


def test_padding_is_marked_whichever_sign_it_was_written_with() -> None:
    stored = np.array([[-2000, 5], [7, -2000]], dtype=np.int16)
    ds = an_object(stored)
    ds.add_new("PixelPaddingValue", "US", 63536)
    (frame,) = decoded(to_bytes(ds))
    assert frame.valid is not None
    assert frame.valid.tolist() == [[False, True], [True, False]]


def test_a_padding_range_includes_both_ends() -> None:
    ds = an_object(RAMP)
    ds.add_new("PixelPaddingValue", "US", 2)
    ds.add_new("PixelPaddingRangeLimit", "US", 0)
    (frame,) = decoded(to_bytes(ds))
    assert frame.valid is not None
    assert (~frame.valid).sum() == 3


def test_a_frame_without_padded_pixels_has_no_mask() -> None:
    ds = an_object(RAMP)
    ds.add_new("PixelPaddingValue", "US", 4000)
    assert decoded(to_bytes(ds))[0].valid is None


def test_a_padding_limit_without_a_value_is_refused() -> None:
    ds = an_object(RAMP)
    ds.add_new("PixelPaddingRangeLimit", "US", 0)
    with pytest.raises(DecodeError, match="PixelPaddingRangeLimit without PixelPaddingValue"):
        decoded(to_bytes(ds))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"Rows": None}, "Rows is missing"),
        ({"Columns": 0}, "Columns: 0"),
        ({"BitsAllocated": 12}, "BitsAllocated: 12"),
        ({"BitsStored": 17}, "BitsStored: 17"),
        ({"HighBit": 3, "BitsStored": 12}, "HighBit: 3"),
        ({"PixelRepresentation": 2}, "PixelRepresentation: 2"),
        ({"SamplesPerPixel": 2, "PlanarConfiguration": 0}, "SamplesPerPixel: 2"),
        ({"BitsAllocated": 64, "BitsStored": 12}, "BitsAllocated: 64, one of 1, 8, 16, 32 wanted"),
        ({"PhotometricInterpretation": "CMYK"}, "PhotometricInterpretation: CMYK"),
        ({"PhotometricInterpretation": None}, "PhotometricInterpretation: missing"),
        ({"NumberOfFrames": 2}, "PixelData: 24 bytes, but"),
        ({"Rows": 2}, "PixelData: 24 bytes, but"),
        ({"RescaleSlope": "2"}, "RescaleIntercept is missing"),
        ({"RescaleSlope": "0", "RescaleIntercept": "1"}, "RescaleSlope: 0"),
        ({"PixelData": None}, "PixelData is missing"),
        ({"sop_class_uid": CTImageStorage}, "RescaleSlope and RescaleIntercept are missing"),
    ],
)
def test_a_missing_or_contradicting_attribute_is_named(
    attributes: dict[str, object], message: str
) -> None:
    with pytest.raises(DecodeError, match=message):
        decoded(a_file(RAMP, **attributes))


def test_zeros_after_the_pixels_are_taken_as_padding_and_anything_else_is_not() -> None:
    ds = an_object(RAMP)
    ds.PixelData += bytes(8)
    np.testing.assert_array_equal(values(to_bytes(ds))[0], RAMP)
    ds.PixelData = RAMP.tobytes() + bytes(7) + b"\1"
    with pytest.raises(DecodeError, match="PixelData: 32 bytes, but"):
        decoded(to_bytes(ds))


def test_a_syntax_that_is_not_served_is_refused_by_name() -> None:
    data = a_file(RAMP).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.20\0\0")
    with pytest.raises(DecodeError, match=r"transfer syntax Papyrus 3 Implicit.* is not served"):
        decode(data)


def test_a_deflated_file_is_read_and_inflated() -> None:
    data = real_file("image_dfl.dcm")
    assert read_header(data).Rows == 512
    ds = dcmread(BytesIO(data))
    np.testing.assert_array_equal(decode(data).stored[0], ds.pixel_array)


@pytest.mark.promise("C3")
def test_a_deflated_bomb_is_refused() -> None:
    head = real_file("image_dfl.dcm")
    start = 144 + dcmread(BytesIO(head), stop_before_pixels=True).file_meta[0x20000].value
    bomb = zlib.compress(bytes(MAX_INFLATED_BYTES + 1), 1, -zlib.MAX_WBITS)
    with pytest.raises(DecodeError, match="inflates to more than 536870912 bytes"):
        decode(head[:start] + bomb)


def test_truncated_pixel_data_is_refused() -> None:
    data = a_file(RAMP)
    with pytest.raises(DecodeError, match="24 bytes announced, 23 in the file"):
        decoded(data[:-1])


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_every_prefix_of_a_file_is_refused_as_undecodable() -> None:
    data = a_file(RAMP)
    for length in range(len(data)):
        with pytest.raises(DecodeError):
            decoded(data[:length])


def test_a_damaged_number_is_named_without_its_value() -> None:
    ds = an_object(RAMP, RescaleSlope="1", RescaleIntercept="0")
    data = to_bytes(ds).replace(b"DS\x02\x001 ", b"DS\x02\x00x ")
    with pytest.raises(DecodeError, match=r"^RescaleSlope: a value is no number$"):
        decoded(data)


@pytest.mark.promise("C3")
def test_a_size_over_the_limit_is_refused_before_anything_is_allocated() -> None:
    ds = an_object(RAMP, Rows=60000, Columns=60000)
    data = to_bytes(ds)
    tracemalloc.start()
    with pytest.raises(DecodeError, match="Rows 60000, Columns 60000 and NumberOfFrames 1 need"):
        decoded(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000  # the header's objects; one float32 frame would be 14.4 GB


def test_the_limit_is_an_argument() -> None:
    with pytest.raises(DecodeError, match="need 48 bytes decoded; the limit is 47"):
        decoded(a_file(RAMP), limit_bytes=47)
    assert len(decoded(a_file(RAMP), limit_bytes=48)) == 1


def test_a_header_is_read_without_pixel_data_and_with_file_meta() -> None:
    header = read_header(real_file("CT_small.dcm"))
    assert header.file_meta.TransferSyntaxUID.is_little_endian
    assert header.Rows == 128
    assert "PixelData" not in header


def test_no_dicom_file_is_refused() -> None:
    for data in (b"", b"x" * 300, b"\0" * 128 + b"DICM"):
        with pytest.raises(DecodeError):
            decoded(data)
