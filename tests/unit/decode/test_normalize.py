"""What a model of images or slices is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dicom_xai.config import InputKind, ModelInput, ResizeRule, Windowing, WindowSource
from dicom_xai.decode.normalize import model_inputs
from dicom_xai.errors import ModelInputError
from dicom_xai.study import Frame, Geometry, Inputs, Placement, Volume
from tests.make.images import a_frame

RAMP = np.linspace(-100, 200, 64 * 64, dtype=np.float32).reshape(64, 64)
PERCENTILE = Windowing(source=WindowSource.PERCENTILE, low_percentile=0, high_percentile=100)


def inputs_of(spec: ModelInput, *frames: Frame, geometry: Geometry = Geometry()) -> Inputs:  # noqa: B008
    return model_inputs(Volume(frames, geometry), spec)


def to_model_input(frame: Frame, spec: ModelInput) -> tuple[torch.Tensor, Placement]:
    """One frame on the model's grid, ``(1, rows, columns)``."""
    inputs = inputs_of(spec, frame)
    return inputs.images[0], inputs.placements[0]


def an_input(**changes: object) -> ModelInput:
    given: dict[str, object] = {
        "name": "image",
        "kind": InputKind.IMAGE2D,
        "size": (64, 64),
        "windowing": PERCENTILE,
    }
    return ModelInput.model_validate({**given, **changes})


def test_a_fixed_window_is_in_modality_units() -> None:
    spec = an_input(windowing=Windowing(source=WindowSource.FIXED, center=40, width=80))
    image, _ = to_model_input(a_frame(RAMP), spec)
    np.testing.assert_allclose(image[0].numpy(), np.clip(RAMP / 80, 0, 1), atol=1e-6)


def test_scaling_gives_the_ends_of_the_window_their_values() -> None:
    image, _ = to_model_input(a_frame(RAMP), an_input(scaling=(-1, 1)))
    assert image.shape == (1, 64, 64)
    assert image.dtype is torch.float32
    assert (image.min(), image.max()) == (-1, 1)


@pytest.mark.parametrize("wanted", ["MONOCHROME1", "MONOCHROME2"])
def test_the_model_sees_the_same_whatever_the_source_s_photometric(wanted: str) -> None:
    spec = an_input(photometric=wanted)
    plain, _ = to_model_input(a_frame(RAMP), spec)
    inverted, _ = to_model_input(a_frame(-RAMP, PhotometricInterpretation="MONOCHROME1"), spec)
    torch.testing.assert_close(plain, inverted, atol=1e-6, rtol=0)
    assert bool(plain[0, -1, -1] == 1) is (wanted == "MONOCHROME2")


def test_a_letterbox_keeps_the_aspect_and_fills_with_the_lowest_value() -> None:
    frame = a_frame(np.full((100, 50), 3.0) + np.eye(100, 50))
    image, placement = to_model_input(frame, an_input(scaling=(-1, 1)))
    assert placement.scale == (0.64, 0.64)
    assert placement.offset == (0.0, 16.0)
    assert (placement.source_size, placement.input_size) == ((100, 50), (64, 64))
    assert (image[0, :, :16] == -1).all()
    assert (image[0, :, 48:] == -1).all()


def test_a_stretch_fills_the_grid() -> None:
    _, placement = to_model_input(a_frame(RAMP[:32]), an_input(resize=ResizeRule.STRETCH))
    assert placement.scale == (2.0, 1.0)
    assert placement.offset == (0.0, 0.0)


@pytest.mark.parametrize("rule", list(ResizeRule))
@pytest.mark.parametrize("shape", [(301, 200), (200, 333), (640, 640), (50, 40)])
def test_a_placement_says_where_a_source_pixel_went(
    rule: ResizeRule, shape: tuple[int, int]
) -> None:
    rows, columns = np.indices(shape, dtype=np.float32) + 0.5
    at = (0.3 * shape[0], 0.8 * shape[1])
    blob = np.exp(-(((rows - at[0]) / shape[0]) ** 2 + ((columns - at[1]) / shape[1]) ** 2) / 0.005)
    image, placement = to_model_input(a_frame(blob), an_input(resize=rule))
    weight = image[0].numpy().astype(np.float64)
    grid = np.indices(weight.shape) + 0.5
    found = [float((weight * axis).sum() / weight.sum()) for axis in grid]
    expected = [
        a * scale + offset
        for a, scale, offset in zip(at, placement.scale, placement.offset, strict=True)
    ]
    # a tenth of an input pixel: resampling and the blob's cut-off tails
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_shrinking_averages_instead_of_skipping() -> None:
    checks = np.indices((256, 256)).sum(axis=0) % 2
    image, _ = to_model_input(a_frame(checks), an_input())
    inner = image[0, 4:-4, 4:-4]
    assert (inner - 0.5).abs().max() < 0.02  # a triangle filter leaves almost nothing of it


def test_padding_holds_the_lowest_value() -> None:
    valid = np.ones(RAMP.shape, dtype=bool)
    valid[:, :20] = False
    frame = a_frame(RAMP, valid=valid, PhotometricInterpretation="MONOCHROME1")
    image, _ = to_model_input(frame, an_input(scaling=(-1, 1)))
    assert (image[0, :, :20] == -1).all()


def test_frames_of_several_sizes_are_placed_one_by_one() -> None:
    frames = (a_frame(RAMP), a_frame(RAMP[:32]), a_frame(RAMP))
    inputs = inputs_of(an_input(), *frames)
    assert inputs.images.shape == (3, 1, 64, 64)
    assert [each.source_size for each in inputs.placements] == [(64, 64), (32, 64), (64, 64)]
    for frame, image in zip(frames, inputs.images, strict=True):
        assert torch.equal(image, to_model_input(frame, an_input())[0])


@pytest.mark.parametrize("source", list(WindowSource))
def test_a_long_stack_is_prepared_as_each_of_its_slices_is_alone(source: WindowSource) -> None:
    spec = an_input(
        kind=InputKind.SLICES,
        size=(40, 30),
        windowing=Windowing(source=source, center=40, width=90),
        scaling=(-1, 1),
    )
    frames = [
        a_frame(RAMP + n, WindowCenter=str(n), WindowWidth="100", PhotometricInterpretation=p)
        for n, p in zip(range(37), ["MONOCHROME2", "MONOCHROME1", "MONOCHROME2"] * 13)  # noqa: B905
    ]
    together = inputs_of(spec, *frames).images
    alone = torch.stack([to_model_input(frame, spec)[0] for frame in frames])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)  # kernels block differently


def test_the_margins_of_a_letterbox_are_outside() -> None:
    inputs = inputs_of(an_input(), a_frame(np.ones((100, 50))))
    assert inputs.inside.shape == (1, 64, 64)
    assert inputs.inside[0, :, 16:48].all()
    assert inputs.inside.sum() == 64 * 32


def test_a_cell_is_a_volume_where_spacings_are_known() -> None:
    spaced = Geometry(pixel_spacing_mm=(0.5, 0.25), slice_spacing_mm=4.0)
    spec = an_input(size=(32, 16), resize=ResizeRule.STRETCH)
    inputs = inputs_of(spec, a_frame(RAMP), geometry=spaced)
    assert inputs.cell_ml == pytest.approx(1.0 * 1.0 * 4.0 / 1000)
    assert inputs_of(spec, a_frame(RAMP)).cell_ml is None


def test_neighbours_are_channels_and_ends_are_repeated() -> None:
    fixed = Windowing(source=WindowSource.FIXED, center=2, width=4)
    spec = an_input(kind=InputKind.SLICES, neighbours=2, size=(4, 4), windowing=fixed)
    inputs = inputs_of(spec, *(a_frame(np.full((4, 4), n)) for n in range(4)))
    assert inputs.images.shape == (4, 5, 4, 4)
    assert (inputs.images[:, :, 0, 0] * 4).tolist() == [
        [0, 0, 0, 1, 2],
        [0, 0, 1, 2, 3],
        [0, 1, 2, 3, 3],
        [1, 2, 3, 3, 3],
    ]


def test_neighbours_are_views_of_a_stack_that_is_there_once() -> None:
    spec = an_input(kind=InputKind.SLICES, neighbours=2, size=(8, 8))
    images = inputs_of(spec, *(a_frame(RAMP + n) for n in range(30))).images
    assert images.untyped_storage().nbytes() == (30 + 2 * 2) * 8 * 8 * 4


def test_slices_of_several_sizes_have_no_neighbours() -> None:
    spec = an_input(kind=InputKind.SLICES, neighbours=1)
    with pytest.raises(ModelInputError, match="several sizes have no neighbours"):
        inputs_of(spec, a_frame(RAMP), a_frame(RAMP[:32]))


def test_a_long_stack_gives_way_after_each_batch_of_slices() -> None:
    spec = an_input(kind=InputKind.SLICES, size=(8, 8))
    given: list[int] = []
    volume = Volume([a_frame(RAMP + n) for n in range(20)], Geometry())
    model_inputs(volume, spec, lambda: given.append(1))
    assert len(given) == 3  # of 8, 8 and 4


def test_no_frames_are_refused() -> None:
    with pytest.raises(ModelInputError, match="no frames"):
        inputs_of(an_input())
