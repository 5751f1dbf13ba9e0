"""Audit messages as PS3.15 A.5.1 writes them, one function for each event that we report.

Which event takes which participants and objects is told in PS3.15 A.5.3; each function names its
section. Text from the wire (AE titles, identifiers) is cleaned of what XML cannot hold; what went
wrong is told in at most `LONGEST_WORDS` characters, for a config can be wrong in hundreds of lines.

Storage commitment (PS3.4 Annex J) has no message, for A.5.3 defines none for it: of its fifteen
(listed in PS3.2 Table N.11-2) Begin Transferring (A.5.3.3) and Instances Transferred (A.5.3.7) are
about instances that go from one application to another, Instances Accessed (A.5.3.6) about their
use. A request or report names instances and moves none; written as a transfer it would tell of one
that was not, beside that of C-STORE. Ledger and log have requests and reports, and whoever is
turned away before one is in the trail like anybody.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from xml.etree import ElementTree

#: What XML 1.0 has no way to write.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
LONGEST_WORDS = 4000


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept."""

    value: str
    meaning: str
    scheme: str = "DCM"


# PS3.16 CID 400, 401, 402 and 404; "2" is RFC 3881's
APPLICATION_ACTIVITY = Code("110100", "Application Activity")
AUDIT_LOG_USED = Code("110101", "Audit Log Used")
INSTANCES_ACCESSED = Code("110103", "DICOM Instances Accessed")
INSTANCES_TRANSFERRED = Code("110104", "DICOM Instances Transferred")
SECURITY_ALERT = Code("110113", "Security Alert")
APPLICATION_START = Code("110120", "Application Start")
APPLICATION_STOP = Code("110121", "Application Stop")
NODE_AUTHENTICATION = Code("110126", "Node Authentication")
SOFTWARE_CONFIGURATION = Code("110131", "Software Configuration")
RESTRICTED_FUNCTION = Code("110132", "Use of Restricted Function")
APPLICATION = Code("110150", "Application")
APPLICATION_LAUNCHER = Code("110151", "Application Launcher")
DESTINATION_ROLE = Code("110152", "Destination Role ID")
SOURCE_ROLE = Code("110153", "Source Role ID")
STUDY_INSTANCE_UID = Code("110180", "Study Instance UID")
NODE_ID = Code("110182", "Node ID")
PATIENT_NUMBER = Code("2", "Patient Number", "RFC-3881")
URI = Code("12", "URI", "RFC-3881")


class Outcome(StrEnum):
    """EventOutcomeIndicator."""

    SUCCESS = "0"
    MINOR_FAILURE = "4"  #: this once
    SERIOUS_FAILURE = "8"  #: somebody should look
    MAJOR_FAILURE = "12"  #: the application is gone


@dataclass(frozen=True, slots=True)
class Participant:
    """A person or a process that took part.

    `address` is an IP address, or a machine's name.
    """

    user_id: str
    is_requestor: bool = False
    role: Code | None = None
    address: str = ""
    alternative_id: str = ""
    user_name: str = ""


@dataclass(frozen=True, slots=True)
class Object:
    """What it was about: type and role are numbers of PS3.15 A.5.1."""

    identifier: str
    id_type: Code
    type_code: str
    role: str
    name: str
    details: Mapping[str, str] = field(default_factory=dict)
    sop_classes: Mapping[str, int] = field(default_factory=dict)  #: UID to number of instances


@dataclass(frozen=True, slots=True)
class Study:
    """Instances of one study; `patient_id` is empty where the trail shall not hold it."""

    study_instance_uid: str
    sop_classes: Mapping[str, int]  #: SOP Class UID to number of instances
    patient_id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One event."""

    event: Code
    action: str  #: C create, R read, U update, D delete, E execute
    outcome: Outcome
    participants: Sequence[Participant]
    objects: Sequence[Object] = ()
    event_type: Code | None = None
    description: str = ""

    def xml(self, at: str, source_id: str, site_id: str = "") -> str:
        """The AuditMessage element, in one line.

        Parameters
        ----------
        at : str
            When it happened, ISO 8601 with the zone.
        source_id, site_id : str
            AuditSourceID and AuditEnterpriseSiteID.
        """
        root = ElementTree.Element("AuditMessage")
        event = _element(
            root,
            "EventIdentification",
            EventActionCode=self.action,
            EventDateTime=at,
            EventOutcomeIndicator=self.outcome,
        )
        _coded(event, "EventID", self.event)
        if self.event_type is not None:
            _coded(event, "EventTypeCode", self.event_type)
        if self.description:
            _element(event, "EventOutcomeDescription").text = _clean(_cut(self.description))
        for each in self.participants:
            _participant(root, each)
        source = _element(root, "AuditSourceIdentification", AuditSourceID=source_id)
        if site_id:
            source.set("AuditEnterpriseSiteID", _clean(site_id))
        _element(source, "AuditSourceTypeCode", **{"csd-code": "4"})  # an application server
        for item in self.objects:
            _object(root, item)
        return ElementTree.tostring(root, encoding="unicode")


def application_started(process: Participant, launcher: Participant) -> Message:
    """The application, or one of its roles, has started (PS3.15 A.5.3.1)."""
    return Message(
        APPLICATION_ACTIVITY,
        "E",
        Outcome.SUCCESS,
        (_as(process, APPLICATION), _as(launcher, APPLICATION_LAUNCHER, is_requestor=True)),
        event_type=APPLICATION_START,
    )


def application_stopped(process: Participant, problem: str = "") -> Message:
    """It has stopped, or died of a problem (PS3.15 A.5.3.1)."""
    return Message(
        APPLICATION_ACTIVITY,
        "E",
        Outcome.SERIOUS_FAILURE if problem else Outcome.SUCCESS,
        (_as(process, APPLICATION),),
        event_type=APPLICATION_STOP,
        description=problem,
    )


def audit_log_used(user: Participant, trail: str) -> Message:
    """Somebody has read the trail (PS3.15 A.5.3.2)."""
    return Message(
        AUDIT_LOG_USED,
        "R",
        Outcome.SUCCESS,
        (_as(user, None, is_requestor=True),),
        (Object(trail, URI, "2", "13", "Security Audit Log"),),
    )


def instances_created(process: Participant, study: Study, problem: str = "") -> Message:
    """We made instances of a study (PS3.15 A.5.3.6, action create)."""
    return Message(
        INSTANCES_ACCESSED,
        "C",
        Outcome.MINOR_FAILURE if problem else Outcome.SUCCESS,
        (_as(process, None, is_requestor=True),),
        _study_objects(study),
        description=problem,
    )


def instances_transferred(
    source: Participant,
    destination: Participant,
    study: Study,
    problem: str = "",
    *,
    is_new: bool = False,
) -> Message:
    """Instances of a study went from one to the other, complete (PS3.15 A.5.3.7).

    The source asked for the transfer: C-STORE is pushed. `is_new` is for the receiver to say, and
    makes action C: not all of them were there before. Who does not know says R.
    """
    return Message(
        INSTANCES_TRANSFERRED,
        "C" if is_new else "R",
        Outcome.MINOR_FAILURE if problem else Outcome.SUCCESS,
        (_as(source, SOURCE_ROLE, is_requestor=True), _as(destination, DESTINATION_ROLE)),
        _study_objects(study),
        description=problem,
    )


def node_refused(process: Participant, node: Participant, reason: str, count: int) -> Message:
    """Somebody was turned away `count` times for one reason (PS3.15 A.5.3.11).

    Who reports is the requestor; who is reported must not be (Table A.5.3.11-1).
    """
    details = {"Alert Description": reason, "count": str(count)}
    name = _clean(node.user_id) or "unknown"
    identifier = f"{name}@{node.address}" if node.address else name
    return Message(
        SECURITY_ALERT,
        "E",
        Outcome.MINOR_FAILURE,
        (_as(process, None, is_requestor=True), _as(node, None, is_requestor=False)),
        (Object(identifier, NODE_ID, "2", "13", name, details),),
        event_type=NODE_AUTHENTICATION,
        description=reason,
    )


def config_changed(
    process: Participant, file: str, old: str, new: str, problem: str = ""
) -> Message:
    """Another config is live, or was refused (PS3.15 A.5.3.11).

    `old` and `new` are digests; new is empty where the config could not be read.
    """
    details = {"old digest": old, "new digest": new}
    return Message(
        SECURITY_ALERT,
        "E",
        Outcome.MINOR_FAILURE if problem else Outcome.SUCCESS,
        (_as(process, None, is_requestor=True),),
        (Object(file, URI, "2", "13", "configuration", details),),
        event_type=SOFTWARE_CONFIGURATION,
        description=problem,
    )


def function_used(
    user: Participant, process: Participant, verb: str, subject: str, *, is_done: bool
) -> Message:
    """A person used a verb that changes what the service does (PS3.15 A.5.3.11)."""
    return Message(
        SECURITY_ALERT,
        "E",
        Outcome.SUCCESS if is_done else Outcome.MINOR_FAILURE,
        (_as(user, None, is_requestor=True), _as(process, None, is_requestor=False)),
        (Object(subject, URI, "2", "20", verb, {"Alert Description": verb}),),
        event_type=RESTRICTED_FUNCTION,
        description=verb if is_done else f"{verb}: there is no such thing",
    )


def _study_objects(study: Study) -> tuple[Object, ...]:
    uid = study.study_instance_uid
    found = Object(uid, STUDY_INSTANCE_UID, "2", "3", uid, sop_classes=study.sop_classes)
    if not study.patient_id:
        return (found,)
    number = study.patient_id
    return found, Object(number, PATIENT_NUMBER, "1", "1", "patient")


def _as(who: Participant, role: Code | None, *, is_requestor: bool | None = None) -> Participant:
    """The same participant in another role."""
    return Participant(
        who.user_id,
        who.is_requestor if is_requestor is None else is_requestor,
        role,
        who.address,
        who.alternative_id,
        who.user_name,
    )


def _participant(root: ElementTree.Element, each: Participant) -> None:
    made = _element(
        root,
        "ActiveParticipant",
        UserID=_clean(each.user_id) or "unknown",
        UserIsRequestor="true" if each.is_requestor else "false",
    )
    if each.alternative_id:
        made.set("AlternativeUserID", _clean(each.alternative_id))
    if each.user_name:
        made.set("UserName", _clean(each.user_name))
    if each.address:
        is_ip = re.fullmatch(r"[0-9.]+|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*", each.address)
        made.set("NetworkAccessPointID", _clean(each.address))
        made.set("NetworkAccessPointTypeCode", "2" if is_ip else "1")
    if each.role is not None:
        _coded(made, "RoleIDCode", each.role)


def _object(root: ElementTree.Element, item: Object) -> None:
    made = _element(
        root,
        "ParticipantObjectIdentification",
        ParticipantObjectID=item.identifier,
        ParticipantObjectTypeCode=item.type_code,
        ParticipantObjectTypeCodeRole=item.role,
    )
    _coded(made, "ParticipantObjectIDTypeCode", item.id_type)
    _element(made, "ParticipantObjectName").text = _clean(item.name)
    for kind, value in item.details.items():
        encoded = base64.b64encode(_cut(value).encode("utf-8", "replace")).decode("ascii")
        _element(made, "ParticipantObjectDetail", type=kind, value=encoded)
    if item.sop_classes:
        described = _element(made, "ParticipantObjectDescription")
        for sop_class_uid, count in sorted(item.sop_classes.items()):
            _element(described, "SOPClass", UID=sop_class_uid, NumberOfInstances=str(count))


def _element(parent: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    cleaned = {name: _clean(value) for name, value in attributes.items()}
    return ElementTree.SubElement(parent, tag, cleaned)


def _coded(parent: ElementTree.Element, tag: str, code: Code) -> None:
    names = {"csd-code": code.value, "codeSystemName": code.scheme, "originalText": code.meaning}
    _element(parent, tag, **names)


def _cut(text: str) -> str:
    """What may be long, with a word where it was cut."""
    if len(text) <= LONGEST_WORDS:
        return text
    return f"{text[:LONGEST_WORDS]} ... (cut here, of {len(text)} characters)"


def _clean(text: str) -> str:
    """Text that XML can hold, in one line."""
    return " ".join(_NOT_XML.sub("�", text).split())
