"""Deflated data sets (PS3.5 A.5), inflated within a bound: a thousand times is easily claimed."""

from __future__ import annotations

import zlib

#: The longest inflated data set. Images that anybody deflates are small; this is 1000 CT slices.
MAX_INFLATED_BYTES = 512 * 1024**2


def inflate(deflated: bytes | memoryview, limit_bytes: int = MAX_INFLATED_BYTES) -> bytes:
    """The data set in Explicit VR Little Endian.

    Parameters
    ----------
    deflated : bytes or memoryview
        A raw deflate stream (RFC 1951) as it stands after the file meta information; the pad byte
        that may follow it is not looked at.
    limit_bytes : int
        At most so much, and one byte more, is ever allocated for the result.

    Raises
    ------
    zlib.error
        Damaged, cut off, or longer than the limit; the message holds nothing of the data.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(deflated, limit_bytes + 1)
    if len(inflated) > limit_bytes:
        raise zlib.error(f"it inflates to more than {limit_bytes} bytes, the limit")
    if not inflater.eof:
        raise zlib.error(f"it ends inside its stream, after {len(inflated)} inflated bytes")
    return inflated
