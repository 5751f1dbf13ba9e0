"""The heatmap is right, not only present: on phantoms whose lesions are known, pixel by pixel.

Fresh phantoms go through the product's own decode, the one ONNX Runtime run and the mapping back to
the source, volumes voxel by voxel. The maximum of a true class's map must lie in its lesion
(pointing game, Zhang et al. 2018), and the thresholded region must overlap it (intersection over
union). With the weights of the same model shuffled, both fall to chance: the maps come from what
the model learnt (sanity check, Adebayo et al. 2018).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from dicom_xai.config import ModelCard, StackRule, parse
from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.geometry import attach, stack
from dicom_xai.decode.normalize import model_inputs
from dicom_xai.decode.pixels import decode
from dicom_xai.decode.planes import planes_of
from dicom_xai.demo.phantom import (
    CHEST_FINDINGS,
    HAEMORRHAGE,
    Phantom,
    chest,
    head_ct,
    to_bytes,
)
from dicom_xai.explain import EXPLAINERS
from dicom_xai.explain.heatmap import explain
from dicom_xai.explain.mapping import to_source
from dicom_xai.explain.served import ServedModel
from dicom_xai.infer.session import Device
from dicom_xai.study import Geometry, Instance, Sender, Volume

#: 170 radiographs and 30 head CT series: 200 phantoms that no training saw (other seeds). 60 more
#: series, of more slices, are judged as volumes.
RADIOGRAPHS, SERIES, SLICES = 170, 30, 8
VOLUMES, VOLUME_SLICES = 60, 24
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


#: A unit and, for each class, ``(frames, rows, columns)`` bool.
Case = tuple[Volume, dict[str, NDArray[np.bool_]]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phantom-cxr", "phantom-ct-head", "phantom-ct-3d"])
def test_maps_point_at_the_lesion_and_those_of_shuffled_weights_do_not(
    name: str, tmp_path: Path
) -> None:
    made = {"phantom-cxr": _radiographs, "phantom-ct-head": _slices, "phantom-ct-3d": _volumes}
    cases = list(made[name]())
    learnt = _card(name)
    shuffled = _shuffled(learnt, tmp_path)
    good, bad = _scores(learnt, cases), _scores(shuffled, cases)
    print(f"{name}: learnt {good}, shuffled {bad}")
    assert good.maps >= 60
    assert good.pointing >= POINTING_FLOOR
    assert good.iou >= IOU_FLOOR
    assert bad.pointing <= POINTING_CHANCE
    assert bad.iou <= IOU_CHANCE


def _scores(card: ModelCard, cases: list[Case]) -> Scores:
    model = ServedModel(card, Device("cpu"), [EXPLAINERS["grad-cam"]], len(card.classes), 2)
    hits, ious = [], []
    for volume, truth in cases:
        inputs = model_inputs(volume, card.inputs[0])
        prediction = model.predict(inputs, "grad-cam")
        findings = explain(prediction, card, len(card.classes), "grad-cam", "").findings
        for finding in findings:
            lesion = truth[finding.name]
            if not lesion.any():
                continue
            assert finding.attribution is not None
            every = range(len(volume.frames))
            heat = to_source(finding.attribution.heat, inputs.placements, every).numpy()
            hits.append(bool(lesion.flat[int(heat.argmax())]))
            region = heat >= finding.attribution.threshold
            ious.append(float((region & lesion).sum() / (region | lesion).sum()))
    return Scores(float(np.mean(hits)), float(np.mean(ious)), len(hits))


def _radiographs() -> Iterator[Case]:
    rng = np.random.default_rng(SEED)
    for number in range(RADIOGRAPHS):
        finding = CHEST_FINDINGS[number % len(CHEST_FINDINGS)]
        phantom = chest(rng, findings={finding}, matrix=(640, 576))
        yield _volume(phantom, [0]), dict(phantom.truth)


def _slices() -> Iterator[Case]:
    rng = np.random.default_rng(SEED)
    for _ in range(SERIES):
        phantom = head_ct(rng, slices=SLICES, haemorrhage=True)
        for index, mask in enumerate(phantom.truth[HAEMORRHAGE]):
            if mask.sum() >= 64:  # not the last trace of a lesion
                yield _volume(phantom, [index]), {HAEMORRHAGE: mask[None]}


def _volumes() -> Iterator[Case]:
    rng = np.random.default_rng(SEED + 1)
    for _ in range(VOLUMES):
        phantom = head_ct(rng, slices=VOLUME_SLICES, haemorrhage=True, matrix=256)
        yield _volume(phantom, range(VOLUME_SLICES)), dict(phantom.truth)


def _volume(phantom: Phantom, chosen: Sequence[int]) -> Volume:
    """Some of a phantom's images, in their own order, which is that of their positions."""
    frames, planes = [], []
    for ds in (phantom.datasets[index] for index in chosen):
        uids = (ds.SOPInstanceUID, ds.SOPClassUID, ds.SeriesInstanceUID, ds.StudyInstanceUID)
        instance = Instance(*map(str, uids), "", "", "", 0, Sender("", "", ""))
        frames += to_frames(instance, decode(to_bytes(ds)), torch.device("cpu"))
        planes += planes_of(instance, ds)
    if len(frames) == 1:
        return Volume(tuple(frames), Geometry())
    return attach(stack(planes, StackRule()), frames)


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
