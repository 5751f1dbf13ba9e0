"""Ready to accepted by the PACS: 100 chest radiographs through all roles, one after the other."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from dicom_xai.demo.phantom import CHEST_FINDINGS, chest
from dicom_xai.demo.site import Site
from dicom_xai.pipeline import PREDICTION_ONLY
from tests.bench.memory import peak_mb
from tests.bench.timing import percentile

STUDIES = 100
TIMEOUT_S = 60.0
MATRIX = (2500, 2000)


@dataclass(frozen=True, slots=True)
class Triaged:
    """What the ledger says of a study that its PACS holds the answer to.

    Attributes
    ----------
    seconds : dict
        Of each stage, of `deliver`, and of `triage` from ready to accepted.
    has_map : bool
        False where the deadline left time for the prediction alone.
    """

    seconds: dict[str, float]
    has_map: bool


def run(folder: Path) -> Table:
    """Percentiles of triage latency and of each stage, and how many were answered without a map."""
    table = Table(title=f"{STUDIES} DX studies of {MATRIX[0]} x {MATRIX[1]}, ms, budget 2000")
    for heading in ("part", "p50", "p95", "p99", "max"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    rng = np.random.default_rng(7)
    parts: dict[str, list[float]] = {}
    without_map = 0
    with Site(folder / "site") as site:
        for number in range(STUDIES):
            findings = {CHEST_FINDINGS[number % len(CHEST_FINDINGS)]} if number % 4 else set()
            phantom = chest(rng, findings=findings, matrix=MATRIX)
            site.send(phantom.files)
            triaged = wait_for_triage(site, str(phantom.datasets[0].StudyInstanceUID))
            without_map += not triaged.has_map
            for name, seconds in triaged.seconds.items():
                parts.setdefault(name, []).append(seconds)
        peak = peak_mb(site.pid)
    for name, values in parts.items():
        cells = [percentile(values, p) * 1e3 for p in (50, 95, 99, 100)]
        table.add_row(name, *(f"{cell:.0f}" for cell in cells))
    table.caption = f"{without_map} without a map; peak memory of all processes {peak:.0f} MB"
    return table


def wait_for_triage(site: Site, study_instance_uid: str) -> Triaged:
    """The study's first answer, once the PACS holds its objects."""
    ledger = site.ledger()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            for row in ledger.views.study(study_instance_uid):
                if row["triage_s"] is not None:
                    stages = json.loads(str(row["stages"]))
                    ends = {name: float(str(row[f"{name}_s"])) for name in ("deliver", "triage")}
                    has_map = row["explainer"] not in ("", PREDICTION_ONLY)
                    return Triaged({**stages, **ends}, has_map)
            time.sleep(0.01)
    finally:
        ledger.close()
    raise AssertionError(f"a study was not triaged in {TIMEOUT_S:g} s; see {site.log}")
