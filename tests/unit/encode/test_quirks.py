"""Headers as they really come: an object is made all the same, and its identity is untouched.

The quirks are those that make a validating library raise, and some more.
"""

from __future__ import annotations

import struct

import pytest

from dicom_xai import identity
from dicom_xai.config import Compression, InputKind
from dicom_xai.encode.note import encode_note
from dicom_xai.encode.objects import Planned
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


def check(file: bytes, kind: InputKind) -> None:
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
    for encoded in (*results.objects, *notes):
        identity.compare(source, identity.read_block(encoded.file))


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


@pytest.mark.promise("C5")
def test_a_name_in_an_escape_coded_character_set_stays_as_received():
    received = b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B"
    charset = b"\\ISO 2022 IR 87 "
    file = patched(
        as_file(header("CR", 40, 36)),
        PatientName=received + b" " * (len(received) % 2),
        SpecificCharacterSet=charset,
    )
    check(file, InputKind.IMAGE2D)
    assert struct.pack("<H", len(charset)) + charset in file
