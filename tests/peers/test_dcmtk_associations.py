"""DCMTK sends to our receiver and receives from our sender."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

from dicom_xai import errors
from dicom_xai.config import Destination
from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.receive.inspect import file_meta
from tests.make.associations import HOST, Shelf, an_image, encoded, listening
from tests.make.dcmtk import program

pytestmark = pytest.mark.peers


def run(*command: object) -> subprocess.CompletedProcess[str]:
    name, *words = [str(each) for each in command]
    return subprocess.run(
        [program(name) or name, *words], capture_output=True, text=True, timeout=60, check=False
    )


def a_path(folder: Path, name: str, syntax: str = ExplicitVRLittleEndian) -> tuple[Path, bytes]:
    """A file on disk, and its data set."""
    ds = an_image(rows=512, columns=512)
    data = encoded(ds, syntax)
    path = folder / name
    meta = file_meta(syntax, ds.SOPClassUID, ds.SOPInstanceUID, "STORESCU")
    path.write_bytes(meta + data)
    return path, data


def test_echoscu_is_answered() -> None:
    with listening(Shelf()) as scp:
        done = run("echoscu", "-aec", "DICOM_XAI", HOST, scp.ports[0])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("option", "syntax"),
    [
        ("-xe", ExplicitVRLittleEndian),
        ("-xi", ImplicitVRLittleEndian),
        ("-xb", ExplicitVRBigEndian),
    ],
)
def test_storescu_stores_in_each_transfer_syntax(tmp_path: Path, option: str, syntax: str) -> None:
    path, data = a_path(tmp_path, "ct.dcm", syntax)
    door = Shelf()
    with listening(door) as scp:
        done = run("storescu", option, "-aec", "DICOM_XAI", HOST, scp.ports[0], path)
        assert done.returncode == 0, done.stderr
        door.wait("ends")
    (arrival,) = door.arrivals
    assert arrival.sender.calling_ae_title == "STORESCU"
    assert len(door.data_sets[0]) >= len(data) - 100
    assert door.ends == [(1, "released")]


def test_storescu_sees_why_an_object_is_refused(tmp_path: Path) -> None:
    path, _ = a_path(tmp_path, "ct.dcm")
    with listening(Shelf(errors.OutOfResourcesError("full"))) as scp:
        done = run("storescu", "-v", "-aec", "DICOM_XAI", HOST, scp.ports[0], path)
    assert "Refused: OutOfResources" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("-aec", "WRONG"), "Called AE Title Not Recognized"),
        (("-aec", "DICOM_XAI", "-aet", "STRANGER"), "Calling AE Title Not Recognized"),
    ],
)
def test_storescu_sees_why_it_is_rejected(
    tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    path, _ = a_path(tmp_path, "ct.dcm")
    allow = ({"ae_title": "STORESCU", "network": "127.0.0.0/8"},)
    with listening(Shelf(), allow=allow) as scp:
        done = run("storescu", *arguments, HOST, scp.ports[0], path)
    assert reason in done.stdout + done.stderr


@contextmanager
def storescp(folder: Path, *options: str) -> Iterator[int]:
    """DCMTK's server on a free port, up when this yields."""
    with socket.create_server((HOST, 0)) as probe:
        port = int(probe.getsockname()[1])
    process = subprocess.Popen(
        [program("storescp") or "storescp", "-v", "-od", str(folder), *options, str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for _ in range(100):
            if run("echoscu", "-to", "1", HOST, port).returncode == 0:
                break
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=10)


def test_storescp_holds_our_bytes_after_a_send_and_a_resend(tmp_path: Path) -> None:
    path, data = a_path(tmp_path, "result.dcm")
    kept = tmp_path / "kept"
    kept.mkdir()
    with storescp(kept, "+B") as port:  # +B: written exactly as read
        scu = StorageSCU(
            "pacs",
            Destination(type="dimse", ae_title="ANY", host=HOST, port=port),
            [(CTImageStorage, ExplicitVRLittleEndian)],
        )
        assert scu.echo().echo_s > 0
        for _ in range(2):
            assert scu.send(path.read_bytes()).status == 0
            (file,) = kept.iterdir()
            assert file.read_bytes().endswith(data)
        scu.close()


def test_storescp_that_takes_one_syntax_only_refuses_that_object_alone(tmp_path: Path) -> None:
    path, _ = a_path(tmp_path, "result.dcm")
    kept = tmp_path / "kept"
    kept.mkdir()
    contexts = [
        (CTImageStorage, ExplicitVRLittleEndian),
        (SecondaryCaptureImageStorage, ImplicitVRLittleEndian),
    ]
    with storescp(kept, "+xi") as port:  # implicit little endian only
        place = Destination(type="dimse", ae_title="ANY", host=HOST, port=port)
        scu = StorageSCU("pacs", place, contexts)
        receipt = scu.send(path.read_bytes())
        assert (receipt.status, receipt.comment) == (0x0122, "presentation context refused")
        assert scu.is_open
        scu.close()


def test_an_object_takes_milliseconds_without_the_peer_being_tuned(tmp_path: Path) -> None:
    # storescp leaves Nagle's algorithm on: 88 ms an object against a sender that does not help.
    # The bound lies far from both, 40 objects at 88 ms would be 3.5 s.
    ds = an_image()
    meta = file_meta(ExplicitVRLittleEndian, ds.SOPClassUID, ds.SOPInstanceUID, "DICOM_XAI")
    file = meta + encoded(ds)
    with storescp(tmp_path) as port:
        place = Destination(type="dimse", ae_title="ANY", host=HOST, port=port)
        scu = StorageSCU("pacs", place, [(CTImageStorage, ExplicitVRLittleEndian)])
        elapsed = sum(_timed(scu, file) for _ in range(40))
        scu.close()
    assert elapsed < 2.0


def _timed(scu: StorageSCU, file: bytes) -> float:
    start = time.monotonic()
    assert scu.send(file).status == 0
    return time.monotonic() - start
