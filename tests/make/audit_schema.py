"""The schema of audit messages (PS3.15 A.5.1.1) as data, and a judge that walks it.

A rule for each element: its attributes with the pattern of their values, and its children in order
with how often each may come.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from xml.etree import ElementTree

_TOKEN = r"\S+( \S+)*|"
_DATE_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"
_BASE64 = r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
_UID = r"[0-2](\.(0|[1-9]\d*))*"
_REQUIRED, _OPTIONAL, _ANY, _SOME = (1, 1), (0, 1), (0, None), (1, None)


@dataclass(frozen=True)
class Rule:
    """What one element may hold."""

    required: dict[str, str] = field(default_factory=dict)
    optional: dict[str, str] = field(default_factory=dict)
    children: tuple[tuple[str, tuple[int, int | None]], ...] = ()
    text: str = r"\s*"


_CODED = Rule(
    {"csd-code": _TOKEN, "codeSystemName": _TOKEN, "originalText": _TOKEN}, {"displayName": _TOKEN}
)
_RULES = {
    "AuditMessage": Rule(
        children=(
            ("EventIdentification", _REQUIRED),
            ("ActiveParticipant", _SOME),
            ("AuditSourceIdentification", _REQUIRED),
            ("ParticipantObjectIdentification", _ANY),
        )
    ),
    "EventIdentification": Rule(
        {"EventDateTime": _DATE_TIME, "EventOutcomeIndicator": "0|4|8|12"},
        {"EventActionCode": "[CRUDE]"},
        (("EventID", _REQUIRED), ("EventTypeCode", _ANY), ("EventOutcomeDescription", _OPTIONAL)),
    ),
    "EventID": _CODED,
    "EventTypeCode": _CODED,
    "EventOutcomeDescription": Rule(text=r"(?s).*"),
    "ActiveParticipant": Rule(
        {"UserID": ".+", "UserIsRequestor": "true|false|0|1"},
        {
            "AlternativeUserID": ".*",
            "UserName": ".*",
            "NetworkAccessPointID": _TOKEN,
            "NetworkAccessPointTypeCode": "[1-5]",
        },
        (("RoleIDCode", _ANY), ("MediaIdentifier", _OPTIONAL)),
    ),
    "RoleIDCode": _CODED,
    "AuditSourceIdentification": Rule(
        {"AuditSourceID": _TOKEN},
        {"AuditEnterpriseSiteID": _TOKEN},
        (("AuditSourceTypeCode", _ANY),),
    ),
    "AuditSourceTypeCode": Rule({"csd-code": "[1-9]"}),
    "ParticipantObjectIdentification": Rule(
        {"ParticipantObjectID": _TOKEN},
        {
            "ParticipantObjectTypeCode": "[1-4]",
            "ParticipantObjectTypeCodeRole": "[1-9]|1[0-9]|2[0-6]",
            "ParticipantObjectDataLifeCycle": "[1-9]|1[0-5]",
            "ParticipantObjectSensitivity": _TOKEN,
        },
        (
            ("ParticipantObjectIDTypeCode", _REQUIRED),
            ("ParticipantObjectName", _REQUIRED),  # or a query, which we never have
            ("ParticipantObjectDetail", _ANY),
            ("ParticipantObjectDescription", _ANY),
        ),
    ),
    "ParticipantObjectIDTypeCode": _CODED,
    "ParticipantObjectName": Rule(text=_TOKEN),
    "ParticipantObjectDetail": Rule({"type": _TOKEN, "value": _BASE64}),
    "ParticipantObjectDescription": Rule(children=(("SOPClass", _ANY),)),
    "SOPClass": Rule({"NumberOfInstances": r"\d+"}, {"UID": _UID}, (("Instance", _ANY),)),
    "Instance": Rule({"UID": _UID}),
}


def faults_of(message: str) -> list[str]:
    """What the schema has against a message; nothing for a good one.

    Raises
    ------
    ElementTree.ParseError
        It is no XML.
    """
    root = ElementTree.fromstring(message)
    return ["the root is no AuditMessage"] if root.tag != "AuditMessage" else list(_faults(root))


def _faults(element: ElementTree.Element) -> list[str]:
    rule = _RULES[element.tag]
    found = [f"{element.tag}: no {name}" for name in rule.required if name not in element.attrib]
    for name, value in element.attrib.items():
        pattern = {**rule.required, **rule.optional}.get(name)
        if pattern is None:
            found.append(f"{element.tag}: attribute {name}")
        elif not re.fullmatch(pattern, value):
            found.append(f"{element.tag}: {name} is {value!r}")
    if not re.fullmatch(rule.text, element.text or ""):
        found.append(f"{element.tag}: text {element.text!r}")
    order = [name for name, _ in rule.children]
    tags = [child.tag for child in element]
    if unknown := set(tags) - set(order):
        return [*found, f"{element.tag}: {sorted(unknown)}"]
    if tags != sorted(tags, key=order.index):
        found.append(f"{element.tag}: children in the order {tags}")
    for name, (least, most) in rule.children:
        if tags.count(name) < least or (most is not None and tags.count(name) > most):
            found.append(f"{element.tag}: {tags.count(name)} of {name}")
    return found + [fault for child in element for fault in _faults(child)]
