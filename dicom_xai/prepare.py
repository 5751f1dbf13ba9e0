"""What one object alone gives away: prepared as it arrives, so that a ready unit finds it done.

Torch and highdicom stay out: this runs in processes that only decode, one object at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from dicom_xai.decode.pixels import DECODED_BYTES_LIMIT, Decoded, decode
from dicom_xai.decode.planes import planes_of
from dicom_xai.encode.source import Described, describe
from dicom_xai.study import Instance, PlaneRecord


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Everything about one object that needs no other one.

    Attributes
    ----------
    decoded : Decoded
        Its frames as stored.
    described : Described
        What the results need to know of it.
    planes : tuple of PlaneRecord
        Where each of its frames lies.
    """

    decoded: Decoded
    described: Described
    planes: tuple[PlaneRecord, ...]


def prepare(instance: Instance, data: bytes, *, limit_bytes: int = DECODED_BYTES_LIMIT) -> Prepared:
    """Prepare one object.

    Parameters
    ----------
    instance : Instance
        As the ledger knows it.
    data : bytes
        The file as stored (PS3.10).
    limit_bytes : int
        Largest size of all frames together as float32.

    Raises
    ------
    StudyError
        It cannot be decoded or described; the unit it belongs to is not retried.
    """
    decoded = decode(data, limit_bytes=limit_bytes)
    header = decoded.header
    return Prepared(decoded, describe(data, header), planes_of(instance, header))
