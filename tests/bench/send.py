"""Sending: our side beside pynetdicom's own and DCMTK's, to an untouched DCMTK storescp.

Untouched: without TCP_NODELAY the peer holds back the end of each answer until what it sent before
was acknowledged, which a kernel delays by 40 ms. Most receivers in hospitals are like that.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage
from pynetdicom import AE
from rich.table import Table

from dicom_xai.config import Destination
from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.phantom import chest
from dicom_xai.demo.site import free_ports
from dicom_xai.dimse import Status
from tests.bench.memory import peak_bytes
from tests.bench.receive import wait_until_listening
from tests.make.dcmtk import program
from tests.make.studies import changed

ROUNDS = 3
#: Images, as results are: Secondary Captures, each under its own UID.
LOADS = {"3 kB": (100, (32, 32)), "0.5 MB": (40, (512, 512)), "10 MB": (10, (2500, 2000))}
_UNTOUCHED = {key: value for key, value in os.environ.items() if key != "TCP_NODELAY"}


def run(folder: Path) -> Table:
    """Milliseconds an object over one association, medians of turns in one run."""
    table = Table(title=f"send to an untouched DCMTK storescp, ms an object, medians of {ROUNDS}")
    for heading in ("sender", *LOADS, "peak MB"):
        table.add_column(heading, justify="left" if heading == "sender" else "right")
    if program("storescp") is None or program("storescu") is None:
        table.add_row("DCMTK is not installed: nobody to send to")
        return table
    senders: dict[str, Callable[[int, Sequence[Path]], None]] = {
        "dicom_xai": _ours,
        "pynetdicom": _pynetdicom,
        "DCMTK storescu": _dcmtk,
    }
    spent_s: dict[tuple[str, str], list[float]] = {}
    peaks = dict.fromkeys(senders, 0)
    with _storescp(folder / "kept") as port:
        for load, (count, matrix) in LOADS.items():
            files = _files(folder / load.replace(" ", "-"), count, matrix)
            for _ in range(ROUNDS):
                for name, send in senders.items():
                    peak, elapsed_s = peak_bytes(partial(_timed, send, port, files))
                    spent_s.setdefault((name, load), []).append(elapsed_s)
                    peaks[name] = max(peaks[name], peak)
    for name in senders:
        cells = [
            f"{statistics.median(spent_s[name, load]) / count * 1e3:.1f}"
            for load, (count, _) in LOADS.items()
        ]
        own = "-" if name.startswith("DCMTK") else f"{peaks[name] / 1e6:.0f}"
        table.add_row(name, *cells, own)
    return table


def _timed(send: Callable[[int, Sequence[Path]], None], port: int, files: Sequence[Path]) -> float:
    started = time.perf_counter()
    send(port, files)
    return time.perf_counter() - started


def _ours(port: int, files: Sequence[Path]) -> None:
    destination = Destination(type="dimse", ae_title="ANY", host="127.0.0.1", port=port)
    scu = StorageSCU("pacs", destination)
    try:
        for path in files:
            assert scu.send(path.read_bytes()).status == Status.SUCCESS
    finally:
        scu.close()


def _pynetdicom(port: int, files: Sequence[Path]) -> None:
    ae = AE("BENCH")
    ae.add_requested_context(SecondaryCaptureImageStorage, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", port, ae_title="ANY")
    try:
        for path in files:
            assert association.send_c_store(path).Status == Status.SUCCESS
    finally:
        association.release()


def _dcmtk(port: int, files: Sequence[Path]) -> None:
    command = [str(program("storescu")), "-aec", "ANY", "127.0.0.1", str(port), *map(str, files)]
    subprocess.run(command, check=True, env=_UNTOUCHED)


@contextmanager
def _storescp(folder: Path) -> Iterator[int]:
    folder.mkdir()
    (port,) = free_ports(1)
    command = [
        str(program("storescp")),
        "--fork",
        "--quiet",
        "--output-directory",
        str(folder),
        str(port),
    ]
    process = subprocess.Popen(command, env=_UNTOUCHED)
    try:
        wait_until_listening(port)
        yield port
    finally:
        process.terminate()
        process.wait()


def _files(folder: Path, count: int, matrix: tuple[int, int]) -> list[Path]:
    folder.mkdir()
    example = chest(np.random.default_rng(3), findings=set(), matrix=matrix).files[0]
    paths = [folder / f"{number:04d}.dcm" for number in range(count)]
    uid = str(dcmread(BytesIO(example), stop_before_pixels=True).SOPInstanceUID)
    for number, path in enumerate(paths):
        own = f"{uid[: uid.rindex('.')]}.{number + 1}"
        path.write_bytes(
            changed(example, SOPClassUID=SecondaryCaptureImageStorage, SOPInstanceUID=own)
        )
    return paths
