"""The bundled networks and what their training measures, on networks too small to learn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from dicom_xai.config import ModelCard, ModelInput, parse
from dicom_xai.demo import train
from dicom_xai.demo.networks import SmallResNet, multiply_adds
from dicom_xai.study import Geometry, Placement, Volume, VolumePlacement
from tests.make.images import a_frame


@pytest.fixture
def network() -> SmallResNet:
    torch.manual_seed(7)
    network = SmallResNet(2, channels=(4, 4, 6), dilations=(1, 2))
    network.train()(torch.randn(4, 1, 64, 64))  # gives batch norm some statistics
    return network.eval()


def test_maps_and_bias_add_up_to_the_logits(network: SmallResNet) -> None:
    image = torch.randn(3, 1, 64, 64)
    maps = network.maps(network.features(image))
    assert maps.shape == (3, 2, 8, 8)
    # sums of 64 float32 terms in another order
    torch.testing.assert_close(
        maps.sum(dim=(2, 3)) + network.head.bias, network(image), atol=1e-4, rtol=1e-4
    )


def test_the_positive_part_of_a_map_is_grad_cam_by_autograd(network: SmallResNet) -> None:
    image = torch.randn(1, 1, 64, 64)
    features = network.features(image).detach().requires_grad_(True)
    logits = (
        torch.nn.functional.linear(
            features.mean(dim=(2, 3)), network.head.weight * network.gain, network.head.bias
        )
    )[0]
    for index in range(2):
        (gradient,) = torch.autograd.grad(logits[index], features, retain_graph=True)
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        grad_cam = torch.relu((weights * features).sum(dim=1))[0]
        expected = torch.relu(network.maps(features))[0, index]
        torch.testing.assert_close(grad_cam, expected, atol=1e-5, rtol=1e-4)  # order of sums


def test_folding_the_gain_changes_no_logit(network: SmallResNet) -> None:
    image = torch.randn(2, 1, 64, 64)
    before = network(image)
    network.fold_gain()
    torch.testing.assert_close(network(image), before, atol=1e-5, rtol=1e-5)


def test_multiply_adds_are_counted_by_hand() -> None:
    network = SmallResNet(1, channels=(1, 1, 1), dilations=())
    # stem 32x32, middle 16x16 and two in its block, last 8x8; 9 a cell; one in the head
    assert multiply_adds(network, (64, 64)) == 9 * (32 * 32 + 3 * 16 * 16 + 8 * 8) + 1


@pytest.mark.parametrize(
    ("scores", "labels", "area"),
    [
        ([0.1, 0.2, 0.8, 0.9], [False, False, True, True], 1.0),
        ([0.9, 0.8, 0.2, 0.1], [False, False, True, True], 0.0),
        ([0.5, 0.5], [False, True], 0.5),
        ([0.1, 0.3, 0.2, 0.4], [False, False, True, True], 0.75),
    ],
)
def test_area_under_the_curve_counts_ordered_pairs(
    scores: list[float], labels: list[bool], area: float
) -> None:
    assert train.area_under_curve(scores, labels) == area


def test_the_cover_of_a_cell_takes_the_way_of_the_image() -> None:
    mask = np.zeros((1, 64, 32), dtype=bool)
    mask[0, :32] = True
    spec = train.TASKS["cxr"].spec.model_copy(update={"size": (64, 64)})
    volume = Volume((a_frame(np.zeros((64, 32))),), Geometry())
    cover = train._cover(volume, mask, spec, (8, 8))
    assert cover.shape == (8, 8)
    np.testing.assert_array_equal(cover[:4, 2:6], 1)
    assert cover.sum() == 16


def test_the_cover_of_a_volume_lies_where_the_lesion_does() -> None:
    task = train.TASKS["ct-3d"]
    (sample,) = train._samples_of(task, 3, True, bleeding_index(task))
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


def bleeding_index(task: train.Task) -> int:
    """The number of a phantom with a lesion, from the seed of these tests."""
    for index in range(20):
        rng = np.random.default_rng([3, index])
        rng.integers(24, 41)
        if rng.random() < 0.5:
            return index
    raise AssertionError(task.name)


def test_pointing_asks_the_source_pixel_under_the_maximum() -> None:
    raw = torch.zeros(8, 8)
    raw[2, 3] = 1  # the cell's middle: row 20, column 28 of the input
    truth = np.zeros((1, 1, 128, 64), dtype=bool)
    truth[0, 0, 40, 24] = True  # scale 0.5 and 1, offset 0 and 4
    placement = Placement((128, 64), (64, 64), (0.5, 1.0), (0.0, 4.0))
    nothing = np.zeros((1, 8, 8), dtype=np.float32)
    sample = train.Sample(np.zeros((1, 64, 64), np.float16), nothing, truth, (placement,))
    assert train._points_inside(raw, sample, 0)
    moved = dataclasses.replace(sample, truth=np.roll(truth, 1, axis=2))
    assert not train._points_inside(raw, moved, 0)


def test_pointing_asks_the_voxel_under_the_maximum() -> None:
    raw = torch.zeros(4, 8, 8)
    raw[2, 3, 5] = 1  # the cell's middle: 10, 14, 22 of the input
    placements = tuple(
        VolumePlacement((40, 50), (16, 32, 32), (11.0 - n, 2.0, 31.0), (0, 0.5, 0), (0, 0, -0.25))
        for n in range(4)
    )
    truth = np.zeros((1, 4, 40, 50), dtype=bool)
    truth[0, 1, 24, 36] = True
    nothing = np.zeros((1, 4, 8, 8), dtype=np.float32)
    sample = train.Sample(np.zeros((1, 16, 32, 32), np.float16), nothing, truth, placements)
    assert train._points_inside(raw, sample, 0)
    moved = dataclasses.replace(sample, truth=np.roll(truth, 1, axis=1))
    assert not train._points_inside(raw, moved, 0)


def test_the_same_seed_makes_the_same_samples() -> None:
    task = train.TASKS["ct-head"]
    one, other = (train._samples_of(task, 3, False, 5) for _ in range(2))
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.cover, second.cover)


def test_a_network_of_volumes_adds_up_its_maps_too() -> None:
    torch.manual_seed(7)
    network = train.TASKS["ct-3d"].network(2).eval()
    image = torch.randn(2, 1, 8, 16, 16)
    maps = network.maps(network.features(image))
    assert maps.shape == (2, 2, 4, 4, 4)
    torch.testing.assert_close(
        maps.sum(dim=(2, 3, 4)) + network.head.bias, network(image), atol=1e-4, rtol=1e-4
    )


@pytest.fixture
def exported(network: SmallResNet, tmp_path: Path) -> tuple[train.Task, Path, str]:
    task = train.TASKS["ct-head"]
    spec = ModelInput.model_validate({**task.spec.model_dump(), "size": (64, 64)})
    both = (task.classes[0], dataclasses.replace(task.classes[0], name="other"))
    task = dataclasses.replace(task, spec=spec, classes=both)
    network.fold_gain()
    path = tmp_path / f"{task.name}.onnx"
    return task, path, train.export(network, task, path)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # raised inside torch's exporter
def test_an_exported_model_stands_alone_and_gives_the_same_logits(
    network: SmallResNet, exported: tuple[train.Task, Path, str]
) -> None:
    _, path, digest = exported
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert len(digest) == 64
    data = path.read_bytes()
    assert b"/site-packages/" not in data
    assert str(Path(train.__file__).parent).encode() not in data
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape) == ("image", ["batch", 1, 64, 64])
    assert (logits.name, logits.shape) == ("logits", ["batch", 2])
    for batch in (1, 3):
        given = torch.randn(batch, 1, 64, 64)
        (found,) = session.run(None, {"image": given.numpy()})
        expected = network(given).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)  # other kernels


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_written_card_is_a_card(
    network: SmallResNet, exported: tuple[train.Task, Path, str], tmp_path: Path
) -> None:
    task, _, digest = exported
    measured = train.Measured(
        images=10,
        auc=(0.99, 0.98),
        pointing=(0.9, 0.8),
        iou=(0.5, 0.4),
        full_scale=1.5,
        threshold=0.6,
        false_area=0.0001,
    )
    file = tmp_path / "phantom-ct-head.yaml"
    file.write_text(train.card_text(network, "ct-head", task, measured, digest))
    card, _ = parse(file, ModelCard)
    assert card.sha256 == digest
    assert card.inputs == (task.spec,)
    assert card.calibrated is False
    assert "Not for diagnosis" in card.intended_use
    assert (card.heatmap.full_scale, card.heatmap.threshold) == (1.5, 0.6)
    assert card.performance["other"] == "AUC 0.980, pointing game 0.80, mean IoU 0.40"
