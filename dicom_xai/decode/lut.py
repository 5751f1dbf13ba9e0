"""Lookup tables of a data set: Modality LUT and VOI LUT have the same form (PS3.3 C.11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydicom import Dataset

from dicom_xai.decode.attributes import numbers
from dicom_xai.errors import DecodeError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class LookupTable:
    """One table: what each input value becomes.

    Attributes
    ----------
    first : int
        The input value that gets the first entry; lower values get it too, values above the last
        entry's get the last (PS3.3 C.11.1.1).
    entries : ndarray, (n,) float32
    bits : int
        Bits of an entry: its range is ``0..2**bits - 1``.
    """

    first: int
    entries: np.ndarray
    bits: int

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """The entry of each float32 value, rounded down to an integer first; same shape."""
        table = values.new_tensor(self.entries)
        index = (values.floor().long() - self.first).clamp_(0, len(self.entries) - 1)
        return table[index]


def read(item: Dataset, *, signed: bool, big_endian: bool) -> LookupTable:
    """The table of one item of a LUT sequence.

    Source: PS3.3 C.11.1.1.1 (LUT Descriptor: entries, 0 meaning 65536; first value mapped; bits)
    and C.11.1.1.2 (LUT Data: US values or words, 8-bit entries possibly packed in pairs).

    Parameters
    ----------
    item : Dataset
        Of ``ModalityLUTSequence`` or ``VOILUTSequence``.
    signed : bool
        Whether the table's input is signed: the first value mapped is then a signed number, also
        where the writer gave it as unsigned.
    big_endian : bool
        Byte order of the data set, for LUT Data kept as words.

    Raises
    ------
    DecodeError
        A descriptor that the standard does not allow, or data of another length than it says.
    """
    descriptor = numbers(item, "LUTDescriptor")
    if descriptor is None or len(descriptor) != 3:
        raise DecodeError("LUTDescriptor: three values wanted")
    count, first, bits = (int(value) for value in descriptor)
    count = count or 65536
    if not 1 <= count <= 65536 or not 8 <= bits <= 16:
        raise DecodeError(f"LUTDescriptor: {count} entries of {bits} bits; 8 to 16 bits wanted")
    if signed and first >= 32768:
        first -= 65536
    data = item.get("LUTData")
    if isinstance(data, bytes):
        found = entries(data, count, bits, big_endian=big_endian, name="LUTData")
    else:
        values = numbers(item, "LUTData") or ()
        if len(values) != count:
            raise DecodeError(f"LUTData: {len(values)} values, LUTDescriptor says {count}")
        found = np.array(values)
    return LookupTable(first, found.astype(np.float32), bits)


def entries(data: bytes, count: int, bits: int, *, big_endian: bool, name: str) -> np.ndarray:
    """The entries of a table kept as words, or of 8-bit ones as packed pairs.

    Returns
    -------
    ndarray, (count,) unsigned integers

    Raises
    ------
    DecodeError
        `data` has another length; `name` says which attribute it is.
    """
    if len(data) == 2 * count:
        return np.frombuffer(data, dtype=">u2" if big_endian else "<u2")
    if bits == 8 and len(data) in (count, count + 1):
        packed = np.frombuffer(data, dtype=np.uint8)
        if big_endian:
            packed = packed[: len(packed) // 2 * 2].reshape(-1, 2)[:, ::-1].reshape(-1)
        return packed[:count]
    raise DecodeError(f"{name}: {len(data)} bytes for {count} entries of {bits} bits")
