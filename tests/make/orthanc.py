"""An Orthanc of our own: on loopback, free ports, one folder for its state, one trusted sender."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from pathlib import Path

from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import dcmread

from dicom_xai.demo.site import ROUTINE, free_ports

START_TIMEOUT_S = 30.0


class Orthanc:
    """Runs from `start` to `stop`; objects are looked up by their SOP Instance UID.

    Parameters
    ----------
    folder : Path
        Takes configuration, storage, index and log; made when absent.

    Attributes
    ----------
    service_port : int
        Where the service listens that it knows as `service`; it reports to it, and may ask it.
    """

    ae_title = "ORTHANC"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self._http_port = free_ports(2)
        self.service_port = 104
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """``AE@HOST:PORT``."""
        return f"{self.ae_title}@127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process id while it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Orthanc:
        """Return when it answers; TCP_NODELAY as any peer that is compared has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "orthanc.json"
        config.write_text(json.dumps(self._config()))
        with (self.folder / "orthanc.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["Orthanc", str(config)],
                stdout=log,
                stderr=log,
                env={**os.environ, "TCP_NODELAY": "1"},
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.get("system")
            except OSError:
                log_text = (self.folder / "orthanc.log").read_text(errors="replace")
                assert self._process.poll() is None, log_text
                assert time.monotonic() < deadline, log_text
                time.sleep(0.05)
            else:
                return self

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def __enter__(self) -> Orthanc:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def get(self, path: str) -> bytes:
        """The answer of its REST interface; HTTPError for any status but 2xx."""
        with urllib.request.urlopen(self._url(path), timeout=30) as answer:
            body: bytes = answer.read()
        return body

    def post(self, path: str, content: object) -> bytes:
        """The answer to a POST of JSON."""
        data = json.dumps(content).encode()
        request = urllib.request.Request(self._url(path), data=data, method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            body: bytes = answer.read()
        return body

    def delete(self, path: str) -> None:
        """DELETE it."""
        request = urllib.request.Request(self._url(path), method="DELETE")
        with urllib.request.urlopen(request, timeout=30):
            pass

    def identifier(self, sop_instance_uid: str) -> str | None:
        """Its own name for an object, or None when it does not hold it."""
        request = urllib.request.Request(
            self._url("tools/lookup"), data=sop_instance_uid.encode("ascii"), method="POST"
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = json.loads(answer.read())
        return next((str(item["ID"]) for item in found if item["Type"] == "Instance"), None)

    def file(self, sop_instance_uid: str) -> bytes:
        """An object as it serves it."""
        return self.get(f"instances/{self.identifier(sop_instance_uid)}/file")

    def raw_frame(self, sop_instance_uid: str, frame: int = 0) -> bytes:
        """One frame's bytes as they lie in the pixel data."""
        return self.get(f"instances/{self.identifier(sop_instance_uid)}/frames/{frame}/raw")

    def preview(self, sop_instance_uid: str, frame: int = 0) -> bytes:
        """One frame as PNG, as its own viewer shows it."""
        return self.get(f"instances/{self.identifier(sop_instance_uid)}/frames/{frame}/preview")

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._http_port}/{path}"

    def _config(self) -> dict[str, object]:
        return {
            "Name": "peer",
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "storage"),
            "Plugins": [],
            "HttpPort": self._http_port,
            "RemoteAccessAllowed": False,
            "DicomAet": self.ae_title,
            "DicomPort": self.port,
            "DicomCheckCalledAet": True,
            "DicomAlwaysAllowStore": False,
            "DicomCheckModalityHost": True,
            "DicomModalities": {"service": [ROUTINE, "127.0.0.1", self.service_port]},
            "StableAge": 1,
            "SaveJobs": False,
        }


def data_set(file: bytes) -> Dataset:
    """A file as pydicom reads it."""
    return dcmread(DicomBytesIO(file))
