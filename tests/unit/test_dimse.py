"""Statuses, answers and what is served."""

from __future__ import annotations

import pytest
from pydicom import uid
from pydicom.uid import UID
from pynetdicom.presentation import build_context, negotiate_as_acceptor
from pynetdicom.sop_class import uid_to_service_class

from dicom_xai import dimse, errors
from dicom_xai.config import IgnoredKind
from dicom_xai.decode.pixels import SERVED
from dicom_xai.dimse import Answer, Status, acceptor_contexts, answer_of, ignored_kind, status_of


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.OutOfResourcesError("full"), 0xA700),
        (errors.DataSetMismatchError("other"), 0xA900),
        (errors.CannotUnderstandError("cut"), 0xC000),
        (errors.DuplicateInstanceError("twice"), 0x0111),
        (errors.RefusedError("because"), 0x0110),
    ],
)
def test_each_refusal_has_its_status(error: errors.RefusedError, status: int) -> None:
    assert status_of(error) == status


@pytest.mark.promise("P3")
@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (0x0000, Answer.DELIVERED),
        (0xB000, Answer.WARNING),
        (0xB006, Answer.WARNING),
        (0xB007, Answer.WARNING),
        (0x0107, Answer.WARNING),
        (0xA700, Answer.TRANSIENT),
        (0xA702, Answer.TRANSIENT),
        (0x0110, Answer.TRANSIENT),
        (0x0213, Answer.TRANSIENT),
        (0xA900, Answer.PERMANENT),
        (0xC000, Answer.PERMANENT),
        (0xC211, Answer.PERMANENT),
        (0x0111, Answer.PERMANENT),
        (0x0117, Answer.PERMANENT),
        (0x0122, Answer.PERMANENT),
        (0x0124, Answer.PERMANENT),
        (0x0212, Answer.PERMANENT),
        (0xFE00, Answer.TRANSIENT),
        (0x1234, Answer.TRANSIENT),
    ],
)
def test_an_answer_is_sorted_by_what_happens_next(status: int, answer: Answer) -> None:
    assert answer_of(status) is answer
    assert answer.is_delivered == (answer in ("delivered", "warning"))


def test_a_duplicate_is_delivered_only_when_we_sent_it_before() -> None:
    assert answer_of(Status.DUPLICATE_SOP_INSTANCE, is_resend=True) is Answer.DELIVERED
    assert answer_of(Status.DUPLICATE_SOP_INSTANCE, is_resend=False) is Answer.PERMANENT


def test_every_kind_that_the_config_knows_has_its_classes() -> None:
    assert set(dimse.IGNORED_CLASSES) == {kind.value for kind in IgnoredKind}


def test_all_that_is_served_is_storage_or_its_commitment_and_exists_once() -> None:
    contexts = acceptor_contexts(list(IgnoredKind))
    classes = [context.abstract_syntax for context in contexts]
    assert len(set(classes)) == len(classes)
    services = {uid_to_service_class(each).__name__ for each in classes}
    assert services == {
        "StorageServiceClass",
        "StorageCommitmentServiceClass",
        "VerificationServiceClass",
    }


def test_kinds_that_are_not_configured_are_not_served() -> None:
    classes = {context.abstract_syntax for context in acceptor_contexts([])}
    assert not classes & {each for kind in dimse.IGNORED_CLASSES.values() for each in kind}


def test_every_syntax_that_is_taken_can_be_decoded_and_the_reverse() -> None:
    assert set(dimse.TRANSFER_SYNTAXES) == SERVED
    assert len(dimse.TRANSFER_SYNTAXES) == len(SERVED)


def test_objects_without_pixels_are_taken_in_no_syntax_for_pixels() -> None:
    for context in acceptor_contexts(list(IgnoredKind)):
        is_compressed = any(UID(each).is_encapsulated for each in context.transfer_syntax)
        assert is_compressed == (context.abstract_syntax in dimse.PIXEL_CLASSES)


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        ([uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless], uid.RLELossless),
        ([uid.JPEGBaseline8Bit, uid.JPEG2000Lossless], uid.JPEG2000Lossless),
        ([uid.JPEG2000, uid.ImplicitVRLittleEndian], uid.ImplicitVRLittleEndian),
        ([uid.JPEG2000, uid.HTJ2K], uid.HTJ2K),
    ],
)
def test_of_several_syntaxes_the_cheapest_lossless_one_is_taken(
    offered: list[str], taken: str
) -> None:
    theirs = build_context(uid.CTImageStorage, offered)
    theirs.context_id = 1
    (agreed,) = negotiate_as_acceptor([theirs], acceptor_contexts([]))[0]
    assert agreed.transfer_syntax == [taken]


def test_an_image_is_of_no_ignored_kind() -> None:
    assert {ignored_kind(each) for each in dimse.IMAGE_CLASSES} == {None}
    assert ignored_kind("1.2.840.10008.5.1.4.1.1.88.59") == "KO"
    assert ignored_kind("1.2.840.10008.5.1.4.1.1.66.4") == "SEG"
