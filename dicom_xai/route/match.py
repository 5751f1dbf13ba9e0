"""Does an image fit a route? Clauses are closed data; a missing attribute makes one false.

Text is compared without regard to case and surrounding spaces; of an attribute with several values
one must fit. Sequences and bytes have no text: whether they are there is all that can be asked.
Every answer says why.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydicom import Dataset, Sequence
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.errors import BytesLengthException
from pydicom.multival import MultiValue

from dicom_xai.config import SENDER_FACTS, Clause, Route
from dicom_xai.study import Sender

#: Keyword or sender fact: its values as text. A keyword that is absent or empty is not in it.
Facts = Mapping[str, tuple[str, ...]]

#: Patient and visit (PS3.6 6); what they hold is said by no verdict.
_PATIENT_GROUPS = (0x0010, 0x0038)
_HOW_TO_READ = frozenset((0x00080005, 0x00280103))
#: What pydicom raises on access to values that break their VR (all seen on real files).
_UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OSError,  # a sequence that is none; there is no file to fail
    OverflowError,
    NotImplementedError,
    struct.error,
    BytesLengthException,
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a route fits, and the clause that decided; holds no value that names a patient."""

    route: str
    is_match: bool
    reason: str


def facts_of(header: Dataset, sender: Sender, keywords: Iterable[str]) -> Facts:
    """What the clauses may ask about one instance.

    Parameters
    ----------
    header : Dataset
        As received; a value that cannot be read counts as missing.
    sender : Sender
    keywords : iterable of str
        Those that any clause names.
    """
    facts: dict[str, tuple[str, ...]] = {
        "calling_ae_title": (sender.calling_ae_title,),
        "called_ae_title": (sender.called_ae_title,),
        "source_address": (sender.source_address,),
    }
    for keyword in keywords:
        if keyword not in SENDER_FACTS:
            values = _values(header, keyword)
            if values:
                facts[keyword] = values
    return facts


def keywords_of(routes: Iterable[Route]) -> frozenset[str]:
    """All keywords and sender facts that these routes ask about."""
    return frozenset(keyword for route in routes for keyword in route.when)


def tags_of(routes: Iterable[Route]) -> frozenset[int]:
    """All elements on which a verdict of these routes may depend; sender facts have none.

    Character set and pixel representation say how others are to be read (PS3.5 6.1, PS3.6 6).
    """
    asked = (tag_for_keyword(keyword) for keyword in keywords_of(routes))
    return frozenset(tag for tag in asked if tag is not None) | _HOW_TO_READ


def match(route: Route, facts: Facts) -> Verdict:
    """Whether all clauses of a route hold; the reason names the first that does not."""
    if not route.enabled:
        return Verdict(route.name, False, "the route is disabled")
    for keyword, clause in route.when.items():
        why_not = _why_not(clause, facts.get(keyword, ()), keyword)
        if why_not:
            return Verdict(route.name, False, f"{keyword} {why_not}")
    return Verdict(route.name, True, f"{len(route.when)} clauses hold")


def _why_not(clause: Clause, values: tuple[str, ...], keyword: str) -> str:
    """Why a clause is false for these values, or nothing."""
    shown = _shown(values, keyword)
    texts = {value.strip().casefold() for value in values}
    checks: list[tuple[bool, str]] = []
    if clause.exists is not None:
        checks.append((bool(values) == clause.exists, f"exists: {str(clause.exists).lower()}"))
    if clause.equals is not None:
        checks.append((clause.equals.strip().casefold() in texts, f"equals: {clause.equals}"))
    if clause.one_of is not None:
        wanted = {item.strip().casefold() for item in clause.one_of}
        checks.append((bool(wanted & texts), f"in: {', '.join(clause.one_of)}"))
    if clause.contains is not None:
        part = clause.contains.strip().casefold()
        checks.append((any(part in text for text in texts), f"contains: {clause.contains}"))
    if clause.min is not None or clause.max is not None:
        checks.append(_is_in_range(clause, texts))
    if clause.negated is not None:
        is_false = bool(_why_not(clause.negated, values, keyword))
        checks.append((is_false, "not: that clause holds"))
    return next((f"{wanted}, found {shown}" for holds, wanted in checks if not holds), "")


def _is_in_range(clause: Clause, texts: Iterable[str]) -> tuple[bool, str]:
    """Whether one number lies within both bounds, and how that is said."""
    low = float("-inf") if clause.min is None else clause.min
    high = float("inf") if clause.max is None else clause.max
    numbers = [number for text in texts if (number := _number(text)) is not None]
    bounds = {"min": clause.min, "max": clause.max}
    said = ", ".join(f"{name}: {at:g}" for name, at in bounds.items() if at is not None)
    return any(low <= number <= high for number in numbers), said


def _shown(values: tuple[str, ...], keyword: str) -> str:
    if not values:
        return "nothing"
    tag = tag_for_keyword(keyword)
    if tag is not None and (tag >> 16 in _PATIENT_GROUPS or dictionary_VR(tag) == "PN"):
        return "another value"
    return "\\".join(values)[:64]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _values(header: Dataset, keyword: str) -> tuple[str, ...]:
    try:
        value = header.get(keyword)
        if isinstance(value, MultiValue):
            texts = tuple(str(item) for item in value)
        elif value is None or (isinstance(value, Sequence | bytes) and not value):
            texts = ()
        elif isinstance(value, Sequence):
            # no text of it: items may name a patient, and pydicom's text of a broken item grows
            # twofold with each level around it, to gigabytes from a data set of 900 bytes
            texts = (f"items: {len(value)}",)
        elif isinstance(value, bytes):
            texts = (f"bytes: {len(value)}",)
        else:
            texts = (str(value),)
    except _UNREADABLE:
        return ()
    return tuple(text for text in texts if text.strip())
