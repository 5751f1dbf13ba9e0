"""Destinations that break every rule: each attempt ends, nothing hangs, nothing is doubled."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from dicom_xai.config import Destination
from dicom_xai.deliver.storage_scu import StorageSCU, Timeouts
from dicom_xai.dimse import Answer, answer_of
from dicom_xai.errors import DestinationUnavailableError, NotNowError, NotReachedError
from tests.make.associations import HOST, wait_until_all_have_ended
from tests.make.scripted_peer import OF_OBJECTS, STALLS, Lie, ScriptedPeer
from tests.make.studies import a_radiograph

SHORT = Timeouts(connect_s=2.0, associate_s=0.5, answer_s=0.5, stall_s=0.5)
#: The longest of SHORT's chains, twice, and what a loaded machine needs to run threads.
ENOUGH_S = 8.0


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    wait_until_all_have_ended()


@pytest.fixture
def peer() -> Iterator[ScriptedPeer]:
    with ScriptedPeer() as started:
        yield started


@pytest.fixture
def scu(peer: ScriptedPeer) -> Iterator[StorageSCU]:
    place = Destination(type="dimse", ae_title="LIAR", host=HOST, port=peer.port)
    made = StorageSCU("liar", place, timeouts=SHORT)
    yield made
    made.close()


@pytest.fixture(scope="module")
def file() -> bytes:
    return a_radiograph().files[0]


def send_until_taken(scu: StorageSCU, file: bytes, most: int = 4) -> int:
    """How often it took; 0x0111 to a resend counts as taken."""
    for attempt in range(1, most + 1):
        try:
            receipt = scu.send(file)
        except DestinationUnavailableError:
            continue
        assert answer_of(receipt.status, is_resend=attempt > 1).is_delivered
        return attempt
    raise AssertionError(f"not taken in {most} attempts")


@pytest.mark.promise("P2")
@pytest.mark.parametrize("is_warm", [False, True], ids=["first object", "later object"])
@pytest.mark.parametrize("lie", Lie)
def test_an_attempt_ends_in_time_and_the_next_one_delivers(
    peer: ScriptedPeer, scu: StorageSCU, file: bytes, lie: Lie, is_warm: bool
) -> None:
    if is_warm:
        assert scu.send(a_radiograph().files[0]).status == 0
    before = len(peer.kept)
    peer.tell(lie)
    if is_warm and lie not in OF_OBJECTS:
        scu.close()  # those are about a new association
    started = time.monotonic()
    send_until_taken(scu, file)
    assert time.monotonic() - started < ENOUGH_S
    assert len(peer.kept) == before + 1
    assert peer.conflicts == []


@pytest.mark.promise("P2")
@pytest.mark.parametrize("lie", sorted(STALLS))
def test_a_stalled_send_ends_when_another_thread_hangs_up(
    peer: ScriptedPeer, file: bytes, lie: Lie
) -> None:
    place = Destination(type="dimse", ae_title="LIAR", host=HOST, port=peer.port)
    scu = StorageSCU("liar", place, timeouts=Timeouts(associate_s=3.0, answer_s=60.0))
    peer.tell(lie)
    failures: list[DestinationUnavailableError] = []

    def attempt() -> None:
        try:
            scu.send(file if lie is not Lie.STOPS_READING else file + bytes(64_000_000))
        except DestinationUnavailableError as error:
            failures.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    while not peer.attempts:
        thread.join(0.02)
    scu.hang_up()
    thread.join(ENOUGH_S)
    assert not thread.is_alive()
    assert len(failures) == 1
    with pytest.raises(DestinationUnavailableError, match="hung up"):
        scu.send(file)


@pytest.mark.promise("P3")
@pytest.mark.parametrize("status", [0x0000, 0xB000, 0xB006, 0xB007, 0x0107, 0x0116])
def test_success_and_warnings_are_delivered(
    peer: ScriptedPeer, scu: StorageSCU, file: bytes, status: int
) -> None:
    peer.answer(status)
    assert answer_of(scu.send(file).status).is_delivered


@pytest.mark.promise("P3")
@pytest.mark.parametrize("status", [0xA700, 0xA701, 0xA7FF, 0x0110, 0x0213, 0xD000])
def test_what_may_pass_is_tried_later_on_the_same_association(
    peer: ScriptedPeer, scu: StorageSCU, file: bytes, status: int
) -> None:
    peer.answer(status)
    with pytest.raises(NotNowError):
        scu.send(file)
    assert scu.send(file).status == 0
    assert peer.attempts == 1


@pytest.mark.promise("P3")
@pytest.mark.parametrize("status", [0xA900, 0xA9FF, 0xC000, 0xCFFF, 0x0122, 0x0124, 0x0117])
def test_what_will_not_pass_is_final(
    peer: ScriptedPeer, scu: StorageSCU, file: bytes, status: int
) -> None:
    peer.answer(status)
    receipt = scu.send(file)
    assert receipt.status == status
    assert answer_of(receipt.status, is_resend=True) is Answer.PERMANENT


@pytest.mark.promise("P3")
def test_a_known_uid_is_delivered_only_if_we_sent_it_before() -> None:
    assert answer_of(0x0111) is Answer.PERMANENT
    assert answer_of(0x0111, is_resend=True).is_delivered


@pytest.mark.promise("P3")
def test_an_object_that_went_out_twice_in_one_attempt_says_so(
    peer: ScriptedPeer, scu: StorageSCU, file: bytes
) -> None:
    scu.send(
        a_radiograph().files[0]
    )  # warm: a lost connection then says nothing about the destination
    peer.tell(Lie.KEEP_AND_CLOSE)
    receipt = scu.send(file)
    assert receipt.sends == 2
    assert peer.received == 3
    assert peer.conflicts == []


def test_an_object_that_went_out_did_reach_somebody_who_is_away_then(
    peer: ScriptedPeer, scu: StorageSCU, file: bytes
) -> None:
    scu.send(a_radiograph().files[0])
    peer.tell(Lie.KEEP_AND_CLOSE, Lie.REJECT)
    with pytest.raises(DestinationUnavailableError) as caught:
        scu.send(file)
    assert not isinstance(caught.value, NotReachedError)
    scu.close()
    peer.tell(Lie.REJECT)
    with pytest.raises(NotReachedError):
        scu.send(file)


@pytest.mark.promise("P2")
def test_contexts_agreed_yesterday_are_asked_for_again_on_each_association(
    peer: ScriptedPeer, scu: StorageSCU, file: bytes
) -> None:
    scu.send(file)
    scu.close()
    peer.tell(Lie.NO_CONTEXTS)
    with pytest.raises(DestinationUnavailableError, match="none of the presentation contexts"):
        scu.send(file)
    assert scu.send(file).status == 0
