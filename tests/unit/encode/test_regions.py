"""Maps become bits, bytes and labels: exactly, whatever is in a batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dicom_xai.config import SegmentationKind
from dicom_xai.encode import regions
from dicom_xai.encode.maps import ClassMap, MapValues, maps_of
from dicom_xai.encode.regions import Gathered
from dicom_xai.study import Explanation
from tests.make.results import as_file, case, header

GIVEN = case([as_file(header("CR", 4, 6, n + 1)) for n in range(4)], positives=3, segmenting=True)


def found(class_index: int, frames: dict[int, torch.Tensor]) -> MapValues:
    """A map with these values on these frames of a batch; threshold 0.5."""
    finding = GIVEN.explanation.findings[class_index]
    map_ = ClassMap(finding, (1, 2, 3), 0.5, True, frozenset(frames), GIVEN.probability_of)
    return MapValues(map_, tuple(frames), torch.stack(list(frames.values())))


def image(*rows: str) -> torch.Tensor:
    """Tenths, one letter each."""
    return torch.tensor([[int(letter) / 10 for letter in row] for row in rows])


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 7), (1, 1, 1), (0, 8, 8)])
def test_masks_are_packed_as_numpy_packs_them(shape):
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
    flat = masks.numpy().reshape(len(masks), shape[1] * shape[2])
    assert np.array_equal(regions.packed(masks), np.packbits(flat, axis=1, bitorder="little"))


def test_probabilities_are_rounded_to_the_nearest_byte():
    values = torch.tensor([0.0, 0.001, 0.002, 0.5, 0.998, 0.9985, 1.0])
    expected = np.around(values.numpy() * 255).astype(np.uint8)
    assert np.array_equal(regions.quantised(values), expected)
    below = torch.tensor([regions.LOWEST_FRACTION * 0.99])
    assert regions.quantised(below) == 0


def test_a_binary_frame_holds_what_reaches_the_threshold_and_empty_ones_are_left_out():
    gathered = Gathered(SegmentationKind.BINARY)
    maps = [found(0, {0: image("0450", "0000"), 1: image("0440", "0000")}), None]
    gathered.add([7, 9], maps)
    assert {key: bits.tolist() for key, bits in gathered.frames.items()} == {(0, 7): [0b100]}
    assert gathered.present == {(0, 7)}
    assert gathered.overlapping == set()


def test_overlapping_regions_are_told_frame_by_frame():
    gathered = Gathered(SegmentationKind.BINARY)
    left, right, both = image("9900"), image("0099"), image("0990")
    gathered.add([3, 4], [found(0, {0: left, 1: left}), found(1, {0: right, 1: both})])
    assert gathered.overlapping == {4}


def test_a_fractional_frame_holds_all_probabilities_and_empty_ones_are_left_out():
    gathered = Gathered(SegmentationKind.FRACTIONAL)
    gathered.add([7, 9], [found(0, {0: image("0100"), 1: image("0000")})])
    assert {key: frame.tolist() for key, frame in gathered.frames.items()} == {
        (0, 7): [[0, 26, 0, 0]]
    }


def test_a_label_is_the_strongest_at_each_pixel_and_the_first_of_equals():
    gathered = Gathered(SegmentationKind.LABELMAP)
    maps = [
        found(0, {0: image("67450")}),
        None,
        found(2, {0: image("76460"), 1: image("00009")}),
    ]
    gathered.add([5, 6], maps)
    assert {key: frame.tolist() for key, frame in gathered.frames.items()} == {
        (0, 5): [[3, 1, 0, 3, 0]],
        (0, 6): [[0, 0, 0, 0, 3]],
    }
    assert gathered.present == {(0, 5), (2, 5), (2, 6)}
    tie = Gathered(SegmentationKind.LABELMAP)
    tie.add([0], [found(0, {0: image("8")}), found(1, {0: image("8")})])
    assert tie.frames[0, 0].tolist() == [[1]]


@pytest.mark.parametrize("count", [255, 256, 300])
def test_labels_become_wider_with_more_than_255_maps(count):
    gathered = Gathered(SegmentationKind.LABELMAP)
    maps: list[MapValues | None] = [None] * (count - 2)
    gathered.add([0], [*maps, found(0, {0: image("90")}), found(1, {0: image("09")})])
    labels = gathered.frames[0, 0]
    assert labels.dtype == (np.uint8 if count <= 255 else np.uint16)
    assert labels.tolist() == [[count - 1, count]]


def maps(explanation: Explanation, lowest: float | None = None):
    return maps_of(explanation, GIVEN.heat_of, GIVEN.probability_of, lowest)


def test_a_segmenting_models_heat_is_drawn_and_its_probability_segmented():
    made = maps(GIVEN.explanation)
    assert [map_.is_probability for map_ in (*made.drawn, *made.segmented)] == [False] * 3 + [
        True
    ] * 3


@pytest.mark.parametrize("left_out", ["attribution", "region"])
def test_what_there_is_serves_for_both(left_out):
    findings = tuple(
        dataclasses.replace(finding, **{left_out: None}) for finding in GIVEN.explanation.findings
    )
    made = maps(dataclasses.replace(GIVEN.explanation, findings=findings))
    assert made.drawn == made.segmented
    assert {map_.is_probability for map_ in made.drawn} == {left_out == "attribution"}


def test_a_map_is_looked_at_where_it_can_reach_what_matters():
    finding = GIVEN.explanation.findings[0]
    assert finding.region is not None
    region = dataclasses.replace(finding.region, frame_peaks=(0.9, 0.4, 0.001, 0.5))
    explanation = dataclasses.replace(
        GIVEN.explanation, findings=(dataclasses.replace(finding, region=region),)
    )
    assert maps(explanation).segmented[0].frames == {0, 3}
    assert maps(explanation, regions.LOWEST_FRACTION).segmented[0].frames == {0, 1, 3}
