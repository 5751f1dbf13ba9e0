"""What the model is given, and what a radiologist sees."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from pydicom import dcmread
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing

from dicom_xai.config import InputKind, ModelInput, ResizeRule, Windowing, WindowSource
from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.normalize import display, stack_inputs, to_model_input
from dicom_xai.decode.pixels import decode
from dicom_xai.errors import ModelInputError
from tests.make.images import CPU, a_frame, an_instance, real_file

RAMP = np.linspace(-100, 200, 64 * 64, dtype=np.float32).reshape(64, 64)
PERCENTILE = Windowing(source=WindowSource.PERCENTILE, low_percentile=0, high_percentile=100)


def an_input(**changes: object) -> ModelInput:
    given: dict[str, object] = {
        "name": "image",
        "kind": InputKind.IMAGE2D,
        "size": (64, 64),
        "windowing": PERCENTILE,
    }
    return ModelInput.model_validate({**given, **changes})


# ------------------------------------------------------------------ display


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_the_first_window_is_applied_as_pydicom_does(function: str) -> None:
    frame = a_frame(
        RAMP, WindowCenter=["40", "300"], WindowWidth=["80", "9"], VOILUTFunction=function
    )
    frame.header.BitsStored = 12
    frame.header.HighBit = 11
    # pydicom windows into the stored range; a float window of 0..1 needs that range undone
    expected = apply_windowing(RAMP.astype(np.float64), frame.header)
    low, high = 0.0, 4095.0
    if frame.header.PixelRepresentation:
        low, high = -2048.0, 2047.0
    expected = (expected - low) / (high - low)
    np.testing.assert_allclose(display(frame).numpy(), expected, atol=1e-6)  # float32


@pytest.mark.parametrize("name", ["vlut_04.dcm", "693_UNCR.dcm", "CT_small.dcm"])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_real_file_looks_as_pydicom_shows_it(name: str) -> None:
    data = real_file(name)
    ds = dcmread(BytesIO(data))
    (frame,) = to_frames(an_instance(), decode(data), CPU)
    if "WindowCenter" not in ds and "VOILUTSequence" not in ds:
        low, high = np.percentile(frame.values.numpy(), [0.5, 99.5])
        expected = np.clip((frame.values.numpy() - low) / (high - low), 0, 1)
    else:
        shown = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds, prefer_lut=False)
        expected = (shown - shown.min()) / (shown.max() - shown.min())
    if frame.valid is not None:
        expected = expected * frame.valid.numpy()
    np.testing.assert_allclose(display(frame).numpy(), expected, atol=1e-5)  # float32


def test_monochrome1_is_inverted_so_that_one_is_bright() -> None:
    window = {"WindowCenter": "50", "WindowWidth": "301"}
    plain = display(a_frame(RAMP, **window))
    inverted = display(a_frame(RAMP, PhotometricInterpretation="MONOCHROME1", **window))
    torch.testing.assert_close(inverted, 1 - plain)


def test_an_image_without_window_spans_the_percentiles_of_its_valid_pixels() -> None:
    values = RAMP.copy()
    values[:32] = -2000
    shown = display(a_frame(values, valid=values > -1000))
    assert shown[:32].max() == 0
    assert shown[32].min() < 0.01
    assert shown.max() == 1


@pytest.mark.parametrize(
    "window",
    [
        {"WindowCenter": "50", "WindowWidth": "0"},
        {"WindowCenter": "50", "WindowWidth": "-3"},
        {"WindowCenter": "50"},
        {"WindowCenter": "50", "WindowWidth": "10", "VOILUTFunction": "CUBIC"},
    ],
)
def test_a_window_that_the_standard_does_not_allow_counts_as_none(window: dict[str, str]) -> None:
    torch.testing.assert_close(display(a_frame(RAMP, **window)), display(a_frame(RAMP)))


def test_padding_is_black_also_where_low_values_are_bright() -> None:
    valid = np.ones(RAMP.shape, dtype=bool)
    valid[0] = False
    shown = display(a_frame(RAMP, valid=valid, PhotometricInterpretation="MONOCHROME1"))
    assert shown[0].max() == 0
    assert shown[1].min() > 0.9


def test_an_image_of_padding_only_is_black() -> None:
    shown = display(a_frame(RAMP, valid=np.zeros(RAMP.shape, dtype=bool)))
    assert not shown.any()


def test_a_flat_image_is_shown_without_division_by_zero() -> None:
    assert torch.isfinite(display(a_frame(np.full((8, 8), 7.0)))).all()


# ------------------------------------------------------------------ model input


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


def test_frames_of_a_stack_are_placed_one_by_one() -> None:
    frames = (a_frame(RAMP), a_frame(RAMP[:32]))
    images, placements = stack_inputs(frames, an_input())
    assert images.shape == (2, 1, 64, 64)
    assert [placement.source_size for placement in placements] == [(64, 64), (32, 64)]
    torch.testing.assert_close(images[1], to_model_input(frames[1], an_input())[0])


def test_an_input_of_three_dimensions_is_refused() -> None:
    spec = an_input(kind=InputKind.VOLUME3D, size=(8, 64, 64))
    with pytest.raises(ModelInputError, match="a frame fits rows and columns only"):
        to_model_input(a_frame(RAMP), spec)


def test_no_frames_are_refused() -> None:
    with pytest.raises(ModelInputError, match="no frames"):
        stack_inputs((), an_input())
