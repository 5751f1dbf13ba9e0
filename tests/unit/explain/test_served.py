"""A loaded model proves itself, or is refused."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from dicom_xai.errors import ModelCardError, StudyError
from dicom_xai.explain import EXPLAINERS
from dicom_xai.explain.served import ServedModel
from dicom_xai.infer.session import Device, Session
from dicom_xai.study import Inputs, Placement

CPU = Device("cpu")
GRAD_CAM = [EXPLAINERS["grad-cam"]]


@pytest.fixture(scope="module")
def served(cxr_card) -> ServedModel:
    return ServedModel(cxr_card, CPU, GRAD_CAM, 3, 1)


def images(served: ServedModel, count: int) -> Inputs:
    generator = torch.Generator().manual_seed(5)
    size = served.card.inputs[0].size
    return Inputs(
        images=torch.rand((count, 1, *size), generator=generator),
        placements=(Placement((256, 256), (256, 256)),) * count,
        inside=torch.ones((count, *size), dtype=torch.bool),
        cell_ml=None,
    )


def part(inputs: Inputs, chosen: slice) -> Inputs:
    return Inputs(
        inputs.images[chosen], inputs.placements[chosen], inputs.inside[chosen], inputs.cell_ml
    )


def test_the_prediction_is_bit_identical_to_the_plain_models(served):
    test = served.self_tests["grad-cam"]
    assert test.is_bit_identical
    assert test.largest_difference == 0
    assert set(test.backward_nodes) == {"CPUExecutionProvider"}
    plain = Session(onnx.load(served.card.file).SerializeToString(), CPU, 1)
    batch = images(served, served.costs.batch_size("grad-cam"))
    expected = torch.sigmoid(plain.run({"image": batch.images})["logits"]).numpy()
    found = served.predict(batch, "grad-cam")
    assert np.array_equal(found.scores, expected)


def test_one_run_gives_scores_maps_and_the_class_each_map_explains(served):
    found = served.predict(images(served, 2), "grad-cam")
    assert found.scores.shape == (2, 3)
    assert found.raw_maps.shape[:2] == (2, 3)
    assert sorted(found.target_classes[0]) == [0, 1, 2]
    assert float(found.raw_maps.min()) >= 0


def test_a_long_series_is_run_in_batches_with_the_same_answer_for_each_image(served):
    batch = images(served, served.costs.batch_size("grad-cam") + 3)
    together = served.predict(batch, "grad-cam")
    alone = served.predict(part(batch, slice(-1, None)), "grad-cam")
    # another batch size may block convolutions differently: last bits of float32
    assert np.allclose(together.scores[-1], alone.scores[0], atol=1e-6)
    assert torch.allclose(together.raw_maps[-1], alone.raw_maps[0], rtol=1e-4, atol=1e-7)


def test_it_gives_way_after_each_run_on_the_device(served):
    size = served.costs.batch_size("")
    run = served.batches([images(served, 2 * size + 1)], "")
    assert list(run) == [size, 2 * size, 2 * size + 1]


def test_units_that_share_runs_get_each_its_own_answer(served):
    whole = images(served, 7)
    units = [part(whole, slice(0, 1)), part(whole, slice(1, 6)), part(whole, slice(6, 7))]
    run = served.batches(units, "grad-cam")
    try:
        while True:
            next(run)
    except StopIteration as end:
        together = end.value
    for unit, found in zip(units, together, strict=True):
        alone = served.predict(unit, "grad-cam")
        # another batch size may block convolutions differently: last bits of float32
        assert np.allclose(found.scores, alone.scores, atol=1e-6)
        assert np.array_equal(found.target_classes, alone.target_classes)
        assert torch.allclose(found.raw_maps, alone.raw_maps, rtol=1e-4, atol=1e-7)
        assert found.placements == unit.placements


def test_a_prediction_without_explanation_has_no_maps(served):
    found = served.predict(images(served, 2), "")
    assert found.raw_maps is None
    assert found.target_classes.shape == (2, 0)


@pytest.mark.promise("C6")
def test_values_that_are_not_finite_fail_the_study(served):
    broken = images(served, 1)
    broken.images[0, 0, 0, 0] = float("nan")
    with pytest.raises(StudyError, match="not finite"):
        served.predict(broken, "grad-cam")


@pytest.mark.promise("G2")
def test_a_changed_file_is_refused_with_both_hashes(cxr_card, tmp_path):
    model = onnx.load(cxr_card.file)
    item = model.graph.initializer[0]
    values = numpy_helper.to_array(item).copy()
    values.flat[0] += 1
    item.CopyFrom(numpy_helper.from_array(values, item.name))
    path = tmp_path / cxr_card.file.name
    onnx.save(model, path)
    changed = cxr_card.model_copy(update={"file": path})
    with pytest.raises(ModelCardError, match=hashlib.sha256(path.read_bytes()).hexdigest()):
        ServedModel(changed, CPU, GRAD_CAM, 1)


def test_a_graph_whose_prediction_differs_is_refused(cxr_card, monkeypatch):
    whole = EXPLAINERS["grad-cam"].explain

    class Tampering:
        name = "grad-cam"

        def explain(self, model, targets):
            graph = whole(model, targets)
            proto = onnx.load_model_from_string(graph.data)
            for item in proto.graph.initializer:
                values = numpy_helper.to_array(item)
                if values.ndim == 2:  # the head's weights
                    item.CopyFrom(numpy_helper.from_array(values * np.float32(1.001), item.name))
            return dataclasses.replace(graph, data=proto.SerializeToString())

    with pytest.raises(ModelCardError, match="prediction changed by"):
        ServedModel(cxr_card, CPU, [Tampering()], 1)


def test_costs_are_measured_for_one_image(served):
    assert set(served.costs.runs_s) == {"", "grad-cam"}
    assert all(0 < served.costs.seconds(name, 3) < 10 for name in served.costs.runs_s)
