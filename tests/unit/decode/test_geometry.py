"""Frames to volumes: order, and every oddity said in words."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from dicom_xai.config import (
    Preference,
    StackAttribute,
    StackOrientation,
    StackRule,
)
from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.geometry import attach, stack
from dicom_xai.decode.pixels import decode
from dicom_xai.decode.planes import planes_of
from dicom_xai.demo.phantom import head_ct, to_bytes
from dicom_xai.errors import DecodeError, GeometryError
from dicom_xai.study import Frame, PlaneRecord, Volume
from tests.make.images import CPU, a_frame, a_slice, an_instance, real_file

ANY = StackRule()


def volume_of(frames: tuple[Frame, ...], rule: StackRule | None = ANY) -> Volume:
    """As the pipeline does it."""
    return attach(stack(planes(frames), rule), frames)


def planes(frames: tuple[Frame, ...]) -> list[PlaneRecord]:
    headers = {frame.instance.sop_instance_uid: frame for frame in frames}
    return [p for frame in headers.values() for p in planes_of(frame.instance, frame.header)]


def heights(frames: tuple[Frame, ...]) -> list[float]:
    return [float(frame.header.ImagePositionPatient[2]) for frame in frames]


def test_slices_are_ordered_by_position_not_by_instance_number() -> None:
    frames = tuple(a_slice(z, number=i) for i, z in enumerate([10.0, 0.0, 5.0]))
    volume = volume_of(frames)
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
    geometry = volume_of(frames).geometry
    np.testing.assert_allclose(geometry.positions_mm, [0, 2, 4], atol=1e-9)
    assert geometry.problems == ()


def test_a_duplicated_position_keeps_the_lower_instance_number_and_is_reported() -> None:
    frames = (a_slice(0, number=1), a_slice(5, number=9), a_slice(5.001, number=2))
    volume = volume_of(frames)
    assert [frame.header.InstanceNumber for frame in volume.frames] == [1, 2]
    assert volume.geometry.problems == (
        "1 image at the position of another left out (the lowest InstanceNumber is kept)",
    )


def test_a_missing_slice_is_reported_as_a_gap() -> None:
    geometry = volume_of(tuple(a_slice(z) for z in (0, 2, 4, 8, 10))).geometry
    assert geometry.problems == ("gap of 4.00 mm between slices 3 and 4 (usual step 2.00 mm)",)
    assert geometry.slice_spacing_mm == 2.0


def test_uneven_spacing_is_reported() -> None:
    geometry = volume_of(tuple(a_slice(z) for z in (0, 2, 4, 6.4, 8.4))).geometry
    assert geometry.problems == ("uneven slice spacing: 2.00 to 2.40 mm",)


def test_gantry_tilt_is_reported_as_a_shift_in_the_plane() -> None:
    phantom = head_ct(np.random.default_rng(1), 5, matrix=32, tilt_degrees=10)
    frames = tuple(
        to_frames(an_instance(ds), decode(to_bytes(ds)), CPU)[0]
        for ds in reversed(phantom.datasets)
    )
    volume = volume_of(frames)
    assert [int(frame.header.InstanceNumber) for frame in volume.frames] == [1, 2, 3, 4, 5]
    (problem,) = volume.geometry.problems
    assert "(10.0 degrees: gantry tilt or a moved table)" in problem
    step = float(phantom.datasets[0].SliceThickness)
    assert volume.geometry.slice_spacing_mm == pytest.approx(step * math.cos(math.radians(10)))


def a_slab(
    aside: float, heights: Iterable[int], *, tilt: float = 0.0, first: int = 1, **attributes: object
) -> tuple[Frame, ...]:
    """Slices 2 mm apart, so far to the side, their origins shifted by `tilt` mm for each."""
    return tuple(
        a_slice(0, number=first + i, ImagePositionPatient=[aside, tilt * i, 2.0 * i], **attributes)
        for i in heights
    )


def sides(volume: Volume) -> list[float]:
    return [float(frame.header.ImagePositionPatient[0]) for frame in volume.frames]


@pytest.mark.parametrize("tilt", [0.0, 0.6, -0.6])
def test_slabs_beside_each_other_are_two_stacks(tilt: float) -> None:
    left, right = a_slab(0, range(5), tilt=tilt), a_slab(180, range(6), tilt=tilt, first=101)
    found = volume_of((*right, *left))
    assert sides(found) == [180] * 6
    assert found.geometry.problems[0] == (
        "5 images of 1 other stack(s) left out; kept the one of 6: the most slices"
    )
    assert not any("position of another" in problem for problem in found.geometry.problems)


def test_slabs_that_meet_in_some_slices_are_kept_apart_in_all_of_them() -> None:
    low, high = a_slab(0, range(5), tilt=0.6), a_slab(-90, range(3, 10), tilt=0.6, first=101)
    found = volume_of((*low, *high))
    assert sides(found) == [-90] * 7


def test_slabs_numbered_in_turns_are_kept_apart() -> None:
    turns = [(i, side) for i in range(6) for side in ((0, 180) if i % 2 else (180, 0))]
    slices = [a_slab(side, [i], first=n - i, tilt=0.6) for n, (i, side) in enumerate(turns)]
    found = volume_of(tuple(frame for (frame,) in slices))
    assert sides(found) == [180] * 6


def test_slabs_of_several_echoes_are_a_stack_for_each_slab_and_echo() -> None:
    frames = tuple(
        frame
        for side, echo in itertools.product((0, 180), (12, 98))
        for frame in a_slab(side, range(4), first=side + echo, EchoTime=echo)
    )
    found = volume_of(frames, prefer(StackAttribute.ECHO_TIME, choose="highest"))
    assert sides(found) == [0] * 4
    assert {float(frame.header.EchoTime) for frame in found.frames} == {98.0}
    assert "12 images of 3 other stack(s) left out" in found.geometry.problems[0]


def test_a_model_of_single_images_gets_the_slabs_one_after_the_other() -> None:
    found = volume_of((*a_slab(0, range(3)), *a_slab(180, range(3), first=101)), None)
    assert sides(found) == [0, 0, 0, 180, 180, 180]


def test_a_slice_taken_again_beside_its_place_does_not_cut_a_tilted_stack() -> None:
    again = a_slice(0, number=90, ImagePositionPatient=[0, 0.6 * 4 + 1.2, 8.0])
    found = volume_of((*a_slab(0, range(9), tilt=0.6), again))
    assert [frame.header.InstanceNumber for frame in found.frames] == list(range(1, 10))


def test_a_scan_that_was_taken_up_again_a_little_aside_is_one_stack() -> None:
    wide = {"PixelSpacing": [50, 50]}
    before, after = a_slab(0, range(20), **wide), a_slab(1.5, range(19, 40), first=101, **wide)
    found = volume_of((*before, *after))
    assert len(found.frames) == 40
    assert "1 image at the position of another left out" in found.geometry.problems[0]


def test_a_copy_a_little_aside_is_still_a_copy() -> None:
    copy = a_slice(0, number=90, ImagePositionPatient=[0.5, 0, 4.0])
    found = volume_of((*a_slab(0, range(4)), copy))
    assert len(found.frames) == 4
    assert "1 image at the position of another left out" in found.geometry.problems[0]


def test_frames_beside_each_other_in_a_number_that_no_scanner_takes_are_not_told_apart() -> None:
    crowd = tuple(frame for side in range(40) for frame in a_slab(10 * side, [0, 1]))
    found = volume_of(crowd)
    assert len(found.frames) == 2
    assert "78 images at the position of another left out" in found.geometry.problems[0]


def test_of_mixed_orientations_the_largest_stack_is_kept() -> None:
    sagittal = a_slice(0, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    volume = volume_of((sagittal, a_slice(0), a_slice(3)))
    assert heights(volume.frames) == [0, 3]
    assert volume.geometry.problems == (
        "1 image of 1 other stack(s) left out; kept the one of 2: the most slices",
    )


def test_series_are_not_mixed_into_one_stack() -> None:
    other = [a_slice(z) for z in (1, 2)]
    other = [
        replace(frame, instance=replace(frame.instance, series_instance_uid="9.9"))
        for frame in other
    ]
    volume = volume_of((*other, a_slice(0), a_slice(1.5), a_slice(3)))
    assert heights(volume.frames) == [0, 1.5, 3]


def test_images_without_position_are_left_out_of_a_stack() -> None:
    volume = volume_of((a_slice(0), a_slice(2), a_frame(np.zeros((4, 4)))))
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
        volume_of((a_slice(0, **attributes),))


def test_no_frames_are_refused() -> None:
    with pytest.raises(GeometryError, match="no frames"):
        volume_of(())


def test_projections_stay_in_the_order_of_instance_number() -> None:
    frames = tuple(a_frame(np.full((2, 2), n), InstanceNumber=n, Modality="DX") for n in (3, 1, 2))
    volume = volume_of(frames)
    assert [frame.values[0, 0].item() for frame in volume.frames] == [1, 2, 3]
    assert volume.geometry.positions_mm == ()
    assert volume.geometry.slice_spacing_mm is None
    assert volume.geometry.problems == ()


def test_ct_slices_without_any_position_are_kept_and_the_guess_is_said() -> None:
    frames = tuple(a_frame(np.zeros((2, 2)), InstanceNumber=n, Modality="CT") for n in (2, 1))
    volume = volume_of(frames)
    assert [frame.header.InstanceNumber for frame in volume.frames] == [1, 2]
    assert volume.geometry.problems == ("no positions: slices are in the order of InstanceNumber",)


def test_spacing_at_the_detector_is_not_spacing_in_the_patient() -> None:
    assert (
        volume_of((a_frame(np.zeros((2, 2)), ImagerPixelSpacing=[0.1, 0.1]),)).geometry
        == volume_of((a_frame(np.zeros((2, 2))),)).geometry
    )
    both = a_frame(np.zeros((2, 2)), ImagerPixelSpacing=[0.1, 0.1], PixelSpacing=[0.09, 0.08])
    assert volume_of((both,)).geometry.pixel_spacing_mm == (0.09, 0.08)


def test_a_real_radiograph_with_zero_spacing_has_none() -> None:
    frames = to_frames(an_instance(), decode(real_file("RG1_UNCR.dcm")), CPU)
    assert volume_of(frames).geometry.pixel_spacing_mm is None


def test_the_slices_of_a_real_enhanced_ct_are_found_in_its_functional_groups() -> None:
    volume = volume_of(to_frames(an_instance(), decode(real_file("eCT_Supplemental.dcm")), CPU))
    assert len(volume.geometry.positions_mm) == 2
    assert volume.geometry.slice_spacing_mm == pytest.approx(10.0, abs=0.01)  # DS rounding
    assert volume.geometry.pixel_spacing_mm is not None


def test_problems_hold_no_uid_and_no_name() -> None:
    frames = (a_slice(0), a_slice(0), a_slice(5), a_slice(30), a_frame(np.zeros((4, 4))))
    for problem in volume_of(frames).geometry.problems:
        assert "1.2.3" not in problem


def an_mr(
    echoes: tuple[float, ...] = (10,), slices: int = 4, **attributes: object
) -> tuple[Frame, ...]:
    """Slices 3 mm apart, each with all echoes, InstanceNumber running over the echoes first."""
    return tuple(
        a_slice(3.0 * i, number=i * len(echoes) + n, Modality="MR", EchoTime=echo, **attributes)
        for i in range(slices)
        for n, echo in enumerate(echoes)
    )


def prefer(attribute: StackAttribute, **wish: str) -> StackRule:
    return StackRule(prefer=(Preference(attribute=attribute, **wish),))


@pytest.mark.parametrize(("choose", "echo"), [("lowest", 12), ("highest", 98)])
def test_of_several_echoes_the_card_s_rule_takes_one_and_the_reason_is_said(
    choose: str, echo: float
) -> None:
    found = volume_of(an_mr((98, 12, 45)), prefer(StackAttribute.ECHO_TIME, choose=choose))
    assert [float(frame.header.EchoTime) for frame in found.frames] == [echo] * 4
    assert found.geometry.problems == (
        f"8 images of 2 other stack(s) left out; kept the one of 4: EchoTime {choose}",
    )


def test_without_a_wish_the_first_of_equal_stacks_is_kept_and_that_is_said() -> None:
    found = volume_of(an_mr((98, 12)))
    assert {float(frame.header.EchoTime) for frame in found.frames} == {98.0}
    (problem,) = found.geometry.problems
    assert problem.endswith("kept the one of 4: the first of several like it")


@pytest.mark.parametrize(
    ("keyword", "values", "attribute", "wanted"),
    [
        ("DiffusionBValue", (0, 500, 1000), StackAttribute.B_VALUE, "1000"),
        ("TemporalPositionIdentifier", (1, 2, 3), StackAttribute.TEMPORAL_POSITION, "2"),
        ("AcquisitionNumber", (1, 2), StackAttribute.ACQUISITION_NUMBER, "2"),
        ("TriggerTime", (0, 40.5), StackAttribute.TRIGGER_TIME, "40.50"),
        (
            "ImageType",
            (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]),
            StackAttribute.IMAGE_TYPE,
            "P",
        ),
        ("ConvolutionKernel", ("H30", "H60"), StackAttribute.CONVOLUTION_KERNEL, "H60"),
    ],
)
def test_frames_at_one_place_are_told_apart_by(
    keyword: str, values: tuple[object, ...], attribute: StackAttribute, wanted: str
) -> None:
    frames = tuple(
        a_slice(2.0 * i, number=10 * n + i, **{keyword: value})
        for n, value in enumerate(values)
        for i in range(3)
    )
    found = volume_of(frames, prefer(attribute, equals=wanted))
    ((_, kept),) = {(keyword, str(frame.header.get(keyword))) for frame in found.frames}
    assert wanted.rstrip("0").rstrip(".") in kept or wanted in kept
    assert len(found.frames) == 3
    assert f"{attribute} equals {wanted}" in found.geometry.problems[0]


def test_the_most_slices_win_over_number_one_but_not_over_a_wish() -> None:
    frames = an_mr((10,), slices=6) + an_mr((80,), slices=4)
    assert len(volume_of(frames).frames) == 6
    assert len(volume_of(frames, prefer(StackAttribute.ECHO_TIME, choose="highest")).frames) == 4


def test_an_acquisition_number_that_runs_from_slice_to_slice_does_not_cut_a_stack() -> None:
    frames = tuple(a_slice(z, number=z, AcquisitionNumber=z) for z in range(8))
    again = a_slice(3, number=30, AcquisitionNumber=30)
    volume = volume_of((*frames, again))
    assert len(volume.frames) == 8
    assert "at the position of another" in volume.geometry.problems[0]


def test_two_acquisitions_that_meet_in_one_slice_stay_one_stack() -> None:
    frames = tuple(
        a_slice(z, number=z + acquisition, AcquisitionNumber=acquisition)
        for acquisition, heights in ((1, range(6)), (2, range(5, 11)))
        for z in heights
    )
    assert heights(volume_of(frames).frames) == [float(z) for z in range(11)]


def test_a_localizer_is_no_slice_even_where_it_lies_like_one() -> None:
    scout = a_slice(2.5, number=0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert heights(volume_of((scout, a_slice(0), a_slice(5))).frames) == [0, 5]


def test_a_study_of_several_series_gives_the_stack_that_the_card_wants() -> None:
    def series(uid: str, kernel: str, slices: int) -> list[Frame]:
        made = [a_slice(z, number=z, ConvolutionKernel=kernel) for z in range(slices)]
        return [
            replace(frame, instance=replace(frame.instance, series_instance_uid=uid))
            for frame in made
        ]

    frames = (*series("1.1", "BONE", 9), *series("1.2", "SOFT", 6))
    rule = prefer(StackAttribute.CONVOLUTION_KERNEL, equals="SOFT")
    assert len(volume_of(frames, rule).frames) == 6
    assert len(volume_of(frames).frames) == 9


@pytest.mark.parametrize(
    ("orientation", "wanted"),
    [
        ([1, 0, 0, 0, 1, 0], StackOrientation.AXIAL),
        ([1, 0, 0, 0, 0.9, -0.43588989], StackOrientation.AXIAL),
        ([1, 0, 0, 0, 0, -1], StackOrientation.CORONAL),
        ([0, 1, 0, 0, 0, -1], StackOrientation.SAGITTAL),
    ],
)
def test_a_rule_may_want_an_orientation(orientation: list[float], wanted: StackOrientation) -> None:
    normal = np.cross(orientation[:3], orientation[3:])
    frames = tuple(
        a_slice(0, ImagePositionPatient=list(normal * d), ImageOrientationPatient=orientation)
        for d in range(3)
    )
    for rule in (StackRule(orientation=o) for o in StackOrientation):
        if rule.orientation in (wanted, StackOrientation.ANY):
            assert len(volume_of(frames, rule).frames) == 3
        else:
            with pytest.raises(GeometryError, match=f"{wanted}; the model card's stack section"):
                volume_of(frames, rule)


def test_too_few_slices_are_refused_with_both_numbers() -> None:
    with pytest.raises(GeometryError, match=r"largest with 2 slice.*at least 5 slice"):
        volume_of((a_slice(0), a_slice(3)), StackRule(minimum_slices=5))
    with pytest.raises(GeometryError, match=r"1 image without position.*at least 5 slice"):
        volume_of((a_frame(np.zeros((4, 4))),), StackRule(minimum_slices=5))


def test_a_model_of_single_images_gets_every_one_of_them() -> None:
    sagittal = a_slice(0, number=7, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    projection = a_frame(np.zeros((4, 4)), InstanceNumber=9)
    volume = volume_of((projection, sagittal, a_slice(3, number=2), a_slice(0, number=1)), None)
    assert [frame.header.InstanceNumber for frame in volume.frames] == [1, 2, 7, 9]
    assert volume.geometry.positions_mm == ()
    assert volume.geometry.pixel_spacing_mm is None


def test_a_plane_record_travels_between_processes() -> None:
    (record,) = planes((a_slice(2.5, number=4),))
    assert pickle.loads(pickle.dumps(record)) == record
    assert record.position_mm == (0, 0, 2.5)
    assert record.pixel_spacing_mm == (0.5, 0.5)
    assert (record.rows, record.columns, record.instance_number) == (4, 4, 4)


def test_origins_follow_the_table_of_a_tilted_gantry() -> None:
    phantom = head_ct(np.random.default_rng(1), 5, matrix=32, tilt_degrees=10)
    records = [p for ds in phantom.datasets for p in planes_of(an_instance(ds), ds)]
    geometry = stack(records, ANY).geometry
    expected = [[float(v) for v in ds.ImagePositionPatient] for ds in phantom.datasets]
    np.testing.assert_allclose(geometry.origins_mm, expected)


def test_a_frame_that_was_not_decoded_is_missed() -> None:
    frames = (a_slice(0), a_slice(3))
    with pytest.raises(GeometryError, match="2 frames in the stack, 1 decoded"):
        attach(stack(planes(frames), ANY), frames[:1])


@pytest.mark.promise("C4")
def test_a_sequence_where_a_value_should_be_is_no_fact() -> None:
    """Its text would be its items': gigabytes where a broken one lies 25 levels deep."""
    inner = Dataset()
    inner[0x00280101] = RawDataElement(Tag(0x00280101), "FL", 2, b"4 ", 0, False, True)
    for _ in range(25):
        outer = Dataset()
        outer.add_new(0x00081140, "SQ", [inner])
        inner = outer
    frame = a_slice(0)
    frame.header.add_new("EchoTime", "SQ", [inner])
    [record] = planes((frame,))
    assert "EchoTime" not in dict(record.facts)


def test_a_frame_count_that_no_object_has_is_refused_before_any_record_is_made() -> None:
    frame = a_slice(0, NumberOfFrames=10_000_000)
    with pytest.raises(DecodeError, match="NumberOfFrames: 10000000"):
        planes((frame,))


def test_values_that_cannot_be_read_are_no_facts() -> None:
    frame = a_slice(0)
    frame.header.add_new("EchoTime", "DS", None)
    frame.header.add_new("DiffusionBValue", "FD", [])
    (record,) = planes((frame,))
    assert not {"EchoTime", "DiffusionBValue"} & {name for name, _ in record.facts}
