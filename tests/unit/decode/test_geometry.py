"""Frames to volumes: order, and every oddity said in words."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.geometry import stack
from dicom_xai.decode.pixels import decode
from dicom_xai.demo.phantom import head_ct, to_bytes
from dicom_xai.errors import GeometryError
from dicom_xai.study import Frame
from tests.make.images import CPU, a_frame, a_slice, an_instance, real_file


def heights(frames: tuple[Frame, ...]) -> list[float]:
    return [float(frame.header.ImagePositionPatient[2]) for frame in frames]


def test_slices_are_ordered_by_position_not_by_instance_number() -> None:
    frames = tuple(a_slice(z, number=i) for i, z in enumerate([10.0, 0.0, 5.0]))
    volume = stack(frames)
    assert heights(volume.frames) == [0, 5, 10]
    geometry = volume.geometry
    assert geometry.positions_mm == (0.0, 5.0, 10.0)
    assert geometry.slice_spacing_mm == 5.0
    assert geometry.pixel_spacing_mm == (0.5, 0.5)
    assert geometry.orientation == (1, 0, 0, 0, 1, 0)
    assert geometry.problems == ()


def test_positions_are_measured_along_the_normal_of_oblique_slices() -> None:
    c, s = math.cos(0.3), math.sin(0.3)
    orientation = [1, 0, 0, 0, c, s]
    frames = tuple(
        a_slice(0, ImagePositionPatient=[0, -s * d, c * d], ImageOrientationPatient=orientation)
        for d in (4.0, 0.0, 2.0)
    )
    geometry = stack(frames).geometry
    np.testing.assert_allclose(geometry.positions_mm, [0, 2, 4], atol=1e-9)
    assert geometry.problems == ()


def test_a_duplicated_position_keeps_the_lower_instance_number_and_is_reported() -> None:
    frames = (a_slice(0, number=1), a_slice(5, number=9), a_slice(5.001, number=2))
    volume = stack(frames)
    assert [frame.header.InstanceNumber for frame in volume.frames] == [1, 2]
    assert volume.geometry.problems == (
        "1 image at the position of another left out (the lowest InstanceNumber is kept)",
    )


def test_a_missing_slice_is_reported_as_a_gap() -> None:
    geometry = stack(tuple(a_slice(z) for z in (0, 2, 4, 8, 10))).geometry
    assert geometry.problems == ("gap of 4.00 mm between slices 3 and 4 (usual step 2.00 mm)",)
    assert geometry.slice_spacing_mm == 2.0


def test_uneven_spacing_is_reported() -> None:
    geometry = stack(tuple(a_slice(z) for z in (0, 2, 4, 6.4, 8.4))).geometry
    assert geometry.problems == ("uneven slice spacing: 2.00 to 2.40 mm",)


def test_gantry_tilt_is_reported_as_a_shift_in_the_plane() -> None:
    phantom = head_ct(np.random.default_rng(1), 5, matrix=32, tilt_degrees=10)
    frames = tuple(
        to_frames(an_instance(ds), decode(to_bytes(ds)), CPU)[0]
        for ds in reversed(phantom.datasets)
    )
    volume = stack(frames)
    assert [int(frame.header.InstanceNumber) for frame in volume.frames] == [1, 2, 3, 4, 5]
    (problem,) = volume.geometry.problems
    assert "(10.0 degrees: gantry tilt or a moved table)" in problem
    step = float(phantom.datasets[0].SliceThickness)
    assert volume.geometry.slice_spacing_mm == pytest.approx(step * math.cos(math.radians(10)))


def test_of_mixed_orientations_the_largest_stack_is_kept() -> None:
    sagittal = a_slice(0, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    volume = stack((sagittal, a_slice(0), a_slice(3)))
    assert heights(volume.frames) == [0, 3]
    assert volume.geometry.problems == (
        "1 image of 1 other orientation(s), series or matrix left out; the largest stack has 2",
    )


def test_series_are_not_mixed_into_one_stack() -> None:
    other = [a_slice(z) for z in (1, 2)]
    other = [
        replace(frame, instance=replace(frame.instance, series_instance_uid="9.9"))
        for frame in other
    ]
    volume = stack((*other, a_slice(0), a_slice(1.5), a_slice(3)))
    assert heights(volume.frames) == [0, 1.5, 3]


def test_images_without_position_are_left_out_of_a_stack() -> None:
    volume = stack((a_slice(0), a_slice(2), a_frame(np.zeros((4, 4)))))
    assert len(volume.frames) == 2
    assert volume.geometry.problems == ("1 image without position left out",)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "perpendicular unit vectors"),
        ({"ImageOrientationPatient": None}, "ImageOrientationPatient is missing"),
        ({"ImagePositionPatient": [0, 0]}, "have 2 and 6 values"),
    ],
)
def test_slices_without_a_usable_place_are_refused(
    attributes: dict[str, object], message: str
) -> None:
    with pytest.raises(GeometryError, match=message):
        stack((a_slice(0, **attributes),))


def test_no_frames_are_refused() -> None:
    with pytest.raises(GeometryError, match="no frames"):
        stack(())


def test_projections_stay_in_the_order_of_instance_number() -> None:
    frames = tuple(a_frame(np.full((2, 2), n), InstanceNumber=n, Modality="DX") for n in (3, 1, 2))
    volume = stack(frames)
    assert [frame.values[0, 0].item() for frame in volume.frames] == [1, 2, 3]
    assert volume.geometry.positions_mm == ()
    assert volume.geometry.slice_spacing_mm is None
    assert volume.geometry.problems == ()


def test_ct_slices_without_any_position_are_kept_and_the_guess_is_said() -> None:
    frames = tuple(a_frame(np.zeros((2, 2)), InstanceNumber=n, Modality="CT") for n in (2, 1))
    volume = stack(frames)
    assert [frame.header.InstanceNumber for frame in volume.frames] == [1, 2]
    assert volume.geometry.problems == ("no positions: slices are in the order of InstanceNumber",)


def test_spacing_at_the_detector_is_not_spacing_in_the_patient() -> None:
    assert (
        stack((a_frame(np.zeros((2, 2)), ImagerPixelSpacing=[0.1, 0.1]),)).geometry
        == stack((a_frame(np.zeros((2, 2))),)).geometry
    )
    both = a_frame(np.zeros((2, 2)), ImagerPixelSpacing=[0.1, 0.1], PixelSpacing=[0.09, 0.08])
    assert stack((both,)).geometry.pixel_spacing_mm == (0.09, 0.08)


def test_a_real_radiograph_with_zero_spacing_has_none() -> None:
    frames = to_frames(an_instance(), decode(real_file("RG1_UNCR.dcm")), CPU)
    assert stack(frames).geometry.pixel_spacing_mm is None


def test_the_slices_of_a_real_enhanced_ct_are_found_in_its_functional_groups() -> None:
    volume = stack(to_frames(an_instance(), decode(real_file("eCT_Supplemental.dcm")), CPU))
    assert len(volume.geometry.positions_mm) == 2
    assert volume.geometry.slice_spacing_mm == pytest.approx(10.0, abs=0.01)  # DS rounding
    assert volume.geometry.pixel_spacing_mm is not None


def test_problems_hold_no_uid_and_no_name() -> None:
    frames = (a_slice(0), a_slice(0), a_slice(5), a_slice(30), a_frame(np.zeros((4, 4))))
    for problem in stack(frames).geometry.problems:
        assert "1.2.3" not in problem
