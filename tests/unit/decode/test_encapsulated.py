"""Which fragments are which frame, and what is refused because nobody can tell."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import JPEGLSLossless, RLELossless

from dicom_xai.decode import encapsulated
from dicom_xai.decode.pixels import decode
from dicom_xai.demo.phantom import to_bytes
from dicom_xai.errors import DecodeError
from tests.make import compressed
from tests.make.compressed import an_image_object, frame_of, smooth
from tests.make.images import an_object

FRAMES = np.stack([smooth() + offset for offset in (0, 1, 2)]).astype(np.uint16)


def three_frames(syntax: str = JPEGLSLossless, **how: object) -> Dataset:
    ds = an_image_object(an_object(np.zeros((1, 1), np.uint16)), FRAMES, bits=16)
    streams = [frame_of(frame, syntax, 16) for frame in FRAMES]
    return compressed.encapsulated(ds, streams, syntax, **how)  # type: ignore[arg-type]


def item(value: bytes) -> bytes:
    return struct.pack("<HHL", 0xFFFE, 0xE000, len(value)) + value


END = struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)


def split(data: bytes, count: int, table: encapsulated.OffsetTable | None = None) -> list[bytes]:
    return [bytes(frame) for frame in encapsulated.frames(data, 0, count, table)]


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
@pytest.mark.parametrize("table", ["basic", "extended", "none"])
def test_frames_of_one_fragment_need_no_table(syntax: str, table: str) -> None:
    made = decode(to_bytes(three_frames(syntax, table=table)))
    np.testing.assert_array_equal(made.stored, FRAMES)


@pytest.mark.parametrize("table", ["basic", "none"])
def test_frames_of_several_fragments_are_joined(table: str) -> None:
    # without a table each frame ends with its end-of-image marker
    made = decode(to_bytes(three_frames(table=table, fragments=4)))
    np.testing.assert_array_equal(made.stored, FRAMES)


def test_a_single_frame_takes_all_fragments_whatever_they_end_with() -> None:
    assert split(item(b"") + item(b"ab\xff\xd9") + item(b"cd") + END, 1) == [b"ab\xff\xd9cd"]


def test_a_basic_table_may_skip_nothing_and_must_rise() -> None:
    fragments = item(b"aa") + item(b"bb") + item(b"cc")
    assert split(item(struct.pack("<2L", 0, 10)) + fragments + END, 2) == [b"aa", b"bbcc"]
    for offsets in ((0, 11), (10, 20), (10, 0), (0, 0), (0, 4000)):
        with pytest.raises(DecodeError, match="points beside the fragments"):
            split(item(struct.pack("<2L", *offsets)) + fragments + END, 2)


def test_an_extended_table_gives_each_frame_one_fragment_with_or_without_its_pad_byte() -> None:
    fragments = item(b"aa") + item(b"b\0") + item(b"cc")

    def table(*pairs: tuple[int, int]) -> encapsulated.OffsetTable:
        offsets, lengths = zip(*pairs, strict=True)
        return encapsulated.OffsetTable(
            struct.pack(f"<{len(pairs)}Q", *offsets), struct.pack(f"<{len(pairs)}Q", *lengths)
        )

    data = item(b"") + fragments + END
    assert split(data, 2, table((0, 2), (10, 1))) == [b"aa", b"b\0"]
    for wrong in ((2, 2), (10, 4), (10, 0), (2**40, 2)):
        with pytest.raises(DecodeError, match="no such fragment for frame 2"):
            split(data, 2, table((0, 2), wrong))
    with pytest.raises(DecodeError, match="have 1 and 1 values, NumberOfFrames is 2"):
        split(data, 2, table((0, 2)))


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (item(b"") + END, 1, "no fragments"),
        (END, 1, "no basic offset table"),
        (item(b"") + item(b"ab"), 1, "cut off before its sequence delimiter"),
        (item(b"") + item(b"abcd")[:-1], 1, "claims 4 bytes, 3 are there"),
        (item(b"") + struct.pack("<HHL", 0xFFFE, 0xE000, 2**32 - 2), 1, "claims 4294967294 bytes"),
        (item(b"") + struct.pack("<HHL", 0x7FE0, 0x10, 0), 1, r"\(7FE0,0010\) where an item"),
        (item(b"") + item(b"ab") * 3 + END, 2, "3 fragments without an offset table make 1"),
        (item(b"") + item(b"ab") + END, 3, "1 fragments without an offset table make 1"),
        (item(b"\0" * 4) + item(b"ab") * 2 + END, 2, "has 4 bytes, 8 are wanted"),
    ],
)
def test_fragments_that_do_not_make_the_frames_are_refused(
    data: bytes, count: int, message: str
) -> None:
    with pytest.raises(DecodeError, match=message):
        split(data, count)


def test_a_million_claimed_frames_cost_nothing() -> None:
    ds = three_frames(table="none")
    ds.NumberOfFrames = 100_000
    with pytest.raises(DecodeError, match="3 fragments without an offset table make 3 frames"):
        decode(to_bytes(ds))


def test_an_undefined_length_belongs_to_compressed_pixels_only() -> None:
    ds = three_frames()
    data = to_bytes(ds).replace(JPEGLSLossless.encode() + b"", b"1.2.840.10008.1.2.1\0\0\0")
    with pytest.raises(DecodeError, match="undefined length in transfer syntax Explicit VR Little"):
        decode(data)
