"""A model file that is what its card says, or a clear refusal."""

from __future__ import annotations

import hashlib

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from dicom_xai.config import InputKind, ModelCard, parse
from dicom_xai.errors import ModelCardError
from dicom_xai.infer.model import LARGEST_BATCH, Model, exposing, read_model
from dicom_xai.infer.session import Device, Session
from tests.make.models import SEGMENTERS, write_segmenters

CPU = Device("cpu")


def refit(card, **changes):
    """The card with parts of its only input or output changed."""
    (given,), (output,) = card.inputs, card.outputs
    inputs = {k: v for k, v in changes.items() if k in type(given).model_fields and k != "name"}
    own = type(output).model_fields
    outputs = {k: v for k, v in changes.items() if k in own and k not in inputs}
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


def changed(card, tmp_path, change):
    """The card's model after `change`, and the card that fits its bytes."""
    model = onnx.load(card.file)
    change(model.graph)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return card.model_copy(update={"file": path, "sha256": digest})


def test_an_input_besides_the_image_is_refused_by_name(cxr_card, tmp_path):
    age = helper.make_tensor_value_info("age", TensorProto.FLOAT, ["batch", 1])
    card = changed(cxr_card, tmp_path, lambda graph: graph.input.append(age))
    with pytest.raises(ModelCardError, match=r"inputs \['age', 'image'\] in the file"):
        read_model(card)
    both = (*card.inputs, card.inputs[0].model_copy(update={"name": "age"}))
    with pytest.raises(ModelCardError, match=r"inputs \['age', 'image'\]; a model with one"):
        read_model(card.model_copy(update={"inputs": both}))


def test_a_second_output_on_the_card_is_refused_by_name(cxr_card):
    second = cxr_card.outputs[0].model_copy(update={"name": "mask"})
    with pytest.raises(ModelCardError, match=r"outputs \['logits', 'mask'\] on the card; one is"):
        read_model(cxr_card.model_copy(update={"outputs": (*cxr_card.outputs, second)}))


def test_an_output_that_the_card_does_not_name_is_left_alone(cxr_card, tmp_path):
    def add(graph):
        graph.node.append(helper.make_node("Shape", ["logits"], ["sizes"], name="sizes"))
        graph.output.append(helper.make_tensor_value_info("sizes", TensorProto.INT64, [2]))

    model = Model(changed(cxr_card, tmp_path, add), CPU, 1)
    image = torch.zeros((1, 1, *model.card.inputs[0].size))
    assert list(model.session.run({"image": image}, [model.output_name])) == ["logits"]


def test_channels_that_the_card_does_not_have_are_refused(cxr_card):
    with pytest.raises(ModelCardError, match=r"needs \[batch, 3, 256, 256\]"):
        read_model(refit(cxr_card, kind=InputKind.SLICES, neighbours=1))


@pytest.fixture(scope="module")
def segmenters(tmp_path_factory):
    folder = write_segmenters(tmp_path_factory.mktemp("segmenters"))
    cards = [parse(folder / f"{name}.yaml", ModelCard)[0] for name in SEGMENTERS]
    return {c.name: c.model_copy(update={"file": folder / c.file}) for c in cards}


@pytest.mark.parametrize("name", list(SEGMENTERS))
def test_a_segmentation_gives_a_value_for_each_cell(segmenters, name):
    model = Model(segmenters[name], CPU, 1)
    spec = model.card.inputs[0]
    image = torch.zeros((1, spec.channels, *spec.size))
    raw = model.session.run({"image": image})[model.output_name]
    assert model.scores(raw).shape == (1, 1, *spec.size)
    assert model.is_segmentation
    assert model.largest_batch == (1 if len(spec.size) == 3 else LARGEST_BATCH)


def test_a_segmentation_on_another_grid_is_refused(segmenters):
    card = segmenters["brighter-slices"]
    two = (card.classes[0], card.classes[0].model_copy(update={"name": "other"}))
    with pytest.raises(ModelCardError, match=r"2 classes need \[batch, 2, 64, 64\]"):
        read_model(refit(card, classes=two))


def test_a_volume_may_have_a_fixed_batch_of_one_and_no_other(segmenters, tmp_path):
    def fix(size):
        def change(graph):
            for item in (graph.input[0], graph.output[0]):
                item.type.tensor_type.shape.dim[0].dim_value = size

        return change

    card = segmenters["brighter-3d"]
    assert read_model(changed(card, tmp_path, fix(1))).graph.node
    with pytest.raises(ModelCardError, match="fixed batch of 2; a volume is run alone"):
        read_model(changed(card, tmp_path, fix(2)))


def test_the_channel_of_the_background_is_no_score(segmenters):
    model = Model(segmenters["brighter-slices"], CPU, 1)
    model.card = refit(model.card, activation="softmax", background=True)
    raw = torch.tensor([[[[0.0]], [[2.0]]]])
    assert model.scores(raw).flatten().tolist() == pytest.approx([0.880797], abs=1e-6)
    assert model.is_exclusive


def test_a_tensor_within_the_model_can_be_shown(cxr_card):
    model = read_model(cxr_card)
    inner = model.graph.node[0].output[0]
    session = Session(exposing(model, inner), CPU, 1)
    assert {inner, "logits"} == set(session.outputs)
    assert inner not in {item.name for item in model.graph.output}
