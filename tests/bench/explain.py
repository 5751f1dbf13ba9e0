"""One image: bare ONNX Runtime, ours with the heatmap, and the same heatmap in torch by peers."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
from rich.table import Table

from dicom_xai import autodiff
from dicom_xai.demo.card import export
from dicom_xai.demo.tasks import TASKS, Task
from dicom_xai.infer.session import Device, Session
from tests.bench.timing import interleaved

ROUNDS = 60
#: One, for all: with more, the idle threads of one contestant spin into the time of the next.
THREADS = 1
#: Relative difference between our map and captum's above which the comparison would mean nothing.
TOLERANCE = 1e-3


def run(folder: Path) -> Table:
    """Median milliseconds and ratios for the architecture of each bundled model."""
    table = Table(title="one image, CPU, medians: prediction alone and with its Grad-CAM")
    for heading in ("model", "contestant"):
        table.add_column(heading)
    for heading in ("ms", "x bare ORT", "x ours"):
        table.add_column(heading, justify="right")
    torch.set_num_threads(THREADS)
    for task in TASKS.values():
        times = _times(task, folder)
        bare, ours = times["ONNX Runtime, prediction only"], times["ours, prediction + heatmap"]
        for contestant, seconds in times.items():
            ratios = (f"{seconds / bare:.2f}", f"{seconds / ours:.2f}")
            table.add_row(task.name, contestant, f"{seconds * 1e3:.2f}", *ratios)
    return table


def _times(task: Task, folder: Path) -> dict[str, float]:
    """Time all contestants on one network with the same weights and the same image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, MONAI's and captum's own
        from captum.attr import LayerGradCam
        from monai.visualize import GradCAM

        torch.manual_seed(1)
        twin = task.network(len(task.classes)).eval()
        path = folder / f"{task.name}.onnx"
        export(twin, task, path)
    plain_graph = onnx.load(path)
    explained_graph = autodiff.compile(plain_graph, "grad-cam", select=autodiff.TopClasses(1)).model
    device = Device("cpu")
    plain = Session(plain_graph.SerializeToString(), device, THREADS)
    ours = Session(explained_graph.SerializeToString(), device, THREADS)
    image = torch.rand((1, 1, *task.spec.size))
    feeds = {task.spec.name: image}
    top = int(twin(image).argmax())
    layer = f"body.{len(twin.body) - 1}"
    captum = LayerGradCam(twin, twin.get_submodule(layer))
    monai = GradCAM(twin, target_layers=layer)

    def by_captum() -> torch.Tensor:
        attribution: torch.Tensor = captum.attribute(image, target=top, relu_attributions=True)
        return attribution

    def by_torch() -> torch.Tensor:
        with torch.no_grad():
            prediction: torch.Tensor = twin(image)
        return prediction

    theirs, mine = by_captum().detach(), ours.run(feeds)["attribution"]
    difference = float((theirs - mine).abs().max() / theirs.abs().max().clamp(min=1e-12))
    if difference > TOLERANCE:
        raise AssertionError(
            f"{task.name}: the maps differ by {difference:.2g}: nothing to compare"
        )
    return interleaved(
        {
            "ONNX Runtime, prediction only": lambda: plain.run(feeds),
            "ours, prediction + heatmap": lambda: ours.run(feeds),
            "torch eager, prediction only": by_torch,
            "captum LayerGradCam, heatmap": by_captum,
            "MONAI GradCAM, heatmap": lambda: monai(x=image, class_idx=top),
        },
        ROUNDS,
    )
