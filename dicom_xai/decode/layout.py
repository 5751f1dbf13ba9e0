"""How pixels lie in Pixel Data, as the header says; and what a cell's bits mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydicom import Dataset

from dicom_xai.decode.attributes import integer, required, text
from dicom_xai.errors import DecodeError

MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
PALETTE = "PALETTE COLOR"
_ONE_SAMPLE = (*MONOCHROME, PALETTE)
_NATIVE_COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422")
#: YBR_ICT and YBR_RCT are transformations inside a JPEG 2000 codestream.
_COMPRESSED_COLOR = (*_NATIVE_COLOR, "YBR_ICT", "YBR_RCT")
_BITS_ALLOCATED = (1, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Layout:
    """The Image Pixel attributes, checked (PS3.3 C.7.6.3)."""

    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    planar: bool  #: colour by plane; says nothing about compressed frames
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool

    @classmethod
    def of(cls, header: Dataset, *, is_compressed: bool) -> Layout:
        """Read and check the Image Pixel attributes.

        Raises
        ------
        DecodeError
            One is missing, not served, or contradicts another.
        """
        frames = integer(header, "NumberOfFrames")
        samples = required(header, "SamplesPerPixel")
        representation = required(header, "PixelRepresentation")
        is_planar = samples > 1 and not is_compressed
        layout = cls(
            rows=required(header, "Rows"),
            columns=required(header, "Columns"),
            frames=1 if frames is None else frames,
            samples=samples,
            photometric=text(header, "PhotometricInterpretation"),
            planar=is_planar and required(header, "PlanarConfiguration") == 1,
            bits_allocated=required(header, "BitsAllocated"),
            bits_stored=required(header, "BitsStored"),
            high_bit=required(header, "HighBit"),
            signed=representation == 1,
        )
        layout._check(representation, is_compressed)
        return layout

    def _check(self, pixel_representation: int, is_compressed: bool) -> None:
        for keyword, value in (
            ("Rows", self.rows),
            ("Columns", self.columns),
            ("NumberOfFrames", self.frames),
        ):
            if value < 1:
                raise DecodeError(f"{keyword}: {value}, at least 1 wanted")
        color = _COMPRESSED_COLOR if is_compressed else _NATIVE_COLOR
        wanted = {1: _ONE_SAMPLE, 3: color}.get(self.samples)
        if wanted is None:
            raise DecodeError(f"SamplesPerPixel: {self.samples}, 1 or 3 wanted")
        if self.photometric not in wanted:
            raise DecodeError(
                f"PhotometricInterpretation: {self.photometric or 'missing'} with "
                f"{self.samples} samples, {' or '.join(wanted)} wanted"
            )
        is_shared = self.photometric == "YBR_FULL_422" and not is_compressed
        if is_shared and (self.planar or self.columns % 2):
            raise DecodeError("YBR_FULL_422 wants PlanarConfiguration 0 and an even Columns")
        may_be_bits = self.samples == 1 and not is_compressed
        allowed = _BITS_ALLOCATED if may_be_bits else _BITS_ALLOCATED[1:]
        if self.bits_allocated not in allowed:
            names = ", ".join(map(str, allowed))
            raise DecodeError(f"BitsAllocated: {self.bits_allocated}, one of {names} wanted")
        if not 1 <= self.bits_stored <= self.bits_allocated:
            raise DecodeError(f"BitsStored: {self.bits_stored} of {self.bits_allocated} allocated")
        if not self.bits_stored - 1 <= self.high_bit < self.bits_allocated:
            raise DecodeError(f"HighBit: {self.high_bit} with BitsStored {self.bits_stored}")
        if pixel_representation not in (0, 1):
            raise DecodeError(f"PixelRepresentation: {pixel_representation}, 0 or 1 wanted")
        if self.photometric == PALETTE and (self.signed or self.bits_allocated not in (8, 16)):
            raise DecodeError("PALETTE COLOR wants unsigned cells of 8 or 16 bits")

    def check_limit(self, limit_bytes: int) -> None:
        """Refuse what would not fit, by arithmetic alone."""
        decoded = self.rows * self.columns * self.frames * 4
        if decoded > limit_bytes:
            raise DecodeError(
                f"Rows {self.rows}, Columns {self.columns} and NumberOfFrames {self.frames} need "
                f"{decoded} bytes decoded; the limit is {limit_bytes}"
            )

    @property
    def cell_bytes(self) -> int:
        """Bytes of a decoded cell; single bits become bytes."""
        return max(1, self.bits_allocated // 8)

    @property
    def cell_type(self) -> np.dtype[np.unsignedinteger]:
        """Of a cell before its bits are looked at: unsigned, native byte order."""
        return np.dtype(f"u{self.cell_bytes}")

    @property
    def stored_type(self) -> np.dtype[np.integer]:
        """Of a stored value."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.cell_bytes}")

    def stored(
        self, cells: np.ndarray, bits: int | None = None, high_bit: int | None = None
    ) -> np.ndarray:
        """The value of each cell: `bits` bits ending at `high_bit` (PS3.5 8.1.1).

        Bits outside (old overlays) are dropped, the sign is extended.

        Parameters
        ----------
        cells : ndarray of `cell_type`
        bits, high_bit : int, optional
            BitsStored and HighBit if not given.
        """
        bits = self.bits_stored if bits is None else bits
        high_bit = self.high_bit if high_bit is None else high_bit
        allocated = 8 * self.cell_bytes
        if bits == allocated:
            return cells.view(self.stored_type)
        raised = cells << (allocated - 1 - high_bit)
        return np.asarray(raised.view(self.stored_type) >> (allocated - bits))
