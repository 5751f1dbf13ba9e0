"""Headers as they really come: an object is made all the same, and its identity is untouched.

The quirks are those that make a validating library raise, and some more.
"""

from __future__ import annotations

import struct
from io import BytesIO

import pytest
from pydicom import dcmread

from dicom_xai import identity
from dicom_xai.config import Compression, InputKind
from dicom_xai.encode.note import encode_note
from dicom_xai.encode.objects import Encoded, Planned
from dicom_xai.encode.results import encode_results
from dicom_xai.study import ObjectKind
from tests.make.results import as_file, case, header, patched

PLAN = (
    Planned(ObjectKind.SC, Compression.NONE, ("pacs",)),
    Planned(ObjectKind.SEG, Compression.NONE, ("pacs",)),
)

QUIRKS: list[dict[str, bytes | None]] = [
    # absent patient and study elements of type 2
    *(
        {keyword: None}
        for keyword in (
            *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber"),
            *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName", "Manufacturer"),
            *("Modality", "SpecificCharacterSet", "InstanceNumber", "SeriesNumber", "ImageType"),
        )
    ),
    # present but empty
    *(
        {keyword: b""}
        for keyword in (
            *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber"),
            *("StudyID", "StudyDate", "StudyTime", "Modality", "SpecificCharacterSet"),
        )
    ),
    # values that no validator takes
    {"PatientSex": b"U "},
    {"PatientSex": b"m "},
    {"PatientSex": b"MALE"},
    {"PatientBirthDate": b"00000000"},
    {"PatientBirthDate": b"19701 "},
    {"PatientBirthDate": b"1970.01.01"},
    {"PatientBirthDate": b"unknown "},
    {"StudyDate": b"2026.01.01"},
    {"StudyDate": b"20261399"},
    {"StudyTime": b"12:00:00"},
    {"StudyTime": b"120000.1234567 "},
    {"StudyTime": b"noon"},
    {"SpecificCharacterSet": b"\\ISO 2022 IR 87 "},
    {"SpecificCharacterSet": b"latin1"},
    {"SpecificCharacterSet": b"ISO-8859-1"},
    {"SpecificCharacterSet": b"ISO_IR 192"},
    {"SpecificCharacterSet": b"GB18030 "},
    {"SpecificCharacterSet": b"ISO 2022 IR 6\\ISO 2022 IR 149 "},
    {"PatientName": b"\xff\xfe\x80^\x81 ", "SpecificCharacterSet": b"ISO_IR 192"},
    {"PatientName": b"A^B^C^D^E^F^G=x=y=z "},
    {"PatientName": b"N" * 200},
    {"AccessionNumber": b"A" * 40},
    {"PatientID": b"ID\\with\\backslashes "},
    {"StudyDescription": b"two\r\nlines "},
    {"PatientAge": b"forty "},
    {"PatientWeight": b"80 kg "},
    {"TimezoneOffsetFromUTC": b"UTC+1 "},
    {"ReferringPhysicianName": b"\0\0"},
    # what the picture and the region are described with
    {"PatientOrientation": None},
    {"PatientOrientation": b"PF\\LH "},
    {"PatientOrientation": b"?\\? "},
    {"BodyPartExamined": None},
    {"BodyPartExamined": b"left knee "},
    {"BodyPartExamined": b"KNEE", "Laterality": b"L "},
    {"LossyImageCompression": b"maybe "},
    {"LossyImageCompression": b"01", "LossyImageCompressionRatio": b"a lot "},
    {"Modality": b"ct"},
    {"Manufacturer": b"M" * 90},
    {"SliceThickness": b"thin"},
    {"PixelSpacing": b"0\\0 "},
    {"PixelSpacing": b"0.123456789012345678\\0.123456789012345678"},
    {"PositionReferenceIndicator": b"\xff\xff"},
]

#: Of a CT: what is left of its place decides whether its region is spatial.
PLACE_QUIRKS: list[dict[str, bytes | None]] = [
    {"FrameOfReferenceUID": None},
    {"FrameOfReferenceUID": b"not.a.uid "},
    {"ImagePositionPatient": None},
    {"ImageOrientationPatient": None},
    {"ImageOrientationPatient": b"1\\0\\0\\1\\0\\0 "},
    {"PixelSpacing": None},
    {"SliceThickness": None},
    {"SliceThickness": b""},
]


def name(quirk: dict[str, bytes | None]) -> str:
    return ",".join(f"{k}={v!r}"[:48] if v is not None else f"no {k}" for k, v in quirk.items())


def check(file: bytes, kind: InputKind) -> list[Encoded]:
    """All that is made of a file, once it carries the file's identity."""
    given = case([file], kind=kind)
    results = encode_results(
        given.job,
        given.card,
        given.volume,
        given.explanation,
        PLAN,
        given.described,
        given.display_of,
        given.heat_of,
        given.probability_of,
    )
    assert [str(encoded.kind) for encoded in results.objects] == ["sc", "seg"], results.skipped
    first = given.job.instances[0]
    notes = encode_note(given.job, "a test", first, identity.read_block(file), PLAN)
    source = identity.read_block(file)
    made = [*results.objects, *notes]
    for encoded in made:
        identity.compare(source, identity.read_block(encoded.file))
    return made


@pytest.mark.promise("C4")
@pytest.mark.parametrize("quirk", QUIRKS, ids=name)
@pytest.mark.parametrize("modality", ["CR", "CT"])
def test_an_odd_header_gives_all_objects_with_its_identity_untouched(modality, quirk):
    kind = InputKind.SLICES if modality == "CT" else InputKind.IMAGE2D
    check(patched(as_file(header(modality, 40, 36)), **quirk), kind)


@pytest.mark.parametrize("quirk", PLACE_QUIRKS, ids=name)
def test_a_slice_without_its_place_is_still_segmented(quirk):
    check(patched(as_file(header("CT", 40, 36)), **quirk), InputKind.SLICES)


@pytest.mark.parametrize("uid", ["1.2.840.10008.5.1.4.1.1.481.2", "1.3.46.670589.11.0.0.12.1"])
def test_an_unusual_or_private_class_gives_all_objects(uid):
    ds = header("CT", 40, 36)
    ds.SOPClassUID = uid
    check(as_file(ds), InputKind.SLICES)


#: Specific Character Set, bytes of a name in it, and what they say (PS3.5 Annexes H to K).
TEXTS = {
    "ISO 2022 IR 6": (b"ISO 2022 IR 6 ", b"Yamada^Tarou", "Yamada^Tarou"),
    "ISO 2022 IR 13": (
        b"ISO 2022 IR 13\\ISO 2022 IR 87 ",
        b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J",
        "\uff94\uff8f\uff80\uff9e^\uff80\uff9b\uff73=山田^太郎",
    ),
    "ISO 2022 IR 87": (
        b"\\ISO 2022 IR 87 ",
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B",
        "Yamada^Tarou=山田^太郎",
    ),
    "ISO 2022 IR 100": (b"ISO 2022 IR 100 ", b"M\xfcller^J\xf6rg", "Müller^Jörg"),
    "ISO 2022 IR 101": (b"ISO 2022 IR 101 ", b"Wa\xb3\xeasa^Lech ", "Wałęsa^Lech"),
    "ISO 2022 IR 144": (b"ISO 2022 IR 144 ", "Чехов^Антон".encode("iso8859_5"), "Чехов^Антон"),
    "ISO 2022 IR 149": (
        b"\\ISO 2022 IR 149",
        b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7",
        "Hong^Gildong=洪^吉洞",
    ),
    "ISO 2022 IR 159": (b"\\ISO 2022 IR 159", b"A^B=\x1b$(D0!\x1b(B^C", "A^B=丂^C"),
    "GB18030": (b"GB18030 ", "Wang^Xiao=王^小东".encode("gb18030"), "Wang^Xiao=王^小东"),
    "ISO_IR 192": (b"ISO_IR 192", "Wang^Xiao=王^小東=é".encode(), "Wang^Xiao=王^小東=é"),
}


@pytest.mark.promise("C5")
@pytest.mark.parametrize(("charset", "received", "text"), TEXTS.values(), ids=TEXTS.keys())
def test_text_in_results_is_the_sources_text(charset, received, text):
    received += b" " * (len(received) % 2)
    values = {"PatientName": received, "StudyDescription": received.replace(b"=", b"^")}
    file = patched(
        as_file(header("CR", 40, 36)), SpecificCharacterSet=charset, PatientID=received, **values
    )
    made = check(file, InputKind.IMAGE2D)
    assert [str(encoded.kind) for encoded in made] == ["sc", "seg", "note"]
    for encoded in made:
        ds = dcmread(BytesIO(encoded.file))
        assert ds.PatientName == text
        assert ds.PatientID == text
        assert ds.StudyDescription == text.replace("=", "^")
        assert struct.pack("<H", len(charset)) + charset in encoded.file


@pytest.mark.promise("C5")
def test_bytes_that_are_no_text_lose_no_object_and_stay_as_received():
    received = b"\xff\xfe\x80^\x81 "
    file = patched(
        as_file(header("CR", 40, 36)), SpecificCharacterSet=b"ISO_IR 192", PatientName=received
    )
    for encoded in check(file, InputKind.IMAGE2D):
        assert received in encoded.file
