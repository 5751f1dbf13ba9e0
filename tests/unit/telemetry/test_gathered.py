"""Counting what comes in floods."""

from __future__ import annotations

from dicom_xai.telemetry import Gathered
from dicom_xai.telemetry.gathered import MOST_KINDS


def test_kinds_are_counted_until_they_are_taken() -> None:
    gathered: Gathered[str] = Gathered(lambda _: "rest")
    assert not gathered
    assert [gathered.add(kind) for kind in "aba"] == [("a", 1), ("b", 1), ("a", 2)]
    assert gathered
    assert list(gathered.take().items()) == [("a", 2), ("b", 1)]
    assert gathered.add("a") == ("a", 1)


def test_above_so_many_kinds_new_ones_share_the_rest_and_known_ones_go_on() -> None:
    gathered: Gathered[int] = Gathered(lambda _: -1)
    for kind in range(1_000):
        gathered.add(kind)
    assert gathered.add(0) == (0, 2)
    taken = gathered.take()
    assert len(taken) == MOST_KINDS + 1
    assert taken[-1] == 1_000 - MOST_KINDS
    assert taken.total() == 1_001
