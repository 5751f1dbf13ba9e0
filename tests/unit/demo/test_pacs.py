"""The stand-in PACS keeps what it is sent."""

from __future__ import annotations

from pathlib import Path

from pydicom import dcmread
from pydicom.uid import SegmentationStorage

from dicom_xai.demo.pacs import StandInPACS
from tests.make.associations import an_image, encoded, ready_to_send, store


def test_objects_are_kept_as_files_in_order_of_arrival(tmp_path: Path) -> None:
    sent = [an_image(), an_image(sop_class_uid=SegmentationStorage)]
    with StandInPACS(tmp_path / "new") as pacs:
        assert store(pacs.port, *sent, called="PACS") == [0, 0]
        assert pacs.wait_for(2, timeout_s=5)
        kept = pacs.kept
    assert [each.sop_instance_uid for each in kept] == [ds.SOPInstanceUID for ds in sent]
    assert [each.sop_class_uid for each in kept] == [ds.SOPClassUID for ds in sent]
    assert kept[0].arrived_s <= kept[1].arrived_s
    for each, ds in zip(kept, sent, strict=True):
        assert each.path.read_bytes().endswith(encoded(ds))
        assert dcmread(each.path).PixelData == ds.PixelData


def test_the_same_uid_with_other_bytes_is_a_duplicate_and_the_same_bytes_are_not(
    tmp_path: Path,
) -> None:
    ds = an_image()
    with StandInPACS(tmp_path) as pacs:
        assert store(pacs.port, ds, ds) == [0, 0]
        ds.PatientName = "Other^Name"
        assert store(pacs.port, ready_to_send(ds)) == [0x0111]
        assert pacs.received == 3
        assert len(pacs.kept) == 1


def test_waiting_ends_when_the_time_is_over(tmp_path: Path) -> None:
    with StandInPACS(tmp_path) as pacs:
        assert not pacs.wait_for(1, timeout_s=0.01)


def test_it_can_be_stopped_and_started_on_the_same_port(tmp_path: Path) -> None:
    pacs = StandInPACS(tmp_path).start()
    port = pacs.port
    pacs.stop()
    assert pacs.port == port
    with pacs:
        assert store(port, an_image()) == [0]
