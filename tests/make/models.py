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

from dicom_xai.demo.networks import SmallResNet
from dicom_xai.demo.train import TASKS, Task, export

#: Lower than any score and any map value of these models; higher than any of their scores.
_ALWAYS, _NEVER = 1e-9, 0.99999


def write_models(folder: Path) -> Path:
    """Write ``phantom-cxr`` and ``phantom-ct-head``, which find everything, and ``blind-cxr``.

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


def _export(task: Task, path: Path) -> str:
    torch.manual_seed(7)
    model = SmallResNet(len(task.classes)).eval()
    model.gain = 1.0  # small weights: no score comes near 1
    with torch.no_grad():
        # with positive weights over features that are never negative no map is empty
        model.head.weight.abs_()
    with warnings.catch_warnings():
        # torch's exporter uses its own deprecated parts
        warnings.simplefilter("ignore", FutureWarning)
        return export(model, task, path)


def _write_card(
    folder: Path, name: str, task: Task, digest: str, threshold: float, layer: str = "auto"
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
    output = {"name": "logits", "kind": "classification", "activation": "sigmoid"}
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
