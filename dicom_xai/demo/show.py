"""`dicom-xai demo`: the whole flow on phantoms, and a table of what came back.

Everything lives in one new folder and in processes that are stopped in the end, also by Ctrl-C.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.uid import SegmentationStorage
from rich.console import Console
from rich.table import Table

from dicom_xai.demo.phantom import Phantom, chest, head_ct
from dicom_xai.demo.site import ROUTINE, STAT, Site
from dicom_xai.service.files import write_png

#: Longest wait for one study's results; far over the budget, so that a slow host still tells why.
TIMEOUT_S = 60.0
CT_SLICES = 40


@dataclass(frozen=True, slots=True)
class Study:
    """One study of the demonstration."""

    title: str
    make: Callable[[np.random.Generator], Phantom]
    ae_title: str = ROUTINE


STUDIES = (
    Study("DX chest, nodule", lambda rng: chest(rng, findings={"nodule"})),
    Study(
        "CR chest, two views, consolidation",
        lambda rng: chest(rng, modality="CR", findings={"consolidation"}, views=("PA", "AP")),
    ),
    Study(
        f"CT head, {CT_SLICES} slices, haemorrhage",
        lambda rng: head_ct(rng, slices=CT_SLICES, haemorrhage=True),
    ),
    Study(
        f"CT head as one volume, {CT_SLICES} slices, haemorrhage, STAT",
        lambda rng: head_ct(rng, slices=CT_SLICES, haemorrhage=True),
        STAT,
    ),
    Study("DX chest, pneumothorax, STAT", lambda rng: chest(rng, findings={"pneumothorax"}), STAT),
    Study("DX chest, negative", lambda rng: chest(rng, findings=set())),
)


def show(folder: Path | None, keep: bool, console: Console) -> int:
    """Run the demonstration; gives the exit status.

    Parameters
    ----------
    folder : Path, optional
        Takes DICOM results, pictures and metrics; a new one by default.
    keep : bool
        Go on serving until Ctrl-C.
    console : Console
    """
    results = folder or Path("demo-output") / f"{datetime.now():%Y%m%d-%H%M%S}"
    results.mkdir(parents=True, exist_ok=True)
    state = Path(tempfile.mkdtemp(prefix="dicom-xai-demo-"))
    site = Site(state)
    try:
        with _step(console, "starting the service and a stand-in PACS; loading and testing models"):
            site.start()
        in_time = list(_send_all(site, results, console))
        metrics = results / "metrics.txt"
        metrics.write_text(site.http("metrics")[1])
        console.print(f"results    {results.resolve()}", soft_wrap=True)
        console.print(f"metrics    {metrics.resolve()}", soft_wrap=True)
        if keep:
            url = f"http://127.0.0.1:{site.http_port}/metrics"
            console.print(f"           {url} (serving until Ctrl-C)", soft_wrap=True)
            while True:
                time.sleep(1)
        else:
            console.print("           `dicom-xai demo --keep` goes on serving /metrics")
        console.print("demonstration models on synthetic phantoms: not for diagnosis")
        return 0 if all(in_time) else 1
    except KeyboardInterrupt:
        console.print("stopping")
        return 0
    finally:
        site.stop()
        shutil.copy(site.log, results / "service.log")
        shutil.rmtree(state, ignore_errors=True)


def _send_all(site: Site, results: Path, console: Console) -> Iterator[bool]:
    """Send, wait, write and show one study after the other; tells whether each was in time."""
    for number, study in enumerate(STUDIES, start=1):
        with _step(console, f"study {number} of {len(STUDIES)}: {study.title}"):
            phantom = study.make(np.random.default_rng(number))  # same pixels, fresh UIDs
            before = len(site.pacs.kept)
            statuses = site.send(phantom.files, study.ae_title)
            uid = str(phantom.datasets[0].StudyInstanceUID)
            jobs = _wait_for_triage(site, uid, _expected_jobs(phantom))
            received = [kept.path.read_bytes() for kept in site.pacs.kept[before:]]
        objects = [dcmread(io.BytesIO(file)) for file in received]
        _write(results, number, received, objects)
        table, is_in_time = _report(statuses, jobs, objects)
        console.print(table)
        yield is_in_time


def _expected_jobs(phantom: Phantom) -> int:
    return 1 if phantom.datasets[0].Modality == "CT" else len(phantom.datasets)


def _wait_for_triage(site: Site, uid: str, expected: int) -> list[Mapping[str, object]]:
    """The study's jobs, once the PACS holds all of their objects or the time is over."""
    ledger = site.ledger()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            jobs = ledger.views.study(uid)
            done = [job for job in jobs if job["triage_s"] is not None]
            if len(done) >= expected or time.monotonic() > deadline:
                return list(jobs)
            time.sleep(0.02)
    finally:
        ledger.close()


def _write(results: Path, number: int, files: list[bytes], objects: list[Dataset]) -> None:
    counts: dict[str, int] = {}
    for file, ds in zip(files, objects, strict=True):
        kind = "seg" if ds.SOPClassUID == SegmentationStorage else "sc"
        counts[kind] = counts.get(kind, 0) + 1
        path = results / f"study{number}-{kind}{counts[kind]}.dcm"
        path.write_bytes(file)
        if kind == "sc":
            write_png(file, path.with_suffix(".png"))


def _report(
    statuses: list[int], jobs: list[Mapping[str, object]], objects: list[Dataset]
) -> tuple[Table, bool]:
    """One study's table, and whether it was in time; of several jobs the slowest's times."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=13)
    table.add_column()
    if any(statuses) or not jobs or any(job["triage_s"] is None for job in jobs):
        reason = next((str(job["note"]) for job in jobs if job["note"]), "no result in time")
        table.add_row("  failed", f"[red]{reason}[/]")
        return table, False
    slowest = max(jobs, key=lambda job: float(str(job["triage_s"])))
    stages = {k: float(v) for k, v in json.loads(str(slowest["stages"])).items()}
    stages["deliver"] = float(str(slowest["deliver_s"]))
    triage_s, budget_s = (float(str(slowest[key])) for key in ("triage_s", "budget_s"))
    findings = [item for job in jobs for item in json.loads(str(job["findings"]))]
    top = max(findings, key=lambda item: (item["is_positive"], item["score"]))
    mark = "" if top["is_positive"] else ", below its threshold"
    segs = sum(ds.SOPClassUID == SegmentationStorage for ds in objects)
    color = "green" if triage_s <= budget_s else "red"
    table.add_row("  model", str(slowest["model"]))
    table.add_row("  top finding", f"{top['class']}, score {top['score']:.2f}{mark}")
    table.add_row("  returned", f"{len(objects) - segs} SC, {segs} SEG")
    times = "  ".join(f"{name} {spent * 1e3:.0f}" for name, spent in stages.items())
    table.add_row("  stages (ms)", times)
    table.add_row("  triage", f"[{color}]{triage_s * 1e3:.0f} ms[/] of {budget_s * 1e3:.0f} ms")
    return table, triage_s <= budget_s


@contextmanager
def _step(console: Console, what: str) -> Iterator[None]:
    """Say what is going on, and how long it took."""
    started = time.monotonic()
    if console.is_terminal:
        with console.status(what):
            yield
        console.print(f"{what}: {time.monotonic() - started:.1f} s", soft_wrap=True)
    else:
        console.print(f"{what} ... ", end="", soft_wrap=True)
        yield
        console.print(f"{time.monotonic() - started:.1f} s", soft_wrap=True)
