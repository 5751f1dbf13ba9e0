"""The committed models are what their cards say, and good enough for what the demo shows."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from dicom_xai.config import ModelCard, parse
from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.geometry import attach, stack
from dicom_xai.decode.normalize import model_inputs
from dicom_xai.decode.pixels import decode
from dicom_xai.decode.planes import planes_of
from dicom_xai.demo.measure import area_under_curve
from dicom_xai.demo.phantom import HAEMORRHAGE, Phantom, chest, head_ct, to_bytes
from dicom_xai.demo.tasks import TASKS
from dicom_xai.infer.model import Model
from dicom_xai.infer.session import Device
from tests.make.images import CPU, an_instance

FOLDER = Path(__file__).parents[3] / "config" / "models"
#: Their cost in FLOP: what an image may take where 300 of them, or one volume, have two seconds.
LIMITS = {"phantom-cxr": 0.2e9, "phantom-ct-head": 0.2e9, "phantom-ct-3d": 0.5e9}
NAMES = tuple(LIMITS)
#: No seed of training or of its held-out phantoms.
SEED = 4711


@cache
def card(name: str) -> ModelCard:
    found, _ = parse(FOLDER / f"{name}.yaml", ModelCard)
    return found.model_copy(update={"file": FOLDER / found.file})


def scores(name: str, phantom: Phantom) -> np.ndarray:
    """``(images, classes)``, by the path that serving takes."""
    model = Model(card(name), Device("cpu"), 1)
    instances = [an_instance(ds) for ds in phantom.datasets]
    each = list(zip(instances, phantom.datasets, strict=True))
    frames = [to_frames(instance, decode(to_bytes(ds)), CPU)[0] for instance, ds in each]
    planes = [plane for instance, ds in each for plane in planes_of(instance, ds)]
    volume = attach(stack(planes, card(name).stack_rule), frames)
    inputs = model_inputs(volume, card(name).inputs[0])
    raw = model.session.run({model.input_name: inputs.images})[model.output_name]
    return model.scores(raw).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_a_card_fits_its_file_and_the_task_it_was_trained_for(name: str) -> None:
    found = card(name)
    assert found.sha256 == hashlib.sha256(found.file.read_bytes()).hexdigest()
    (task,) = (task for task in TASKS.values() if task.name == name)
    assert found.inputs == (task.spec,)
    assert [item.name for item in found.classes] == [item.name for item in task.classes]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_that_it_is_a_demonstration(name: str) -> None:
    assert card(name).intended_use == "Demonstration on synthetic phantoms. Not for diagnosis."
    assert card(name).calibrated is False


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_small_and_one_self_contained_file(name: str) -> None:
    assert card(name).file.stat().st_size <= 3_000_000
    assert not list(FOLDER.glob("*.data"))
    model = onnx.load(card(name).file)
    assert not any(node.metadata_props for node in model.graph.node)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_or_volume_costs_little(name: str) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(card(name).file))
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.value_info
    }
    weights = {item.name: list(item.dims) for item in model.graph.initializer}
    flop = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            out, kernel = shapes[node.output[0]], weights[node.input[1]]
            flop += 2 * int(np.prod(out[1:])) * int(np.prod(kernel[1:]))
    assert 0 < flop <= LIMITS[name]


def test_radiographs_are_told_apart() -> None:
    truth: list[list[bool]] = []
    found: list[np.ndarray] = []
    for number in range(30):
        phantom = chest(np.random.default_rng([SEED, number]), matrix=400)
        found.append(scores("phantom-cxr", phantom)[0])
        truth.append([item.name in phantom.findings for item in card("phantom-cxr").classes])
    for index, item in enumerate(card("phantom-cxr").classes):
        area = area_under_curve([float(row[index]) for row in found], [row[index] for row in truth])
        assert area >= 0.9, item.name  # the card's figure, less what 30 images leave to chance


def test_slices_that_bleed_are_told_from_those_that_do_not() -> None:
    truth: list[bool] = []
    found: list[float] = []
    for number in range(6):
        rng = np.random.default_rng([SEED, number])
        phantom = head_ct(rng, slices=10, haemorrhage=number % 2 == 0, matrix=256)
        found += scores("phantom-ct-head", phantom)[:, 0].tolist()
        truth += phantom.truth[HAEMORRHAGE].any(axis=(1, 2)).tolist()
    assert area_under_curve(found, truth) >= 0.9


def test_volumes_that_bleed_are_told_from_those_that_do_not() -> None:
    truth, found = [], []
    for number in range(10):
        rng = np.random.default_rng([SEED, number])
        phantom = head_ct(rng, slices=24, haemorrhage=number % 2 == 0, matrix=128)
        found.append(float(scores("phantom-ct-3d", phantom)[0, 0]))
        truth.append(number % 2 == 0)
    assert area_under_curve(found, truth) >= 0.8  # the card's figure, less what ten leave to chance


def test_a_score_does_not_depend_on_the_company_in_its_batch() -> None:
    phantom = head_ct(np.random.default_rng(SEED), slices=4, matrix=128)
    together = scores("phantom-ct-head", phantom)
    alone = Phantom(phantom.datasets[:1], phantom.truth, phantom.findings)
    np.testing.assert_allclose(scores("phantom-ct-head", alone), together[:1], atol=1e-5)
    assert torch.isfinite(torch.from_numpy(together)).all()
