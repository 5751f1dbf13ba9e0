"""Messages of an association that we asked for."""

from __future__ import annotations

from pynetdicom import AE
from pynetdicom.association import Association

from dicom_xai.deliver.requestor import Messages

ANSWER = (1, "an answer")


def test_only_who_waits_is_given_the_answer() -> None:
    messages = Messages(Association(AE(), "requestor"))
    with messages.awaited():
        messages.msg_queue.put(ANSWER)
        assert messages.get_msg(block=False) == (None, None)  # as the association's thread asks
        assert messages.get_msg(block=True) == ANSWER
    messages.msg_queue.put(ANSWER)
    assert messages.get_msg(block=False) == ANSWER
