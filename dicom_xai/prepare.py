"""What one object alone gives away: prepared as it arrives, so that a ready unit finds it done.

Torch and highdicom stay out: this runs in processes that only decode, one object at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from dicom_xai.decode.pixels import DECODED_BYTES_LIMIT, Decoded, decode


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Everything about one object that needs no other one.

    Attributes
    ----------
    decoded : Decoded
        Its frames as stored.
    """

    decoded: Decoded


def prepare(data: bytes, *, limit_bytes: int = DECODED_BYTES_LIMIT) -> Prepared:
    """Prepare one object.

    Parameters
    ----------
    data : bytes
        The file as stored (PS3.10).
    limit_bytes : int
        Largest size of all frames together as float32.

    Raises
    ------
    StudyError
        It cannot be decoded or described; the unit it belongs to is not retried.
    """
    return Prepared(decode(data, limit_bytes=limit_bytes))
