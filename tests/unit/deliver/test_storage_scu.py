"""The sender against real storage SCPs, and against peers that misbehave."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SegmentationStorage,
)

from dicom_xai import errors
from dicom_xai.config import Destination
from dicom_xai.deliver.storage_scu import RESULT_CONTEXTS, StorageSCU, Timeouts, parse
from dicom_xai.demo.pacs import StandInPACS
from dicom_xai.dimse import Answer, answer_of
from dicom_xai.errors import CannotUnderstandError, DestinationUnavailableError
from dicom_xai.receive.inspect import file_meta
from dicom_xai.study import Receipt
from tests.make.associations import (
    HOST,
    Shelf,
    agree,
    an_image,
    encoded,
    listening,
    next_pdu,
    stubborn,
    wait_until_all_have_ended,
)

SHORT = Timeouts(connect_s=2.0, associate_s=0.5, answer_s=0.5, stall_s=0.5)
CT = [(CTImageStorage, ExplicitVRLittleEndian)]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    wait_until_all_have_ended()


def a_file(ds: Dataset | None = None, syntax: str = ExplicitVRLittleEndian) -> bytes:
    ds = ds or an_image()
    data = encoded(ds, syntax)
    return file_meta(syntax, ds.SOPClassUID, ds.SOPInstanceUID, "SENDER") + data


def at(port: int, ae_title: str = "DICOM_XAI") -> Destination:
    return Destination(type="dimse", ae_title=ae_title, host=HOST, port=port)


def sending(
    port: int, contexts: list[tuple[str, str]] = CT, timeouts: Timeouts = SHORT
) -> StorageSCU:
    return StorageSCU("pacs", at(port), contexts, timeouts)


def free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("rows", [1, 700])
def test_the_data_set_arrives_as_it_lies_in_the_file(syntax: str, rows: int) -> None:
    door = Shelf()
    # an odd encoding that any re-encoding would straighten: a sequence of undefined length
    item = Dataset()
    item.CodeMeaning = "x"
    item.is_undefined_length_sequence_item = True
    ds = an_image(rows=rows, columns=640, AnatomicRegionSequence=[item])
    ds["AnatomicRegionSequence"].is_undefined_length = True
    with listening(door) as scp:
        scu = sending(scp.ports[0], [(CTImageStorage, syntax)])
        receipt = scu.send(a_file(ds, syntax))
        scu.close()
    assert receipt == Receipt("pacs", str(ds.SOPInstanceUID), 0, "")
    assert door.data_sets[0] == encoded(ds, syntax)
    assert door.arrivals[0].transfer_syntax_uid == syntax


def test_a_resend_is_byte_equal_and_kept_once(tmp_path: Path) -> None:
    ds = an_image()
    with StandInPACS(tmp_path) as pacs:
        scu = StorageSCU("pacs", at(pacs.port, "PACS"))
        assert scu.send(a_file(ds)).status == 0
        assert scu.send(a_file(ds)).status == 0
        scu.close()
        assert pacs.received == 2
        (kept,) = pacs.kept
        assert kept.path.read_bytes().endswith(encoded(ds))


def test_one_association_serves_many_objects_until_it_is_idle() -> None:
    door = Shelf()
    now = [0.0]
    with listening(door) as scp:
        place = at(scp.ports[0])
        scu = StorageSCU("pacs", place, CT, SHORT, clock=lambda: now[0])
        scu.open()
        for _ in range(5):
            scu.send(a_file())
        assert door.transfers == 1
        now[0] = place.keep_open_s - 0.1
        assert not scu.close_if_idle()
        now[0] = place.keep_open_s
        assert scu.close_if_idle()
        assert not scu.is_open
        door.wait("ends")
        scu.send(a_file())
        scu.close()
        door.wait("ends", 2)
    assert {how for _, how in door.ends} == {"released"}


def test_the_contexts_of_results_are_proposed_early() -> None:
    with listening(Shelf()) as scp:
        scu = StorageSCU("pacs", at(scp.ports[0]), timeouts=SHORT)
        scu.open()
        wanted = {pair for pair in RESULT_CONTEXTS if pair[1] == ExplicitVRLittleEndian}
        assert wanted <= set(scu._accepted)
        scu.close()


def test_an_association_that_the_peer_closed_while_idle_is_opened_again() -> None:
    door = Shelf()
    with listening(door, network_timeout_s=0.2) as scp:
        scu = sending(scp.ports[0])
        scu.send(a_file())
        door.wait("ends")  # aborted by the receiver for idling
        assert scu.send(a_file()).status == 0
        scu.close()
    assert len(door.arrivals) == 2


def test_an_association_that_was_opened_too_early_is_opened_again() -> None:
    door = Shelf()
    with listening(door, network_timeout_s=0.2) as scp:
        scu = sending(scp.ports[0])
        scu.open()
        door.wait("refusals")  # aborted by the receiver for idling
        assert scu.send(a_file()).status == 0
        scu.close()


def test_a_peer_that_agrees_to_no_context_says_so() -> None:
    def refuse_all(connection: socket.socket) -> None:
        agree(connection, result=3)

    why = "none of the presentation contexts"
    with (
        stubborn(refuse_all) as port,
        pytest.raises(DestinationUnavailableError, match=why),
    ):
        sending(port).open()


def test_a_refused_context_is_permanent_for_its_object_and_the_others_go_on() -> None:
    door = Shelf()
    contexts = [*CT, (SegmentationStorage, ExplicitVRLittleEndian)]
    with listening(door, accept_and_ignore=()) as scp:
        scu = sending(scp.ports[0], contexts)
        receipt = scu.send(a_file(an_image(sop_class_uid=SegmentationStorage)))
        assert receipt.status == 0x0122
        assert answer_of(receipt.status) is Answer.PERMANENT
        assert scu.send(a_file()).status == 0
        # one that was not even proposed costs a new association and is refused as well
        assert scu.send(a_file(syntax="1.2.840.10008.1.2.4.100")).status == 0x0122
        assert scu.send(a_file()).status == 0
        scu.close()
    assert len(door.arrivals) == 2


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (errors.CannotUnderstandError("no"), 0xC000),
        (errors.DataSetMismatchError("no"), 0xA900),
        (errors.DuplicateInstanceError("no"), 0x0111),
    ],
)
def test_a_permanent_failure_is_a_receipt(refusal: Exception, status: int) -> None:
    door = Shelf(refusal)
    with listening(door) as scp:
        scu = sending(scp.ports[0])
        assert scu.send(a_file()).status == status
        door.refusal = None
        assert scu.send(a_file()).status == 0
        scu.close()


def test_a_transient_failure_is_tried_later_on_the_same_association() -> None:
    door = Shelf(errors.OutOfResourcesError("full"))
    with listening(door) as scp:
        scu = sending(scp.ports[0])
        with pytest.raises(DestinationUnavailableError, match="0xA700"):
            scu.send(a_file())
        door.refusal = None
        assert scu.send(a_file()).status == 0
        assert door.transfers == 1
        scu.close()


def test_nobody_listening_is_unavailable() -> None:
    with pytest.raises(DestinationUnavailableError, match="refused the connection"):
        sending(free_port()).send(a_file())


def test_a_host_without_address_is_unavailable() -> None:
    nowhere = Destination(type="dimse", ae_title="X", host="no-such-host.invalid", port=104)
    with pytest.raises(DestinationUnavailableError, match="no address"):
        StorageSCU("pacs", nowhere, CT, SHORT).open()


def test_a_rejection_is_told_with_its_reason() -> None:
    with listening(Shelf()) as scp:
        scu = StorageSCU("pacs", at(scp.ports[0], "WRONG"), CT, SHORT)
        with pytest.raises(DestinationUnavailableError, match="Called AE title not recognised"):
            scu.open()


def _silent(connection: socket.socket) -> None:
    """Take the connection and never answer."""


def _deaf(connection: socket.socket) -> None:
    """Agree to an association, then never read again."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    agree(connection)


def _mute(connection: socket.socket) -> None:
    """Agree, read everything, answer nothing."""
    agree(connection)
    connection.settimeout(3)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        pass


def _closing(connection: socket.socket) -> None:
    """Agree, then close in the middle of the object."""
    agree(connection)
    next_pdu(connection)
    connection.shutdown(socket.SHUT_RDWR)


def _resetting(connection: socket.socket) -> None:
    """Agree, then reset the connection."""
    agree(connection)
    next_pdu(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _aborting(connection: socket.socket) -> None:
    """Agree, then abort."""
    agree(connection)
    next_pdu(connection)
    connection.sendall(b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00")
    while next_pdu(connection):
        pass


@pytest.mark.promise("P2")
@pytest.mark.parametrize("behaviour", [_silent, _deaf, _mute, _closing, _resetting, _aborting])
def test_an_attempt_ends_within_its_deadline_whatever_the_peer_does(
    behaviour: object,
) -> None:
    large = a_file(an_image(rows=2000, columns=4000))  # 16 MB: more than buffers hold
    quick = Timeouts(
        connect_s=2.0, associate_s=0.5, answer_s=0.5, stall_s=0.5, slowest_bytes_per_s=32e6
    )
    with stubborn(behaviour) as port:  # type: ignore[arg-type]
        scu = sending(port, timeouts=quick)
        start = time.monotonic()
        with pytest.raises(DestinationUnavailableError):
            scu.send(large)
        # the longest: answer_s and 0.5 s for the bytes; the rest is a loaded machine's
        assert time.monotonic() - start < 5.0
        assert not scu.is_open
        wait_until_all_have_ended()
        scu.close()


@pytest.mark.promise("P5")
def test_a_destination_that_hangs_does_not_hold_up_another(tmp_path: Path) -> None:
    with stubborn(_silent) as port, StandInPACS(tmp_path) as pacs:
        slow = StorageSCU("slow", at(port), CT, Timeouts(associate_s=2.0))
        failed: list[BaseException] = []

        def attempt() -> None:
            try:
                slow.send(a_file())
            except DestinationUnavailableError as error:
                failed.append(error)

        thread = threading.Thread(target=attempt)
        thread.start()
        scu = StorageSCU("pacs", at(pacs.port, "PACS"), CT, SHORT)
        assert scu.send(a_file()).status == 0
        assert failed == []
        scu.close()
        thread.join(timeout=10)
        assert len(failed) == 1


def test_an_echo_is_timed() -> None:
    with listening(Shelf()) as scp:
        scu = sending(scp.ports[0])
        timing = scu.echo()
        assert 0 < timing.echo_s < 5
        assert 0 < timing.associate_s < 5
        scu.close()


@pytest.mark.parametrize("behaviour", [_silent, _mute])
def test_an_echo_that_nobody_answers_is_unavailable(behaviour: object) -> None:
    with (
        stubborn(behaviour) as port,  # type: ignore[arg-type]
        pytest.raises(DestinationUnavailableError),
    ):
        sending(port).echo()


def test_a_file_without_file_meta_is_refused() -> None:
    with pytest.raises(CannotUnderstandError, match="DICM"):
        parse(encoded(an_image()))
    with pytest.raises(CannotUnderstandError, match="MediaStorageSOPClassUID"):
        parse(b"\x00" * 128 + b"DICM" + encoded(an_image()))
