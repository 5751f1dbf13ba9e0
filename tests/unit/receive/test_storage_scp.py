"""The receiver on real sockets: who may come in, and what each object is answered."""

from __future__ import annotations

import hashlib
import itertools
import resource
import socket
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    KeyObjectSelectionDocumentStorage,
)
from pynetdicom.sop_class import Verification

from dicom_xai import errors
from dicom_xai.config import Allowed, Listener
from dicom_xai.receive.inspect import file_meta
from dicom_xai.receive.storage_scp import StorageSCP
from dicom_xai.receive.upper_layer import PDU
from dicom_xai.spool import Draft
from tests.make.associations import (
    HOST,
    Shelf,
    a_config,
    an_image,
    associated,
    connected,
    encoded,
    listening,
    negotiated,
    next_pdu,
    ready_to_send,
    rejection,
    store,
    store_request,
    wait_until_all_have_ended,
)


def test_an_echo_is_answered_and_opens_no_transfer() -> None:
    door = Shelf()
    with listening(door) as scp, associated(scp.ports[0], [Verification]) as assoc:
        assert assoc.send_c_echo().Status == 0x0000
    assert door.transfers == 0


@pytest.mark.promise("D7")
@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_an_object_arrives_byte_for_byte_with_its_facts(syntax: str) -> None:
    door = Shelf()
    ds = ready_to_send(an_image(), syntax)
    with listening(door) as scp:
        assert store(scp.ports[0], ds, syntaxes=[syntax], calling="MODALITY") == [0x0000]
        door.wait("ends")
    (arrival,) = door.arrivals
    assert door.data_sets == [encoded(ds, syntax)]
    assert arrival.data_set_sha256 == hashlib.sha256(encoded(ds, syntax)).hexdigest()
    meta = file_meta(syntax, ds.SOPClassUID, ds.SOPInstanceUID, "MODALITY")
    assert arrival.size_bytes == len(meta) + len(encoded(ds, syntax))
    assert arrival.transfer_syntax_uid == syntax
    assert arrival.sop_instance_uid == ds.SOPInstanceUID
    assert arrival.series_instance_uid == ds.SeriesInstanceUID
    assert arrival.study_instance_uid == ds.StudyInstanceUID
    assert arrival.header.data_set.PatientID == ds.PatientID
    sender = arrival.sender
    assert (sender.calling_ae_title, sender.called_ae_title) == ("MODALITY", "DICOM_XAI")
    assert (sender.source_address, sender.priority) == (HOST, 2)  # low: pynetdicom's default


def test_explicit_little_endian_is_chosen_whatever_the_peer_prefers() -> None:
    door = Shelf()
    offered = [ImplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian]
    with (
        listening(door) as scp,
        associated(scp.ports[0], [CTImageStorage], offered) as assoc,
    ):
        (context,) = assoc.accepted_contexts
        assert context.transfer_syntax == [ExplicitVRLittleEndian]


@pytest.mark.parametrize("at_once", [True, False], ids=["in one piece", "byte by byte"])
def test_requests_and_release_are_told_apart_however_they_come(at_once: bool) -> None:
    door = Shelf()
    data_sets = [an_image(), an_image()]
    sent = b"".join(
        store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID) for ds in data_sets
    )
    sent += struct.pack(">BxLL", PDU.RELEASE_RQ, 4, 0)
    with listening(door) as scp, negotiated(scp.ports[0]) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in [sent] if at_once else [sent[i : i + 1] for i in range(len(sent))]:
            sock.sendall(part)
        kinds = [next_pdu(sock)[0] for _ in range(3)]
        door.wait("ends")
    assert kinds == [PDU.P_DATA_TF, PDU.P_DATA_TF, PDU.RELEASE_RP]
    assert door.data_sets == [encoded(ds) for ds in data_sets]
    assert door.ends == [(1, "released")]


def test_what_may_wait_is_done_once_the_peer_has_its_answer() -> None:
    may_go_on, done = threading.Event(), threading.Event()

    class Later(Shelf):
        def accept(self, arrival: object, transfer: int) -> Callable[[], None]:
            super().accept(arrival, transfer)  # type: ignore[arg-type]
            return self.tell

        def tell(self) -> None:
            if may_go_on.wait(10):
                done.set()

    door = Later()
    with listening(door) as scp, associated(scp.ports[0]) as assoc:
        assert assoc.send_c_store(ready_to_send(an_image())).Status == 0x0000
        assert not done.is_set()
        may_go_on.set()
    assert done.wait(10)


def test_what_may_wait_is_done_for_a_peer_that_left_without_its_answer() -> None:
    is_gone, done = threading.Event(), threading.Event()

    class Later(Shelf):
        def accept(self, arrival: object, transfer: int) -> Callable[[], None]:
            assert is_gone.wait(10)
            return done.set

    ds = an_image()
    door = Later()
    with listening(door) as scp:
        sock = negotiated(scp.ports[0])
        sock.sendall(store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID))
        # lingers for no time: the answer meets a connection that was reset
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        is_gone.set()
        assert done.wait(10)
        door.wait("ends")
    assert door.ends == [(1, "aborted")]


def test_all_objects_of_an_association_are_one_transfer_that_ends_released() -> None:
    door = Shelf()
    with listening(door) as scp:
        assert store(scp.ports[0], an_image(), an_image(), an_image()) == [0, 0, 0]
        door.wait("ends")
        assert door.ends == [(1, "released")]


def test_a_sender_that_aborts_or_vanishes_ends_its_transfer_aborted() -> None:
    door = Shelf()
    ds = an_image()
    request = store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID)
    with listening(door) as scp:
        with associated(scp.ports[0]) as assoc:
            assoc.send_c_store(ready_to_send(an_image()))
            assoc.abort()
        door.wait("ends", 1)
        with negotiated(scp.ports[0]) as sock:
            sock.sendall(request)
            next_pdu(sock)
        door.wait("ends", 2)
    assert [how for _, how in door.ends] == ["aborted", "aborted"]


@pytest.mark.parametrize(
    ("refusal", "status", "reason"),
    [
        (errors.OutOfResourcesError("full", reason="no-space"), 0xA700, "no-space"),
        (errors.DuplicateInstanceError("known"), 0x0111, "duplicate-conflict"),
        (errors.LedgerBusyError("locked"), 0xA700, "not-durable"),
        (OSError(28, "No space left on device"), 0xA700, "not-durable"),
        (RuntimeError("a bug"), 0x0110, "failed"),
    ],
)
def test_what_the_door_raises_becomes_the_answer(
    refusal: Exception, status: int, reason: str
) -> None:
    door = Shelf(refusal)
    with listening(door) as scp, associated(scp.ports[0]) as assoc:
        assert assoc.send_c_store(ready_to_send(an_image())).Status == status
        assert door.reasons() == [reason]
        door.refusal = None
        assert assoc.send_c_store(ready_to_send(an_image())).Status == 0x0000


def test_an_unforeseen_error_is_told_with_its_stack_and_without_its_message() -> None:
    door = Shelf(ValueError("cannot use PatientName Doe^Nobody"))
    with listening(door) as scp:
        assert store(scp.ports[0], an_image()) == [0x0110]
    assert door.reasons() == ["failed"]
    [text] = door.details
    assert "ValueError" in text
    assert "accept" in text
    assert "Doe" not in text


def test_a_door_that_cannot_note_an_end_loses_no_later_association() -> None:
    class Jammed(Shelf):
        def closed(self, transfer: int, how: object) -> None:
            raise errors.LedgerBusyError("locked")

    door = Jammed()
    with listening(door, max_associations=1) as scp:
        for _ in range(3):
            assert store(scp.ports[0], an_image()) == [0x0000]
            wait_until_all_have_ended()
        assert scp.associations == 0


def test_a_refusal_that_nobody_can_count_ends_no_listener() -> None:
    class Uncounted(Shelf):
        def refused(self, reason: str, sender: object, detail: str) -> None:
            raise RuntimeError("the registry is gone")

    with listening(Uncounted(), acse_timeout_s=60, max_per_source=1) as scp:
        with ExitStack() as opened:
            for _ in range(36):  # two above the limit: refused, or an older one closed for it
                opened.enter_context(connected(scp.ports[0], b"\x01"))
        wait_until_all_have_ended()
        assert store(scp.ports[0], an_image()) == [0x0000]


def test_a_transfer_that_cannot_be_opened_is_answered_out_of_resources() -> None:
    class Full(Shelf):
        def opened(self, sender: object) -> int:
            raise errors.OutOfResourcesError("full")

    door = Full()
    with listening(door) as scp:
        assert store(scp.ports[0], an_image()) == [0xA700]
    assert door.ends == []


def test_a_truncated_data_set_is_never_success() -> None:
    door = Shelf()
    ds = an_image()
    whole = encoded(ds)
    with listening(door) as scp:
        for cut in (1, 100, len(whole) - 1):
            with negotiated(scp.ports[0]) as sock:
                sock.sendall(store_request(whole[:-cut], ds.SOPClassUID, ds.SOPInstanceUID))
                assert b"\x00\x00\x00\x09\x02\x00\x00\x00\x00\xc0" in next_pdu(sock)
    assert door.arrivals == []
    assert door.reasons() == ["cannot-understand"] * 3


def test_an_object_of_another_class_than_agreed_is_refused() -> None:
    door = Shelf()
    ds = an_image(sop_class_uid=ComputedRadiographyImageStorage)
    with listening(door) as scp, negotiated(scp.ports[0], classes=[CTImageStorage]) as sock:
        sock.sendall(store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID))
        assert b"\x00\x00\x00\x09\x02\x00\x00\x00\x00\xa9" in next_pdu(sock)
    assert door.reasons() == ["data-set-mismatch"]


def test_a_wrong_called_ae_title_is_rejected_with_that_reason() -> None:
    door = Shelf()
    with listening(door) as scp:
        assert rejection(scp.ports[0], called="SOMEBODY") == (1, 1, 7)
    ((reason, sender),) = door.refusals
    assert (reason, sender.called_ae_title) == ("called-ae", "SOMEBODY")


@pytest.mark.promise("N11")
@pytest.mark.parametrize(
    ("allow", "may_come"),
    [
        ([("*", "127.0.0.0/8")], True),
        ([("SENDER", "127.0.0.1/32")], True),
        ([("OTHER", "127.0.0.0/8")], False),
        ([("SENDER", "10.0.0.0/8")], False),
        # each half matches another line: only a pair counts
        ([("SENDER", "10.0.0.0/8"), ("OTHER", "127.0.0.0/8")], False),
    ],
)
def test_calling_ae_title_and_network_must_match_as_a_pair(
    allow: list[tuple[str, str]], may_come: bool
) -> None:
    door = Shelf()
    pairs = tuple(Allowed(ae_title=title, network=network) for title, network in allow)
    with listening(door, allow=pairs) as scp:
        if may_come:
            with associated(scp.ports[0]) as assoc:
                assert assoc.is_established
        else:
            assert rejection(scp.ports[0], calling="SENDER") == (1, 1, 3)
    assert door.reasons() == ([] if may_come else ["not-allowed"])


@pytest.mark.promise("N11")
def test_each_called_ae_title_has_its_own_rules() -> None:
    listeners = tuple({"ae_title": title, "host": HOST, "port": 0} for title in ("ROUTINE", "STAT"))
    allow = (
        Allowed(ae_title="SENDER", network="127.0.0.0/8", called_ae_title="STAT"),
        Allowed(ae_title="OTHER", network="127.0.0.0/8"),
    )
    asked = [("SENDER", "ROUTINE"), ("SENDER", "STAT"), ("OTHER", "ROUTINE"), ("OTHER", "STAT")]
    door = Shelf()
    with listening(door, listeners=listeners, allow=allow) as scp:
        ports = dict(zip(("ROUTINE", "STAT"), scp.ports, strict=True))
        answers = []
        for calling, called in asked:
            with associated(ports[called], calling=calling, called=called) as assoc:
                answers.append(bool(assoc.is_established))
    assert answers == [False, True, True, True]
    assert door.reasons() == ["not-allowed"]


@pytest.mark.promise("N12")
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_associations": 2}, "association-limit"),
        ({"max_per_source": 2}, "source-limit"),
    ],
)
def test_an_association_above_a_limit_is_rejected_and_room_comes_back(
    limits: dict[str, int], reason: str
) -> None:
    door = Shelf()
    with listening(door, **limits) as scp:
        port = scp.ports[0]
        with associated(port) as one, associated(port) as two:
            assert one.is_established
            assert two.is_established
            assert scp.associations == 2
            assert rejection(port) == (2, 3, 2)
        assert door.reasons() == [reason]
        # the releases may still be on their way out
        assert any(_is_let_in(port) for _ in range(100))


def _is_let_in(port: int) -> bool:
    with associated(port) as assoc:
        return bool(assoc.is_established)


def test_two_listeners_have_their_own_ports_and_titles() -> None:
    door = Shelf()
    listeners = (
        Listener(ae_title="ROUTINE", host=HOST, port=0),
        Listener(ae_title="STAT", host=HOST, port=0),
    )
    with listening(door, listeners=listeners) as scp:
        routine, stat = scp.ports
        assert store(stat, an_image(), called="STAT") == [0x0000]
        assert rejection(routine, called="STAT") == (1, 1, 7)
    assert door.arrivals[0].sender.called_ae_title == "STAT"


def test_two_ae_titles_may_share_one_port() -> None:
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    listeners = tuple(
        Listener(ae_title=title, host=HOST, port=port) for title in ("ROUTINE", "STAT")
    )
    with listening(Shelf(), listeners=listeners) as scp:
        assert scp.ports == (port, port)
        for title in ("ROUTINE", "STAT"):
            assert store(port, an_image(), called=title) == [0x0000]


def test_a_taken_port_is_an_error_at_start_and_leaves_nothing_open() -> None:
    door = Shelf()
    with listening(door) as first:
        taken = Listener(ae_title="X", host=HOST, port=first.ports[0])
        free = Listener(ae_title="Y", host=HOST, port=0)
        second = StorageSCP(a_config(listeners=(free, taken)), door, door.refused)
        with pytest.raises(errors.ConfigError, match=r"receive\.listeners: .* in use"):
            second.start()
        assert second.ports == ()


def test_ignored_kinds_are_accepted_only_where_configured() -> None:
    kinds = [KeyObjectSelectionDocumentStorage]
    with listening(Shelf()) as scp, associated(scp.ports[0], kinds) as assoc:
        assert assoc.is_established
    with (
        listening(Shelf(), accept_and_ignore=("SR",)) as scp,
        associated(scp.ports[0], kinds) as assoc,
    ):
        assert not assoc.is_established


def test_stop_lets_an_association_finish() -> None:
    door = Shelf()
    with listening(door) as scp:
        port = scp.ports[0]
        with associated(port) as assoc:
            stopping = threading.Thread(target=scp.stop, args=(10.0,))
            stopping.start()
            assert assoc.send_c_store(ready_to_send(an_image())).Status == 0x0000
        stopping.join(timeout=10)
        assert not stopping.is_alive()
        assert door.ends == [(1, "released")]
        with pytest.raises(ConnectionError):
            connected(port)


@pytest.mark.promise("N9")
def test_stop_returns_whatever_peers_and_door_do() -> None:
    hold = threading.Event()

    class Stuck(Shelf):
        def accept(self, arrival: object, transfer: int) -> Callable[[], None]:
            hold.wait(30)
            return hold.clear

    ds = an_image()
    request = store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID)
    door = Stuck()
    with listening(door, acse_timeout_s=30, dimse_timeout_s=30, network_timeout_s=30) as scp:
        port = scp.ports[0]
        silent = connected(port)
        half_header = connected(port, b"\x01\x00\x00")
        idle = negotiated(port)
        half_data = negotiated(port)
        half_data.sendall(request[:20])
        blocked = negotiated(port)
        blocked.sendall(request)
        stopping = threading.Thread(target=scp.stop, args=(0.2,))
        stopping.start()
        # grace, two lingers and a margin for a loaded machine
        stopping.join(timeout=5)
        assert not stopping.is_alive()
        hold.set()
        for sock in (silent, half_header, idle, half_data, blocked):
            while next_pdu(sock):
                pass
            sock.close()
    wait_until_all_have_ended()


def test_a_refusal_says_why_in_64_characters() -> None:
    reason = "12 bytes free, 4000 to store, spool.min_free_bytes is 2000000000: C:\\spool"
    door = Shelf(errors.OutOfResourcesError(reason, reason="no-space"))
    with listening(door) as scp, associated(scp.ports[0]) as assoc:
        answer = assoc.send_c_store(ready_to_send(an_image()))
    assert answer.Status == 0xA700
    assert answer.ErrorComment == reason[:64]


def in_fragments(request: bytes, *sizes: int) -> bytes:
    """The fragments of a message cut and put into one PDU each, or several into one, anew.

    `sizes` are fragments for each PDU, over and over.
    """
    fragments = []
    while request:
        (length,) = struct.unpack_from(">L", request, 2)
        fragments.append(request[6 : 6 + length])
        request = request[6 + length :]
    pdus = []
    for count in itertools.cycle(sizes):
        body, fragments = b"".join(fragments[:count]), fragments[count:]
        pdus.append(struct.pack(">BxL", 4, len(body)) + body)
        if not fragments:
            return b"".join(pdus)
    raise AssertionError


@pytest.mark.parametrize("sizes", [(1,), (2,), (1, 3), (5, 1), (7,)])
def test_fragments_may_lie_in_pdus_as_the_peer_likes(sizes: tuple[int, ...]) -> None:
    door = Shelf()
    ds = an_image(rows=200, columns=250)  # seven fragments of 16 kB and the command
    request = store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID)
    with listening(door) as scp, negotiated(scp.ports[0]) as sock:
        # two messages, cut where the fragments fall
        sock.sendall(in_fragments(request + request, *sizes))
        assert [next_pdu(sock)[:1] for _ in range(2)] == [b"\x04", b"\x04"]
    assert door.data_sets == [encoded(ds)] * 2


def test_an_object_that_is_refused_early_is_heard_out_and_the_next_one_is_taken() -> None:
    class Closed(Shelf):
        is_full = True

        def draft(self) -> AbstractContextManager[Draft]:
            if self.is_full:
                raise errors.OutOfResourcesError("full", reason="no-space")
            return super().draft()

    door = Closed()
    with listening(door) as scp, associated(scp.ports[0]) as assoc:
        large = ready_to_send(an_image(rows=700, columns=700))
        assert assoc.send_c_store(large).Status == 0xA700
        door.is_full = False
        assert assoc.send_c_store(large).Status == 0x0000
    assert door.reasons() == ["no-space"]


@pytest.mark.promise("N3")
def test_a_large_object_is_never_held_in_memory() -> None:
    door = Shelf(errors.OutOfResourcesError("not kept"))
    ds = an_image(rows=8000, columns=8000)  # 128 MB
    request = store_request(encoded(ds), ds.SOPClassUID, ds.SOPInstanceUID)
    with (
        listening(door, max_message_bytes=200_000_000) as scp,
        negotiated(scp.ports[0]) as sock,
    ):
        sock.settimeout(60)
        before = peak_bytes()
        sock.sendall(request)
        assert b"\x00\x00\x00\x09\x02\x00\x00\x00\x00\xa7" in next_pdu(sock)
        # a part of 256 kB, the header, and the pages of the file that the walk looks at
        assert peak_bytes() - before < 16_000_000


def peak_bytes() -> int:
    """The highest resident size of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stored_deflated(ds: Dataset, deflated: bytes, **options: object) -> tuple[bytes, Shelf]:
    """The answer to a deflated data set, and the door; the association is over."""
    door = Shelf()
    with (
        listening(door, **options) as scp,  # type: ignore[arg-type]
        negotiated(scp.ports[0], syntax=DeflatedExplicitVRLittleEndian) as sock,
    ):
        sock.sendall(store_request(deflated, ds.SOPClassUID, ds.SOPInstanceUID))
        return next_pdu(sock), door


def deflated(data: bytes) -> bytes:
    whole = zlib.compress(data, 6, -zlib.MAX_WBITS)
    return whole + bytes(len(whole) % 2)


def test_a_deflated_data_set_is_walked_inflated_and_kept_as_it_came() -> None:
    ds = an_image()
    _, door = stored_deflated(ds, deflated(encoded(ds)))
    assert door.data_sets == [deflated(encoded(ds))]
    assert door.arrivals[0].header.data_set.Rows == ds.Rows


@pytest.mark.promise("D6")
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: deflated(data)[:-20],
        lambda data: deflated(data[:-1]),
        lambda data: deflated(b""),
        lambda data: b"\xff" * 50,
    ],
    ids=["cut", "cut inside", "empty", "no deflate stream"],
)
def test_a_deflated_data_set_that_is_not_whole_is_refused(damage: object) -> None:
    ds = an_image()
    _, door = stored_deflated(ds, damage(encoded(ds)))  # type: ignore[operator]
    assert door.reasons() == ["cannot-understand"]
    assert door.arrivals == []


@pytest.mark.promise("C3")
@pytest.mark.promise("N3")
def test_a_deflated_bomb_is_inflated_onto_the_disk_and_not_into_memory() -> None:
    frames = 200
    ds = an_image(rows=1024, columns=512, NumberOfFrames=frames)
    ds.PixelData = bytes(frames * 1024 * 1024)
    bomb = deflated(encoded(ds))
    assert len(bomb) < 250_000
    ds.PixelData = b""
    tracemalloc.start()
    _, door = stored_deflated(ds, bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(door.arrivals) == 1  # it is whole: two hundred black frames
    assert peak < 16_000_000  # a few parts of 1 MB, and what a test holds
