"""The compiled graphs on CUDA beside the CPU: the same maps, no added node left behind, and times.

Networks and exports are those of `tests/contract/test_vjp_networks.py`; FULL_GRID=1 runs them all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

from dicom_xai.autodiff import METHODS, compile
from dicom_xai.errors import ConfigError
from dicom_xai.infer.session import CPU_PROVIDER, CUDA_PROVIDER, Device, Session
from tests.contract.test_vjp_networks import CASES, network
from tests.make.networks import exported

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
CPU, CUDA = Device("cpu"), Device("cuda:0")

PREDICTION = 1e-4
"""Relative to the largest score: float32 without TF32, sums in another order."""

MAP = 1e-2
"""Of the map's norm: the same, and now and then a ReLU or a maximum that falls the other way."""

UNSTABLE = 5e-2
"""The same where something is divided by what may be near 0, or a component found by iteration."""


def tolerance(method: str) -> float:
    is_unstable = method.startswith(("lrp", "eigen", "deep-taylor", "grad-cam++"))
    return UNSTABLE if is_unstable else MAP


def on(
    device: Device, model: onnx.ModelProto, x: torch.Tensor
) -> tuple[Session, dict[str, torch.Tensor]]:
    """The session and its outputs, brought to the CPU."""
    session = Session(model.SerializeToString(), device, 1)
    feeds = {"image": x.to(device.torch), "target": torch.tensor([1, 0], device=device.torch)}
    return session, {name: tensor.cpu() for name, tensor in session.run(feeds).items()}


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference, as a part of the norm."""
    norm = wanted.norm().item()
    return (found - wanted).norm().item() / norm if norm else found.norm().item()


@pytest.mark.parametrize(("name", "export"), CASES, ids=lambda item: str(item))
def test_every_method_gives_the_cpus_map_and_stays_on_the_device(
    name: str, export: tuple[str, int]
) -> None:
    model, x = network(name)
    plain = exported(model, x, *export)
    seen, wrong = 0, []
    for method in METHODS:
        try:
            compiled = compile(plain, method, box=(-6.0, 6.0))
        except ConfigError:
            continue  # which method applies where is the README's table, kept true elsewhere
        seen += 1
        _, wanted = on(CPU, compiled.model, x)
        session, found = on(CUDA, compiled.model, x)
        taken = session.nodes_by_provider(compiled.report.on_device)
        if taken.get(CPU_PROVIDER) or not taken.get(CUDA_PROVIDER):
            wrong.append(f"{method}: the added nodes are on {taken}")
        scores = (found["scores"] - wanted["scores"]).abs().max() / wanted["scores"].abs().max()
        if scores > PREDICTION:
            wrong.append(f"{method}: the prediction is {scores:.1e} off")
        apart = far(found["attribution"], wanted["attribution"])
        if not apart <= tolerance(method):
            wrong.append(f"{method}: the map is {apart:.1e} off")
    assert seen
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_times_by_method_and_model_are_recorded() -> None:
    """In a process of its own, where TF32 is as the service has it."""
    free = {name: value for name, value in os.environ.items() if name != "NVIDIA_TF32_OVERRIDE"}
    command = [sys.executable, "-m", "tests.gpu.times", CUDA.name]
    done = subprocess.run(command, cwd=ROOT, env=free, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    device = torch.cuda.get_device_name(CUDA.index)
    assert device in (ROOT / "tests/gpu/RESULTS.md").read_text()
