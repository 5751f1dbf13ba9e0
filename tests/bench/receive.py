"""Receiving CT slices: our receiver, durable, beside DCMTK's storescp, which syncs nothing."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
from rich.table import Table

from dicom_xai.demo.phantom import head_ct
from dicom_xai.demo.site import Site, free_ports

SLICES = 100
ROUNDS = 3
#: Without it DCMTK waits for delayed acknowledgements, and the comparison means nothing.
ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}


def run(folder: Path) -> Table:
    """MB/s with one sender, medians of turns taken in one run."""
    table = Table(title=f"receive {SLICES} CT slices, one storescu sender, TCP_NODELAY=1, medians")
    for heading in ("receiver", "MB/s", "objects/s", "durable before Success"):
        table.add_column(heading, justify="left" if heading == "receiver" else "right")
    storescu, storescp = shutil.which("storescu"), shutil.which("storescp")
    if storescu is None or storescp is None:
        table.add_row("DCMTK is not installed: nothing to send with", "", "", "")
        return table
    (their_port,) = free_ports(1)
    (folder / "theirs").mkdir()
    peer = subprocess.Popen(
        [storescp, "--output-directory", str(folder / "theirs"), str(their_port)],
        env=ENVIRONMENT,
    )
    rates: dict[str, list[float]] = {"DCMTK storescp": [], "dicom_xai": []}
    try:
        with Site(folder / "site", environment={"TCP_NODELAY": "1"}) as site:
            for turn in range(ROUNDS):
                files = _series(folder / f"series{turn}", turn)
                size = sum(file.stat().st_size for file in files)
                for name, port, title in (
                    ("DCMTK storescp", their_port, "ANY"),
                    ("dicom_xai", site.port, "DICOM_XAI"),
                ):
                    started = time.perf_counter()
                    _send(storescu, title, port, files)
                    rates[name].append(size / (time.perf_counter() - started))
    finally:
        peer.terminate()
        peer.wait()
    for name, values in rates.items():
        rate = statistics.median(values)
        durable = "yes" if name == "dicom_xai" else "no"
        table.add_row(name, f"{rate / 1e6:.0f}", f"{rate / size * SLICES:.0f}", durable)
    return table


def _series(folder: Path, seed: int) -> list[Path]:
    folder.mkdir()
    phantom = head_ct(np.random.default_rng(seed), slices=SLICES, haemorrhage=False)
    paths = [folder / f"{number:04d}.dcm" for number in range(SLICES)]
    for path, file in zip(paths, phantom.files, strict=True):
        path.write_bytes(file)
    return paths


def _send(storescu: str, title: str, port: int, files: list[Path]) -> None:
    command = [storescu, "-aec", title, "127.0.0.1", str(port), *map(str, files)]
    subprocess.run(command, check=True, env=ENVIRONMENT)
