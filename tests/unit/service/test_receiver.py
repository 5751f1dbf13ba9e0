"""What the receiver makes of one object, with a real ledger and spool and no wire."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from dicom_xai.audit.trail import Follower
from dicom_xai.errors import DuplicateInstanceError
from dicom_xai.identity import MODEL_NAME
from dicom_xai.receive.inspect import file_meta, inspect
from dicom_xai.receive.storage_scp import Arrival, TransferEnd
from dicom_xai.service.receiver import Receiver
from dicom_xai.service.role import Context
from dicom_xai.study import Sender
from tests.make.associations import an_image, encoded
from tests.make.config_files import Folder
from tests.make.ledger import change, rows

SENDER = Sender("PACS", "DICOM_XAI", "127.0.0.1", 0, "127.0.0.1:11112")
SYNTAX = "1.2.840.10008.1.2.1"


@pytest.fixture
def files(files: Folder) -> Folder:
    asked = "SeriesDescription: {equals: CHÄST}\n      calling_ae_title: {equals: PACS}"
    files.spoil("routes.yaml", "BodyPartExamined: {equals: CHEST}", asked)
    files.texts["dicom-xai.yaml"] += "audit: {include_patient_id: true}\n"
    files.texts["routes.yaml"] = files.texts["routes.yaml"].partition("tests:")[0]
    return files


def a_chest(**attributes: object) -> Dataset:
    """An image that the route wants."""
    chosen: dict[str, object] = {
        "SpecificCharacterSet": "ISO_IR 100",
        "Modality": "DX",
        "SeriesDescription": "CHÄST",
        **attributes,
    }
    return an_image(4, 4, **chosen)  # type: ignore[arg-type]


def taken(receiver: Receiver, transfer: int, ds: Dataset, sender: Sender = SENDER) -> None:
    """As if it had come by an association."""
    data = encoded(ds)
    with receiver.draft() as draft:
        draft.write(file_meta(SYNTAX, ds.SOPClassUID, ds.SOPInstanceUID, sender.calling_ae_title))
        draft.write(data)
        arrival = Arrival(
            header=inspect(data, SYNTAX, ds.SOPClassUID, ds.SOPInstanceUID),
            draft=draft,
            sop_class_uid=ds.SOPClassUID,
            sop_instance_uid=ds.SOPInstanceUID,
            series_instance_uid=ds.SeriesInstanceUID,
            study_instance_uid=ds.StudyInstanceUID,
            transfer_syntax_uid=SYNTAX,
            sender=sender,
            data_set_sha256=hashlib.sha256(data).hexdigest(),
            received_s=0.0,
        )
        receiver.accept(arrival, transfer)()


def trail_of(context: Context) -> list[ElementTree.Element]:
    """All messages of the audit trail."""
    directory = context.config.service.audit.directory
    assert directory is not None
    follower = Follower(directory, 0)
    found = []
    while (record := follower.next()) is not None:
        found.append(ElementTree.fromstring(record.message))
    follower.close()
    return found


def dispositions(folder: Path) -> list[object]:
    return [row[0] for row in rows(folder, "SELECT disposition FROM instance ORDER BY id")]


@pytest.mark.promise("K6")
def test_the_trail_tells_what_was_new_from_what_was_here(context: Context) -> None:
    receiver = Receiver(context)
    ds = a_chest()
    for _ in range(2):
        transfer = receiver.opened(SENDER)
        taken(receiver, transfer, ds)
        receiver.closed(transfer, TransferEnd.RELEASED)
    transfer = receiver.opened(SENDER)
    taken(receiver, transfer, ds)
    taken(receiver, transfer, a_chest(StudyInstanceUID=ds.StudyInstanceUID))
    receiver.closed(transfer, TransferEnd.RELEASED)
    events = [message.find("EventIdentification") for message in trail_of(context)]
    assert [event.get("EventActionCode") for event in events if event is not None] == list("CRC")


@pytest.mark.promise("K6")
def test_the_trail_names_the_patient_though_the_first_image_was_here_already(
    context: Context,
) -> None:
    receiver = Receiver(context)
    first = a_chest()
    for images in ([first], [first, a_chest(StudyInstanceUID=first.StudyInstanceUID)]):
        transfer = receiver.opened(SENDER)
        for ds in images:
            taken(receiver, transfer, ds)
        receiver.closed(transfer, TransferEnd.RELEASED)
    for message in trail_of(context):
        objects = message.iter("ParticipantObjectIdentification")
        assert [each.get("ParticipantObjectID") for each in objects] == [
            first.StudyInstanceUID,
            first.PatientID,
        ]


@pytest.mark.promise("D2")
def test_a_unit_whose_route_another_version_wrote_is_held_and_stops_nobody(
    context: Context, tmp_path: Path
) -> None:
    receiver = Receiver(context)
    transfer = receiver.opened(SENDER)
    taken(receiver, transfer, a_chest())
    change(tmp_path, """UPDATE candidate SET state = 'waiting', route_json = '{"of": "old"}'""")
    receiver.closed(transfer, TransferEnd.ABORTED)
    assert rows(tmp_path, "SELECT state, fired FROM candidate") == [("held", "unreadable route")]


@pytest.mark.promise("D8")
def test_other_content_that_comes_again_and_again_is_kept_once(context: Context) -> None:
    receiver = Receiver(context)
    transfer = receiver.opened(SENDER)
    ds = a_chest()
    taken(receiver, transfer, ds)
    ds.StudyDescription = "corrected"
    for _ in range(3):
        with pytest.raises(DuplicateInstanceError):
            taken(receiver, transfer, ds)
    kept = [key for key, _ in context.spool.entries()]
    assert len(kept) == 2
    assert all(map(context.ledger.upkeep.is_known_key, kept))
    assert context.ledger.upkeep.depths().quarantined == 1


def test_objects_that_differ_in_what_a_route_asks_get_answers_of_their_own(
    context: Context, tmp_path: Path
) -> None:
    receiver = Receiver(context)
    other = replace(SENDER, calling_ae_title="OTHER")
    transfers = {sender: receiver.opened(sender) for sender in (SENDER, other)}
    cases = [
        (a_chest(), SENDER, "routed"),
        (a_chest(), other, "unrouted"),
        (a_chest(Modality="CT"), SENDER, "unrouted"),
        # the same bytes, another letter
        (
            a_chest(SpecificCharacterSet="ISO_IR 126", SeriesDescription="CHΔST"),
            SENDER,
            "unrouted",
        ),
        (a_chest(ManufacturerModelName=MODEL_NAME), SENDER, "own"),
    ]
    for _ in range(2):  # asked, and then remembered
        for ds, sender, _ in cases:
            ds.SOPInstanceUID = generate_uid()
            taken(receiver, transfers[sender], ds, sender)
    assert dispositions(tmp_path) == 2 * [expected for *_, expected in cases]
