"""A mixed hour of a hospital at 20 times its speed: latency by priority and kind of study."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.uid import MRImageStorage, UltrasoundImageStorage
from rich.table import Table

from dicom_xai.demo.phantom import CHEST_FINDINGS, chest, head_ct
from dicom_xai.demo.site import ROUTINE, STAT, Site
from tests.bench.memory import peak_mb
from tests.bench.series import renamed
from tests.bench.timing import percentile
from tests.bench.triage import wait_for_triage
from tests.make.studies import changed

#: Studies of each kind in the hour.
MIX = {"X-ray": 120, "US": 50, "CT": 30, "MR": 25}
SPEED = 20
#: This part of the X-rays comes from the emergency department.
STAT_PART = 0.2
SENDERS = 6

#: Nothing clinical: ultrasound and MR go to the bundled models for the load that they make.
ROUTES = """
match: all
routes:
  - name: x-ray
    when: {Modality: {in: [DX, US]}, called_ae_title: {equals: DICOM_XAI}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs]}, {object: seg, to: [pacs]}]
  - name: x-ray-stat
    when: {Modality: {in: [DX]}, called_ae_title: {equals: DICOM_XAI_STAT}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    priority: stat
    send: [{object: sc, to: [pacs]}, {object: seg, to: [pacs]}]
  - name: series
    when: {Modality: {in: [CT, MR]}}
    trigger: association_release
    model: phantom-ct-head
    explain: [grad-cam]
    send: [{object: sc, to: [pacs], slices: 3}, {object: seg, to: [pacs]}]
"""


def run(folder: Path) -> Table:
    """Percentiles of ready to accepted, ms."""
    total_s = 3600 / SPEED
    table = Table(
        title=f"a mixed hour in {total_s:.0f} s: ready to accepted by the PACS, ms, budget 2000"
    )
    for heading in ("studies", "number", "p50", "p95", "p99", "max", "no map"):
        table.add_column(heading, justify="left" if heading == "studies" else "right")
    rng = np.random.default_rng(7)
    examples = _examples(rng)
    plan = sorted(
        (float(rng.uniform(0, total_s)), kind, kind == "X-ray" and bool(rng.random() < STAT_PART))
        for kind, number in MIX.items()
        for _ in range(number)
    )
    latencies: dict[str, list[float]] = {}
    without_map: Counter[str] = Counter()
    with Site(folder / "site", routes=ROUTES) as site, ThreadPoolExecutor(SENDERS) as senders:
        started = time.monotonic()
        sent = []
        for at, kind, is_stat in plan:
            files = renamed(examples[kind][int(rng.integers(len(examples[kind])))])
            time.sleep(max(0.0, started + at - time.monotonic()))
            senders.submit(site.send, files, STAT if is_stat else ROUTINE)
            sent.append((kind, is_stat, files[0]))
        for kind, is_stat, file in sent:
            uid = str(dcmread(BytesIO(file), stop_before_pixels=True).StudyInstanceUID)
            triaged = wait_for_triage(site, uid)
            for name in ("STAT" if is_stat else "routine", kind):
                latencies.setdefault(name, []).append(triaged.seconds["triage"])
                without_map[name] += not triaged.has_map
        peak = peak_mb(site.pid)
    for name in ("STAT", "routine", *MIX):
        values = latencies[name]
        cells = [percentile(values, p) * 1e3 for p in (50, 95, 99, 100)]
        times = (f"{cell:.0f}" for cell in cells)
        table.add_row(name, str(len(values)), *times, str(without_map[name]))
    table.caption = f"peak memory of all processes together {peak:.0f} MB"
    return table


def _examples(rng: np.random.Generator) -> dict[str, list[Sequence[bytes]]]:
    """A few studies of each kind; each is sent again and again under new UIDs."""
    finding = {CHEST_FINDINGS[0]}
    x_rays = [chest(rng, findings=finding, matrix=(2500, 2000)).files for _ in range(2)]
    ultrasound = chest(rng, findings=finding, matrix=(768, 1024)).files
    heads = [head_ct(rng, slices=count, matrix=512, haemorrhage=True).files for count in (100, 300)]
    brain = head_ct(rng, slices=60, matrix=256, haemorrhage=False).files
    return {
        "X-ray": x_rays,
        "US": [[changed(f, Modality="US", SOPClassUID=UltrasoundImageStorage) for f in ultrasound]],
        "CT": heads,
        "MR": [[changed(f, Modality="MR", SOPClassUID=MRImageStorage) for f in brain]],
    }
