"""Hostile peers before a whole service: what they cost, and that nobody else notices."""

from __future__ import annotations

import itertools
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import imagecodecs
import numpy as np
import psutil
import pytest
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, RLELossless

from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.phantom import Phantom
from dicom_xai.demo.site import Site
from tests.flow.conftest import ROUTES_TO_PACS
from tests.make.associations import HOST, association_request, store
from tests.make.books import PATIENCE_S, jobs_of, rows, wait_for_jobs, wait_until
from tests.make.command import Running
from tests.make.studies import a_radiograph, study_of

BAD_CONNECTIONS = 1000
#: The flood comes from so many addresses, none of which may send.
ADDRESSES = [f"127.0.0.{number}" for number in range(2, 52)]
MOST_ASSOCIATIONS = 40
#: Of `guards`: connections for as many associations again, those that are dying, and the rest of
#: the role's own threads.
MOST_THREADS = 2 * MOST_ASSOCIATIONS + 32 + 64 + 20
DECODE_TIMEOUT_S = 6.0


@pytest.fixture(scope="module")
def besieged(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Site, Running]]:
    """A service that only 127.0.0.1 may send to."""
    decode = f"  processes: 2\n  timeout_s: {DECODE_TIMEOUT_S}\n  limit_bytes: 100000000\n"
    site = Site(
        tmp_path_factory.mktemp("besieged"),
        models=models,
        routes=ROUTES_TO_PACS,
        settings={"decode": decode},
        environment={"OMP_NUM_THREADS": "1"},
    )
    site.pacs.start()
    site.write_config()
    text = site.config.read_text()
    narrow = f"network: 127.0.0.1/32}}]\n  max_associations: {MOST_ASSOCIATIONS}"
    assert "network: 127.0.0.0/8}]" in text
    site.config.write_text(text.replace("network: 127.0.0.0/8}]", narrow))
    running = Running(site).wait_until_ready()
    yield site, running
    running.stop()
    site.pacs.stop()


class Flood:
    """Keeps a thousand connections that lead to nothing; one that is dropped comes again."""

    def __init__(self, port: int) -> None:
        request = association_request(calling="FLOOD")
        self._beginnings = itertools.cycle(
            [b"", b"\x01\x00\x00", request[:-1], request[:40], request, b"GET / HTTP/1.1\r\n\r\n"]
        )
        self._addresses = itertools.cycle(ADDRESSES)
        self._port = port
        self._over = threading.Event()
        self.is_full = threading.Event()
        self.opened = 0
        self._thread = threading.Thread(target=self._press, name="flood")

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _press(self) -> None:
        socks: list[socket.socket] = []
        while not self._over.is_set():
            socks = [each for each in socks if self._is_held(each)]
            for _ in range(min(50, BAD_CONNECTIONS - len(socks))):
                with suppress(OSError):
                    socks.append(self._another())
            if self.opened >= BAD_CONNECTIONS:
                self.is_full.set()
            self._over.wait(0.02)
        for each in socks:
            each.close()

    def _another(self) -> socket.socket:
        sock = socket.socket()
        try:
            sock.bind((next(self._addresses), 0))
            sock.settimeout(1)
            sock.connect((HOST, self._port))
            sock.sendall(next(self._beginnings))
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        self.opened += 1
        return sock

    def _is_held(self, sock: socket.socket) -> bool:
        try:
            held = sock.recv(4096) != b""
        except BlockingIOError:
            return True
        except OSError:
            held = False
        if not held:
            sock.close()
        return held


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.promise("N1")
@pytest.mark.promise("N2")
@pytest.mark.promise("N3")
@pytest.mark.promise("N12")
@pytest.mark.usefixtures("many_descriptors")
def test_a_good_peer_is_served_while_a_thousand_bad_ones_come_and_stay(
    besieged: tuple[Site, Running],
) -> None:
    site, running = besieged
    receiver = running.role_process("receiver")
    assert receiver is not None
    assert site.send(a_radiograph().files) == [0x0000]  # what is made once, is made
    calm_threads, calm_bytes = receiver.num_threads(), receiver.memory_info().rss
    took, threads, bytes_ = [], [], []
    with Flood(site.port) as flood:
        assert flood.is_full.wait(PATIENCE_S)
        for _ in range(20):
            began = time.monotonic()
            scu = StorageSCU("service", site.address())
            try:
                scu.echo()
            finally:
                scu.close()
            took.append(time.monotonic() - began)
            threads.append(receiver.num_threads())
            bytes_.append(receiver.memory_info().rss)
        phantom = a_radiograph()
        assert site.send(phantom.files) == [0x0000]
    print(
        f"{flood.opened} bad connections; good C-ECHO median {sorted(took)[10]:.3f} s, worst "
        f"{max(took):.3f} s; most threads {max(threads)}, grown {max(bytes_) - calm_bytes} bytes"
    )
    # three in four: the flood, and other tests, take their share of the same cores
    assert sorted(took)[15] < 1.0
    assert max(threads) < MOST_THREADS
    assert max(bytes_) - calm_bytes < 64_000_000
    wait_until(lambda: receiver.num_threads() <= calm_threads, "no thread stays")
    wait_until(lambda: not connections_of(receiver), "no connection stays")
    assert wait_for_jobs(site, study_of(phantom))[0]["state"] == "done"


def connections_of(process: psutil.Process) -> list[object]:
    return [each for each in process.net_connections("tcp") if each.raddr]


def compressed(phantom: Phantom, frames: list[bytes], syntax: str, **attributes: object) -> Dataset:
    """The radiograph with these frames, described as said."""
    ds = phantom.datasets[0]
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    return ds


def slow_to_decode() -> tuple[Phantom, Dataset]:
    """A radiograph that keeps a decoder for a second or more: noise in JPEG 2000, many frames."""
    phantom = a_radiograph()
    noise = np.random.default_rng(1).integers(0, 4096, (700, 700), np.uint16)
    frame = bytes(imagecodecs.jpeg2k_encode(noise, codecformat="j2k", reversible=True, level=0))
    ds = compressed(
        phantom,
        [frame] * 40,
        JPEG2000Lossless,
        Rows=700,
        Columns=700,
        NumberOfFrames=40,
        BitsAllocated=16,
        BitsStored=12,
        HighBit=11,
        PixelRepresentation=0,
    )
    return phantom, ds


def decoder_of(site: Site, running: Running, ds: Dataset) -> psutil.Process | None:
    """The process that decodes this object now."""
    found = rows(
        site.folder,
        "SELECT spool_key FROM instance WHERE sop_instance_uid = ?",
        str(ds.SOPInstanceUID),
    )
    for each in running.family():
        with suppress(psutil.NoSuchProcess):
            if "dicom_xai.service.decoder" in each.cmdline():
                names = [Path(file.path).name for file in each.open_files()]
                if found and found[0]["spool_key"] in names:
                    return each
    return None


def harm(site: Site, running: Running, how: str) -> tuple[Phantom, threading.Thread]:
    """Send a study; each process that decodes it is killed or stopped, until its job has ended."""
    phantom, ds = slow_to_decode()
    study = study_of(phantom)

    def press() -> None:
        done: set[int] = set()
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if any(job["state"] in ("done", "failed") for job in jobs_of(site, study)):
                return
            found = decoder_of(site, running, ds)
            if found is not None and found.pid not in done:
                done.add(found.pid)
                with suppress(psutil.NoSuchProcess):
                    getattr(found, how)()
            time.sleep(0.01)

    thread = threading.Thread(target=press)
    thread.start()
    assert store(site.port, ds, syntaxes=[JPEG2000Lossless], calling="MODALITY") == [0x0000]
    return phantom, thread


@pytest.mark.promise("G3")
@pytest.mark.promise("P6")
@pytest.mark.parametrize(
    ("how", "reason"),
    [("kill", "was ended by signal 9, 2 times"), ("suspend", "did not answer in time, 2 times")],
    ids=["crashes", "hangs"],
)
def test_an_object_that_harms_its_decoder_costs_its_own_study_and_no_other(
    besieged: tuple[Site, Running], how: str, reason: str
) -> None:
    site, running = besieged
    worker = running.role_process("worker")
    assert worker is not None
    bad, pressing = harm(site, running, how)
    good = [a_radiograph() for _ in range(3)]
    for each in good:
        assert site.send(each.files) == [0x0000]
        assert wait_for_jobs(site, study_of(each))[0]["state"] == "done"
    [job] = wait_for_jobs(site, study_of(bad))
    pressing.join()
    assert job["state"] == "failed"
    assert reason in str(job["note"])
    assert running.role_process("worker") == worker


@pytest.mark.promise("C3")
@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(
            (RLELossless, struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\0" * 100, 30000),
            id="RLE of 30000 rows and columns from 264 bytes",
        ),
        pytest.param(
            (
                JPEG2000Lossless,
                bytes.fromhex("ff4fff5100290000")
                + struct.pack(">8L", 60000, 60000, 0, 0, 60000, 60000, 0, 0)
                + bytes.fromhex("00010f0101ff93ffd9"),
                60000,
            ),
            id="JPEG 2000 of 60000 rows and columns from 60 bytes",
        ),
        pytest.param(
            (
                JPEG2000Lossless,
                bytes.fromhex("ff4fff5100290000")
                + struct.pack(">8L", 60000, 60000, 0, 0, 60000, 60000, 0, 0)
                + bytes.fromhex("00010f0101ff93ffd9"),
                64,
            ),
            id="JPEG 2000 that says more than its header",
        ),
    ],
)
def test_a_bomb_is_a_failed_study_with_a_reason_and_no_memory(
    besieged: tuple[Site, Running], bomb: tuple[str, bytes, int]
) -> None:
    site, running = besieged
    syntax, frame, size = bomb
    phantom = a_radiograph()
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7} if syntax == RLELossless else {}
    ds = compressed(phantom, [frame], syntax, Rows=size, Columns=size, **bits)
    assert store(site.port, ds, syntaxes=[syntax], calling="MODALITY") == [0x0000]
    [job] = wait_for_jobs(site, study_of(phantom))
    assert job["state"] == "failed"
    assert "limit is" in str(job["note"]) or "header says" in str(job["note"])
    for each in running.family():
        if "dicom_xai.service.decoder" in each.cmdline():
            # of its whole life: interpreter and codecs take 120 MB, the slow study above 50 MB
            assert most_memory_kb(each) < 400_000


def most_memory_kb(process: psutil.Process) -> int:
    words = Path(f"/proc/{process.pid}/status").read_text()
    return int(words.partition("VmHWM:")[2].split()[0])
