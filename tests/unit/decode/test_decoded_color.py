"""Palettes become luminance: plain and segmented tables, both byte orders."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from pydicom import Dataset

from dicom_xai.decode.pixels import decode
from dicom_xai.demo.phantom import to_bytes
from dicom_xai.errors import DecodeError
from tests.make.images import an_object, real_file

COLORS = ("Red", "Green", "Blue")
WEIGHTS = np.array([0.299, 0.587, 0.114])


def a_palette_image(descriptor: list[int], data: dict[str, bytes], prefix: str = "") -> Dataset:
    ds = an_object(np.zeros((1, 1), np.uint16))
    ds.Rows, ds.Columns = 1, 4
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PhotometricInterpretation = "PALETTE COLOR"
    ds.PixelData = bytes([0, 1, 2, 255])
    ds["PixelData"].VR = "OB"
    for color in COLORS:
        setattr(ds, f"{color}PaletteColorLookupTableDescriptor", descriptor)
        ds[f"{color}PaletteColorLookupTableDescriptor"].VR = "US"
        setattr(ds, f"{prefix}{color}PaletteColorLookupTableData", data[color])
        ds[f"{prefix}{color}PaletteColorLookupTableData"].VR = "OW"
    return ds


def same(words: bytes) -> dict[str, bytes]:
    return dict.fromkeys(COLORS, words)


def stored(ds: Dataset) -> list[float]:
    return [float(value) for value in decode(to_bytes(ds)).stored.ravel()]


def test_values_below_and_above_the_table_get_its_ends() -> None:
    ds = a_palette_image([2, 1, 16], same(struct.pack("<2H", 1000, 3000)))
    # equal red, green and blue are their own luminance; float32 weights round in the last bit
    assert stored(ds) == pytest.approx([1000, 1000, 3000, 3000], rel=1e-6)


def test_colours_weigh_as_the_standard_says() -> None:
    data = {
        color: struct.pack("<H", value)
        for color, value in zip(COLORS, (100, 200, 300), strict=True)
    }
    ds = a_palette_image([1, 0, 16], data)
    assert stored(ds) == pytest.approx([WEIGHTS @ [100, 200, 300]] * 4, rel=1e-6)


def test_eight_bit_entries_may_come_packed() -> None:
    ds = a_palette_image([3, 0, 8], same(bytes([7, 8, 9, 0])))
    assert stored(ds) == pytest.approx([7, 8, 9, 9], rel=1e-6)


def test_segments_are_expanded() -> None:
    # two entries, then three on a line to 40
    words = same(struct.pack("<7H", 0, 2, 5, 10, 1, 3, 40))
    ds = a_palette_image([5, 0, 16], words, prefix="Segmented")
    assert stored(ds) == pytest.approx([5, 10, 20, 40], rel=1e-6)


def test_a_real_segmented_palette_is_the_same_in_both_byte_orders() -> None:
    little, big = (
        decode(real_file(f"gdcm-US-ALOKA-16{suffix}.dcm")).stored for suffix in ("", "_big")
    )
    np.testing.assert_array_equal(little, big)


def test_a_real_plain_palette_is_the_same_in_both_byte_orders() -> None:
    little, big = (decode(real_file(f"OBXXXX1A{suffix}.dcm")).stored for suffix in ("", "_expb"))
    np.testing.assert_array_equal(little, big)


@pytest.mark.parametrize("name", ["OBXXXX1A.dcm", "examples_palette.dcm", "gdcm-US-ALOKA-16.dcm"])
def test_real_palettes_are_the_luminance_of_what_pydicom_draws(name: str) -> None:
    from io import BytesIO

    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut

    ds = dcmread(BytesIO(real_file(name)))
    expected = apply_color_lut(ds.pixel_array, ds) @ WEIGHTS
    # float32 of 16-bit entries
    np.testing.assert_allclose(decode(real_file(name)).stored[0], expected, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize(
    ("descriptor", "prefix", "words", "message"),
    [
        ([2, 0, 16], "", (1,), "RedPaletteColorLookupTableData: 2 bytes for 2 entries of 16 bits"),
        ([2, 0, 12], "", (1, 2), "2 entries of 12 bits; 8 or 16 wanted"),
        ([2, 0], "", (1, 2), "RedPaletteColorLookupTableDescriptor: three values wanted"),
        ([9, 0, 16], "Segmented", (0, 2, 5, 6), "expands to 2 entries, 9 wanted"),
        ([1, 0, 16], "Segmented", (0, 2, 5, 6), "expands to 2 entries, 1 wanted"),
        ([2, 0, 16], "Segmented", (1, 2, 5, 6), "a segment of type 1; discrete or linear"),
        ([2, 0, 16], "Segmented", (0, 1, 5, 2, 1, 0, 0), "a segment of type 2"),
        ([2, 0, 16], "Blurred", (1, 2), "RedPaletteColorLookupTableData is missing"),
    ],
)
def test_a_palette_that_is_no_table_is_refused(
    descriptor: list[int], prefix: str, words: tuple[int, ...], message: str
) -> None:
    data = same(struct.pack(f"<{len(words)}H", *words))
    if prefix == "Blurred":
        ds = a_palette_image(descriptor, data)
        for color in COLORS:
            delattr(ds, f"{color}PaletteColorLookupTableData")
    else:
        ds = a_palette_image(descriptor, data, prefix)
    with pytest.raises(DecodeError, match=message):
        stored(ds)
