"""The heatmap is right, not only present: on phantoms whose lesions are known, pixel by pixel.

Fresh phantoms go through the product's own decode, the one ONNX Runtime run and the mapping back to
the source. The maximum of a true class's map must lie in its lesion (pointing game, Zhang et al.
2018), and the thresholded region must overlap it (intersection over union). With the weights of the
same model shuffled, both fall to chance: the maps come from what the model learnt (sanity check,
Adebayo et al. 2018).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from dicom_xai.config import ModelCard, parse
from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.normalize import stack_inputs
from dicom_xai.decode.pixels import decode
from dicom_xai.demo.phantom import CHEST_FINDINGS, HAEMORRHAGE, chest, head_ct, to_bytes
from dicom_xai.explain import EXPLAINERS
from dicom_xai.explain.heatmap import explain, to_source
from dicom_xai.explain.served import ServedModel
from dicom_xai.infer.session import Device
from dicom_xai.study import Frame, Instance, Sender

#: 170 radiographs and 30 head CT series: 200 phantoms that no training saw (other seeds).
RADIOGRAPHS, SERIES, SLICES = 170, 30, 8
SEED = 911
#: Floors well under what the cards report, so that chance in 200 phantoms does not decide.
POINTING_FLOOR = 0.9
IOU_FLOOR = 0.4
#: Shuffled weights may point into a lesion by luck: its share of the body, with a margin.
POINTING_CHANCE = 0.2
IOU_CHANCE = 0.05


@dataclass(frozen=True)
class Scores:
    """Means over all maps of classes that are truly there."""

    pointing: float
    iou: float
    maps: int


@pytest.fixture(scope="module")
def cases() -> dict[str, list[tuple[Frame, dict[str, NDArray[np.bool_]]]]]:
    """Frames with the truth of each class, by model."""
    return {"phantom-cxr": list(_radiographs()), "phantom-ct-head": list(_slices())}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phantom-cxr", "phantom-ct-head"])
def test_maps_point_at_the_lesion_and_those_of_shuffled_weights_do_not(
    name: str, cases: dict[str, list[tuple[Frame, dict[str, NDArray[np.bool_]]]]], tmp_path: Path
) -> None:
    learnt = _card(name)
    shuffled = _shuffled(learnt, tmp_path)
    good, bad = _scores(learnt, cases[name]), _scores(shuffled, cases[name])
    print(f"{name}: learnt {good}, shuffled {bad}")
    assert good.maps >= 60
    assert good.pointing >= POINTING_FLOOR
    assert good.iou >= IOU_FLOOR
    assert bad.pointing <= POINTING_CHANCE
    assert bad.iou <= IOU_CHANCE


def _scores(card: ModelCard, cases: list[tuple[Frame, dict[str, NDArray[np.bool_]]]]) -> Scores:
    model = ServedModel(card, Device("cpu"), [EXPLAINERS["grad-cam"]], len(card.classes), 2)
    hits, ious = [], []
    for frame, truth in cases:
        images, placements = stack_inputs((frame,), card.inputs[0])
        prediction = model.predict(images, placements, "grad-cam")
        findings = explain(prediction, card, len(card.classes), "grad-cam", "").findings
        for finding in findings:
            lesion = truth[finding.name]
            if not lesion.any():
                continue
            assert finding.attribution is not None
            heat = to_source(finding.attribution.heat[0], placements[0]).numpy()
            hits.append(bool(lesion.flat[int(heat.argmax())]))
            region = heat >= finding.attribution.threshold
            ious.append(float((region & lesion).sum() / (region | lesion).sum()))
    return Scores(float(np.mean(hits)), float(np.mean(ious)), len(hits))


def _radiographs() -> Iterator[tuple[Frame, dict[str, NDArray[np.bool_]]]]:
    rng = np.random.default_rng(SEED)
    for number in range(RADIOGRAPHS):
        phantom = chest(
            rng, findings={CHEST_FINDINGS[number % len(CHEST_FINDINGS)]}, matrix=(640, 576)
        )
        yield _frame(to_bytes(phantom.datasets[0])), {k: v[0] for k, v in phantom.truth.items()}


def _slices() -> Iterator[tuple[Frame, dict[str, NDArray[np.bool_]]]]:
    rng = np.random.default_rng(SEED)
    for _ in range(SERIES):
        phantom = head_ct(rng, slices=SLICES, haemorrhage=True)
        for index, ds in enumerate(phantom.datasets):
            if phantom.truth[HAEMORRHAGE][index].sum() >= 64:  # not the last trace of a lesion
                yield _frame(to_bytes(ds)), {HAEMORRHAGE: phantom.truth[HAEMORRHAGE][index]}


def _frame(data: bytes) -> Frame:
    instance = Instance("1.2", "1.2", "1.2", "1.2", "1.2", "", "", 0, Sender("", "", ""))
    return to_frames(instance, decode(data), torch.device("cpu"))[0]


def _card(name: str) -> ModelCard:
    folder = Path(str(resources.files("dicom_xai"))) / "bundled" / "models"
    card, _ = parse(folder / f"{name}.yaml", ModelCard)
    return card.model_copy(update={"file": (folder / card.file).resolve()})


def _shuffled(card: ModelCard, folder: Path) -> ModelCard:
    """The same model with each weight tensor's values in random order."""
    model = onnx.load(card.file)
    rng = np.random.default_rng(SEED)
    for item in model.graph.initializer:
        values = numpy_helper.to_array(item)
        if values.ndim >= 2 and values.dtype == np.float32:
            mixed = rng.permutation(values.reshape(-1)).reshape(values.shape)
            item.CopyFrom(numpy_helper.from_array(mixed, item.name))
    path = folder / card.file.name
    onnx.save(model, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return card.model_copy(update={"file": path, "sha256": digest})
