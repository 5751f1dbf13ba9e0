"""Batches are chosen by what they were measured to cost."""

from __future__ import annotations

import pytest

from dicom_xai.errors import DeviceBusyError
from dicom_xai.explain.costs import LONGEST_BATCH_S, Costs, measure


def costs(**runs_s: float) -> Costs:
    """By size: ``s4=0.1`` is 0.1 s for 4 images."""
    return Costs({"grad-cam": {int(name[1:]): seconds for name, seconds in runs_s.items()}})


class Device:
    """A device with a clock of its own, on which a run of n images takes `runs_s[n]`."""

    def __init__(self, runs_s: dict[int, float]) -> None:
        self._runs_s = runs_s
        self.now = 0.0
        self.sizes: list[int] = []

    def run(self, images: int) -> None:
        self.sizes.append(images)
        if images not in self._runs_s:
            raise DeviceBusyError("no memory")
        self.now += self._runs_s[images]

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("runs_s", "expected"),
    [
        ({"s1": 0.01, "s4": 0.02, "s16": 0.06, "s64": 0.2}, 64),
        ({"s1": 0.01, "s4": 0.02, "s16": 0.06, "s64": 0.3}, 16),  # too long for what is urgent
        ({"s1": 0.01, "s4": 0.04, "s16": 0.16}, 1),  # nothing gained
        ({"s1": 3.0}, 1),
    ],
)
def test_the_cheapest_batch_that_does_not_take_too_long_is_chosen(runs_s, expected):
    assert costs(**runs_s).batch_size("grad-cam") == expected


def test_seconds_count_whole_batches_and_the_rest():
    made = costs(s1=0.01, s4=0.02, s16=0.06)
    assert made.seconds("grad-cam", 32) == pytest.approx(0.12)
    assert made.seconds("grad-cam", 33) == pytest.approx(0.13)
    assert made.seconds("grad-cam", 35) == pytest.approx(0.14)  # three cost no more than four
    assert made.seconds("grad-cam", 40) == pytest.approx(0.18)  # eight no more than sixteen


def test_units_share_a_batch_only_where_that_pays():
    assert costs(s1=0.01, s4=0.02).gains_from_sharing("grad-cam")
    assert not costs(s1=0.01, s4=0.036).gains_from_sharing("grad-cam")
    assert not costs(s1=0.01).gains_from_sharing("grad-cam")


def test_sizes_are_measured_until_one_takes_too_long():
    device = Device({1: 0.1, 4: LONGEST_BATCH_S + 0.1, 16: 1.0})
    assert measure(device.run, 64, device.clock) == pytest.approx({1: 0.1, 4: 0.35})
    assert 16 not in device.sizes


def test_sizes_without_memory_are_left_out_and_one_image_must_fit():
    device = Device({1: 0.01, 4: 0.02})
    assert measure(device.run, 64, device.clock) == pytest.approx({1: 0.01, 4: 0.02})
    with pytest.raises(DeviceBusyError):
        measure(Device({}).run, 64, device.clock)
