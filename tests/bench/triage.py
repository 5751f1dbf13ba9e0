"""Ready to accepted by the PACS: 100 chest radiographs through all roles, one after the other."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from rich.table import Table

from dicom_xai.demo.phantom import CHEST_FINDINGS, chest
from dicom_xai.demo.site import Site
from tests.bench.timing import percentile

STUDIES = 100
TIMEOUT_S = 60.0
MATRIX = (2500, 2000)


def run(folder: Path) -> Table:
    """Percentiles of triage latency and of each stage."""
    table = Table(title=f"{STUDIES} DX studies of {MATRIX[0]} x {MATRIX[1]}, ms, budget 2000")
    for heading in ("part", "p50", "p95", "p99", "max"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    rng = np.random.default_rng(7)
    parts: dict[str, list[float]] = {}
    with Site(folder / "site") as site:
        for number in range(STUDIES):
            findings = {CHEST_FINDINGS[number % len(CHEST_FINDINGS)]} if number % 4 else set()
            phantom = chest(rng, findings=findings, matrix=MATRIX)
            site.send(phantom.files)
            for name, seconds in wait_for_triage(
                site, str(phantom.datasets[0].StudyInstanceUID)
            ).items():
                parts.setdefault(name, []).append(seconds)
    for name, values in parts.items():
        cells = [percentile(values, p) * 1e3 for p in (50, 95, 99, 100)]
        table.add_row(name, *(f"{cell:.0f}" for cell in cells))
    return table


def wait_for_triage(site: Site, study_instance_uid: str) -> dict[str, float]:
    """Seconds of each part of the study's only job, once the PACS holds its objects."""
    ledger = site.ledger()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            for row in ledger.views.study(study_instance_uid):
                if row["triage_s"] is not None:
                    stages = json.loads(str(row["stages"]))
                    ends = {name: float(str(row[f"{name}_s"])) for name in ("deliver", "triage")}
                    return {**stages, **ends}
            time.sleep(0.01)
    finally:
        ledger.close()
    raise AssertionError(f"a study was not triaged in {TIMEOUT_S:g} s; see {site.log}")
