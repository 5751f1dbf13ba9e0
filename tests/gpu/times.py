"""Times of every method on every benchmark network: `python -m tests.gpu.times cuda:0`.

Appends to RESULTS.md under the device's name. Sessions are the service's own, TF32 included.
"""

from __future__ import annotations

import datetime
import statistics
import sys
import time
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import nn

from dicom_xai.autodiff import METHODS, TopClasses, compile
from dicom_xai.errors import ConfigError
from dicom_xai.infer.session import Device, Session
from tests.bench.compiler import Network, networks
from tests.make.networks import exported

RESULTS = Path(__file__).with_name("RESULTS.md")
WARM, ROUNDS = 3, 15
PLAIN = "plain forward"


class FirstOutput(nn.Module):
    """A network that gives its hidden states too, without them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        out = self.inner(image)
        return out[0] if isinstance(out, tuple) else out


def main(device: Device) -> None:
    """Measure all and append one section."""
    if device.kind != "cuda":
        raise SystemExit(f"{device.name} is no CUDA device; RESULTS.md holds no other times")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's own
        measured = {item.name: times(item, device) for item in networks()}
    with RESULTS.open("a") as file:
        file.write(section(torch.cuda.get_device_name(device.index), measured))


def times(network: Network, device: Device) -> dict[str, float]:
    """Median milliseconds of one image by method, and of the model alone; refused ones left out."""
    torch.manual_seed(0)
    image = torch.rand(1, 1, *network.size)
    plain = exported(FirstOutput(network.make()).eval(), image, dynamic_batch=False)
    image = image.to(device.torch)
    found = {PLAIN: median_ms(plain, image, device)}
    for method in METHODS:
        try:
            compiled = compile(plain, method, select=TopClasses(1)).model
        except ConfigError:
            continue
        found[method] = median_ms(compiled, image, device)
    return found


def median_ms(model: onnx.ModelProto, image: torch.Tensor, device: Device) -> float:
    """Milliseconds of one run, the image already on the device."""
    session, taken = Session(model.SerializeToString(), device), []
    for _ in range(WARM + ROUNDS):
        start = time.perf_counter()
        session.run({"image": image})
        if device.kind == "cuda":
            torch.cuda.synchronize(device.torch)
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken[WARM:])


def section(device: str, measured: dict[str, dict[str, float]]) -> str:
    """A heading and a table, methods down and networks across; empty where a method is refused."""
    day = datetime.datetime.now(datetime.UTC).date()
    lines = [
        f"\n## {device}, {day}, ONNX Runtime {onnxruntime.__version__}\n",
        f"One image, random weights, median milliseconds of {ROUNDS} runs (x = of the plain "
        "forward), TF32 as the service has it.\n",
        "| method | " + " | ".join(measured) + " |",
        "|---" * (len(measured) + 1) + "|",
    ]
    for method in (PLAIN, *METHODS):
        cells = [
            f"{row[method]:.2f} ({row[method] / row[PLAIN]:.2f} x)" if method in row else ""
            for row in measured.values()
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Device(sys.argv[1]))
