"""Files that a person sends, one of which is no DICOM file and one of which is not there."""

from __future__ import annotations

from pathlib import Path

from pydicom.uid import ExplicitVRLittleEndian

from dicom_xai.config import Destination
from dicom_xai.deliver.by_hand import send_files
from dicom_xai.receive.inspect import file_meta
from tests.make.associations import (
    HOST,
    Shelf,
    an_image,
    encoded,
    listening,
    wait_until_all_have_ended,
)


def test_files_go_over_one_association_and_a_bad_one_stops_nobody(tmp_path: Path) -> None:
    door = Shelf()
    ds = an_image()
    meta = file_meta(ExplicitVRLittleEndian, ds.SOPClassUID, ds.SOPInstanceUID, "SENDER")
    file = meta + encoded(ds)
    good = [tmp_path / "1.dcm", tmp_path / "4.dcm"]
    for path in good:
        path.write_bytes(file)
    (tmp_path / "2.txt").write_text("no image")
    paths = [good[0], tmp_path / "2.txt", tmp_path / "3-missing.dcm", good[1]]
    with listening(door) as scp:
        place = Destination(type="dimse", ae_title="DICOM_XAI", host=HOST, port=scp.ports[0])
        sent = list(send_files(paths, "pacs", place))
    assert [each.path for each in sent] == paths
    assert [each.receipt.status if each.receipt else None for each in sent] == [0, None, None, 0]
    assert "DICM" in sent[1].problem
    assert "No such file" in sent[2].problem
    assert sent[0].size_bytes == good[0].stat().st_size
    assert door.transfers == 1
    wait_until_all_have_ended()
