"""The receiver on real sockets, against pynetdicom's requestor."""

from __future__ import annotations

from pynetdicom.sop_class import Verification

from tests.make.associations import Shelf, an_image, associated, encoded, listening, store


def test_an_echo_is_answered_and_opens_no_transfer() -> None:
    door = Shelf()
    with listening(door) as scp, associated(scp.ports[0], [Verification]) as assoc:
        assert assoc.send_c_echo().Status == 0x0000
    assert door.transfers == 0


def test_an_object_arrives_byte_for_byte() -> None:
    door = Shelf()
    ds = an_image()
    with listening(door) as scp:
        assert store(scp.ports[0], ds) == [0x0000]
        door.wait("ends")
    (arrival,) = door.arrivals
    assert arrival.file[1] == encoded(ds)
    assert arrival.sop_instance_uid == ds.SOPInstanceUID
    assert door.ends == [(1, "released")]
