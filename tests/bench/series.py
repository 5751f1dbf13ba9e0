"""Ready to accepted by the PACS for CT series, by transfer syntax and by number of slices."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless
from rich.table import Table

from dicom_xai.demo.phantom import head_ct, to_bytes
from dicom_xai.demo.site import Site
from tests.bench.memory import forget_peaks, peak_mb
from tests.bench.timing import percentile
from tests.bench.triage import wait_for_triage
from tests.make.compressed import encapsulated, frame_of

MATRIX = 512
SLICES = 300
COUNTS = (50, 100, 300, 600)
REPEATS = 20
STAGES = ("queue", "decode", "infer", "explain", "encode", "deliver")

SYNTAXES = (ExplicitVRLittleEndian, JPEGLSLossless, JPEG2000Lossless)


def run(folder: Path) -> Table:
    """Percentiles of triage latency, medians of each stage, and peak memory of all processes."""
    table = Table(title=f"head CT of {MATRIX} x {MATRIX}: ready to accepted, ms, budget 2000")
    for heading in ("series", "p50", "p95", *STAGES, "no map", "peak MB"):
        table.add_column(heading, justify="left" if heading == "series" else "right")
    volume = head_ct(
        np.random.default_rng(7), slices=max(COUNTS), matrix=MATRIX, haemorrhage=True
    ).files
    with Site(folder / "site") as site:
        for syntax in SYNTAXES:
            coded = [_coded(file, syntax) for file in volume[:SLICES]]
            _measure(site, table, f"{SLICES} slices, {syntax.name}", coded)
        for count in COUNTS:
            _measure(site, table, f"{count} slices", volume[:count])
    return table


def _measure(site: Site, table: Table, name: str, files: Sequence[bytes]) -> None:
    parts: dict[str, list[float]] = {}
    without_map = 0
    forget_peaks(site.pid)
    for _ in range(REPEATS):
        series = renamed(files)
        site.send(series)
        uid = str(dcmread(BytesIO(series[0]), stop_before_pixels=True).StudyInstanceUID)
        triaged = wait_for_triage(site, uid)
        without_map += not triaged.has_map
        for part, seconds in triaged.seconds.items():
            parts.setdefault(part, []).append(seconds)
    cells = [percentile(parts["triage"], p) for p in (50, 95)]
    cells += [percentile(parts[stage], 50) for stage in STAGES]
    times = (f"{cell * 1e3:.0f}" for cell in cells)
    table.add_row(name, *times, str(without_map), f"{peak_mb(site.pid):.0f}")


def _coded(file: bytes, syntax: UID) -> bytes:
    """The same slice in another transfer syntax."""
    if syntax == ExplicitVRLittleEndian:
        return file
    ds = dcmread(BytesIO(file))
    return to_bytes(encapsulated(ds, [frame_of(ds.pixel_array, syntax, ds.BitsStored)], syntax))


def renamed(files: Sequence[bytes]) -> list[bytes]:
    """The same series as another study: new UIDs of the same length, byte for byte elsewhere."""
    ds = dcmread(BytesIO(files[0]), stop_before_pixels=True)
    stems = {str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID)}
    for file in files:
        stems.add(str(dcmread(BytesIO(file), specific_tags=["SOPInstanceUID"]).SOPInstanceUID))
    new = {
        stem.encode(): (stem[:-9] + f"{secrets.randbelow(10**9 - 10**8) + 10**8}").encode()
        for stem in stems
    }
    pattern = re.compile(b"|".join(sorted(new, key=len, reverse=True)))
    head = 4096  # patient, study and series elements lie before the pixels
    return [pattern.sub(lambda match: new[match[0]], file[:head]) + file[head:] for file in files]
