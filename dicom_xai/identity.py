"""Whose object is it: the patient and study elements, as received bytes; read, compare, splice.

A result must belong to the same patient and study as its source, whatever the source's header
looks like. So the identity block never passes through a parser that could repair, decode or trim
it: its value bytes go from the received file into the result as they are, and are compared, value
byte by value byte, before anything is sent. Encoding (VR, lengths, byte order) is not part of a
value; padding is.

Also here, because receiver and encoder need it: the mark by which we know our own results.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from pydicom import Dataset
from pydicom import Sequence as DicomSequence
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.errors import BytesLengthException
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from dicom_xai.errors import IdentityError

#: ManufacturerModelName of everything that we make: our mark, see `is_ours`.
MODEL_NAME = "dicom_xai"

#: Root elements of the Patient, Clinical Trial Subject, General Study, Patient Study and Clinical
#: Trial Study modules (PS3.3 C.7.1.1, C.7.1.3, C.7.2.1, C.7.2.2, C.7.2.3), the retired ones that
#: scanners still write, and the two that say how to read them (PS3.3 C.12.1).
BLOCK_KEYWORDS = (
    # SOP Common: how to read the rest
    *("SpecificCharacterSet", "TimezoneOffsetFromUTC"),
    # General Study
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription"),
    *("AccessionNumber", "IssuerOfAccessionNumberSequence"),
    *("ReferringPhysicianName", "ReferringPhysicianIdentificationSequence"),
    *("ConsultingPhysicianName", "ConsultingPhysicianIdentificationSequence"),
    *("PhysiciansOfRecord", "PhysiciansOfRecordIdentificationSequence"),
    *("NameOfPhysiciansReadingStudy", "PhysiciansReadingStudyIdentificationSequence"),
    *("RequestingService", "RequestingServiceCodeSequence", "ReferencedStudySequence"),
    *("ProcedureCodeSequence", "ReasonForPerformedProcedureCodeSequence"),
    # Patient
    *("PatientID", "IssuerOfPatientID", "TypeOfPatientID", "IssuerOfPatientIDQualifiersSequence"),
    *("SourcePatientGroupIdentificationSequence", "GroupOfPatientsIdentificationSequence"),
    *("OtherPatientIDs", "OtherPatientIDsSequence", "OtherPatientNames", "PatientName"),
    *("PatientBirthDate", "PatientBirthTime", "PatientBirthDateInAlternativeCalendar"),
    *("PatientDeathDateInAlternativeCalendar", "PatientAlternativeCalendar", "PatientSex"),
    *("QualityControlSubject", "ReferencedPatientPhotoSequence", "ReferencedPatientSequence"),
    *("EthnicGroup", "EthnicGroupCodeSequence", "PatientComments"),
    *("PatientSpeciesDescription", "PatientSpeciesCodeSequence", "PatientBreedDescription"),
    *("PatientBreedCodeSequence", "BreedRegistrationSequence", "StrainDescription"),
    *("StrainNomenclature", "StrainStockSequence", "StrainAdditionalInformation"),
    *("StrainCodeSequence", "GeneticModificationsSequence", "ResponsiblePerson"),
    *("ResponsiblePersonRole", "ResponsibleOrganization", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "DeidentificationMethodCodeSequence"),
    # Patient Study
    *("PatientAge", "PatientSize", "PatientSizeCodeSequence", "PatientWeight"),
    *("PatientBodyMassIndex", "MeasuredAPDimension", "MeasuredLateralDimension"),
    *("PatientSexNeutered", "PregnancyStatus"),
    *("LastMenstrualDate", "MedicalAlerts", "Allergies", "SmokingStatus", "Occupation"),
    *("AdditionalPatientHistory", "PatientState", "AdmissionID", "IssuerOfAdmissionIDSequence"),
    *("ServiceEpisodeID", "ServiceEpisodeDescription", "IssuerOfServiceEpisodeIDSequence"),
    *("AdmittingDiagnosesDescription", "AdmittingDiagnosesCodeSequence"),
    *("ReasonForVisit", "ReasonForVisitCodeSequence"),
    # Clinical Trial Subject and Study
    *("ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName"),
    *("IssuerOfClinicalTrialProtocolID", "OtherClinicalTrialProtocolIDsSequence"),
    *("ClinicalTrialSiteID", "ClinicalTrialSiteName", "IssuerOfClinicalTrialSiteID"),
    *("ClinicalTrialSubjectID", "IssuerOfClinicalTrialSubjectID"),
    *("ClinicalTrialSubjectReadingID", "IssuerOfClinicalTrialSubjectReadingID"),
    *("ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription"),
    *("ClinicalTrialTimePointTypeCodeSequence", "IssuerOfClinicalTrialTimePointID"),
    *("LongitudinalTemporalOffsetFromEvent", "LongitudinalTemporalEventType"),
    *("ClinicalTrialProtocolEthicsCommitteeName", "ConsentForClinicalTrialUseSequence"),
    "ClinicalTrialProtocolEthicsCommitteeApprovalNumber",
)

#: What else travels from the source, below the level of the study: where in the body it is. A
#: result may lack it where its kind of object forbids it, but never says anything else.
PLACE_KEYWORDS = ("BodyPartExamined", "Laterality", "ImageLaterality")

#: Type 2 in every result: absent in the source, they are written empty (PS3.5 7.4.3).
EMPTY_WHEN_ABSENT = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"),
    *("StudyID", "AccessionNumber", "ReferringPhysicianName"),
)

#: What the instances of one unit must agree on, where they say anything.
AGREE_KEYWORDS = (
    *("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "AccessionNumber"),
)
#: Of these, silence is a statement too.
AGREE_EVEN_EMPTY = ("PatientID", "StudyInstanceUID")

_PADDING = b" \0"
#: Identity stands before any pixel: no more of a deflated data set is needed.
_MAX_INFLATED_BYTES = 16_000_000
#: Tags and length that give a sequence its shape (PS3.5 7.5).
_ITEM, _ITEM_END, _SEQUENCE_END, _UNDEFINED = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFFFFFF
_MAX_DEPTH = 16
_UNREADABLE = (EOFError, ValueError, TypeError, LookupError, AttributeError, struct.error)
_SWAP_BYTES = {
    **dict.fromkeys(("US", "SS", "OW", "AT"), 2),
    **dict.fromkeys(("UL", "SL", "FL", "OF", "OL"), 4),
    **dict.fromkeys(("FD", "OD", "SV", "UV", "OV"), 8),
}
_LONG_LENGTH = frozenset("OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())


def _tag(keyword: str) -> int:
    tag: int | None = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return tag


BLOCK_TAGS = tuple(sorted(_tag(keyword) for keyword in BLOCK_KEYWORDS))
_TRAVELLING_TAGS = tuple(sorted((*BLOCK_TAGS, *map(_tag, PLACE_KEYWORDS))))
_PLACE_TAGS = tuple(map(_tag, PLACE_KEYWORDS))
_EMPTY_WHEN_ABSENT_TAGS = tuple(map(_tag, EMPTY_WHEN_ABSENT))

#: The items of a sequence; each item's elements in tag order.
Items = tuple[tuple["Element", ...], ...]


@dataclass(frozen=True, slots=True)
class Element:
    """One element: its tag, the VR to write it with, and its value bytes or items.

    Value bytes are as received but for two things: multi-byte numbers are little endian, and a
    value of odd length, which no transfer syntax allows, has got its padding byte (PS3.5 7.1.1).
    """

    tag: int
    vr: str
    value: bytes | Items

    @property
    def is_empty(self) -> bool:
        """No value, or nothing but padding."""
        return not (self.value.strip(_PADDING) if isinstance(self.value, bytes) else self.value)


#: The identity block of one object, by tag. Absent elements are absent here.
Block = Mapping[int, Element]


# ------------------------------------------------------------------ reading


def read_block(file: bytes) -> Block:
    """The identity block and the place elements of a stored file, as received.

    About 0.3 ms: nothing behind the last of them is read.

    Parameters
    ----------
    file : bytes
        Preamble, file meta information and data set (PS3.10 7.1), any transfer syntax.

    Raises
    ------
    IdentityError
        The file cannot be read as far as its identity goes.
    """
    try:
        return {element.tag: element for element in _travelling(file)}
    except (*_UNREADABLE, zlib.error) as error:
        message = f"a file of {len(file)} bytes cannot be read for its identity"
        raise IdentityError(f"{message}: {error}") from error


def _travelling(file: bytes) -> list[Element]:
    if file[128:132] != b"DICM":
        raise EOFError("no DICM prefix")
    meta, start = _read(file, 132, len(file), _Form(False, "<"), _META_TAGS)
    syntax = text_of({element.tag: element for element in meta}, "TransferSyntaxUID")
    if syntax == DeflatedExplicitVRLittleEndian:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        file, start = inflater.decompress(file[start:], _MAX_INFLATED_BYTES), 0
    # as in pydicom, what stands there wins over what the transfer syntax says
    is_implicit = not file[start + 4 : start + 6].isalpha()
    form = _Form(is_implicit, ">" if syntax == ExplicitVRBigEndian else "<")
    return _read(file, start, len(file), form, _WANTED)[0]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which elements to keep, and the tag behind which none of them can come."""

    tags: Collection[int]
    stop: int


_META_TAGS = _Wanted(range(0x00020000, 0x00030000), 0x0002FFFF)
_WANTED = _Wanted(frozenset(_TRAVELLING_TAGS), _TRAVELLING_TAGS[-1])


@dataclass(frozen=True, slots=True)
class _Form:
    """How elements are encoded (PS3.5 7.1)."""

    is_implicit: bool
    order: str  #: ``<`` or ``>``
    depth: int = 0


def _read(
    data: bytes, at: int, end: int, form: _Form, wanted: _Wanted | None = None
) -> tuple[list[Element], int]:
    """The wanted elements from `at` on, not parsed, and where reading stopped.

    pydicom's reader is not used here: it parses the character set and repairs what it finds.
    """
    last = wanted.stop if wanted else 0xFFFFFFFF
    found: list[Element] = []
    while at < end:
        group, number = struct.unpack_from(f"{form.order}HH", data, at)
        tag = (group << 16) | number
        if tag == _ITEM_END:
            return found, at + 8
        if tag > last:
            break
        vr, length, at = _head(data, at, tag, form)
        is_wanted = number != 0 if wanted is None else tag in wanted.tags
        if length == _UNDEFINED:
            is_items = vr in ("SQ", "UN")
            inner = _Form(True, "<", form.depth) if vr == "UN" else form
            items, at = _read_items(data, at, end, inner, is_items)
            value: bytes | Items = items
            vr = "SQ"
        else:
            if at + length > end:
                raise EOFError(f"it ends inside {_name(tag)}")
            value = data[at : at + length]
            at += length
        if is_wanted:
            found.append(_from_bytes(tag, vr, value, form))
    return found, at


def _head(data: bytes, at: int, tag: int, form: _Form) -> tuple[str, int, int]:
    """VR, length and where the value starts."""
    vr = data[at + 4 : at + 6]
    if form.is_implicit or not (vr.isalpha() and vr.isupper()):  # some writers switch in sequences
        (length,) = struct.unpack_from(f"{form.order}I", data, at + 4)
        return _vr(tag, None), length, at + 8
    name = vr.decode("ascii")
    if name in _LONG_LENGTH:
        (length,) = struct.unpack_from(f"{form.order}I", data, at + 8)
        return name, length, at + 12
    (length,) = struct.unpack_from(f"{form.order}H", data, at + 6)
    return name, length, at + 8


def _read_items(
    data: bytes, at: int, end: int, form: _Form, are_elements: bool = True
) -> tuple[Items, int]:
    """The items of a sequence, up to `end` or its delimiter; fragments are only skipped."""
    if form.depth >= _MAX_DEPTH:
        raise ValueError(f"sequences nested more than {_MAX_DEPTH} deep")
    inner = _Form(form.is_implicit, form.order, form.depth + 1)
    items = []
    while at < end:
        group, number, length = struct.unpack_from(f"{form.order}HHI", data, at)
        tag, at = (group << 16) | number, at + 8
        if tag == _SEQUENCE_END:
            break
        if tag != _ITEM:
            raise ValueError("no item where one should be")
        stop = end if length == _UNDEFINED else at + length
        if stop > end:
            raise EOFError("it ends inside an item")
        if are_elements:
            elements, at = _read(data, at, stop, inner)
            items.append(tuple(sorted(elements, key=lambda element: element.tag)))
        else:
            at = stop
    return tuple(items), at


def _from_bytes(tag: int, found: str, value: bytes | Items, form: _Form) -> Element:
    vr = _vr(tag, found)
    if not isinstance(value, bytes):
        return Element(tag, "SQ", value)
    if vr == "SQ":
        inner = _Form(True, "<", form.depth) if found == "UN" else form  # PS3.5 6.2.2
        return Element(tag, vr, _read_items(value, 0, len(value), inner)[0])
    width = _SWAP_BYTES.get(vr, 1)
    if form.order == ">" and width > 1 and len(value) % width == 0:
        value = b"".join(value[i : i + width][::-1] for i in range(0, len(value), width))
    if len(value) % 2:
        value += b"\0" if vr in ("UI", "OB", "UN") else b" "
    return Element(tag, vr, value)


def _vr(tag: int, found: str | None) -> str:
    """The dictionary's VR, else the file's, else UN."""
    try:
        vr = dictionary_VR(tag)
    except KeyError:
        vr = found or "UN"
    return vr if len(vr) == 2 else (found if found and len(found) == 2 else "US")


# ------------------------------------------------------------------ comparing


def compare(source: Block, result: Block) -> None:
    """Make sure that a result carries its source's identity.

    Raises
    ------
    IdentityError
        Naming every element that differs, never its value; the result must not be sent.
    """
    differing = [
        _name(tag)
        for tag in sorted({*source, *result})
        if not _same(source.get(tag), result.get(tag), tag)
    ]
    if differing:
        listed = ", ".join(differing)
        raise IdentityError(f"result and source differ in {listed}; the result is not sent")


def _same(source: Element | None, result: Element | None, tag: int) -> bool:
    if tag in _PLACE_TAGS and (result is None or result.is_empty):
        return True
    if source is None or result is None:
        may_be_empty = tag in _EMPTY_WHEN_ABSENT_TAGS
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
    charset = _tag("SpecificCharacterSet")
    decode = len({_trimmed(block.get(charset)) for block in blocks}) > 1
    for block in blocks:
        for keyword in AGREE_KEYWORDS:
            value = _trimmed(block.get(_tag(keyword)))
            if value or keyword in AGREE_EVEN_EMPTY:
                said[keyword].add(_text(value, block.get(charset)) if decode else value)
    differing = [keyword for keyword, values in said.items() if len(values) > 1]
    if differing:
        listed = ", ".join(differing)
        raise IdentityError(f"{len(blocks)} instances of one unit differ in {listed}")


def _trimmed(element: Element | None) -> bytes:
    if element is None or not isinstance(element.value, bytes):
        return b""
    value = element.value.strip(_PADDING)
    # trailing delimiters of a person name say nothing (PS3.5 6.2.1.1)
    return value.rstrip(b"^= ") if element.vr == "PN" else value


def _text(value: bytes, charset: Element | None) -> str | bytes:
    names = _trimmed(charset).decode("ascii", "replace").split("\\")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            text: str = decode_bytes(value, convert_encodings([n.strip() for n in names]), set())
        except (LookupError, UnicodeError):
            return value
    return text


def text_of(block: Block, keyword: str) -> str:
    """An element's value for our own decisions: ASCII, without padding; empty when absent."""
    return _trimmed(block.get(_tag(keyword))).decode("ascii", "replace")


def without(block: Block, *keywords: str) -> Block:
    """The block, less the place elements that a kind of object must not have."""
    left_out = {_tag(keyword) for keyword in keywords}
    assert left_out <= {*_PLACE_TAGS}, "patient and study elements always travel"
    return {tag: element for tag, element in block.items() if tag not in left_out}


# ------------------------------------------------------------------ splicing


def splice(encoded: bytes, block: Block) -> bytes:
    """The data set with the block's elements in it, and no other patient or study elements.

    Parameters
    ----------
    encoded : bytes
        A data set in Explicit VR Little Endian without file meta information, or the part of it
        before the pixel data; sequences of defined length.
    block : Block
        Of the source. Type 2 elements that it lacks are written empty.

    Returns
    -------
    bytes
        In tag order, ready for `compare` after `read_block`.
    """
    pieces = {tag: piece for tag, piece in _split(encoded) if tag not in BLOCK_TAGS}
    for tag in _EMPTY_WHEN_ABSENT_TAGS:
        pieces[tag] = _write(Element(tag, _vr(tag, None), b""))
    for tag, element in block.items():
        pieces[tag] = _write(element)
    return b"".join(pieces[tag] for tag in sorted(pieces))


def _split(encoded: bytes) -> Iterable[tuple[int, bytes]]:
    at = 0
    while at < len(encoded):
        group, number, vr = struct.unpack_from("<HH2s", encoded, at)
        if vr.decode("ascii") in _LONG_LENGTH:
            length, header = struct.unpack_from("<I", encoded, at + 8)[0], 12
        else:
            length, header = struct.unpack_from("<H", encoded, at + 6)[0], 8
        end = at + header + length
        if end > len(encoded):
            raise ValueError(f"element at byte {at} ends at {end} of {len(encoded)}")
        yield (group << 16) | number, encoded[at:end]
        at = end


def _write(element: Element) -> bytes:
    """One element in Explicit VR Little Endian (PS3.5 7.1.2)."""
    vr = element.vr
    if isinstance(element.value, bytes):
        value = element.value
    else:
        items = (b"".join(map(_write, item)) for item in element.value)
        value = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(i)) + i for i in items)
    if vr not in _LONG_LENGTH and len(value) > 0xFFFE:
        vr = "UN"  # PS3.5 6.2.2: too long for a 16-bit length
    tag = struct.pack("<HH", element.tag >> 16, element.tag & 0xFFFF)
    if vr in _LONG_LENGTH:
        return tag + vr.encode() + b"\0\0" + struct.pack("<I", len(value)) + value
    return tag + vr.encode() + struct.pack("<H", len(value)) + value


# ------------------------------------------------------------------ our mark


#: All that `is_ours` looks at.
MARK_TAGS = frozenset((_tag("ManufacturerModelName"), _tag("ContributingEquipmentSequence")))


def is_ours(header: Dataset) -> bool:
    """Whether an object is one of our results, or was made from one.

    The mark is Manufacturer's Model Name, on the object itself or on an item of its Contributing
    Equipment Sequence (PS3.3 C.7.5.1, C.12.1.5): an archive may rewrite file meta information,
    UIDs, series number and descriptions, and drops private elements, but keeps equipment; and a
    conversion to another kind of object moves it to the sequence.
    """
    if _is_model_name(header):
        return True
    try:
        items = header.get("ContributingEquipmentSequence")
    except (*_UNREADABLE, OSError, NotImplementedError, BytesLengthException):
        return False  # an unreadable sequence is not of our making
    return isinstance(items, DicomSequence) and any(map(_is_model_name, items))


def _is_model_name(dataset: Dataset) -> bool:
    tag = _tag("ManufacturerModelName")
    if tag not in dataset:
        return False
    item = dataset.get_item(tag)
    value = item.value
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
    return text.strip(" \0") == MODEL_NAME


def _name(tag: int) -> str:
    return keyword_for_tag(tag) or f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
