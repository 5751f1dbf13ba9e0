"""Does a result carry its source's identity, and do the sources of a unit agree on it?

A result carries its source's value bytes, or it is not sent (`compare`). The instances of one unit
agree as follows (`check_agreement`); padding never counts (PS3.5 6.2), and values under different
character sets are compared as text.

- **PatientID, StudyInstanceUID**: equal. Empty everywhere is allowed (trauma); empty in one and not
  in another is a difference.
- **IssuerOfPatientID**: equal, and an absent one differs from a present one. Absent does not mean
  "any": nobody wrote down who gave the number (PS3.3 10.14), and the same number from two places is
  two people. Were it let pass, results of one study would also reach the PACS under two identities.
  Whoever sends part of a study with its issuer and part without is told so, and can send it again.
- **IssuerOfPatientIDQualifiersSequence**: equal where both have it. It only details the issuer,
  which was compared.
- **AccessionNumber**: equal where both have one.
- **PatientName, PatientBirthDate, PatientSex**: equal where both have one, or different in
  formatting only, which is reported and stops nothing: each result copies its own source. Of a name
  its case, runs of spaces and components left empty at the end are formatting; of a date its
  separators; of a sex its case.

Only text that is surely read right is compared by form. Bytes that their character set does not
explain count as they are: read wrongly, two names may look like one in capitals.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pydicom.charset import convert_encodings, decode_bytes, python_encoding

from dicom_xai.errors import IdentityError
from dicom_xai.identity.block import (
    EMPTY_WHEN_ABSENT_TAGS,
    PADDING,
    PLACE_TAGS,
    Block,
    Element,
    name_of,
    tag_of,
    trimmed,
)


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


def check_agreement(blocks: Iterable[Block]) -> tuple[str, ...]:
    """Make sure that the instances of one unit belong together, by the rules above.

    Returns
    -------
    tuple of str
        Keywords of the elements whose values differ in formatting only.

    Raises
    ------
    IdentityError
        Naming the elements in which they differ: nothing is made of this unit.
    """
    blocks = list(blocks)
    charset = tag_of("SpecificCharacterSet")
    differing: list[str] = []
    reformatted: list[str] = []
    for keyword, rule in _AGREE.items():
        tag = tag_of(keyword)
        found = {
            (_bare(block.get(tag)), trimmed(block.get(charset)))
            for block in blocks
            if rule.counts_when_empty or _says_something(block.get(tag))
        }
        said = {_read(value, names) for value, names in found}
        if len({each.text for each in said}) < 2:
            continue
        is_same = rule.form is not None and len(set(map(rule.form, said))) == 1
        (reformatted if is_same else differing).append(keyword)
    if differing:
        listed = ", ".join(differing)
        raise IdentityError(f"{len(blocks)} instances of one unit differ in {listed}")
    return tuple(reformatted)


def _says_something(element: Element | None) -> bool:
    if element is None or not isinstance(element.value, bytes):
        return element is not None and not element.is_empty
    return bool(trimmed(element))


@dataclass(frozen=True, slots=True)
class _Said:
    """One value as text; as its bytes or items where it is none."""

    text: object
    is_declared: bool = False  #: the header names the character set that the text was read with


def _bare(element: Element | None) -> bytes | tuple[object, ...]:
    """A value without padding, the items of a sequence without what is empty in them."""
    if element is None or element.is_empty:
        return b""
    if isinstance(element.value, bytes):
        return element.value.strip(PADDING)
    return tuple(
        tuple((each.tag, _bare(each)) for each in item if not each.is_empty)
        for item in element.value
    )


def _read(value: bytes | tuple[object, ...], charset: bytes) -> _Said:
    if not isinstance(value, bytes):
        return _Said(value)
    names = [name.strip() for name in charset.decode("ascii", "replace").split("\\")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            text = decode_bytes(value, convert_encodings(names), set())
        except (LookupError, ValueError):  # the latter also where a name holds a NUL
            return _Said(value)
    if "\N{REPLACEMENT CHARACTER}" in text:
        return _Said(value)
    return _Said(text, any(names) and all(name in python_encoding for name in names))


def _name(said: _Said) -> object:
    """A person name without its formatting (PS3.5 6.2.1)."""
    if isinstance(said.text, bytes):
        return said.text.rstrip(b"^= ")
    text = str(said.text)
    if said.is_declared:
        text = unicodedata.normalize("NFC", text.casefold())
    else:
        text = "".join(each.lower() if each.isascii() else each for each in text)
    groups = [
        "^".join(" ".join(part.split()) for part in group.split("^")).rstrip("^")
        for group in text.split("=")
    ]
    return "=".join(groups).rstrip("=")


def _date(said: _Said) -> object:
    """A date without separators (PS3.5 6.2, DA, and its form of before 1993)."""
    match = _DATE.fullmatch(str(said.text))
    return match.expand(r"\1\3\4") if match else said.text


def _code(said: _Said) -> object:
    """A code string in capitals, as all are (PS3.5 6.2, CS)."""
    return said.text.upper() if isinstance(said.text, str) else said.text


_DATE = re.compile(r"([0-9]{4})([-./]?)([0-9]{2})\2([0-9]{2})")


@dataclass(frozen=True, slots=True)
class _Rule:
    """How one element is compared among the instances of a unit."""

    counts_when_empty: bool = False
    form: Callable[[_Said], object] | None = None  #: what is left of it without formatting


_AGREE: Mapping[str, _Rule] = {
    "PatientID": _Rule(counts_when_empty=True),
    "IssuerOfPatientID": _Rule(counts_when_empty=True),
    "IssuerOfPatientIDQualifiersSequence": _Rule(),
    "PatientName": _Rule(form=_name),
    "PatientBirthDate": _Rule(form=_date),
    "PatientSex": _Rule(form=_code),
    "StudyInstanceUID": _Rule(counts_when_empty=True),
    "AccessionNumber": _Rule(),
}
