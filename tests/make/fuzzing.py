"""Spoilt inputs, the corpus of those that once did harm, and how many were tried.

An input is bytes. `Fuzz.run` first replays what lies in the corpus, then draws as many as asked
for, always the same ones for one seed. An input that fails is made small by hypothesis and left in
the corpus, to be committed together with what mends it.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parents[1] / "fuzz/corpus"
#: What is put over lengths, counts and kinds: nothing, little, all, and around the sign.
_TELLING = [
    *(bytes([value]) for value in (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)),
    *(bytes.fromhex(value) for value in ("0000", "ffff", "fffe", "feff", "7fff", "ff7f", "8000")),
    *(bytes.fromhex(value) for value in ("00000000", "ffffffff", "feffffff", "7fffffff")),
    *(bytes.fromhex(value) for value in ("ffffff7f", "00000080", "fffe00e0", "feff0de0")),
    *(b"../", b"\\", b"\x1b$B", b"\r\n", b"%n", b"'\"<", b"1e999", b"NaN", b"\xc0\x80"),
]
#: Over, delete, insert, repeat, exchange, truncate.
_ACCIDENTS = "oodirxt"


class Fuzz:
    """Runs inputs and counts them.

    Attributes
    ----------
    times : int
        How many times more than in CI: FUZZ_TIMES in the environment.
    seed : int
        FUZZ_SEED in the environment; a failure with one seed comes again with it.
    tried : dict of str to int
        Inputs so far, by name.
    """

    def __init__(self) -> None:
        self.times = int(os.environ.get("FUZZ_TIMES", "1"))
        self.seed = int(os.environ.get("FUZZ_SEED", "20261123"))
        self.tried: dict[str, int] = {}

    def run(
        self,
        name: str,
        trial: Callable[[bytes], None],
        inputs: st.SearchStrategy[bytes],
        count: int,
    ) -> None:
        """Try all of the corpus and `count` inputs, `times` over; the first failure is raised."""
        self.tried.setdefault(name, 0)
        for file in sorted((CORPUS / name).iterdir()):
            self.tried[name] += 1
            trial(file.read_bytes())
        failed = b""

        @seed(self.seed)
        @settings(
            max_examples=count * self.times,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def one(data: bytes) -> None:
            nonlocal failed
            self.tried[name] += 1
            try:
                trial(data)
            except BaseException:
                failed = data
                raise

        try:
            one()
        except BaseException:
            _keep(name, failed)
            raise

    def run_many(
        self, name: str, trial: Callable[[bytes], None], wholes: Sequence[bytes], count: int
    ) -> None:
        """Try `count` of `wholes` with accidents, `times` over; the first failure is raised.

        For a door that answers faster than hypothesis draws. What fails is kept as long as it is.
        """
        for number in range(count * self.times):
            data = _spoilt_by(random.Random(f"{self.seed} {number}"), wholes)
            self.tried[name] = self.tried.get(name, 0) + 1
            try:
                trial(data)
            except BaseException:
                _keep(name, data)
                raise


def _keep(name: str, data: bytes) -> None:
    digest = hashlib.sha256(data).hexdigest()[:16]
    (CORPUS / name / digest).write_bytes(data)


@st.composite
def spoilt(draw: st.DrawFn, wholes: Sequence[bytes], most: int = 6) -> bytes:
    """One of `wholes` after up to `most` accidents: bytes changed, lost, doubled or put in."""
    data = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.one_of(st.integers(1, 8), st.integers(1, max(1, len(data)))))
        kind = draw(st.sampled_from(_ACCIDENTS))
        put = b""
        if kind == "o":
            put = draw(st.sampled_from(_TELLING))
        elif kind == "i":
            put = draw(st.one_of(st.binary(max_size=12), st.sampled_from(_TELLING)))
        elif kind == "r":
            put = bytes(data[at : at + length]) * draw(st.integers(1, 3))
        elif kind == "x":
            other = draw(st.sampled_from(wholes))
            start = draw(st.integers(0, len(other)))
            put = other[start : start + length]
        _spoil(data, kind, at, length, put)
    return bytes(data)


def _spoilt_by(rng: random.Random, wholes: Sequence[bytes]) -> bytes:
    """As `spoilt`, at least once, and drawn without hypothesis."""
    data = bytearray(rng.choice(wholes))
    for _ in range(rng.randint(1, 6)):
        at = rng.randint(0, len(data))
        length = rng.randint(1, rng.choice((8, max(1, len(data)))))
        kind = rng.choice(_ACCIDENTS)
        put = rng.choice(_TELLING)
        if kind == "i" and rng.random() < 0.5:
            put = rng.randbytes(rng.randint(1, 12))
        elif kind == "r":
            put = bytes(data[at : at + length]) * rng.randint(1, 3)
        elif kind == "x":
            other = rng.choice(wholes)
            start = rng.randint(0, len(other))
            put = other[start : start + length]
        _spoil(data, kind, at, length, put)
    return bytes(data)


def _spoil(data: bytearray, kind: str, at: int, length: int, put: bytes) -> None:
    if kind == "o":
        data[at : at + len(put)] = put
    elif kind == "d":
        del data[at : at + length]
    elif kind in "ir":
        data[at:at] = put
    elif kind == "x":
        data[at : at + length] = put
    else:
        del data[max(at, 1) :]
