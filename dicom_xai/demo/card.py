"""What is committed of a trained model: its file, and the card that describes it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from dicom_xai.config import ModelInput, WindowSource
from dicom_xai.demo.measure import Measured
from dicom_xai.demo.networks import SmallResNet, multiply_adds
from dicom_xai.demo.tasks import Task


def export(model: nn.Module, task: Task, path: Path) -> str:
    """Write the model as one self-contained ONNX file and give its SHA-256."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, task.spec.channels, *task.spec.size),),
        dynamo=True,
        opset_version=18,
        input_names=[task.spec.name],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of whoever trained it
    program.model.graph.metadata_props.clear()
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def card_text(model: SmallResNet, key: str, task: Task, measured: Measured, digest: str) -> str:
    """The model card as YAML; `key` is the command's word for the task."""
    spec, window = task.spec, task.spec.windowing
    size = ", ".join(map(str, spec.size))
    windowing = {
        WindowSource.FIXED: f"source: fixed, center: {window.center}, width: {window.width}",
        WindowSource.PERCENTILE: f"source: percentile, low_percentile: {window.low_percentile}, "
        f"high_percentile: {window.high_percentile}",
        WindowSource.SOURCE: "source: source",
    }[window.source]
    flop = 2 * multiply_adds(model, spec.size) / 1e9
    lines = [
        f"# Written by: python -m dicom_xai.demo.train {key}",
        f"name: {task.name}",
        'version: "1.0"',
        f"file: {task.name}.onnx",
        f"sha256: {digest}",
        "intended_use: Demonstration on synthetic phantoms. Not for diagnosis.",
        "manufacturer: dicom_xai",
        "calibrated: false",
        "inputs:",
        f"  - name: {spec.name}",
        f"    kind: {spec.kind}",
        f"    size: [{size}]",
        *_grid_lines(spec),
        f"    windowing: {{{windowing}}}",
        f"    scaling: [{spec.scaling[0]}, {spec.scaling[1]}]",
        f"    photometric: {spec.photometric}",
        *([] if spec.grid else [f"    resize: {spec.resize}"]),
        *(["stack: {minimum_slices: 10, orientation: axial}"] if spec.grid else []),
        "outputs:",
        "  - name: logits",
        "    kind: classification",
        "    activation: sigmoid",
        "    classes:",
    ]
    for item in task.classes:
        category = "49755003, scheme: SCT, meaning: Morphologically abnormal structure"
        lines += [
            f"      - name: {item.name}",
            f"        label: {item.label}",
            "        threshold: 0.5",
            f"        category: {{value: {category}}}",
            f"        type: {{value: {item.code}, scheme: SCT, meaning: {item.meaning}}}",
        ]
    lines += [
        "heatmap:",
        f"  full_scale: {measured.full_scale:.4g}",
        f"  threshold: {measured.threshold:.4g}",
        "  layer: auto",
        "  measured: >-",
        f"    Raw Grad-CAM (ReLU of the weighted features, in logit per cell) on {measured.images}",
        "    held-out phantom images. full_scale is the 90th percentile of the maxima over maps of",
        "    true classes; threshold is the part of it, in steps of 5 %, with the best mean IoU",
        f"    with the truth; {measured.false_area:.3%} of the area of negative maps reaches it.",
        "performance:",
        f"  held-out images: {measured.images} of {task.held_out} phantoms never trained on",
        "  training: classification, and maps held to one level in the true lesions",
        f"  cost: {flop:.2f} GFLOP an image (two a multiply-add)",
    ]
    for index, item in enumerate(task.classes):
        lines.append(
            f"  {item.name}: AUC {measured.auc[index]:.3f}, pointing game "
            f"{measured.pointing[index]:.2f}, mean IoU {measured.iou[index]:.2f}"
        )
    return "\n".join(lines) + "\n"


def _grid_lines(spec: ModelInput) -> list[str]:
    if spec.grid is None:
        return []
    spacing = ", ".join(map(str, spec.grid.spacing_mm))
    align = ", ".join(spec.grid.align)
    orientation = spec.grid.orientation
    return [f"    grid: {{spacing_mm: [{spacing}], orientation: {orientation}, align: [{align}]}}"]
