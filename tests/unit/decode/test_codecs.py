"""Compressed frames: every syntax, what the bits mean, and what contradicts the header."""

from __future__ import annotations

import struct
import tracemalloc

import imagecodecs
import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicom_xai.decode.codecs import CODINGS
from dicom_xai.decode.pixels import decode
from dicom_xai.demo.phantom import to_bytes
from dicom_xai.errors import DecodeError
from tests.make.compressed import LOSSY_ERROR, an_image_object, encapsulated, frame_of, smooth
from tests.make.images import an_object, real_file

LOSSLESS = sorted(set(CODINGS) - set(LOSSY_ERROR))
HAVE_OWN_HEADER = sorted(set(CODINGS) - {RLELossless})


def an_image(values: np.ndarray, syntax: str, bits: int, **attributes: object) -> Dataset:
    """One object of one frame, compressed; `attributes` say something else than the frame."""
    ds = an_image_object(an_object(np.zeros((1, 1), np.uint16)), values[None], bits=bits)
    if values.ndim == 3:
        ds.PhotometricInterpretation = "RGB"
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return encapsulated(ds, [frame_of(values, syntax, bits)], syntax)


def stored(ds: Dataset) -> np.ndarray:
    """``(rows, columns)`` of the only frame."""
    (values,) = decode(to_bytes(ds)).stored
    return np.asarray(values)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda uid: UID(uid).keyword)
def test_lossless_frames_give_every_value_back(syntax: str, bits: int, signed: bool) -> None:
    values = smooth(bits=bits, signed=signed)
    np.testing.assert_array_equal(stored(an_image(values, syntax, bits)), values)


@pytest.mark.parametrize("syntax", sorted(LOSSY_ERROR), ids=lambda uid: UID(uid).keyword)
def test_lossy_frames_stay_within_their_error(syntax: str) -> None:
    bits = 8 if syntax == JPEGBaseline8Bit else 12
    values = smooth(bits=bits)
    found = stored(an_image(values, syntax, bits)).astype(int)
    assert np.abs(found - values).max() <= LOSSY_ERROR[syntax]


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda uid: UID(uid).keyword)
def test_colour_becomes_luminance(syntax: str) -> None:
    rgb = np.stack([smooth(bits=8), smooth(bits=8)[::-1], smooth(bits=8)[:, ::-1]], axis=-1)
    expected = rgb @ np.array([0.299, 0.587, 0.114])
    # float32 products and sums round in the last of their 24 bits
    np.testing.assert_allclose(stored(an_image(rgb, syntax, 8)), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("compressed", "plain"),
    [
        ("693_J2KR.dcm", "693_UNCR.dcm"),
        ("MR2_J2KR.dcm", "MR2_UNCR.dcm"),
        ("RG3_J2KR.dcm", "RG3_UNCR.dcm"),
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("emri_small_RLE.dcm", "emri_small.dcm"),
        ("emri_small_jpeg_ls_lossless.dcm", "emri_small.dcm"),
        ("emri_small_jpeg_2k_lossless.dcm", "emri_small.dcm"),
        ("rtdose_rle.dcm", "rtdose.dcm"),
        ("US1_J2KR.dcm", "US1_UNCR.dcm"),
        ("SC_rgb_rle_16bit_2frame.dcm", "SC_rgb_16bit_2frame.dcm"),
        ("SC_rgb_rle_32bit_2frame.dcm", "SC_rgb_32bit_2frame.dcm"),
        ("OBXXXX1A_rle_2frame.dcm", "OBXXXX1A_2frame.dcm"),
    ],
)
def test_a_real_file_decodes_as_its_uncompressed_twin(compressed: str, plain: str) -> None:
    found, expected = (decode(real_file(name)).stored for name in (compressed, plain))
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("predictor", range(1, 8))
def test_every_predictor_of_process_14_is_undone(predictor: int) -> None:
    values = smooth(bits=16)
    frame = imagecodecs.jpeg8_encode(values, lossless=True, predictor=predictor, bitspersample=16)
    ds = encapsulated(an_image(values, JPEGLossless, 16), [bytes(frame)], JPEGLossless)
    np.testing.assert_array_equal(stored(ds), values)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, HTJ2KLossless])
def test_a_codestream_that_forgot_the_sign_is_read_as_the_header_says(syntax: str) -> None:
    values = smooth(bits=16, signed=True)
    ds = an_image(values.view(np.uint16), syntax, 16, PixelRepresentation=1)
    np.testing.assert_array_equal(stored(ds), values)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, HTJ2KLossless])
def test_a_codestream_with_a_sign_too_much_is_read_as_the_header_says(syntax: str) -> None:
    values = smooth(bits=16)
    ds = an_image(values.view(np.int16), syntax, 16, PixelRepresentation=0)
    np.testing.assert_array_equal(stored(ds), values)


def test_the_known_file_with_13_unsigned_bits_for_signed_values_is_read_right() -> None:
    # its README: -2000 outside the reconstructed circle
    (values,) = decode(real_file("J2K_pixelrep_mismatch.dcm")).stored
    assert (values.min(), values.max(), values.dtype) == (-2000, 1896, np.int16)


def test_lossless_bits_above_the_stored_ones_are_dropped() -> None:
    overlay = np.array([[0xF123, 0x0FFF], [0x8000, 0x1001]], np.uint16)
    found = stored(an_image(overlay, JPEGLSLossless, 16, BitsStored=12, HighBit=11))
    assert found.tolist() == [[0x123, 0xFFF], [0, 1]]


def test_a_lossy_overshoot_is_clipped_instead_of_wrapped() -> None:
    values = np.array([[4095, 4095], [4100, 0]], np.uint16)
    frame = bytes(imagecodecs.jpeg2k_encode(values, codecformat="j2k", reversible=True, level=0))
    ds = encapsulated(an_image(values, JPEG2000, 16), [frame], JPEG2000)
    ds.BitsStored, ds.HighBit = 12, 11
    assert stored(ds).tolist() == [[4095, 4095], [4095, 0]]


def jpeg(rgb: np.ndarray, stream_colors: str) -> bytes:
    return bytes(
        imagecodecs.jpeg8_encode(rgb, level=100, colorspace="RGB", outcolorspace=stream_colors)
    )


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("stream_colors", ["RGB", "YCBCR"])
def test_a_jpeg_stream_s_own_word_about_colour_goes_before_the_header_s(
    photometric: str, stream_colors: str
) -> None:
    rgb = np.stack([smooth(bits=8), smooth(bits=8)[::-1], smooth(bits=8)[:, ::-1]], axis=-1)
    ds = an_image(rgb, JPEGBaseline8Bit, 8, PhotometricInterpretation=photometric)
    ds = encapsulated(ds, [jpeg(rgb, stream_colors)], JPEGBaseline8Bit)
    expected = rgb @ np.array([0.299, 0.587, 0.114])
    # quality 100 quantises by 1: rounding in each of colour, transform and inverse
    assert np.abs(stored(ds) - expected).max() <= 3


@pytest.mark.parametrize(
    "name",
    ["SC_jpeg_no_color_transform.dcm", "SC_rgb_jpeg_app14_dcmd.dcm", "SC_rgb_dcmtk_+eb+cr.dcm"],
)
def test_jpeg_files_that_hold_rgb_are_not_taken_for_luminance(name: str) -> None:
    import pydicom

    ds = pydicom.dcmread(pydicom.data.get_testdata_file(name, download=False))
    expected = ds.pixel_array @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(decode(real_file(name)).stored[0], expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("photometric", ["YBR_RCT", "RGB", "YBR_FULL"])
def test_a_transformed_jpeg_2000_stream_holds_rgb_whatever_the_header_says(
    photometric: str,
) -> None:
    rgb = np.stack([smooth(bits=8), smooth(bits=8)[::-1], smooth(bits=8)[:, ::-1]], axis=-1)
    frame = imagecodecs.jpeg2k_encode(rgb, codecformat="j2k", reversible=True, level=0, mct=True)
    ds = an_image(rgb, JPEG2000Lossless, 8, PhotometricInterpretation=photometric)
    found = stored(encapsulated(ds, [bytes(frame)], JPEG2000Lossless))
    expected = rgb @ np.array([0.299, 0.587, 0.114])
    # float32 products and sums round in the last of their 24 bits
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-4)


def test_an_untransformed_jpeg_2000_stream_holds_what_the_header_says() -> None:
    ycc = np.stack([smooth(bits=8), smooth(bits=8)[::-1], smooth(bits=8)[:, ::-1]], axis=-1)
    frame = imagecodecs.jpeg2k_encode(ycc, codecformat="j2k", reversible=True, level=0, mct=False)
    ds = an_image(ycc, JPEG2000Lossless, 8, PhotometricInterpretation="YBR_FULL")
    found = stored(encapsulated(ds, [bytes(frame)], JPEG2000Lossless))
    np.testing.assert_array_equal(found, ycc[..., 0])


@pytest.mark.parametrize("name", ["GDCMJ2K_TextGBR.dcm", "US1_J2KR.dcm"])
def test_the_colour_transforms_of_jpeg_2000_are_undone_by_the_decoder(name: str) -> None:
    assert decode(real_file(name)).stored.dtype == np.float32


def test_a_codestream_in_the_boxes_of_a_file_is_found() -> None:
    values = smooth()
    boxed = bytes(imagecodecs.jpeg2k_encode(values, codecformat="jp2", reversible=True, level=0))
    ds = encapsulated(an_image(values, JPEG2000Lossless, 12), [boxed], JPEG2000Lossless)
    np.testing.assert_array_equal(stored(ds), values)


@pytest.mark.parametrize("syntax", HAVE_OWN_HEADER, ids=lambda uid: UID(uid).keyword)
def test_a_frame_of_another_size_than_the_header_says_is_refused(syntax: str) -> None:
    bits = 8 if syntax == JPEGBaseline8Bit else 12
    message = "a frame has 64 rows, 48 columns and 1 samples, the header says 65, 48 and 1"
    with pytest.raises(DecodeError, match=message):
        stored(an_image(smooth(bits=bits), syntax, bits, Rows=65))


def test_a_frame_with_more_bits_than_the_header_allocates_is_refused() -> None:
    ds = an_image(smooth(bits=12), JPEGLSLossless, 12)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    with pytest.raises(DecodeError, match=r"samples of (12|16) bits, BitsAllocated is 8"):
        stored(ds)


@pytest.mark.parametrize(
    ("coded_as", "said", "message"),
    [
        (JPEGLosslessSV1, JPEGBaseline8Bit, "coded as lossless, the transfer syntax says baseline"),
        (JPEGBaseline8Bit, JPEGLosslessSV1, "coded as baseline, the transfer syntax says lossless"),
        (JPEGBaseline8Bit, JPEGLSLossless, "coded as baseline, the transfer syntax says JPEG-LS"),
        (JPEGBaseline8Bit, JPEG2000, "JPEG 2000: no codestream header"),
        (JPEG2000, JPEGBaseline8Bit, "JPEG: no start of image"),
    ],
)
def test_a_frame_of_another_process_than_the_transfer_syntax_is_refused(
    coded_as: str, said: str, message: str
) -> None:
    values = smooth(bits=8)
    ds = encapsulated(an_image(values, coded_as, 8), [frame_of(values, coded_as, 8)], said)
    with pytest.raises(DecodeError, match=message):
        stored(ds)


@pytest.mark.parametrize("syntax", sorted(CODINGS), ids=lambda uid: UID(uid).keyword)
def test_every_cut_frame_is_refused(syntax: str) -> None:
    bits = 8 if syntax == JPEGBaseline8Bit else 12
    ds = an_image(smooth(16, 12, bits=bits), syntax, bits)
    frame = frame_of(smooth(16, 12, bits=bits), syntax, bits)
    # a fragment has two bytes at least; the last one of an RLE frame may be its padding
    for length in range(2, len(frame) - 1):
        with pytest.raises(DecodeError):
            stored(encapsulated(ds, [frame[:length]], syntax))


@pytest.mark.parametrize("syntax", sorted(CODINGS), ids=lambda uid: UID(uid).keyword)
def test_damaged_frames_are_refused_or_decode_to_the_header_s_shape(syntax: str) -> None:
    bits = 8 if syntax == JPEGBaseline8Bit else 12
    values = smooth(16, 12, bits=bits)
    ds, frame = an_image(values, syntax, bits), frame_of(values, syntax, bits)
    rng = np.random.default_rng(7)
    for _ in range(60):
        damaged = bytearray(frame)
        for at in rng.integers(0, len(frame), 3):
            damaged[at] = rng.integers(0, 256)
        try:
            found = stored(encapsulated(ds, [bytes(damaged)], syntax))
        except DecodeError:
            continue
        assert found.shape == values.shape


@pytest.mark.parametrize("syntax", HAVE_OWN_HEADER, ids=lambda uid: UID(uid).keyword)
def test_a_frame_that_claims_to_be_huge_is_refused_by_its_header(syntax: str) -> None:
    bits = 8 if syntax == JPEGBaseline8Bit else 12
    values = smooth(bits=bits)
    frame = bytearray(frame_of(values, syntax, bits))
    if frame[:4] == b"\xff\x4f\xff\x51":
        struct.pack_into(">LL", frame, 8, 2**31, 2**31)
    else:
        start = next(i for i in range(len(frame)) if frame[i + 1] in (0xC0, 0xC1, 0xC3, 0xF7))
        struct.pack_into(">HH", frame, start + 5, 65500, 65500)
    ds = encapsulated(an_image(values, syntax, bits), [bytes(frame)], syntax)
    data = to_bytes(ds)
    tracemalloc.start()
    with pytest.raises(DecodeError, match="the header says 64, 48 and 1"):
        decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000  # the header's objects and one small frame


def test_an_rle_frame_that_inflates_beyond_the_header_is_refused() -> None:
    values = np.zeros((64, 64), np.uint8)
    bomb = struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\x00" * 100_000
    ds = encapsulated(an_image(values, RLELossless, 8), [bomb], RLELossless)
    with pytest.raises(DecodeError, match="RLE Lossless: a frame is damaged: ImcdError"):
        stored(ds)


def test_an_rle_frame_with_another_number_of_planes_is_refused() -> None:
    ds = an_image(np.zeros((4, 4), np.uint8), RLELossless, 8)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    with pytest.raises(DecodeError, match=r"a frame has 1 segments, .* make 2"):
        stored(ds)


@pytest.mark.parametrize("syntax", [JPEGExtended12Bit, JPEGLSNearLossless, HTJ2K])
def test_errors_name_the_frame_and_the_syntax_and_nothing_of_the_codec_s(syntax: str) -> None:
    values = smooth()
    good, bad = frame_of(values, syntax, 12), frame_of(values, syntax, 12)
    ds = an_image(values, syntax, 12, NumberOfFrames=2)
    ds = encapsulated(ds, [good, bad[: len(bad) // 2]], syntax)
    with pytest.raises(DecodeError, match=r"^frame 2, ") as caught:
        decode(to_bytes(ds))
    assert UID(syntax).name in str(caught.value)
