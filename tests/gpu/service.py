"""Ready to accepted with DenseNet-121 on the GPU: `python -m tests.gpu.service`.

The two targets: radiographs at 1024 x 1024 with p99 at most 0.3 s, and a CT of 300 slices, every
slice explained, within 2.0 s. Appends to RESULTS.md under the device's name.
"""

from __future__ import annotations

import argparse
import datetime
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from pydicom import dcmread
from pydicom.filebase import DicomBytesIO

from dicom_xai.demo.phantom import CHEST_FINDINGS, chest, head_ct
from dicom_xai.demo.site import Site
from dicom_xai.infer.session import CUDA_PROVIDER, Device
from tests.bench.memory import peak_mb
from tests.bench.series import MATRIX, renamed
from tests.bench.timing import percentile
from tests.bench.triage import MATRIX as RADIOGRAPH
from tests.bench.triage import wait_for_triage
from tests.make.models import write_densenets

RESULTS = Path(__file__).with_name("RESULTS.md")
WARM = 2


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of study, how often it is sent, and the target."""

    name: str
    files: Sequence[bytes]
    studies: int
    target: str


def main() -> None:
    """Measure on the GPU and append one section; anywhere else print what it would say."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.service")
    parser.add_argument("--radiographs", type=int, default=100)
    parser.add_argument("--series", type=int, default=20)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--sides", type=int, nargs=2, default=(1024, 512))
    asked = parser.parse_args()
    rng = np.random.default_rng(7)
    loads = [
        Load(
            f"DX {RADIOGRAPH[0]} x {RADIOGRAPH[1]}, model at {asked.sides[0]}",
            chest(rng, findings={CHEST_FINDINGS[0]}, matrix=RADIOGRAPH).files,
            asked.radiographs,
            "p99 300",
        ),
        Load(
            f"CT {asked.slices} x {MATRIX} x {MATRIX}, model at {asked.sides[1]}",
            head_ct(rng, slices=asked.slices, matrix=MATRIX, haemorrhage=True).files,
            asked.series,
            "p95 2000",
        ),
    ]
    with tempfile.TemporaryDirectory(prefix="dicom-xai-gpu-") as folder:
        models = write_densenets(Path(folder) / "models", *asked.sides)
        with Site(Path(folder) / "site", models=models, routes=ROUTES) as site:
            device, provider = _runs_on(site)
            rows = [_row(site, load) for load in loads]
            peak = peak_mb(site.pid)
    text = _section(device, rows, peak)
    if provider == CUDA_PROVIDER:
        with RESULTS.open("a") as file:
            file.write(text)
    else:
        print(f"not recorded: the models run on {provider}\n{text}")


ROUTES = """
match: all
routes:
  - name: x-ray
    when: {Modality: {in: [DX]}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}, {object: seg, to: [pacs]}]
  - name: series
    when: {Modality: {in: [CT]}}
    trigger: association_release
    model: phantom-ct-head
    explain: [grad-cam]
    send: [{object: sc, to: [pacs], slices: 3}, {object: seg, to: [pacs]}]
"""


def _runs_on(site: Site) -> tuple[str, str]:
    """The device's name and the provider that every model runs on, as the service tells."""
    text = site.http("metrics")[1]
    told = re.findall(r"^dicom_xai_device_info\{(.*)\} 1\.0$", text, re.MULTILINE)
    labels = [dict(re.findall(r'(\w+)="([^"]*)"', each)) for each in told]
    [(name, provider)] = {(each["device"], each["provider"]) for each in labels}
    device = Device(name)
    if device.kind != "cuda":
        return name, provider
    import torch  # names the device

    return str(torch.cuda.get_device_name(device.index)), provider


def _row(site: Site, load: Load) -> str:
    """A line of the table; milliseconds."""
    latencies, without_map = [], 0
    for number in range(WARM + load.studies):
        files = renamed(load.files)
        site.send(files)
        header = dcmread(DicomBytesIO(files[0]), stop_before_pixels=True)
        triaged = wait_for_triage(site, str(header.StudyInstanceUID))
        if number >= WARM:
            latencies.append(triaged.seconds["triage"] * 1e3)
            without_map += not triaged.has_map
    cells = [f"{percentile(latencies, p):.0f}" for p in (50, 95, 99, 100)]
    return " | ".join(["", load.name, str(load.studies), *cells, str(without_map), load.target, ""])


def _section(device: str, rows: Sequence[str], peak: float) -> str:
    day = datetime.datetime.now(datetime.UTC).date()
    lines = [
        f"\n## {device}, the service, {day}, ONNX Runtime {onnxruntime.__version__}\n",
        "Ready to accepted by the PACS, ms; DenseNet-121 with random weights, Grad-CAM, one study "
        f"at a time; peak memory of all processes {peak:.0f} MB.\n",
        "| study | number | p50 | p95 | p99 | max | without a map | target |",
        "|---|---|---|---|---|---|---|---|",
        *(row.strip() for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
