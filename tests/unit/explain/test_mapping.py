"""Maps from the model's grid onto the source's pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from dicom_xai.errors import InvariantError
from dicom_xai.explain.mapping import frame_amounts, frame_peaks, to_source
from dicom_xai.study import Placement, VolumePlacement
from tests.make.volumes import trilinear, turned


def mapped(heat: torch.Tensor, placement: Placement) -> torch.Tensor:
    (one,) = to_source(heat[None], (placement,), [0])
    return one


@pytest.mark.parametrize("source", [(64, 64), (100, 40), (17, 33)])
def test_a_stretched_map_equals_torchs_bilinear_interpolation(source):
    heat = torch.rand((5, 7), generator=torch.Generator().manual_seed(0))
    placement = Placement(source, (80, 56), (80 / source[0], 56 / source[1]))
    expected = functional.interpolate(heat[None, None], source, mode="bilinear")[0, 0]
    # float32 rounding of two matrix products
    assert torch.allclose(mapped(heat, placement), expected, atol=1e-5)


def test_a_letterboxed_source_sees_the_middle_of_the_map():
    # a 40 x 80 source on an 80 x 80 grid: rows 20 to 60 of the grid are image
    placement = Placement((40, 80), (80, 80), (1.0, 1.0), (20.0, 0.0))
    heat = torch.zeros((8, 8))
    heat[4, 2] = 1.0  # grid rows 40 to 50, columns 20 to 30; centre (45, 25)
    seen = mapped(heat, placement)
    assert seen.shape == (40, 80)
    assert np.unravel_index(int(seen.argmax()), seen.shape) in [
        (24, 24),
        (24, 25),
        (25, 24),
        (25, 25),
    ]


def test_interpolation_never_exceeds_the_maps_own_maximum():
    heat = torch.rand((6, 6), generator=torch.Generator().manual_seed(1))
    seen = mapped(heat, Placement((123, 77), (48, 48), (48 / 123, 48 / 77)))
    assert float(seen.max()) <= float(heat.max()) + 1e-6


def test_outside_the_input_grid_there_is_no_heat():
    placement = Placement((30, 30), (10, 10), (1.0, 1.0), (-10.0, -10.0))
    seen = mapped(torch.ones((5, 5)), placement)
    assert seen[10:20, 10:20].min() == 1
    assert seen.sum() == 100


def test_frames_are_mapped_together_as_each_is_alone() -> None:
    heat = torch.rand((4, 6, 5), generator=torch.Generator().manual_seed(2))
    placements = tuple(
        Placement((30, 20), (12, 10), (0.4 * zoom, 0.5), (shift, 0.0))
        for zoom, shift in ((1, 0), (0.8, 1), (1, 0), (0.5, 2))
    )
    together = to_source(heat, placements, [3, 0, 2])
    assert together.shape == (3, 30, 20)
    for picture, index in zip(together, (3, 0, 2), strict=True):
        torch.testing.assert_close(picture, mapped(heat[index], placements[index]))


def test_frames_of_several_sizes_are_not_mapped_together() -> None:
    placements = (Placement((8, 8), (8, 8)), Placement((9, 8), (8, 8)))
    with pytest.raises(InvariantError, match="several sizes"):
        to_source(torch.zeros((2, 4, 4)), placements, [0, 1])


def test_peaks_of_images_are_their_maps_own() -> None:
    heat = torch.tensor([[[0.1, 0.7]], [[-0.5, -0.2]]])
    peaks = frame_peaks(heat, (Placement((8, 8), (8, 8)),) * 2)
    assert peaks == pytest.approx((0.7, -0.2))


def frames_of(affine: np.ndarray, count: int, drift: tuple[float, float, float]) -> tuple:
    """Slices that an affine takes to the grid, and each a drift further than the one before."""
    return tuple(
        VolumePlacement(
            (13, 17),
            (10, 12, 14),
            tuple(affine[:, 3] + n * (affine[:, 0] + drift)),
            tuple(affine[:, 1]),
            tuple(affine[:, 2]),
        )
        for n in range(count)
    )


CASES = {
    "axes": (np.eye(3), np.array([0.9, 0.8, 0.7])),
    "reversed": (np.diag([-1.0, 1.0, -1.0]), np.array([0.9, 0.8, 0.7])),
    "permuted": (np.eye(3)[[2, 0, 1]], np.array([0.5, 0.7, 0.9])),
    "swapped in the plane": (np.eye(3)[[0, 2, 1]], np.array([0.9, 0.6, 0.5])),
    "oblique": (turned(0.3, -0.4, 0.2), np.array([0.8, 0.6, 0.7])),
    "far out": (turned(1.2, 0.9, -0.7), np.array([1.4, 1.1, 1.2])),
}


@pytest.mark.parametrize("drift", [(0.0, 0.0, 0.0), (0.05, -0.2, 0.1)])
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("cells", [(10, 12, 14), (5, 3, 7)])
def test_a_volume_is_mapped_back_voxel_by_voxel_as_the_affine_says(
    name: str, drift: tuple[float, float, float], cells: tuple[int, int, int]
) -> None:
    turn, steps = CASES[name]
    linear = turn * steps
    start = np.array([5.0, 6.0, 7.0]) - linear @ np.array([3.0, 6.0, 8.0])
    placements = frames_of(np.column_stack([linear, start]), 7, drift)
    heat = torch.rand(cells, generator=torch.Generator().manual_seed(3))
    found = to_source(heat, placements, range(7)).numpy()

    index = np.stack(np.meshgrid(range(7), range(13), range(17), indexing="ij"), -1)
    places = index @ linear.T + start + index[..., :1] * np.array(drift)
    inside = ((places >= 0) & (places <= (10, 12, 14))).all(axis=-1)
    at = places * np.array(cells) / (10, 12, 14) - 0.5
    expected = trilinear(heat.double().numpy(), at)
    assert inside.mean() > 0.2
    # float32 sums of eight terms; grid_sample takes its places in float32
    np.testing.assert_allclose(found, expected * inside, atol=2e-5)
    peaks = np.array(frame_peaks(heat, placements))
    assert (peaks >= found.max(axis=(1, 2)) - 1e-6).all()


@pytest.mark.parametrize("name", list(CASES))
def test_amounts_are_means_over_each_frame(name: str) -> None:
    turn, steps = CASES[name]
    linear = turn * steps * (1, 13 / 260, 17 / 170)
    start = np.array([5.0, 6.0, 7.0]) - linear @ np.array([3.0, 130.0, 85.0])
    placements = tuple(
        replace(each, source_size=(260, 170))
        for each in frames_of(np.column_stack([linear, start]), 7, (0.0, 0.0, 0.0))
    )
    heat = torch.rand((10, 12, 14), generator=torch.Generator().manual_seed(3)) - 0.3
    found = to_source(heat, placements, range(7)).clamp(min=0).mean(dim=(1, 2))
    # every fourth row and second column: noise of a cell is seen at two pixels or more
    assert frame_amounts(heat, placements) == pytest.approx(found.tolist(), abs=0.02)


def test_amounts_of_images_follow_their_placements() -> None:
    heat = torch.zeros((2, 8, 8))
    heat[1, :4] = 1.0
    placements = (Placement((8, 8), (8, 8)), Placement((256, 192), (8, 8), (8 / 256, 8 / 192)))
    assert frame_amounts(heat, placements) == pytest.approx((0.0, 0.5), abs=0.01)


def test_a_slice_far_from_all_heat_has_no_peak() -> None:
    heat = torch.zeros((10, 12, 14))
    heat[9] = 1.0
    for turn in (np.eye(3), turned(0.1, 0.1, 0.0)):
        linear = turn * np.array([1.0, 0.5, 0.5])
        placements = frames_of(np.column_stack([linear, [0.5, 1.0, 1.0]]), 3, (0.0, 0.0, 0.0))
        assert frame_peaks(heat, placements)[0] == 0.0


def test_a_slice_outside_the_grid_has_neither_heat_nor_peak() -> None:
    outside = VolumePlacement((8, 8), (4, 8, 8), (-3.0, 0.5, 0.5), (0, 1, 0), (0, 0, 1))
    oblique = VolumePlacement((8, 8), (4, 8, 8), (-9.0, 0.5, 0.5), (0.3, 0.9, 0), (0, 0, 1))
    for placement in (outside, oblique):
        assert frame_peaks(torch.ones((4, 8, 8)), (placement,)) == (0.0,)
        assert to_source(torch.ones((4, 8, 8)), (placement,), [0]).sum() == 0


def test_a_cell_of_a_map_covers_pixels_of_the_source() -> None:
    flat = Placement((64, 32), (16, 16), (0.25, 0.5))
    assert flat.pixels_per_cell((8, 4)) == (8.0, 8.0)
    solid = VolumePlacement((64, 64), (8, 16, 32), (0.5, 0.5, 0.5), (0, 0.25, 0), (0, 0, 0.5))
    assert solid.pixels_per_cell((8, 8, 8)) == (8.0, 8.0)
