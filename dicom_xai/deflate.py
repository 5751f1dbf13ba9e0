"""Deflated data sets (PS3.5 A.5), inflated within a bound: a thousand times is easily claimed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

#: The longest inflated data set. Images that anybody deflates are small; this is 1000 CT slices.
MAX_INFLATED_BYTES = 512 * 1024**2
#: `inflated` takes and gives no more at once.
_FED_BYTES, _PART_BYTES = 65_536, 1_048_576


def inflate(deflated: bytes | memoryview, limit_bytes: int = MAX_INFLATED_BYTES) -> bytes:
    """The data set in Explicit VR Little Endian, as `inflated` gives it, in one piece."""
    return b"".join(inflated(deflated, limit_bytes))


def inflated(
    deflated: bytes | memoryview, limit_bytes: int = MAX_INFLATED_BYTES
) -> Iterator[bytes]:
    """The data set in Explicit VR Little Endian, part by part.

    Parameters
    ----------
    deflated : bytes or memoryview
        A raw deflate stream (RFC 1951) as it stands after the file meta information; the pad byte
        that may follow it is not looked at.
    limit_bytes : int
        At most so much, and one byte more, is ever inflated.

    Raises
    ------
    zlib.error
        Damaged, cut off, or longer than the limit; the message holds nothing of the data.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    rest, at, size = b"", 0, 0
    while not inflater.eof:
        fed = rest or bytes(deflated[at : at + _FED_BYTES])
        at += 0 if rest else len(fed)
        part = inflater.decompress(fed, min(_PART_BYTES, limit_bytes + 1 - size))
        rest = inflater.unconsumed_tail
        size += len(part)
        if size > limit_bytes:
            raise zlib.error(f"it inflates to more than {limit_bytes} bytes, the limit")
        if not part and not fed:
            raise zlib.error(f"it ends inside its stream, after {size} inflated bytes")
        yield part
