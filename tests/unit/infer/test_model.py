"""A model file that is what its card says, or a clear refusal."""

from __future__ import annotations

import hashlib

import onnx
import pytest
import torch

from dicom_xai.errors import ModelCardError
from dicom_xai.infer.model import Model, read_model
from dicom_xai.infer.session import Device

CPU = Device("cpu")


def refit(card, **changes):
    """The card with parts of its only input or output changed."""
    (given,), (output,) = card.inputs, card.outputs
    inputs = {k: v for k, v in changes.items() if k in type(given).model_fields and k != "name"}
    outputs = {k: v for k, v in changes.items() if k in type(output).model_fields and k != "kind"}
    return card.model_copy(
        update={
            "inputs": (given.model_copy(update=inputs),),
            "outputs": (output.model_copy(update=outputs),),
        }
    )


def test_a_model_that_fits_its_card_is_read(cxr_card):
    assert read_model(cxr_card).graph.node


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": (128, 256)}, r"card's size \[128, 256\]"),
        ({"name": "probabilities"}, "'probabilities' on the card"),
        ({"classes": ()}, "0 classes need"),
    ],
)
def test_a_card_that_says_something_else_is_refused_with_both_sides(cxr_card, changes, words):
    with pytest.raises(ModelCardError, match=words):
        read_model(refit(cxr_card, **changes))


def test_a_missing_file_is_named(cxr_card, tmp_path):
    gone = cxr_card.model_copy(update={"file": tmp_path / "gone.onnx"})
    with pytest.raises(ModelCardError, match=r"gone\.onnx: No such file"):
        read_model(gone)


def test_bytes_that_are_no_model_are_refused(cxr_card, tmp_path):
    path = tmp_path / "noise.onnx"
    path.write_bytes(b"\x00noise" * 20)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ModelCardError, match="no valid ONNX model"):
        read_model(cxr_card.model_copy(update={"file": path, "sha256": digest}))


def test_a_fixed_batch_is_refused(cxr_card, tmp_path):
    model = onnx.load(cxr_card.file)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ModelCardError, match="fixed batch of 1"):
        read_model(cxr_card.model_copy(update={"file": path, "sha256": digest}))


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("sigmoid", [0.5, 0.880797]), ("softmax", [0.119203, 0.880797]), ("none", [0.0, 2.0])],
)
def test_scores_are_the_cards_activation_of_the_output(cxr_card, activation, expected):
    model = Model(cxr_card, CPU, 1)
    model.card = refit(cxr_card, activation=activation)
    assert model.scores(torch.tensor([[0.0, 2.0]]))[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_classes_are_ranked_from_their_own_thresholds(cxr_card):
    model = Model(cxr_card, CPU, 1)
    halves = tuple(item.model_copy(update={"threshold": 0.5}) for item in cxr_card.classes)
    model.card = refit(cxr_card, classes=halves)
    assert model.threshold_logits() == [0.0, 0.0, 0.0]
    model.card = refit(cxr_card, activation="softmax")
    assert model.threshold_logits() is None
