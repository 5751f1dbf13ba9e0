"""Spoilt inputs, the corpus of those that once did harm, and how many were tried.

An input is bytes. `Fuzz.run` first replays what lies in the corpus, then draws as many as asked
for, always the same ones for one seed. An input that fails is made small by hypothesis and left in
the corpus, to be committed together with what mends it.
"""

from __future__ import annotations

import hashlib
import os
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
            digest = hashlib.sha256(failed).hexdigest()[:16]
            (CORPUS / name / digest).write_bytes(failed)
            raise


@st.composite
def spoilt(draw: st.DrawFn, wholes: Sequence[bytes], most: int = 6) -> bytes:
    """One of `wholes` after up to `most` accidents: bytes changed, lost, doubled or put in."""
    data = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.one_of(st.integers(1, 8), st.integers(1, max(1, len(data)))))
        match draw(st.sampled_from("oodirxt")):
            case "o":
                telling = draw(st.sampled_from(_TELLING))
                data[at : at + len(telling)] = telling
            case "d":
                del data[at : at + length]
            case "i":
                data[at:at] = draw(st.one_of(st.binary(max_size=12), st.sampled_from(_TELLING)))
            case "r":
                data[at:at] = data[at : at + length] * draw(st.integers(1, 3))
            case "x":
                other = draw(st.sampled_from(wholes))
                start = draw(st.integers(0, len(other)))
                data[at : at + length] = other[start : start + length]
            case "t":
                del data[max(at, 1) :]
    return bytes(data)
