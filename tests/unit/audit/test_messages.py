"""Audit messages against the schema of PS3.15 and the codes of PS3.16."""

from __future__ import annotations

import base64
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.sr.codedict import codes

from dicom_xai.audit import messages
from dicom_xai.audit.messages import Code, Message, Participant, Study
from tests.make.audit_schema import faults_of

NOW = "2026-03-04T05:06:07.089+00:00"
US = Participant("dicom-xai receiver", address="ai-host", alternative_id="4711")
CT = Participant("CT1", address="10.1.2.3")
HEAD = Study("1.2.3", {"1.2.840.10008.5.1.4.1.1.2": 3}, "QX-17")

ALL = {
    "start": messages.application_started(US, Participant("root")),
    "stop": messages.application_stopped(US),
    "crash": messages.application_stopped(US, "ended with status 1"),
    "log used": messages.audit_log_used(Participant("ops"), "audit.log"),
    "created": messages.instances_created(US, HEAD),
    "not created": messages.instances_created(US, HEAD, "no decoder"),
    "transferred": messages.instances_transferred(CT, US, HEAD),
    "refused": messages.node_refused(US, CT, "not-allowed", 7),
    "config": messages.config_changed(US, "dicom-xai.yaml", "a" * 12, "b" * 12),
    "bad config": messages.config_changed(US, "dicom-xai.yaml", "a" * 12, "", "line 3: no"),
    "verb": messages.function_used(Participant("ops"), US, "ledger retry", "job 3", is_done=True),
    "no verb": messages.function_used(
        Participant("ops"), US, "ledger skip", "delivery 9", is_done=False
    ),
}


@pytest.mark.promise("K6")
@pytest.mark.parametrize("name", ALL)
def test_each_message_follows_the_schema(name: str) -> None:
    assert faults_of(ALL[name].xml(NOW, "ai-host", "Example Hospital")) == []


@pytest.mark.promise("K6")
def test_what_went_wrong_is_cut_where_it_is_long_and_says_so() -> None:
    reason = "\n".join(f"routes.yaml:{line}: é no such model" for line in range(20_000))
    node = messages.node_refused(US, CT, reason, 7)
    config = messages.config_changed(US, "dicom-xai.yaml", "a" * 12, "", reason)
    for message in (node, config):
        text = message.xml(NOW, "ai-host")
        assert faults_of(text) == []
        assert len(text.encode()) < 20_000
        told = ElementTree.fromstring(text).findtext("*/EventOutcomeDescription")
        assert told is not None
        assert told.startswith("routes.yaml:0: é no such model routes.yaml:1:")
        assert told.endswith(f" ... (cut here, of {len(reason)} characters)")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('EventOutcomeIndicator="0"', 'EventOutcomeIndicator="1"'),
        (' UserIsRequestor="true"', ""),
        ("05:06:07", "05-06-07"),
        ("<AuditSourceIdentification", "<Extra/><AuditSourceIdentification"),
        ("<ParticipantObjectName>1.2.3</ParticipantObjectName>", ""),
        ('NumberOfInstances="3"', ""),
    ],
)
def test_the_judge_sees_what_is_wrong(old: str, new: str) -> None:
    good = ALL["transferred"].xml(NOW, "ai-host")
    assert old in good
    assert faults_of(good.replace(old, new))


@pytest.mark.promise("K6")
def test_every_code_is_dicoms_own() -> None:
    ours = [each for each in vars(messages).values() if isinstance(each, Code)]
    known = {
        (codes.DCM.__getattr__(name).value, codes.DCM.__getattr__(name).meaning): name
        for name in codes.DCM.dir()
    }
    of_dicom = [code for code in ours if code.scheme == "DCM"]
    assert len(of_dicom) == 16
    for code in of_dicom:
        assert (code.value, code.meaning) in known, code


def test_a_transfer_names_both_ends_the_study_and_the_patient() -> None:
    root = ElementTree.fromstring(ALL["transferred"].xml(NOW, "ai-host"))
    ends = [
        (each.get("UserID"), each.get("UserIsRequestor"), each[0].get("csd-code"))
        for each in root.iter("ActiveParticipant")
    ]
    assert ends == [("CT1", "true", "110153"), ("dicom-xai receiver", "false", "110152")]
    ids = [each.get("ParticipantObjectID") for each in root.iter("ParticipantObjectIdentification")]
    assert ids == ["1.2.3", "QX-17"]
    (sop_class,) = root.iter("SOPClass")
    assert sop_class.get("NumberOfInstances") == "3"


@pytest.mark.parametrize(("is_new", "action"), [(True, "C"), (False, "R")])
def test_only_a_receiver_that_held_no_copies_says_create(is_new: bool, action: str) -> None:
    made = messages.instances_transferred(CT, US, HEAD, is_new=is_new)
    event = ElementTree.fromstring(made.xml(NOW, "ai-host")).find("EventIdentification")
    assert event is not None
    assert event.get("EventActionCode") == action


def test_of_an_alert_the_reporter_is_the_requestor_and_who_is_reported_is_not() -> None:
    root = ElementTree.fromstring(ALL["refused"].xml(NOW, "ai-host"))
    roles = [
        (each.get("UserID"), each.get("UserIsRequestor")) for each in root.iter("ActiveParticipant")
    ]
    assert roles == [("dicom-xai receiver", "true"), ("CT1", "false")]


def test_without_a_patient_id_the_study_leads_there_alone() -> None:
    root = ElementTree.fromstring(
        messages.instances_transferred(CT, US, Study("1.2.3", {})).xml(NOW, "ai-host")
    )
    ids = [each.get("ParticipantObjectID") for each in root.iter("ParticipantObjectIdentification")]
    assert ids == ["1.2.3"]


def test_an_address_is_an_ip_address_or_a_machine() -> None:
    for address, kind in (("10.1.2.3", "2"), ("fe80::1", "2"), ("ct-1.example", "1")):
        made = messages.application_stopped(Participant("x", address=address)).xml(NOW, "h")
        found = ElementTree.fromstring(made).find("ActiveParticipant")
        assert found is not None
        assert found.get("NetworkAccessPointTypeCode") == kind


@pytest.mark.promise("C1")
@settings(deadline=None)  # a busy machine is no failure
@given(st.text(max_size=40))
def test_whatever_a_peer_calls_itself_the_message_stays_one_line_of_good_xml(text: str) -> None:
    node = Participant(text, address=text)
    for message in (
        messages.node_refused(US, node, "called-ae", 1),
        messages.instances_transferred(node, US, Study("1.2.3", {}, text)),
        messages.config_changed(US, "file", "", "", text),
    ):
        xml = message.xml(NOW, "ai-host")
        assert faults_of(xml) == []
        assert "\n" not in xml
        assert "\r" not in xml


def test_details_are_base64() -> None:
    root = ElementTree.fromstring(ALL["config"].xml(NOW, "ai-host"))
    details = {
        each.get("type"): base64.b64decode(each.get("value") or "").decode()
        for each in root.iter("ParticipantObjectDetail")
    }
    assert details == {"old digest": "a" * 12, "new digest": "b" * 12}


def test_a_message_is_a_value() -> None:
    assert ALL["start"] == messages.application_started(US, Participant("root"))
    assert isinstance(ALL["start"], Message)
