"""Untrained models that behave in one known way: some find something everywhere, one never does.

They are real exports of the bundled architecture with seeded weights, so that loading, self-test
and Grad-CAM are the real ones. What they find means nothing; that they find it is certain.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from onnx import helper

from dicom_xai.config import Grid, InputKind, ModelInput, Windowing, WindowSource
from dicom_xai.demo.card import export
from dicom_xai.demo.tasks import TASKS, Task

#: Lower than any score and any map value of these models; higher than any of their scores.
_ALWAYS, _NEVER = 1e-9, 0.99999


def write_models(folder: Path) -> Path:
    """Write the bundled models' namesakes, which find everything, and ``blind-cxr``.

    The last is the first one's file with a card whose thresholds nothing reaches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS.values():
        digest = _export(task, folder / f"{task.name}.onnx")
        _write_card(folder, task.name, task, digest, _ALWAYS)
        if task is TASKS["cxr"]:
            _write_card(folder, "blind-cxr", task, digest, _NEVER)
    return folder


def write_costly_model(folder: Path) -> Path:
    """Add ``costly-ct``: for CT slices, and many times dearer to explain than to run.

    It is the chest model's file with three classes, explained at its first layer, so that three
    passes go back through nearly all of it.
    """
    chest, head = TASKS["cxr"], TASKS["ct-head"]
    path = folder / f"{chest.name}.onnx"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    first = next(node for node in onnx.load(path).graph.node if node.op_type == "Relu")
    task = replace(chest, spec=head.spec)
    _write_card(folder, "costly-ct", task, digest, _ALWAYS, layer=first.output[0])
    return folder


class DenseNet(torch.nn.Module):
    """DenseNet-121 of one channel, untrained: what a hospital's own model costs."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI's own
            from monai.networks.nets import DenseNet121
        self.net = DenseNet121(spatial_dims=2, in_channels=1, out_channels=classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits, ``(batch, classes)``."""
        out: torch.Tensor = self.net(image)
        return out


def write_densenets(folder: Path, radiograph: int = 1024, slice_: int = 512) -> Path:
    """The bundled classifiers' namesakes as DenseNet-121, for images of so many rows and columns.

    They find something everywhere, so that a picture and a region are made of every image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for key, side in (("cxr", radiograph), ("ct-head", slice_)):
        task = TASKS[key]
        sized = replace(task, spec=task.spec.model_copy(update={"size": (side, side)}))
        torch.manual_seed(7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter uses its own deprecated parts
            model = DenseNet(len(task.classes)).eval()
            digest = export(model, sized, folder / f"{task.name}.onnx")
        _write_card(folder, task.name, sized, digest, _ALWAYS)
    return folder


class Brighter(torch.nn.Module):
    """Segments what is brighter than the middle of its window: a truth that needs no training.

    The logit of each cell is `steepness` times its value's distance from 0.5, by way of two
    features, above and below.
    """

    def __init__(self, axes: int, channels: int = 1, steepness: float = 50.0) -> None:
        super().__init__()
        conv = torch.nn.Conv2d if axes == 2 else torch.nn.Conv3d
        self.features = conv(channels, 2, 1)
        self.head = conv(2, 1, 1)
        with torch.no_grad():
            self.features.weight.zero_()
            self.features.weight[:, channels // 2] = torch.tensor([1.0, -1.0]).reshape(
                2, *[1] * axes
            )
            self.features.bias.copy_(torch.tensor([-0.5, 0.5]))
            self.head.weight.copy_(torch.tensor([steepness, -steepness]).reshape(1, 2, *[1] * axes))
            self.head.bias.zero_()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits, ``(batch, 1, *size)``."""
        out: torch.Tensor = self.head(torch.relu(self.features(image)))
        return out


#: What the segmenters take: above 60 HU is bright; the head's own volume, or its slices by threes.
_BRAIN = Windowing(source=WindowSource.FIXED, center=60.0, width=80.0)
SEGMENTERS = {
    "brighter-3d": ModelInput(
        name="image",
        kind=InputKind.VOLUME3D,
        size=(24, 48, 48),
        grid=Grid(spacing_mm=(6.0, 5.0, 5.0), orientation="SPL"),
        windowing=_BRAIN,
    ),
    "brighter-slices": ModelInput(
        name="image", kind=InputKind.SLICES, size=(64, 64), neighbours=1, windowing=_BRAIN
    ),
}


def write_segmenters(folder: Path) -> Path:
    """Add the segmentation models of `SEGMENTERS`."""
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS["ct-head"]
    for name, spec in SEGMENTERS.items():
        path = folder / f"{name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = Brighter(len(spec.size), spec.channels).eval()
            digest = export(model, replace(task, spec=spec), path)
        described = replace(task, name=name, spec=spec)
        _write_card(folder, name, described, digest, 0.5, kind="segmentation")
    return folder


def write_hanging_model(folder: Path) -> Path:
    """Add ``hanging-cxr``: on an image that is nearly all white its run never ends.

    It is the chest model with a loop beside it, whose count is zero for any other image.
    """
    task = TASKS["cxr"]
    model = onnx.load(folder / f"{task.name}.onnx")
    graph = model.graph
    low, high = task.spec.scaling
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["still_on"]),
            helper.make_node("Add", ["sum", "tiny"], ["sum_on"]),
        ],
        "for_ever",
        [
            helper.make_tensor_value_info("turn", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("still_on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_on", onnx.TensorProto.FLOAT, []),
        ],
    )
    numbers = {"white": low + 0.8 * (high - low), "many": 1e15, "none": 0.0, "tiny": 1e-30}
    graph.initializer.extend(
        helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [value])
        for name, value in numbers.items()
    )
    graph.initializer.append(helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1]))
    graph.initializer.append(helper.make_tensor("yes", onnx.TensorProto.BOOL, [], [True]))
    logits = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["calm" if name == logits else name for name in node.output]
    graph.node.extend(
        [
            helper.make_node("ReduceMean", [graph.input[0].name], ["whiteness"], keepdims=0),
            helper.make_node("Sub", ["whiteness", "white"], ["over"]),
            helper.make_node("Relu", ["over"], ["above"]),
            helper.make_node("Mul", ["above", "many"], ["turns"]),
            helper.make_node("Cast", ["turns"], ["count"], to=onnx.TensorProto.INT64),
            helper.make_node("Loop", ["count", "yes", "none"], ["total"], body=body),
            helper.make_node("Reshape", ["total", "one"], ["sum_of_all"]),
            helper.make_node("Mul", ["sum_of_all", "none"], ["nothing"]),
            helper.make_node("Add", ["calm", "nothing"], [logits]),
        ]
    )
    data = model.SerializeToString()
    (folder / "hanging-cxr.onnx").write_bytes(data)
    described = replace(task, name="hanging-cxr")
    _write_card(folder, described.name, described, hashlib.sha256(data).hexdigest(), _ALWAYS)
    return folder


def _export(task: Task, path: Path) -> str:
    torch.manual_seed(7)
    model = task.network(len(task.classes)).eval()
    model.gain = 1.0  # small weights: no score comes near 1
    with torch.no_grad():
        # with positive weights over features that are never negative no map is empty
        model.head.weight.abs_()
    with warnings.catch_warnings():
        # torch's exporter uses its own deprecated parts
        warnings.simplefilter("ignore", FutureWarning)
        return export(model, task, path)


def _write_card(
    folder: Path,
    name: str,
    task: Task,
    digest: str,
    threshold: float,
    layer: str = "auto",
    kind: str = "classification",
) -> None:
    """A card in JSON, which is YAML too."""
    category = {"value": "49755003", "scheme": "SCT", "meaning": "Morphologically Abnormal"}
    classes = [
        {
            "name": item.name,
            "label": item.label,
            "threshold": f"{threshold:.9f}",
            "category": category,
            "type": {"value": item.code, "scheme": "SCT", "meaning": item.meaning},
        }
        for item in task.classes
    ]
    output = {"name": "logits", "kind": kind, "activation": "sigmoid"}
    card = {
        "name": name,
        "version": "1.0",
        "file": f"{task.name}.onnx",
        "sha256": digest,
        "intended_use": "Tests. It knows nothing.",
        "manufacturer": "dicom_xai tests",
        "calibrated": False,
        "inputs": [json.loads(task.spec.model_dump_json(exclude_none=True))],
        "outputs": [{**output, "classes": classes}],
        "heatmap": {"full_scale": 1, "threshold": f"{_ALWAYS:.9f}", "layer": layer},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(card, indent=2))
