"""Inflating stops at its limit, whatever a stream claims."""

from __future__ import annotations

import tracemalloc
import zlib

import pytest

from dicom_xai.deflate import inflate


def deflated(data: bytes) -> bytes:
    return zlib.compress(data, 9, -zlib.MAX_WBITS)


def test_a_stream_gives_its_bytes_whatever_pads_it() -> None:
    assert inflate(deflated(b"abc" * 100)) == b"abc" * 100
    assert inflate(deflated(b"abc") + b"\0") == b"abc"


def test_the_limit_is_a_length_that_is_still_taken() -> None:
    assert len(inflate(deflated(bytes(1000)), 1000)) == 1000
    with pytest.raises(zlib.error, match="inflates to more than 999 bytes"):
        inflate(deflated(bytes(1000)), 999)


def test_a_bomb_costs_its_limit_and_not_its_claim() -> None:
    bomb = deflated(bytes(200_000_000))
    tracemalloc.start()
    with pytest.raises(zlib.error, match="inflates to more than 1000000 bytes"):
        inflate(bomb, 1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000  # zlib's own blocks, joined: twice the limit, and its window


def test_a_cut_or_damaged_stream_is_refused() -> None:
    whole = deflated(bytes(range(256)) * 10)
    for length in range(len(whole)):
        with pytest.raises(zlib.error):
            inflate(whole[:length])
    with pytest.raises(zlib.error):
        inflate(b"\xff" * 50)
