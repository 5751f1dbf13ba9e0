"""A stand-in PACS: a real storage SCP on loopback that keeps what it gets as files.

For the demonstration and for tests. It is no archive: nothing is synced to disk, anybody may send.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification

from dicom_xai.dimse import (
    IGNORED_CLASSES,
    IMAGE_CLASSES,
    MAX_PDU_BYTES,
    TRANSFER_SYNTAXES,
    Status,
)

if TYPE_CHECKING:
    from pynetdicom.events import Event


@dataclass(frozen=True, slots=True)
class Kept:
    """One object that the stand-in holds."""

    sop_class_uid: str
    sop_instance_uid: str
    arrived_s: float  #: monotonic clock, when its C-STORE request was complete
    path: Path
    sha256: str  #: of the data set as received


class StandInPACS:
    """Listens from `start` to `stop`; the same UID with other bytes gets 0x0111.

    Parameters
    ----------
    directory : Path
        Where files go; made when absent. Names are numbers, in order of arrival.
    ae_title, host, port : str, str, int
        Port 0 takes a free one; `port` says which.
    """

    def __init__(
        self, directory: Path, ae_title: str = "PACS", host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.directory = directory
        self.ae_title = ae_title
        self.host = host
        self._wanted_port = port
        self._changed = threading.Condition()
        self._kept: dict[str, Kept] = {}
        self._received = 0
        self._ae = AE(ae_title=ae_title)
        self._ae.maximum_pdu_size = MAX_PDU_BYTES
        self._ae.maximum_associations = 50
        self._ae.add_supported_context(Verification)
        classes = [*IMAGE_CLASSES, *(each for kind in IGNORED_CLASSES.values() for each in kind)]
        for sop_class_uid in classes:
            self._ae.add_supported_context(sop_class_uid, list(TRANSFER_SYNTAXES))
        self._server: object | None = None

    @property
    def port(self) -> int:
        """Where it listens; what was asked for while it does not."""
        server = self._server
        return self._wanted_port if server is None else int(server.server_address[1])  # type: ignore[attr-defined]

    @property
    def kept(self) -> list[Kept]:
        """What it holds, in order of arrival."""
        with self._changed:
            return list(self._kept.values())

    @property
    def received(self) -> int:
        """How many C-STORE requests came, resends included."""
        with self._changed:
            return self._received

    def start(self) -> StandInPACS:
        """Listen; gives itself."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._server = self._ae.start_server(
            (self.host, self._wanted_port),
            block=False,
            evt_handlers=[(evt.EVT_C_STORE, self._store)],
        )
        self._wanted_port = self.port
        return self

    def stop(self) -> None:
        """Close the door and all associations; a later `start` takes the same port."""
        if self._server is not None:
            self._server = None
            self._ae.shutdown()

    def __enter__(self) -> StandInPACS:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_for(self, count: int, timeout_s: float) -> bool:
        """Wait until it holds so many objects; False when the time is over."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._kept) >= count, timeout_s)

    def _store(self, event: Event) -> int:
        arrived_s = time.monotonic()
        file = event.encoded_dataset()
        sha256 = hashlib.sha256(event.encoded_dataset(include_meta=False)).hexdigest()
        sop_instance_uid = str(event.request.AffectedSOPInstanceUID)
        with self._changed:
            self._received += 1
            known = self._kept.get(sop_instance_uid)
            if known is not None:
                same = known.sha256 == sha256
                return Status.SUCCESS if same else Status.DUPLICATE_SOP_INSTANCE
            path = self.directory / f"{len(self._kept) + 1:04d}.dcm"
            path.write_bytes(file)
            sop_class_uid = str(event.request.AffectedSOPClassUID)
            self._kept[sop_instance_uid] = Kept(
                sop_class_uid, sop_instance_uid, arrived_s, path, sha256
            )
            self._changed.notify_all()
        return Status.SUCCESS
