"""The pipeline on CUDA beside the CPU, file to DICOM object, and the latencies of the service."""

from __future__ import annotations

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from pydicom import dcmread

from dicom_xai.config import ModelCard, parse
from dicom_xai.infer.session import Device
from dicom_xai.pipeline import Outcome
from dicom_xai.service.files import explain_files
from tests.make.models import write_models
from tests.make.studies import a_head, a_radiograph

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
CPU, CUDA = Device("cpu"), Device("cuda:0")

SCORE = 1e-3
"""Sums in another order, and TF32 as the service has it: 10 bits of each factor."""

GREY = 1.0
"""Mean difference of a picture's values: heat, and its colour, rounded the other way."""

REGION = 0.01
"""Part of a region's pixels that may fall on the other side of the threshold."""


def made_on(device: Device, card: ModelCard, files: list[Path]) -> Outcome:
    """What comes of the one unit that the files are."""
    [unit] = explain_files(files, card, device, "grad-cam")
    assert unit.outcome is not None, unit.reason
    return unit.outcome


@pytest.mark.parametrize("name", ["phantom-cxr", "phantom-ct-head", "phantom-ct-3d"])
def test_a_study_gives_the_cpus_objects(name: str, tmp_path: Path) -> None:
    models = write_models(tmp_path / "models")
    card, _ = parse(models / f"{name}.yaml", ModelCard)
    card = card.model_copy(update={"file": models / card.file})
    phantom = a_radiograph() if name == "phantom-cxr" else a_head(24)
    files = [tmp_path / f"{number}.dcm" for number in range(len(phantom.files))]
    for path, file in zip(files, phantom.files, strict=True):
        path.write_bytes(file)
    wanted, found = made_on(CPU, card, files), made_on(CUDA, card, files)
    pairs = zip(found.explanation.findings, wanted.explanation.findings, strict=True)
    for mine, theirs in pairs:
        assert mine.name == theirs.name
        assert mine.score == pytest.approx(theirs.score, abs=SCORE)
    for made, other in zip(found.objects, wanted.objects, strict=True):
        assert made.kind is other.kind
        mine, theirs = (dcmread(BytesIO(each.file)).pixel_array for each in (made, other))
        apart = np.abs(mine.astype(np.int32) - theirs.astype(np.int32))
        assert apart.mean() <= (GREY if made.kind == "sc" else REGION)


@pytest.mark.slow
def test_the_services_latencies_are_recorded() -> None:
    """In a process of its own, where TF32 is as the service has it."""
    free = {name: value for name, value in os.environ.items() if name != "NVIDIA_TF32_OVERRIDE"}
    command = [sys.executable, "-m", "tests.gpu.service"]
    done = subprocess.run(command, cwd=ROOT, env=free, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    device = torch.cuda.get_device_name(CUDA.index)
    assert f"## {device}, the service" in (ROOT / "tests/gpu/RESULTS.md").read_text()
