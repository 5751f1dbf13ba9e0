"""What a radiologist sees by default, and how windows of many frames are one operation."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing
from pydicom.uid import CTImageStorage

from dicom_xai.config import Windowing, WindowSource
from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.pixels import decode
from dicom_xai.decode.window import common_ramp, display, shown, shown_through
from dicom_xai.study import Frame
from tests.make.images import CPU, a_file, a_frame, an_instance, real_file

RAMP = np.linspace(-100, 200, 64 * 64, dtype=np.float32).reshape(64, 64)
FIXED = Windowing(source=WindowSource.FIXED, center=40, width=80)


def seen(frame: Frame) -> torch.Tensor:
    """One frame as it is displayed, ``(rows, columns)``."""
    (picture,) = display([frame])
    return picture


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
    np.testing.assert_allclose(seen(frame).numpy(), expected, atol=1e-6)  # float32


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
    np.testing.assert_allclose(seen(frame).numpy(), expected, atol=1e-5)  # float32


def test_monochrome1_is_inverted_so_that_one_is_bright() -> None:
    window = {"WindowCenter": "50", "WindowWidth": "301"}
    plain = seen(a_frame(RAMP, **window))
    inverted = seen(a_frame(RAMP, PhotometricInterpretation="MONOCHROME1", **window))
    torch.testing.assert_close(inverted, 1 - plain)


def test_an_image_without_window_spans_the_percentiles_of_its_valid_pixels() -> None:
    values = RAMP.copy()
    values[:32] = -2000
    shown = seen(a_frame(values, valid=values > -1000))
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
    torch.testing.assert_close(seen(a_frame(RAMP, **window)), seen(a_frame(RAMP)))


def a_table(vr: str, first: int, entries: list[int]) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", vr, [len(entries), first, 16])
    item.add_new("LUTData", "US", entries)
    return item


SIGNED = {"PixelRepresentation": 1}
RESCALED = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
RAISED = {"RescaleSlope": "1", "RescaleIntercept": "32768", **SIGNED}
TURNED = {"RescaleSlope": "-1", "RescaleIntercept": "0"}
CT = {"sop_class_uid": CTImageStorage, "RescaleSlope": "1", "RescaleIntercept": "0"}
TABLED = {"ModalityLUTSequence": [a_table("SS", -1, [39999, 40001, 40002])], **SIGNED}


@pytest.mark.parametrize(
    ("stored", "attributes", "vr", "first"),
    [
        ([0, 40001, 40002], {}, "US", 40000),
        ([-9, 0, 1], SIGNED, "US", 65535),
        ([-9, 0, 1], SIGNED, "SS", -1),
        ([9, 1024, 1025], RESCALED, "US", 65535),
        ([9, 1024, 1025], RESCALED, "SS", -1),
        ([9, 7233, 7234], RAISED, "US", 40000),
        ([9, 1, 0], TURNED, "US", 65534),
        ([-1, 0, 1], TABLED, "US", 40000),
    ],
)
def test_the_first_value_of_a_voi_lut_has_the_sign_of_what_the_modality_gives(
    stored: list[int], attributes: dict[str, object], vr: str, first: int
) -> None:
    # PS3.3 C.11.2.1.1
    dtype = np.int16 if "PixelRepresentation" in attributes else np.uint16
    data = a_file(
        np.array([stored], dtype),
        VOILUTSequence=[a_table(vr, first, [0, 1000, 65535])],
        **attributes,
    )
    (frame,) = to_frames(an_instance(), decode(data), CPU)
    shown = (seen(frame)[0] * 65535).round().int().tolist()
    assert shown == [0, 1000, 65535]


def test_a_ct_is_in_signed_units_even_where_none_can_be_negative() -> None:
    table = a_table("US", 65535, [0, 1000, 65535])
    data = a_file(np.array([[0, 1]], np.uint16), VOILUTSequence=[table], **CT)
    (frame,) = to_frames(an_instance(), decode(data), CPU)
    assert (seen(frame)[0] * 65535).round().int().tolist() == [1000, 65535]


def test_padding_is_black_also_where_low_values_are_bright() -> None:
    valid = np.ones(RAMP.shape, dtype=bool)
    valid[0] = False
    shown = seen(a_frame(RAMP, valid=valid, PhotometricInterpretation="MONOCHROME1"))
    assert shown[0].max() == 0
    assert shown[1].min() > 0.9


def test_an_image_of_padding_only_is_black() -> None:
    shown = seen(a_frame(RAMP, valid=np.zeros(RAMP.shape, dtype=bool)))
    assert not shown.any()


def test_a_flat_image_is_shown_without_division_by_zero() -> None:
    assert torch.isfinite(seen(a_frame(np.full((8, 8), 7.0)))).all()


def test_frames_with_windows_of_their_own_look_as_each_does_alone() -> None:
    valid = np.ones(RAMP.shape, dtype=bool)
    valid[:9] = False
    frames = [
        a_frame(RAMP, WindowCenter="40", WindowWidth="80"),
        a_frame(
            RAMP, WindowCenter="10", WindowWidth="300", PhotometricInterpretation="MONOCHROME1"
        ),
        a_frame(RAMP, WindowCenter="40", WindowWidth="80", VOILUTFunction="SIGMOID"),
        a_frame(RAMP, valid=valid),
        a_frame(RAMP, WindowCenter="40", WindowWidth="1"),
    ]
    together = display(frames)
    assert together.shape == (5, 64, 64)
    for frame, picture in zip(frames, together, strict=True):
        assert torch.equal(picture, seen(frame))


def test_source_values_are_left_as_they_are() -> None:
    frame = a_frame(RAMP, PhotometricInterpretation="MONOCHROME1")
    before = frame.values.clone()
    display([frame])
    shown([frame], FIXED, bright_is_high=False)
    assert torch.equal(frame.values, before)


def test_the_slices_of_a_volume_share_the_percentiles_of_all_of_them() -> None:
    frames = [a_frame(np.full((8, 8), value)) for value in (0, 50, 100)]
    windowing = Windowing(source=WindowSource.PERCENTILE, low_percentile=0, high_percentile=100)
    ramp = common_ramp(frames, windowing)
    assert (ramp.low, ramp.width) == (0, 100)
    made = shown_through(frames, ramp, bright_is_high=True)
    assert made[:, 0, 0].tolist() == [0, 0.5, 1]
    assert common_ramp(frames, FIXED).low == 0
