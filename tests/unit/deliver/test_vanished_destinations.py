"""A destination whose power goes: no end of the connection is ever heard of."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from dicom_xai.config import Destination
from dicom_xai.deliver.storage_scu import StorageSCU, Timeouts
from dicom_xai.dimse import answer_of
from dicom_xai.errors import DestinationUnavailableError
from tests.make.associations import HOST, wait_until_all_have_ended
from tests.make.books import wait_until
from tests.make.cable import Cable
from tests.make.scripted_peer import ScriptedPeer
from tests.make.studies import a_radiograph

SHORT = Timeouts(connect_s=2.0, associate_s=0.5, answer_s=0.5, stall_s=0.5)
#: The longest of SHORT's chains, twice, and what a loaded machine needs to run threads.
ENOUGH_S = 8.0


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    wait_until_all_have_ended()


@pytest.mark.promise("N6")
@pytest.mark.promise("P2")
@pytest.mark.parametrize(
    ("is_warm", "bytes_until", "of_answers", "received"),
    [
        pytest.param(False, 0, False, 1, id="before the association is asked for"),
        pytest.param(True, 0, False, 2, id="between two objects"),
        pytest.param(True, 60_000, False, 2, id="in the middle of an object"),
        pytest.param(True, 0, True, 2, id="before its answer"),
    ],
)
def test_an_attempt_ends_and_what_comes_late_is_the_same_object(
    is_warm: bool, bytes_until: int, of_answers: bool, received: int
) -> None:
    first, second = (a_radiograph().files[0] for _ in range(2))
    with ScriptedPeer() as peer, Cable(peer.port) as cable:
        place = Destination(type="dimse", ae_title="PACS", host=HOST, port=cable.port)
        scu = StorageSCU("pacs", place, timeouts=SHORT)
        if is_warm:
            assert scu.send(first).status == 0
        if bytes_until or of_answers:
            cable.cut_after(bytes_until, of_answers=of_answers)
        else:
            cable.cut()
        for _ in range(2):  # for as long as it lasts
            began = time.monotonic()
            with pytest.raises(DestinationUnavailableError):
                scu.send(second)
            assert time.monotonic() - began < ENOUGH_S
            assert cable.is_cut
        cable.mend()
        assert answer_of(scu.send(second).status, is_resend=True).is_delivered
        scu.close()
        # all that was under way has come by now, the object of the first attempt too
        wait_until(lambda: peer.received == is_warm + received, "what waited has come")
        assert len(peer.kept) == is_warm + 1
        assert peer.conflicts == []
