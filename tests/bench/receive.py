"""Receiving: our receiver role beside pynetdicom's own storescp, Orthanc and DCMTK's storescp.

Everybody takes the same files from DCMTK's storescu, with TCP_NODELAY=1 on both sides: without it
DCMTK waits for delayed acknowledgements, and the comparison means nothing. Disks are synced before
each turn, so that nobody pays for what another left in the page cache.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from pydicom.uid import DigitalXRayImageStorageForPresentation
from rich.table import Table

from dicom_xai.demo.phantom import head_ct
from dicom_xai.demo.site import ROUTINE, Site, free_ports
from tests.bench.memory import peak_mb
from tests.make.associations import (
    HOST,
    an_image,
    association_request,
    connected,
    ready_to_send,
)
from tests.make.command import Running
from tests.make.dcmtk import program
from tests.make.orthanc import Orthanc

ROUNDS = 7
ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}
#: Associations that ask for nothing, of two sources: we let one have twenty.
IDLE_SOURCES = ("127.0.0.1", "127.0.0.2")
IDLE_OF_EACH = 15
IDLE_S = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent at once: one list of files for each sender."""

    name: str
    senders: int
    objects: int  #: of each sender

    def files(self, folder: Path, seed: int) -> list[list[Path]]:
        """Fresh files, as many lists as senders."""
        make = _radiographs if self.name.startswith("DX") else _slices
        folder.mkdir()
        return [
            make(folder / str(sender), self.objects, 100 * seed + sender)
            for sender in range(self.senders)
        ]


LOADS = (
    Load("CT 0.5 MB, 1 sender", 1, 100),
    Load("CT 0.5 MB, 4 senders", 4, 50),
    Load("DX 10 MB, 1 sender", 1, 10),
)


@dataclass(frozen=True, slots=True)
class Peer:
    """A receiver that runs."""

    name: str
    title: str
    port: int
    pid: int
    durable: str


def run(folder: Path) -> Table:
    """MB/s for each load, medians of turns taken in one run, and the peak memory of each peer.

    DCMTK's is that of its parent process: each association's own has ended by then.

    The last column is what idle associations cost: the share of a core, that share without them,
    and how many of those that asked for an association had one.
    """
    table = Table(
        title=f"receive from storescu, TCP_NODELAY=1, MB/s (objects/s), medians of {ROUNDS}",
    )
    for heading in ("receiver", *(load.name for load in LOADS), "peak MB", "durable", "idle"):
        table.add_column(heading, justify="left" if heading == "receiver" else "right")
    if program("storescu") is None or program("storescp") is None:
        table.add_row("DCMTK is not installed: nothing to send with")
        return table
    rates: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as running:
        peers = [running.enter_context(peer) for peer in _peers(folder)]
        peaks = dict.fromkeys((peer.name for peer in peers), 0.0)
        for turn in range(ROUNDS):
            for load in LOADS:
                files = load.files(folder / f"{load.senders}-{load.objects}-{turn}", turn)
                size = sum(path.stat().st_size for each in files for path in each)
                first = turn % len(peers)  # nobody always follows the same peer
                for peer in peers[first:] + peers[:first]:
                    os.sync()
                    elapsed_s = _send(peer, files)
                    rates.setdefault((peer.name, load.name), []).append(size / elapsed_s)
                    peaks[peer.name] = max(peaks[peer.name], peak_mb(peer.pid))
        for peer in peers:
            cells = []
            for load in LOADS:
                rate = statistics.median(rates[peer.name, load.name])
                objects = rate / size_of(load.name)
                cells.append(f"{rate / 1e6:.0f} ({objects:.0f})")
            cells += [f"{peaks[peer.name]:.0f}", peer.durable, _idle(peer)]
            table.add_row(peer.name, *cells)
    return table


def size_of(load: str) -> float:
    """About the bytes of one object, for objects per second."""
    return 10e6 if load.startswith("DX") else 525.7e3


def _peers(folder: Path) -> Iterator[object]:
    yield _ours(folder / "ours")
    yield _pynetdicom(folder / "pynetdicom")
    if shutil.which("Orthanc"):
        yield _orthanc(folder / "orthanc")
    yield _dcmtk(folder / "dcmtk")


@contextmanager
def _ours(folder: Path) -> Iterator[Peer]:
    """The receiver role alone: a worker beside it would be busy with what came in before."""
    site = Site(folder)
    site.pacs.start()
    site.write_config()
    receiver = Running(site, "receiver").wait_until_ready()
    try:
        yield Peer("dicom_xai", ROUTINE, site.port, receiver.process.pid, "file, folder, row")
    finally:
        receiver.stop()
        site.pacs.stop()


@contextmanager
def _orthanc(folder: Path) -> Iterator[Peer]:
    with Orthanc(folder) as orthanc:
        yield Peer("Orthanc", orthanc.ae_title, orthanc.port, orthanc.pid, "file")


@contextmanager
def _pynetdicom(folder: Path) -> Iterator[Peer]:
    folder.mkdir()
    command = [sys.executable, "-m", "pynetdicom", "storescp", "-q", "-od", str(folder)]
    with _started(command) as (port, pid):
        yield Peer("pynetdicom storescp", "ANY", port, pid, "no")


@contextmanager
def _dcmtk(folder: Path) -> Iterator[Peer]:
    folder.mkdir()
    # a process for each association, bytes written as they come: its fastest
    options = ["--fork", "--bit-preserving", "--max-pdu", "131072"]
    command = [str(program("storescp")), *options, "--output-directory", str(folder)]
    with _started(command) as (port, pid):
        yield Peer("DCMTK storescp", "ANY", port, pid, "no")


@contextmanager
def _started(command: Sequence[str]) -> Iterator[tuple[int, int]]:
    (port,) = free_ports(1)
    process = subprocess.Popen([*command, str(port)], env=ENVIRONMENT)
    try:
        wait_until_listening(port)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def wait_until_listening(port: int, timeout_s: float = 30.0) -> None:
    """Return when somebody takes connections there."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            connected(port).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)
        else:
            return


def _idle(peer: Peer) -> str:
    """The share of a core that a peer takes while associations stand idle, and without them."""
    alone = _share(peer.pid)
    request = association_request(calling=ROUTINE, called=peer.title)
    with ExitStack() as open_now:
        associations = [
            open_now.enter_context(
                socket.create_connection((HOST, peer.port), 10.0, source_address=(source, 0))
            )
            for source in IDLE_SOURCES
            for _ in range(IDLE_OF_EACH)
        ]
        for each in associations:
            each.sendall(request)
        time.sleep(1.0)  # the answers are no idling
        share = _share(peer.pid)
        for each in associations:
            each.setblocking(False)
        answered = sum(_has_answer(each) for each in associations)
    return f"{100 * share:.1f} %, {100 * alone:.1f} % alone ({answered})"


def _has_answer(association: socket.socket) -> bool:
    try:
        return association.recv(1) == b"\x02"  # A-ASSOCIATE-AC
    except BlockingIOError:
        return False


def _share(pid: int) -> float:
    """Of a core, that a process and those below it take now."""
    before = _cpu_s(pid)
    time.sleep(IDLE_S)
    return (_cpu_s(pid) - before) / IDLE_S


def _cpu_s(pid: int) -> float:
    root = psutil.Process(pid)
    times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def _slices(folder: Path, count: int, seed: int) -> list[Path]:
    """One CT series, 512 x 512."""
    phantom = head_ct(np.random.default_rng(seed), slices=count, haemorrhage=False)
    folder.mkdir()
    paths = [folder / f"{number:04d}.dcm" for number in range(count)]
    for path, file in zip(paths, phantom.files, strict=True):
        path.write_bytes(file)
    return paths


def _radiographs(folder: Path, count: int, seed: int) -> list[Path]:
    """Radiographs of 2500 x 2000, each a study of its own."""
    folder.mkdir()
    paths = [folder / f"{number:04d}.dcm" for number in range(count)]
    pixels = np.random.default_rng(seed).integers(0, 4096, (2500, 2000), np.uint16).tobytes()
    for path in paths:
        ds = an_image(2500, 2000, DigitalXRayImageStorageForPresentation, Modality="DX")
        ds.PixelData = pixels
        ready_to_send(ds).save_as(path, enforce_file_format=True)
    return paths


def _send(peer: Peer, files: list[list[Path]]) -> float:
    """Seconds until all senders are done, each over one association."""
    started = time.perf_counter()
    # Orthanc trusts this sender
    command = [str(program("storescu")), "-R", "-aet", ROUTINE, "-aec", peer.title]
    command += ["127.0.0.1", str(peer.port)]
    senders = [subprocess.Popen([*command, *map(str, each)], env=ENVIRONMENT) for each in files]
    statuses = [sender.wait() for sender in senders]
    elapsed_s = time.perf_counter() - started
    assert statuses == [0] * len(files), f"{peer.name} did not take all: {statuses}"
    return elapsed_s
