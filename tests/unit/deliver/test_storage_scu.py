"""The sender against real storage SCPs."""

from __future__ import annotations

from pathlib import Path

from pydicom.uid import ExplicitVRLittleEndian

from dicom_xai.config import Destination
from dicom_xai.deliver.storage_scu import StorageSCU
from dicom_xai.demo.pacs import StandInPACS
from dicom_xai.receive.inspect import file_of
from tests.make.associations import an_image, encoded


def a_file(ds, syntax=ExplicitVRLittleEndian) -> bytes:
    return b"".join(
        file_of(encoded(ds, syntax), syntax, ds.SOPClassUID, ds.SOPInstanceUID, "SENDER")
    )


def test_a_resend_is_byte_equal_and_kept_once(tmp_path: Path) -> None:
    ds = an_image()
    with StandInPACS(tmp_path) as pacs:
        destination = Destination(type="dimse", ae_title="PACS", host="127.0.0.1", port=pacs.port)
        scu = StorageSCU("pacs", destination)
        file = a_file(ds)
        assert scu.send(file).status == 0
        assert scu.send(file).status == 0
        scu.close()
        assert pacs.received == 2
        assert len(pacs.kept) == 1
        assert pacs.kept[0].path.read_bytes().endswith(encoded(ds))
