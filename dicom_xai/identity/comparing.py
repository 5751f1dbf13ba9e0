"""Does a result carry its source's identity, and do the sources of a unit agree on it?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from pydicom.charset import convert_encodings, decode_bytes

from dicom_xai.errors import IdentityError
from dicom_xai.identity.block import (
    EMPTY_WHEN_ABSENT_TAGS,
    PLACE_TAGS,
    Block,
    Element,
    name_of,
    tag_of,
    trimmed,
)

#: What the instances of one unit must agree on, where they say anything.
AGREE_KEYWORDS = (
    *("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "AccessionNumber"),
)
#: Of these, silence is a statement too.
AGREE_EVEN_EMPTY = ("PatientID", "StudyInstanceUID")


def compare(source: Block, result: Block) -> None:
    """Make sure that a result carries its source's identity.

    Raises
    ------
    IdentityError
        Naming every element that differs, never its value; the result must not be sent.
    """
    differing = [
        name_of(tag)
        for tag in sorted({*source, *result})
        if not _same(source.get(tag), result.get(tag), tag)
    ]
    if differing:
        listed = ", ".join(differing)
        raise IdentityError(f"result and source differ in {listed}; the result is not sent")


def _same(source: Element | None, result: Element | None, tag: int) -> bool:
    if tag in PLACE_TAGS and (result is None or result.is_empty):
        return True
    if source is None or result is None:
        may_be_empty = tag in EMPTY_WHEN_ABSENT_TAGS
        return source is None and result is not None and may_be_empty and not result.value
    return _value(source) == _value(result)


def _value(element: Element) -> object:
    """What counts in a comparison: not the VR."""
    if isinstance(element.value, bytes):
        return element.value
    return tuple(tuple((e.tag, _value(e)) for e in item) for item in element.value)


def check_agreement(blocks: Iterable[Block]) -> None:
    """Make sure that the instances of one unit belong together.

    An empty value agrees with any other, but for PatientID and StudyInstanceUID. Where character
    sets differ, decoded text is compared.

    Raises
    ------
    IdentityError
        Naming the elements in which they differ: nothing is made of this unit.
    """
    said: dict[str, set[bytes | str]] = {keyword: set() for keyword in AGREE_KEYWORDS}
    blocks = list(blocks)
    charset = tag_of("SpecificCharacterSet")
    decode = len({trimmed(block.get(charset)) for block in blocks}) > 1
    for block in blocks:
        for keyword in AGREE_KEYWORDS:
            value = trimmed(block.get(tag_of(keyword)))
            if value or keyword in AGREE_EVEN_EMPTY:
                said[keyword].add(_text(value, block.get(charset)) if decode else value)
    differing = [keyword for keyword, values in said.items() if len(values) > 1]
    if differing:
        listed = ", ".join(differing)
        raise IdentityError(f"{len(blocks)} instances of one unit differ in {listed}")


def _text(value: bytes, charset: Element | None) -> str | bytes:
    names = trimmed(charset).decode("ascii", "replace").split("\\")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            text: str = decode_bytes(value, convert_encodings([n.strip() for n in names]), set())
        except (LookupError, UnicodeError):
            return value
    return text
