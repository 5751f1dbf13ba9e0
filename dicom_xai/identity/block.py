"""Which elements say whose object it is, and what one element is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

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

PADDING = b" \0"
#: With a 32-bit length, and two reserved bytes before it (PS3.5 7.1.2).
LONG_LENGTH = frozenset("OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())


def tag_of(keyword: str) -> int:
    """The tag of a keyword that the dictionary knows."""
    tag: int | None = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return tag


BLOCK_TAGS = tuple(sorted(tag_of(keyword) for keyword in BLOCK_KEYWORDS))
PLACE_TAGS = tuple(map(tag_of, PLACE_KEYWORDS))
TRAVELLING_TAGS = tuple(sorted((*BLOCK_TAGS, *PLACE_TAGS)))
EMPTY_WHEN_ABSENT_TAGS = tuple(map(tag_of, EMPTY_WHEN_ABSENT))

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
        return not (self.value.strip(PADDING) if isinstance(self.value, bytes) else self.value)


#: The identity block of one object, by tag. Absent elements are absent here.
Block = Mapping[int, Element]


def text_of(block: Block, keyword: str) -> str:
    """An element's value for our own decisions: ASCII, without padding; empty when absent."""
    return trimmed(block.get(tag_of(keyword))).decode("ascii", "replace")


def without(block: Block, *keywords: str) -> Block:
    """The block, less the place elements that a kind of object must not have."""
    left_out = {tag_of(keyword) for keyword in keywords}
    assert left_out <= {*PLACE_TAGS}, "patient and study elements always travel"
    return {tag: element for tag, element in block.items() if tag not in left_out}


def trimmed(element: Element | None) -> bytes:
    """Value bytes without what says nothing; none of an absent element, nor of a sequence."""
    if element is None or not isinstance(element.value, bytes):
        return b""
    value = element.value.strip(PADDING)
    # trailing delimiters of a person name say nothing (PS3.5 6.2.1.1)
    return value.rstrip(b"^= ") if element.vr == "PN" else value


def vr_of(tag: int, found: str | None) -> str:
    """The dictionary's VR, else the file's, else UN."""
    try:
        vr = dictionary_VR(tag)
    except KeyError:
        vr = found or "UN"
    return vr if len(vr) == 2 else (found if found and len(found) == 2 else "US")


def name_of(tag: int) -> str:
    """An element as errors name it: its keyword, or its tag."""
    return keyword_for_tag(tag) or f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
