"""Frames as the value of Pixel Data: nothing lost, nothing longer than an object can hold."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames, parse_basic_offsets
from pydicom.filebase import DicomBytesIO
from pydicom.uid import RLELossless

from dicom_xai.config import Compression
from dicom_xai.encode import pixeldata
from dicom_xai.errors import EncodeError

RNG = np.random.default_rng(5)


def images(count: int, *shape: int, dtype: type = np.uint8) -> list[np.ndarray]:
    """Runs and noise in turns, so that both ways of packing are met."""
    made = RNG.integers(0, 4, (count, *shape)).astype(dtype)
    made[:, ::2] = np.iinfo(dtype).max
    return list(made)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((7, 9), np.uint8), ((8, 6), np.uint16), ((5, 300), np.uint16), ((7, 9, 3), np.uint8)],
)
def test_run_length_encoding_gives_every_cell_back(shape, dtype):
    (image,) = images(1, *shape, dtype=dtype)
    (stream,) = pixeldata.compressed([image], Compression.RLE)
    ds = Dataset()
    ds.Rows, ds.Columns = shape[:2]
    ds.SamplesPerPixel = shape[2] if len(shape) == 3 else 1
    ds.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * np.dtype(dtype).itemsize
    ds.HighBit, ds.PixelRepresentation, ds.PlanarConfiguration = ds.BitsStored - 1, 0, 0
    ds.PixelData = encapsulate([bytes(stream)])
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = RLELossless
    assert np.array_equal(ds.pixel_array, image)


def test_frames_come_in_their_order_however_many_threads_pack_them():
    frames = images(9, 16, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = pixeldata.compressed(frames, Compression.RLE)
    finally:
        torch.set_num_threads(before)
    assert together == [pixeldata.compressed([frame], Compression.RLE)[0] for frame in frames]


def test_a_table_says_where_each_frame_starts():
    streams = [b"a" * 3, b"b" * 8, b"c"]
    made = pixeldata.pixel_data(streams, Compression.RLE)
    value = b"".join(made.pieces) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    padded = [stream + b"\0" * (len(stream) % 2) for stream in streams]
    assert list(generate_frames(value, number_of_frames=3)) == padded
    assert parse_basic_offsets(DicomBytesIO(value)) == [0, 12, 28]


@pytest.mark.parametrize("pixels", [64, 63, 1, 7, 9])
def test_bits_of_frames_follow_each_other_without_a_gap(pixels):
    masks = RNG.integers(0, 2, (5, pixels), dtype=np.uint8)
    frames = list(np.packbits(masks, axis=1, bitorder="little"))
    expected = np.packbits(masks.reshape(-1), bitorder="little").tobytes()
    assert bytes(pixeldata.bits(frames, pixels)) == expected


@pytest.mark.parametrize("compression", [Compression.NONE, Compression.RLE])
def test_what_no_object_can_hold_is_refused(compression):
    half = np.broadcast_to(np.uint8(0), 1 << 31)  # takes no memory
    with pytest.raises(EncodeError, match="no object can hold"):
        pixeldata.pixel_data([half, half], compression)
