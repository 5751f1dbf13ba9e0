"""What is committed of a trained model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from dicom_xai.config import ModelCard, ModelInput, parse
from dicom_xai.demo import card as card_module
from dicom_xai.demo.card import card_text, export
from dicom_xai.demo.measure import Measured
from dicom_xai.demo.networks import SmallResNet
from dicom_xai.demo.tasks import TASKS, Task


@pytest.fixture
def exported(network: SmallResNet, tmp_path: Path) -> tuple[Task, Path, str]:
    task = TASKS["ct-head"]
    spec = ModelInput.model_validate({**task.spec.model_dump(), "size": (64, 64)})
    both = (task.classes[0], dataclasses.replace(task.classes[0], name="other"))
    task = dataclasses.replace(task, spec=spec, classes=both)
    network.fold_gain()
    path = tmp_path / f"{task.name}.onnx"
    return task, path, export(network, task, path)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # raised inside torch's exporter
def test_an_exported_model_stands_alone_and_gives_the_same_logits(
    network: SmallResNet, exported: tuple[Task, Path, str]
) -> None:
    _, path, digest = exported
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert len(digest) == 64
    data = path.read_bytes()
    assert b"/site-packages/" not in data
    assert str(Path(card_module.__file__).parent).encode() not in data
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
    network: SmallResNet, exported: tuple[Task, Path, str], tmp_path: Path
) -> None:
    task, _, digest = exported
    measured = Measured(
        images=10,
        auc=(0.99, 0.98),
        pointing=(0.9, 0.8),
        iou=(0.5, 0.4),
        full_scale=1.5,
        threshold=0.6,
        false_area=0.0001,
    )
    file = tmp_path / "phantom-ct-head.yaml"
    file.write_text(card_text(network, "ct-head", task, measured, digest))
    card, _ = parse(file, ModelCard)
    assert card.sha256 == digest
    assert card.inputs == (task.spec,)
    assert card.calibrated is False
    assert "Not for diagnosis" in card.intended_use
    assert (card.heatmap.full_scale, card.heatmap.threshold) == (1.5, 0.6)
    assert card.performance["other"] == "AUC 0.980, pointing game 0.80, mean IoU 0.40"
