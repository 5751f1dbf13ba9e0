"""Phantoms as samples: the same for a seed, and lesions where the image shows them."""

from __future__ import annotations

import numpy as np
import torch

from dicom_xai.demo.samples import _cover, _samples_of_one
from dicom_xai.demo.tasks import TASKS, Task
from dicom_xai.study import Geometry, Volume
from tests.make.images import a_frame


def test_the_cover_of_a_cell_takes_the_way_of_the_image() -> None:
    mask = np.zeros((1, 64, 32), dtype=bool)
    mask[0, :32] = True
    spec = TASKS["cxr"].spec.model_copy(update={"size": (64, 64)})
    volume = Volume((a_frame(np.zeros((64, 32))),), Geometry())
    cover = _cover(volume, mask, spec, (8, 8))
    assert cover.shape == (8, 8)
    np.testing.assert_array_equal(cover[:4, 2:6], 1)
    assert cover.sum() == 16


def test_the_cover_of_a_volume_lies_where_the_lesion_does() -> None:
    task = TASKS["ct-3d"]
    (sample,) = _samples_of_one(task, 3, True, bleeding_index(task))
    assert sample.image.shape == (1, 32, 96, 96)
    assert sample.cover.shape == (1, 16, 24, 24)
    truth = torch.from_numpy(sample.truth[0])
    first, last = sample.placements[0], sample.placements[-1]
    centre = np.argwhere(truth.numpy()).mean(axis=0)
    part = centre[0] / (len(truth) - 1)
    origin = np.array(first.origin) * (1 - part) + np.array(last.origin) * part
    place = origin + centre[1] * np.array(first.per_row) + centre[2] * np.array(first.per_column)
    cells = np.indices(sample.cover.shape[1:]) + 0.5
    found = (cells * sample.cover[0]).sum(axis=(1, 2, 3)) / sample.cover.sum()
    # a tenth of a cell: the mask's border falls between slices and cells
    np.testing.assert_allclose(found, place / (2, 4, 4), atol=0.1)


def bleeding_index(task: Task) -> int:
    """The number of a phantom with a lesion, from the seed of these tests."""
    for index in range(20):
        rng = np.random.default_rng([3, index])
        rng.integers(24, 41)
        if rng.random() < 0.5:
            return index
    raise AssertionError(task.name)


def test_the_same_seed_makes_the_same_samples() -> None:
    task = TASKS["ct-head"]
    one, other = (_samples_of_one(task, 3, False, 5) for _ in range(2))
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.cover, second.cover)
