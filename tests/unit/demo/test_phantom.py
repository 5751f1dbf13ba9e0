"""Phantoms: the same for a seed, true about their lesions, and valid DICOM."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from dicom_xai.config import StackRule
from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.geometry import stack
from dicom_xai.decode.pixels import decode
from dicom_xai.decode.planes import planes_of
from dicom_xai.decode.window import display
from dicom_xai.demo.phantom import (
    CHEST_FINDINGS,
    HAEMORRHAGE,
    Phantom,
    Subject,
    chest,
    head_ct,
    to_bytes,
)
from tests.make.images import CPU, an_instance
from tests.make.validators import dciodvfy_errors

SMALL = (192, 160)


def a_chest(seed: int = 1, **options: object) -> Phantom:
    return chest(np.random.default_rng(seed), **{"matrix": SMALL, **options})  # type: ignore[arg-type]


def a_head(seed: int = 1, **options: object) -> Phantom:
    given = {"slices": 12, "matrix": 96, **options}
    return head_ct(np.random.default_rng(seed), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [a_chest, a_head])
def test_a_seed_gives_the_same_pixels_and_fresh_uids(make: type[Phantom]) -> None:
    one, other, third = make(), make(), make(2)
    for first, second in zip(one.datasets, other.datasets, strict=True):
        assert first.PixelData == second.PixelData
        assert first.PatientID == second.PatientID
        assert first.SOPInstanceUID != second.SOPInstanceUID
        assert first.StudyInstanceUID != second.StudyInstanceUID
    for name, mask in one.truth.items():
        np.testing.assert_array_equal(mask, other.truth[name])
    assert one.datasets[0].PixelData != third.datasets[0].PixelData


@pytest.mark.parametrize("make", [a_chest, a_head])
def test_uids_come_from_where_the_caller_says(make: type[Phantom]) -> None:
    def numbered() -> Phantom:
        numbers = count(1)
        return make(new_uid=lambda: f"1.2.{next(numbers)}")

    assert numbered().files == numbered().files


@pytest.mark.parametrize("finding", CHEST_FINDINGS)
@pytest.mark.parametrize("seed", range(4))
def test_a_chest_has_a_mask_for_exactly_the_findings_it_shows(finding: str, seed: int) -> None:
    phantom = a_chest(seed, findings={finding})
    assert phantom.findings == {finding}
    for name in CHEST_FINDINGS:
        assert phantom.truth[name].shape == (1, *SMALL)
        assert phantom.truth[name].dtype == bool
        assert phantom.truth[name].any() == (name == finding)


def test_a_chest_without_findings_has_empty_masks() -> None:
    phantom = a_chest(findings=())
    assert not any(mask.any() for mask in phantom.truth.values())


def test_findings_vary_when_none_are_named() -> None:
    seen = {a_chest(seed).findings for seed in range(20)}
    assert len(seen) > 4


@pytest.mark.parametrize(
    ("finding", "brighter"), [("nodule", True), ("consolidation", True), ("pneumothorax", False)]
)
def test_a_lesion_differs_from_the_lung_beside_it_in_the_right_sense(
    finding: str, brighter: bool
) -> None:
    votes = []
    for seed in range(8):
        phantom = a_chest(seed, findings={finding}, photometric="MONOCHROME2")
        (frame,) = to_frames(an_instance(), decode(phantom.files[0]), CPU)
        shown, mask = display([frame])[0].numpy(), phantom.truth[finding][0]
        rows, columns = np.nonzero(mask)
        middle = shown[rows, columns].mean()
        mirrored = shown[:, ::-1][rows, columns].mean()  # the other lung, at the same height
        votes.append((middle > mirrored) == brighter)
    assert sum(votes) >= 6


def test_monochrome1_and_2_show_the_same_picture() -> None:
    shown = []
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        phantom = a_chest(findings=(), photometric=photometric)
        assert phantom.datasets[0].PhotometricInterpretation == photometric
        (frame,) = to_frames(an_instance(), decode(phantom.files[0]), CPU)
        shown.append(display([frame])[0].numpy())
    # one grey level of 4095, twice rounded, in a window of about half of them
    np.testing.assert_allclose(shown[0], shown[1], atol=0.003)


def test_each_view_is_an_image_of_one_series_with_its_own_truth() -> None:
    phantom = a_chest(modality="CR", views=("PA", "AP"), findings={"nodule"})
    one, other = phantom.datasets
    assert (one.Modality, one.ViewPosition, other.ViewPosition) == ("CR", "PA", "AP")
    assert (one.InstanceNumber, other.InstanceNumber) == (1, 2)
    assert one.SeriesInstanceUID == other.SeriesInstanceUID
    assert one.PatientID == other.PatientID
    assert phantom.truth["nodule"].shape == (2, *SMALL)
    assert all(mask.any() for mask in phantom.truth["nodule"])


def test_a_matrix_is_drawn_when_none_is_given() -> None:
    ds = chest(np.random.default_rng(3)).datasets[0]
    assert 1024 <= max(ds.Rows, ds.Columns) <= 2500


def test_rows_alone_make_square_pixels() -> None:
    for seed in range(6):
        ds = a_chest(seed, matrix=200).datasets[0]
        assert ds.Rows == 200
        assert ds.PixelSpacing[0] == pytest.approx(ds.PixelSpacing[1], rel=0.01)  # whole columns


def test_a_bleed_is_dense_and_spans_several_slices() -> None:
    phantom = a_head(haemorrhage=True, slices=40)
    assert phantom.findings == {HAEMORRHAGE}
    mask = phantom.truth[HAEMORRHAGE]
    assert mask.shape == (40, 96, 96)
    assert np.count_nonzero(mask.any(axis=(1, 2))) >= 3
    frames = [to_frames(an_instance(ds), decode(to_bytes(ds)), CPU)[0] for ds in phantom.datasets]
    inside = np.concatenate(
        [frame.values.numpy()[where] for frame, where in zip(frames, mask, strict=True)]
    )
    assert 50 <= np.median(inside) <= 90


def test_a_head_without_haemorrhage_has_an_empty_mask() -> None:
    phantom = a_head(haemorrhage=False)
    assert phantom.findings == frozenset()
    assert not phantom.truth[HAEMORRHAGE].any()


def test_a_head_has_bone_brain_fluid_and_air() -> None:
    phantom = a_head(haemorrhage=False)
    (frame,) = to_frames(an_instance(), decode(phantom.files[6]), CPU)
    assert frame.values.max() > 1000
    values = frame.values if frame.valid is None else frame.values[frame.valid]
    assert values.min() <= -950
    middle = frame.values[40:56, 40:56]
    assert 0 < middle.median() < 45


def test_the_slices_of_a_head_form_one_stack() -> None:
    phantom = a_head(tilt_degrees=0.0)
    planes = [plane for ds in phantom.datasets for plane in planes_of(an_instance(ds), ds)]
    found = stack(reversed(planes), StackRule())
    assert [plane.instance_number for plane in found.planes] == list(range(1, 13))
    assert found.geometry.problems == ()


def test_a_subject_is_passed_through_and_is_plainly_nobody() -> None:
    rng = np.random.default_rng(5)
    subject = Subject.synthetic(rng, datetime(2026, 3, 4, 5, 6, 7))
    assert subject.patient_name.startswith("PHANTOM^SYNTHETIC")
    assert (subject.study_date, subject.study_time) == ("20260304", "050607")
    ds = a_chest(subject=subject).datasets[0]
    assert (ds.PatientName, ds.PatientID) == (subject.patient_name, subject.patient_id)
    assert ds.AccessionNumber == subject.accession_number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "MG"}, "modality 'MG'"),
        ({"views": ("LL",)}, "views"),
        ({"findings": {"mass"}}, "findings"),
    ],
)
def test_what_does_not_exist_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_chest(**options)


def test_a_head_of_one_slice_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 wanted"):
        a_head(slices=1)


@pytest.mark.parametrize(
    "phantom",
    [
        a_chest(1, photometric="MONOCHROME1"),
        a_chest(2, photometric="MONOCHROME2", views=("AP",)),
        a_chest(3, modality="CR", views=("PA", "AP")),
        a_head(4, slices=2),
        a_head(5, slices=2, tilt_degrees=12.0),
    ],
    ids=["dx-monochrome1", "dx-ap", "cr-two-views", "ct", "ct-tilted"],
)
def test_a_validator_finds_no_error(phantom: Phantom, tmp_path: Path) -> None:
    for number, data in enumerate(phantom.files):
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(data)
        assert dciodvfy_errors(path) == []
        assert dcmread(path).file_meta.TransferSyntaxUID.is_little_endian


def test_phantoms_need_neither_torch_nor_the_network() -> None:
    code = (
        "import sys, dicom_xai.demo.phantom; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'pynetdicom')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
