"""Clauses: each operator on values that are there, missing, several or broken."""

from __future__ import annotations

import pytest
from pydicom import Dataset
from pydicom.data import get_testdata_files
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from dicom_xai.config import Clause, Route
from dicom_xai.route.match import facts_of, keywords_of, match, tags_of
from dicom_xai.study import Sender

SENDER = Sender("EMERGENCY", "DICOM_XAI", "10.1.2.3", 0, "DICOM_XAI")


def a_route(when: dict[str, object], **fields: object) -> Route:
    base = {
        "name": "r",
        "trigger": "quiet",
        "model": "m",
        "explain": ["grad-cam"],
        "send": [{"object": "sc", "to": ["pacs"]}],
    }
    return Route.model_validate({**base, "when": when, **fields})


def a_header(**attributes: object) -> Dataset:
    ds = Dataset()
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


def is_match(when: dict[str, object], ds: Dataset) -> bool:
    route = a_route(when)
    return match(route, facts_of(ds, SENDER, keywords_of([route]))).is_match


CT = a_header(
    Modality="CT",
    BodyPartExamined="HEAD",
    ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
    SeriesDescription="Head native 1.0 Br40",
    SliceThickness="1.5",
    PixelSpacing=["0.4", "5.0"],
    Rows=512,
    KVP="",
    PatientAge=None,
    StudyDate="20260102",
)


@pytest.mark.parametrize(
    ("keyword", "clause", "expected"),
    [
        # equals
        ("Modality", {"equals": "CT"}, True),
        ("Modality", {"equals": "ct"}, True),
        ("Modality", {"equals": " CT "}, True),
        ("Modality", {"equals": "C"}, False),
        ("Modality", {"equals": "MR"}, False),
        ("ImageType", {"equals": "AXIAL"}, True),
        ("ImageType", {"equals": "LOCALIZER"}, False),
        ("Rows", {"equals": "512"}, True),
        ("StudyDate", {"equals": "20260102"}, True),
        # in
        ("Modality", {"in": ["MR", "ct"]}, True),
        ("Modality", {"in": ["MR", "CR"]}, False),
        ("ImageType", {"in": ["DERIVED", "PRIMARY"]}, True),
        # contains
        ("SeriesDescription", {"contains": "BR4"}, True),
        ("SeriesDescription", {"contains": "contrast"}, False),
        ("ImageType", {"contains": "orig"}, True),
        ("ImageType", {"contains": "ORIGINAL\\PRIMARY"}, False),
        # min, max
        ("SliceThickness", {"min": "1.5"}, True),
        ("SliceThickness", {"max": "1.5"}, True),
        ("SliceThickness", {"min": "1.51"}, False),
        ("SliceThickness", {"max": "1.49"}, False),
        ("SliceThickness", {"min": "1", "max": "2"}, True),
        ("Rows", {"min": "512", "max": "512"}, True),
        ("PixelSpacing", {"min": "4"}, True),
        ("PixelSpacing", {"max": "0.5"}, True),
        ("PixelSpacing", {"min": "1", "max": "2"}, False),  # 0.4 and 5.0: neither lies between
        ("Modality", {"min": "0"}, False),
        # exists
        ("Modality", {"exists": "true"}, True),
        ("Modality", {"exists": "false"}, False),
        ("ContrastBolusAgent", {"exists": "true"}, False),
        ("ContrastBolusAgent", {"exists": "false"}, True),
        ("KVP", {"exists": "true"}, False),
        ("PatientAge", {"exists": "false"}, True),
        # a missing or empty attribute makes a clause false
        ("ContrastBolusAgent", {"equals": ""}, False),
        ("ContrastBolusAgent", {"in": ["x"]}, False),
        ("ContrastBolusAgent", {"contains": ""}, False),
        ("KVP", {"min": "0"}, False),
        ("PatientAge", {"max": "99"}, False),
        # not
        ("Modality", {"not": {"equals": "MR"}}, True),
        ("Modality", {"not": {"equals": "CT"}}, False),
        ("ImageType", {"not": {"equals": "LOCALIZER"}}, True),
        ("ContrastBolusAgent", {"not": {"equals": "x"}}, True),
        ("Modality", {"not": {"not": {"equals": "CT"}}}, True),
        # several operators must all hold
        ("SeriesDescription", {"contains": "head", "not": {"contains": "contrast"}}, True),
        ("SeriesDescription", {"contains": "head", "equals": "head"}, False),
    ],
)
def test_a_clause_holds_or_not(keyword: str, clause: dict[str, object], expected: bool) -> None:
    assert is_match({keyword: clause}, CT) is expected


def test_all_clauses_must_hold() -> None:
    assert is_match({"Modality": {"equals": "CT"}, "Rows": {"min": "1"}}, CT)
    assert not is_match({"Modality": {"equals": "CT"}, "Rows": {"min": "1000"}}, CT)


def test_no_clause_matches_everything() -> None:
    assert is_match({}, Dataset())


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("calling_ae_title", "EMERGENCY"),
        ("called_ae_title", "DICOM_XAI"),
        ("source_address", "10.1.2.3"),
    ],
)
def test_who_sent_it_can_be_asked(fact: str, value: str) -> None:
    assert is_match({fact: {"equals": value}}, Dataset())
    assert not is_match({fact: {"equals": "other"}}, Dataset())


def test_a_disabled_route_matches_nothing_and_says_so() -> None:
    route = a_route({}, enabled=False)
    verdict = match(route, facts_of(CT, SENDER, keywords_of([route])))
    assert (verdict.is_match, verdict.reason) == (False, "the route is disabled")


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        ({"Modality": {"in": ["CR", "DX"]}}, "Modality in: CR, DX, found CT"),
        ({"Rows": {"min": "600", "max": "700"}}, "Rows min: 600, max: 700, found 512"),
        ({"KVP": {"equals": "120"}}, "KVP equals: 120, found nothing"),
        (
            {"ImageType": {"equals": "X"}},
            "ImageType equals: X, found ORIGINAL\\PRIMARY\\AXIAL",
        ),
        ({"Modality": {"exists": "false"}}, "Modality exists: false, found CT"),
        ({"Modality": {"not": {"equals": "CT"}}}, "Modality not: that clause holds, found CT"),
        ({"Modality": {"equals": "CT"}, "Rows": {"max": "9"}}, "Rows max: 9, found 512"),
    ],
)
def test_the_reason_names_the_first_clause_that_does_not_hold(
    when: dict[str, object], reason: str
) -> None:
    route = a_route(when)
    assert match(route, facts_of(CT, SENDER, keywords_of([route]))).reason == reason


SECRET = {
    "PatientName": "Doe^Jane",
    "PatientID": "ID-4711",
    "PatientBirthDate": "19551224",
    "OtherPatientIDs": "OTHER-4711",
    "PatientComments": "comes from Jane Doe",
    "AdmissionID": "ADM-4711",
    "CurrentPatientLocation": "Ward 12 bed 3",
    "ReferringPhysicianName": "Roe^Richard",
    "PersonName": "Doe^Jane",
}


@pytest.mark.parametrize("keyword", SECRET)
@pytest.mark.parametrize("clause", [{"equals": "x"}, {"min": "9e99"}, {"not": {"exists": "true"}}])
def test_no_verdict_says_a_value_that_names_a_patient(
    keyword: str, clause: dict[str, object]
) -> None:
    route = a_route({keyword: clause})
    ds = a_header(**{keyword: SECRET[keyword]})
    verdict = match(route, facts_of(ds, SENDER, keywords_of([route])))
    assert not verdict.is_match
    assert SECRET[keyword] not in verdict.reason
    assert "found another value" in verdict.reason


def test_long_values_are_cut_in_reasons() -> None:
    route = a_route({"SeriesDescription": {"equals": "x"}})
    ds = a_header(SeriesDescription="y" * 64)
    ds["SeriesDescription"]._value = "y" * 5000
    reason = match(route, facts_of(ds, SENDER, keywords_of([route]))).reason
    assert len(reason) < 150


def raw(keyword: str, tag: int, vr: str, value: bytes) -> Dataset:
    """A header whose element is still the bytes that came over the wire."""
    ds = Dataset()
    ds[Tag(tag)] = RawDataElement(Tag(tag), vr, len(value), value, 0, False, True)
    return ds


@pytest.mark.filterwarnings("ignore")  # pydicom's, about these very values
@pytest.mark.parametrize(
    ("keyword", "tag", "vr", "value", "exists"),
    [
        ("Rows", 0x00280010, "US", b"\x01\x02\x03", False),
        ("AcquisitionDuration", 0x00189073, "FD", bytes(7), False),
        ("FrameIncrementPointer", 0x00280009, "AT", b"\x01\x02\x03", False),
        ("Modality", 0x00080060, "ZZ", b"CT", False),
        ("PixelSpacing", 0x00280030, "DS", b"abc\\1 ", True),
        ("InstanceNumber", 0x00200013, "IS", b"1.50", True),
        ("InstanceNumber", 0x00200013, "IS", b"9" * 30, True),
        ("StudyDate", 0x00080020, "DA", b"notadate", True),
        ("Modality", 0x00080060, "CS", b"\xff\xfe", True),
        ("Modality", 0x00080060, "CS", b"", False),
        ("Modality", 0x00080060, "CS", b"  \\ ", False),
        ("ReferencedImageSequence", 0x00081140, "SQ", b"", False),
        ("PixelData", 0x7FE00010, "OB", b"", False),
    ],
)
def test_a_value_that_breaks_its_vr_never_raises(
    keyword: str, tag: int, vr: str, value: bytes, exists: bool
) -> None:
    for clause in ({"equals": "CT"}, {"contains": "z"}, {"min": "1e40"}):
        assert not is_match({keyword: clause}, raw(keyword, tag, vr, value))
    assert is_match({keyword: {"exists": "true"}}, raw(keyword, tag, vr, value)) is exists


@pytest.mark.promise("C4")
@pytest.mark.parametrize("levels", [1, 25])
def test_of_a_sequence_only_that_it_is_there_can_be_asked(levels: int) -> None:
    """Its text would be its items', and that of a broken one grows twofold with each level."""
    broken = RawDataElement(Tag("PatientID"), "FL", 2, b"4 ", 0, False, True)
    ds = a_header(PatientName="Doe^Jane")
    ds[broken.tag] = broken
    for _ in range(levels):
        ds = a_header(ReferencedStudySequence=[ds])
    route = a_route({"ReferencedStudySequence": {"contains": "jane"}})
    verdict = match(route, facts_of(ds, SENDER, keywords_of([route])))
    assert verdict.reason == "ReferencedStudySequence contains: jane, found items: 1"
    assert is_match({"ReferencedStudySequence": {"exists": "true"}}, ds)


def test_of_bytes_only_that_they_are_there_can_be_asked() -> None:
    ds = a_header(EncapsulatedDocument=bytes(5_000))
    route = a_route({"EncapsulatedDocument": {"contains": "x00"}})
    verdict = match(route, facts_of(ds, SENDER, keywords_of([route])))
    assert verdict.reason == "EncapsulatedDocument contains: x00, found bytes: 5000"
    assert is_match({"EncapsulatedDocument": {"exists": "true"}}, ds)


@pytest.mark.filterwarnings("ignore")
def test_every_keyword_of_real_files_can_be_asked_about() -> None:
    from pydicom import dcmread

    asked = 0
    for name in ("CT_small.dcm", "MR_small.dcm", "reportsi.dcm", "badVR.dcm", "no_meta.dcm"):
        for path in get_testdata_files(name):
            ds = dcmread(path, force=True)
            keywords = [element for element in ds.dir() if element]
            facts = facts_of(ds, SENDER, keywords)
            asked += len(keywords)
            for keyword, values in facts.items():
                assert all(value.strip() for value in values), keyword
    assert asked > 200


def test_only_the_keywords_that_are_asked_are_read() -> None:
    route = a_route({"Modality": {"equals": "CT"}, "calling_ae_title": {"exists": "true"}})
    assert keywords_of([route]) == {"Modality", "calling_ae_title"}
    facts = facts_of(CT, SENDER, keywords_of([route]))
    assert set(facts) == {"Modality", "calling_ae_title", "called_ae_title", "source_address"}


def test_a_verdict_depends_on_what_is_asked_and_on_how_to_read_it() -> None:
    route = a_route({"Modality": {"equals": "CT"}, "calling_ae_title": {"exists": "true"}})
    assert tags_of([route]) == {0x00080060, 0x00080005, 0x00280103}


def test_a_clause_that_asks_nothing_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="an empty clause"):
        Clause.model_validate({"equals": None})
