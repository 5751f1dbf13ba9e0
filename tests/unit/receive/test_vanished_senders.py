"""A sender whose power goes: no end of the connection is ever heard of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydicom.uid import CTImageStorage
from pynetdicom.sop_class import Verification

from tests.make.associations import (
    Shelf,
    an_image,
    associated,
    association_request,
    connected,
    encoded,
    listening,
    next_pdu,
    store_request,
    wait_until_all_have_ended,
)
from tests.make.books import wait_until
from tests.make.cable import Cable

REQUEST = association_request([CTImageStorage])


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    wait_until_all_have_ended()


def an_object() -> bytes:
    ds = an_image(rows=256, columns=256)
    return store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID)


@pytest.mark.promise("N6")
@pytest.mark.parametrize(
    ("objects", "bytes_until", "reason"),
    [
        pytest.param(0, 40, "no-association-request", id="in the request for an association"),
        pytest.param(0, len(REQUEST), "idle", id="before the first object"),
        pytest.param(1, 60_000, "stalled", id="in the middle of the second object"),
        pytest.param(1, 0, "idle", id="between two objects"),
    ],
)
def test_a_sender_that_vanishes_gives_its_place_back_and_its_transfer_ends(
    objects: int, bytes_until: int, reason: str
) -> None:
    door = Shelf()
    limits = {"acse_timeout_s": 0.5, "dimse_timeout_s": 0.5, "network_timeout_s": 0.5}
    with (
        listening(door, max_associations=1, **limits) as scp,
        Cable(scp.ports[0]) as cable,
        connected(cable.port) as sock,
    ):
        if not objects:
            cable.cut_after(bytes_until)
        sock.sendall(REQUEST)
        for _ in range(objects):
            assert next_pdu(sock)[:1] == b"\x02"
            sock.sendall(an_object())
            assert next_pdu(sock)[:1] == b"\x04"
            if bytes_until:
                cable.cut_after(bytes_until)
                sock.sendall(an_object())
            else:
                cable.cut()
        wait_until(lambda: cable.is_cut, "the cable is cut")
        wait_until(lambda: door.reasons() == [reason], f"it ends: {reason}")
        wait_until(lambda: scp.associations == 0, "its place is free")
        with associated(scp.ports[0], [Verification]) as other:
            assert other.send_c_echo().Status == 0x0000  # type: ignore[attr-defined]
        door.wait("ends", objects)
    assert len(door.arrivals) == objects
    assert [how for _, how in door.ends] == ["aborted"] * objects
