"""Slices anywhere in the patient onto a model's grid, and exactly where they lie on it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from dicom_xai.config import Grid, ModelInput, Windowing, WindowSource
from dicom_xai.decode.normalize import model_inputs
from dicom_xai.errors import ModelInputError
from dicom_xai.study import Inputs, Volume
from tests.make.volumes import Array, a_stack, trilinear, turned

#: Of a ramp through the patient, a unit of value per mm.
GRADIENT = np.array([1.3, -0.7, 2.1])
WINDOW = 2000.0
EVEN = [2.5 * n for n in range(12)]


def ramp(places: Array) -> Array:
    return np.asarray(places @ GRADIENT)


def a_spec(
    size: tuple[int, int, int] = (10, 9, 8),
    spacing_mm: tuple[float, float, float] = (2.0, 2.0, 2.0),
    orientation: str = "SPL",
    align: tuple[str, str, str] = ("center", "center", "center"),
    **changes: object,
) -> ModelInput:
    grid = Grid.model_validate(
        {"spacing_mm": spacing_mm, "orientation": orientation, "align": align}
    )
    given: dict[str, object] = {
        "name": "image",
        "kind": "volume3d",
        "size": size,
        "grid": grid,
        "windowing": Windowing(source=WindowSource.FIXED, center=0, width=WINDOW),
    }
    return ModelInput.model_validate({**given, **changes})


def test_a_volume_gives_way_after_each_batch_of_slices() -> None:
    given: list[int] = []
    model_inputs(a_stack(ramp, turn=np.eye(3), heights=EVEN), a_spec(), lambda: given.append(1))
    assert len(given) == 2  # of 8 and 4


def values_of(inputs: Inputs) -> Array:
    """What the grid holds, in the unit of the source."""
    return (inputs.images[0, 0].double().numpy() - 0.5) * WINDOW


def places_of(volume: Volume, inputs: Inputs) -> Array:
    """Patient coordinates of the grid's cells, from the placements alone.

    A slice's placement takes pixels to the grid; first and last of them invert to the patient.
    """
    geometry, first = volume.geometry, inputs.placements[0]
    row_mm, column_mm = geometry.pixel_spacing_mm
    u, v = np.array(geometry.orientation[:3]), np.array(geometry.orientation[3:])
    origins = np.array(geometry.origins_mm)
    between = np.array(inputs.placements[-1].origin) - np.array(first.origin)
    onto = np.stack([first.per_column, first.per_row, between], axis=1)
    steps = np.stack([u * column_mm, v * row_mm, origins[-1] - origins[0]], axis=1)
    to_patient = steps @ np.linalg.inv(onto)
    cells = np.stack(np.meshgrid(*map(range, first.input_size), indexing="ij"), -1) + 0.5
    return np.asarray((cells - first.origin) @ to_patient.T + origins[0])


STACKS = {
    "axial": {"turn": np.eye(3), "heights": EVEN},
    "reversed": {"turn": np.eye(3), "heights": EVEN[::-1]},
    "coronal": {"turn": turned(np.pi / 2, 0, 0), "heights": EVEN},
    "feet first": {"turn": np.diag([-1.0, 1.0, -1.0]), "heights": EVEN},
    "oblique": {"turn": turned(0.3, 0.2, -0.4), "heights": EVEN[::-1]},
    "tilted": {"turn": turned(0.2, 0, 0), "heights": EVEN, "tilt": np.tan(0.2)},
    "uneven": {"turn": turned(0.1, 0, 0), "heights": [0, 2.5, 5, 11, 12, 13, 15.5, 18, 20, 27]},
}


@pytest.mark.parametrize("orientation", ["SPL", "RAS", "PIR", "source"])
@pytest.mark.parametrize("name", list(STACKS))
def test_a_ramp_through_the_patient_is_that_ramp_on_the_grid(name: str, orientation: str) -> None:
    volume = a_stack(ramp, **STACKS[name])
    inputs = model_inputs(volume, a_spec((6, 7, 5), (1.2, 0.9, 1.1), orientation))
    assert inputs.inside.all()
    # float32 values up to 100 in a window of 2000
    np.testing.assert_allclose(values_of(inputs), ramp(places_of(volume, inputs)), atol=2e-3)


@pytest.mark.parametrize("orientation", ["SPL", "source"])
@pytest.mark.parametrize("name", list(STACKS))
def test_a_ramp_stays_that_ramp_where_slices_are_shrunk(name: str, orientation: str) -> None:
    wide = {"shape": (60, 48), **STACKS[name]}
    volume = a_stack(ramp, **wide)
    inputs = model_inputs(volume, a_spec((4, 6, 5), (4.1, 3.7, 5.3), orientation))
    expected = ramp(places_of(volume, inputs))
    # half a shrunk voxel from the border there is nothing more to average: ends are held there
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(values_of(inputs)[inner], expected[inner], atol=2e-3)


def test_values_between_slices_are_what_trilinear_interpolation_gives() -> None:
    """Against the definition, on noise; the affine of an oblique stack is inverted in the test."""
    rng = np.random.default_rng(4)
    turn = turned(0.3, -0.5, 0.2)
    volume = a_stack(lambda p: rng.uniform(-900, 900, p.shape[:-1]), turn=turn, heights=EVEN)
    inputs = model_inputs(volume, a_spec((5, 6, 7), (1.0, 0.9, 0.95), "RAS"))
    source = torch.stack([frame.values for frame in volume.frames]).double().numpy()
    offset = places_of(volume, inputs) - np.array(volume.geometry.origins_mm[0])
    at = np.stack(
        [offset @ turn[:, 2] / 2.5, offset @ turn[:, 1] / 1.0, offset @ turn[:, 0] / 1.25], -1
    )
    # places are float32 in grid_sample: 1e-5 of a voxel, times steps of up to 1800
    np.testing.assert_allclose(values_of(inputs), trilinear(source, at), atol=0.05)


def test_placements_follow_the_standard_s_equation() -> None:
    """PS3.3 C.7.6.2.1.1, with the grid's affine worked out by hand for an axial stack."""
    volume = a_stack(ramp, turn=np.eye(3), heights=EVEN)
    inputs = model_inputs(volume, a_spec((10, 9, 8), (2.0, 2.0, 2.0), "SPL"))
    # voxels reach from 5.75 to 35.75 mm in z, 4.5 to 24.5 in y, -10.625 to 9.375 in x
    corner = np.array([20.75 - 10, 14.5 - 9, -0.625 - 8])
    for index, placement in enumerate(inputs.placements):
        origin = np.array(volume.geometry.origins_mm[index])[::-1]
        np.testing.assert_allclose(placement.origin, (origin - corner) / 2, atol=1e-9)
        np.testing.assert_allclose(placement.per_row, (0, 0.5, 0), atol=1e-12)
        np.testing.assert_allclose(placement.per_column, (0, 0, 0.625), atol=1e-12)


def test_letters_say_where_each_axis_grows() -> None:
    volume = a_stack(ramp, turn=np.eye(3), heights=EVEN)
    straight = model_inputs(volume, a_spec((10, 9, 8), orientation="SPL")).images[0, 0]
    flipped = model_inputs(volume, a_spec((8, 9, 10), orientation="RAI")).images[0, 0]
    torch.testing.assert_close(straight.flip(0, 1, 2).permute(2, 1, 0), flipped, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("align", "first"), [("start", 0.0), ("end", 10.0), ("center", 5.0)])
def test_what_sticks_out_is_cropped_as_the_card_aligns(align: str, first: float) -> None:
    volume = a_stack(lambda p: p[..., 2], turn=np.eye(3), heights=EVEN)
    inputs = model_inputs(volume, a_spec((10, 9, 8), align=(align, "center", "center")))
    lowest = 7 - 1.25 + first + 1  # the stack's lower face, half a cell in
    assert places_of(volume, inputs)[0, 0, 0, 2] == pytest.approx(lowest)
    assert inputs.inside.all()


def test_cells_beyond_the_source_hold_the_lowest_value_and_are_not_inside() -> None:
    volume = a_stack(lambda p: np.full(p.shape[:-1], 1e6), turn=np.eye(3), heights=EVEN)
    inputs = model_inputs(volume, a_spec((31, 30, 30), scaling=(-1.0, 1.0)))
    inside = inputs.inside[0]
    assert (inputs.images[0, 0][~inside] == -1).all()
    assert inputs.images[0, 0][inside].min() > 1 - 1e-5  # float32
    # 30 mm of slices, 20 rows of 1 mm and 16 columns of 1.25 mm, in cells of 2 mm
    assert inside.sum() == 15 * 10 * 10
    assert inputs.cell_ml == pytest.approx(0.008)


def test_padding_holds_the_lowest_value() -> None:
    volume = a_stack(lambda p: np.full(p.shape[:-1], 1e6), turn=np.eye(3), heights=EVEN)
    valid = torch.ones((20, 16), dtype=torch.bool)
    valid[:10] = False
    frames = tuple(replace(frame, make_valid=lambda: valid) for frame in volume.frames)
    inputs = model_inputs(replace(volume, frames=frames), a_spec((4, 10, 4), (1, 1, 1)))
    assert (inputs.images[0, 0, :, :4] == 0).all()
    assert (inputs.images[0, 0, :, -4:] == 1).all()


def test_shrinking_averages_instead_of_skipping() -> None:
    """Of checks one voxel wide a grid six times as coarse sees next to nothing."""
    checks = np.indices((60, 60)).sum(axis=0)
    number = iter(range(60))
    volume = a_stack(
        lambda p: ((checks + next(number)) % 2 - 0.5) * WINDOW,
        turn=np.eye(3),
        heights=[float(n) for n in range(60)],
        shape=(60, 60),
        spacing=(1.0, 1.0),
    )
    inputs = model_inputs(volume, a_spec((6, 6, 6), (6.0, 6.0, 6.0)))
    assert (inputs.images - 0.5).abs().max() < 0.02


def test_a_volume_shares_one_window_over_all_slices() -> None:
    percentile = Windowing(source=WindowSource.PERCENTILE, low_percentile=0, high_percentile=100)
    volume = a_stack(lambda p: p[..., 2], turn=np.eye(3), heights=EVEN)
    inputs = model_inputs(volume, a_spec((12, 4, 4), (2.5, 1, 1), windowing=percentile))
    along = inputs.images[0, 0, :, 2, 2].tolist()
    assert along == pytest.approx([n / 11 for n in range(12)], abs=1e-5)
    assert all(low < high for low, high in pairwise(along))


def test_one_slice_is_no_volume() -> None:
    with pytest.raises(ModelInputError, match=r"1 slice.*at least 2"):
        model_inputs(a_stack(ramp, turn=np.eye(3), heights=[0.0]), a_spec())


def test_a_volume_without_pixel_spacing_is_refused() -> None:
    volume = a_stack(ramp, turn=np.eye(3), heights=EVEN)
    bare = replace(volume, geometry=replace(volume.geometry, pixel_spacing_mm=None))
    with pytest.raises(ModelInputError, match="PixelSpacing is missing"):
        model_inputs(bare, a_spec())


def test_a_volume_is_not_changed_by_being_resampled() -> None:
    volume = a_stack(ramp, turn=np.eye(3), heights=EVEN)
    before = [frame.values.clone() for frame in volume.frames]
    model_inputs(volume, a_spec())
    for frame, values in zip(volume.frames, before, strict=True):
        assert torch.equal(frame.values, values)
