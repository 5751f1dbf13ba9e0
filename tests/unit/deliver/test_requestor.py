"""Messages of an association that we asked for."""

from __future__ import annotations

import socket
import struct
import threading

import pytest
from pynetdicom import AE, build_context
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification

from dicom_xai.config import Destination
from dicom_xai.deliver.requestor import Connection, Messages, Timeouts, associate, drop, why_not
from tests.make.associations import HOST

ANSWER = (1, "an answer")
#: Permanent, by the service user, called AE title not recognized.
REJECTION = struct.pack(">BxLxBBB", 0x03, 4, 1, 1, 7)
ABORT = struct.pack(">BxLxxBB", 0x07, 4, 2, 0)


def test_only_who_waits_is_given_the_answer() -> None:
    messages = Messages(Association(AE(), "requestor"))
    with messages.awaited():
        messages.msg_queue.put(ANSWER)
        assert messages.get_msg(block=False) == (None, None)  # as the association's thread asks
        assert messages.get_msg(block=True) == ANSWER
    messages.msg_queue.put(ANSWER)
    assert messages.get_msg(block=False) == ANSWER


class _Late(threading.Event):
    """What the association's thread waits for; it wakes when the peer has come and gone."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def wait(self, timeout: float | None = None) -> bool:
        assert super().wait(timeout=10)
        pause = threading.Event()
        while self._connection.socket is not None:
            pause.wait(0.001)
        return True


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (REJECTION, "rejected the association: Rejected Permanent, Called AE title not recognised"),
        (ABORT, "took the connection and agreed to no association in 5 s"),
    ],
    ids=["rejected", "aborted"],
)
def test_a_peer_that_is_quicker_than_our_own_thread_is_not_taken_for_absent(
    answer: bytes, reason: str
) -> None:
    made: list[Connection] = []

    def connecting(connection: Connection) -> None:
        connection._ready = _Late(connection)
        made.append(connection)

    with socket.create_server((HOST, 0)) as server:
        server.settimeout(10)

        def turn_away() -> None:
            peer, _ = server.accept()
            with peer:
                peer.settimeout(10)
                peer.recv(4096)
                peer.sendall(answer)
                while peer.recv(4096):
                    pass

        peer = threading.Thread(target=turn_away)
        peer.start()
        destination = Destination(
            type="dimse", ae_title="SOMEBODY", host=HOST, port=server.getsockname()[1]
        )
        association = associate(
            destination, Timeouts(), [build_context(Verification)], None, connecting
        )
        peer.join(timeout=10)
    assert why_not(association, Timeouts(), has_tls=False) == reason
    drop(association, None)
