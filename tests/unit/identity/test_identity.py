"""Identity: received bytes in, the same bytes out, whatever the header looks like."""

from __future__ import annotations

import struct
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicom_xai import identity
from dicom_xai.errors import IdentityError
from tests.make.results import as_file, header, patched


def with_values(**values: bytes) -> bytes:
    """A CR file with these value bytes, exactly, in place of its own."""
    return patched(as_file(header("CR", 4, 4)), **values)


def value(block: identity.Block, keyword: str) -> object:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    return block[tag].value


def rich_header() -> Dataset:
    ds = header("CR", 4, 4)
    issuer, qualifier, other = Dataset(), Dataset(), Dataset()
    issuer.LocalNamespaceEntityID = "RIS"
    qualifier.UniversalEntityID = "1.2.3"
    qualifier.UniversalEntityIDType = "ISO"
    other.PatientID = "OLD-1"
    other.IssuerOfPatientID = "Elsewhere"
    other.IssuerOfPatientIDQualifiersSequence = [qualifier]
    ds.IssuerOfAccessionNumberSequence = [issuer]
    ds.OtherPatientIDsSequence = [other]
    ds.PregnancyStatus = 4
    ds.LongitudinalTemporalOffsetFromEvent = 1.5
    ds.TimezoneOffsetFromUTC = "+0100"
    return ds


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
)
def test_encoding_is_not_part_of_a_value(syntax):
    explicit = identity.read_block(as_file(rich_header()))
    other = identity.read_block(as_file(rich_header(), syntax))
    assert len(explicit) > 15
    identity.compare(explicit, other)


def test_undefined_lengths_are_not_part_of_a_value():
    ds = rich_header()
    for keyword in ("OtherPatientIDsSequence", "IssuerOfAccessionNumberSequence"):
        ds[keyword].is_undefined_length = True
        for item in ds[keyword].value:
            item.is_undefined_length_sequence_item = True
    file = as_file(ds)
    assert b"\xff\xff\xff\xff" in file
    identity.compare(identity.read_block(as_file(rich_header())), identity.read_block(file))


def test_a_difference_deep_in_a_sequence_is_found():
    ds = rich_header()
    ds.OtherPatientIDsSequence[0].IssuerOfPatientIDQualifiersSequence[0].UniversalEntityID = "1.9"
    source = identity.read_block(as_file(rich_header()))
    with pytest.raises(IdentityError, match="OtherPatientIDsSequence"):
        identity.compare(source, identity.read_block(as_file(ds)))


RECEIVED = {
    "plain": b"Doe^John",
    "space padded": b"Doe^John^A ",
    "nul padded": b"Doe^John^A\0",
    "two spaces": b"Doe^John  ",
    "space and nul": b"Doe^John \0",
    "leading space": b" Doe^John ",
    "latin1 bytes": b"M\xfcller^J\xf6rg",
    "utf8 under latin1": "Müller^Jörg".encode(),
    "japanese": b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B",
    "undecodable": b"\xff\xfe\x80^\x81 ",
    "only padding": b"    ",
    "backslash": b"Doe^John\\Roe^Jane",
    "control characters": b"Doe\r\n^John ",
    "long": b"X" * 300,
}


@pytest.mark.parametrize("received", RECEIVED.values(), ids=RECEIVED.keys())
@pytest.mark.parametrize("keyword", ["PatientName", "PatientID"])
def test_received_bytes_travel_byte_for_byte(keyword, received):
    source = identity.read_block(with_values(**{keyword: received}))
    assert value(source, keyword) == received + b" " * (len(received) % 2)
    spliced = identity.splice(b"", source)
    assert received in spliced
    result = identity.read_block(as_result(spliced))
    identity.compare(source, result)


def as_result(dataset_bytes: bytes) -> bytes:
    file = as_file(header("CR", 4, 4))
    at = file.index(b"DICM") + 4
    return file[: at + 12 + struct.unpack_from("<I", file, at + 8)[0]] + dataset_bytes


@settings(max_examples=60, deadline=None)
@given(
    name=st.binary(max_size=120),
    patient_id=st.binary(max_size=70),
    charset=st.binary(max_size=40),
)
def test_any_bytes_survive(name, patient_id, charset):
    received = {"PatientName": name, "PatientID": patient_id, "SpecificCharacterSet": charset}
    source = identity.read_block(with_values(**received))
    again = identity.read_block(as_result(identity.splice(b"", source)))
    identity.compare(source, again)
    for keyword, data in received.items():
        assert value(again, keyword) == data + b" " * (len(data) % 2)


def test_odd_received_length_is_padded_to_even():
    assert value(identity.read_block(with_values(PatientID=b"ABC")), "PatientID") == b"ABC "


def test_a_value_too_long_for_its_representation_is_written_as_unknown():
    huge = b"x" * 70_000
    source = identity.read_block(
        as_result(
            identity.splice(
                b"",
                {
                    0x00100020: identity.Element(0x00100020, "LO", huge),
                },
            )
        )
    )
    assert value(source, "PatientID") == huge


def test_differences_are_named_without_values():
    source = identity.read_block(as_file(header("CR", 4, 4)))
    changed = header("CR", 4, 4)
    changed.PatientName, changed.PatientID = "Other^Name", "SECRET-1"
    del changed.AccessionNumber
    with pytest.raises(IdentityError) as caught:
        identity.compare(source, identity.read_block(as_file(changed)))
    message = str(caught.value)
    for keyword in ("PatientName", "PatientID", "AccessionNumber"):
        assert keyword in message
    for secret in ("SECRET-1", "Other", "ID-4711", "ACC-0001"):
        assert secret not in message


def test_padding_counts_as_a_difference():
    a = identity.read_block(with_values(PatientID=b"ID-1"))
    b = identity.read_block(with_values(PatientID=b"ID-1  "))
    with pytest.raises(IdentityError, match="PatientID"):
        identity.compare(a, b)


def test_absent_type_2_elements_are_written_empty_and_absent_type_3_stay_absent():
    ds = header("CR", 4, 4)
    del ds.PatientBirthDate, ds.StudyID, ds.IssuerOfPatientID
    source = identity.read_block(as_file(ds))
    result = identity.read_block(as_result(identity.splice(b"", source)))
    assert value(result, "PatientBirthDate") == b""
    assert tag_for_keyword("IssuerOfPatientID") not in result
    identity.compare(source, result)


@pytest.mark.parametrize("keyword", ["IssuerOfPatientID", "PatientBirthDate"])
def test_a_value_that_the_source_lacks_is_a_difference(keyword):
    ds = header("CR", 4, 4)
    delattr(ds, keyword)
    source = identity.read_block(as_file(ds))
    with pytest.raises(IdentityError, match=keyword):
        identity.compare(source, identity.read_block(as_file(header("CR", 4, 4))))


def test_a_result_may_lack_the_place_but_never_change_it():
    ds = header("CR", 4, 4)
    ds.Laterality = "L"
    source = identity.read_block(as_file(ds))
    identity.compare(source, identity.without(source, "Laterality"))
    ds.Laterality = "R"
    with pytest.raises(IdentityError, match="Laterality"):
        identity.compare(source, identity.read_block(as_file(ds)))


def test_splice_removes_identity_that_is_not_the_sources():
    file = as_file(header("CR", 4, 4))
    start = file.index(b"DICM") + 4
    start += 12 + struct.unpack_from("<I", file, start + 8)[0]
    end = file.index(struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW"), start)
    spliced = identity.splice(file[start:end], {})
    ds = dcmread(BytesIO(as_result(spliced)))
    assert "PatientComments" not in ds
    assert ds.PatientID == ""
    assert "StudyInstanceUID" not in ds
    assert ds.ViewPosition == "PA"
    assert list(ds.keys()) == sorted(ds.keys())


TRUNCATED = as_file(header("CR", 4, 4)).split(b"ACC-0001")[0] + b"ACC"


@pytest.mark.parametrize("file", [b"", b"no DICOM" * 40, TRUNCATED])
def test_an_unreadable_file_has_no_identity(file):
    with pytest.raises(IdentityError, match="cannot be read"):
        identity.read_block(file)


def test_private_elements_do_not_travel():
    ds = header("CR", 4, 4)
    ds.private_block(0x0011, "ACME", create=True).add_new(1, "LO", "private")
    assert all(tag >> 16 != 0x0011 for tag in identity.read_block(as_file(ds)))


#: Each in a unit with a patient who is Müller^Jörg, ID-4711 of Ward 9, born 19700131, sex O.
@pytest.mark.promise("C2")
@pytest.mark.parametrize(
    ("keyword", "found"),
    [
        ("PatientID", b"ID-9999 "),
        ("PatientID", b"id-4711 "),
        ("PatientID", b""),
        ("IssuerOfPatientID", b"Ward 8"),
        ("IssuerOfPatientID", b"WARD 9"),
        ("IssuerOfPatientID", b""),
        ("IssuerOfPatientID", None),
        ("PatientName", b"Else^Somebody "),
        ("PatientName", b"M\xfcller J\xf6rg "),
        ("PatientName", b"^M\xfcller^J\xf6rg"),
        ("PatientBirthDate", b"19700201"),
        ("PatientBirthDate", b"1970.0131 "),
        ("PatientBirthDate", b"31.01.1970"),
        ("PatientSex", b"F "),
        ("AccessionNumber", b"ACC-0002"),
        ("AccessionNumber", b"acc-0001"),
        ("StudyInstanceUID", b"1.2.3.4\0"),
    ],
)
def test_instances_that_disagree_are_refused(keyword, found):
    blocks = [
        identity.read_block(with_values()),
        identity.read_block(with_values(**{keyword: found})),
    ]
    for order in (blocks, blocks[::-1]):
        with pytest.raises(IdentityError, match=f"2 instances of one unit differ in {keyword}$"):
            identity.check_agreement(order)


@pytest.mark.parametrize(
    "found",
    [
        {"PatientID": b"ID-4711 \0"},
        {"IssuerOfPatientID": b" Ward 9\0"},
        {"PatientName": b"M\xfcller^J\xf6rg  "},
        {"PatientBirthDate": b""},
        {"PatientName": None, "PatientSex": b"  ", "AccessionNumber": b""},
        {"PatientName": b"^^^^ "},
        {"SpecificCharacterSet": b"ISO_IR 192", "PatientName": "Müller^Jörg".encode()},
        {"SpecificCharacterSet": b""},
    ],
    ids=["padding", "issuer", "name", "silence", "more of it", "carets", "charset", "no charset"],
)
def test_instances_that_say_the_same_differently_agree(found):
    blocks = [identity.read_block(with_values()), identity.read_block(with_values(**found))]
    assert identity.check_agreement(blocks) == ()


@pytest.mark.promise("C2")
@pytest.mark.parametrize(
    ("keyword", "found"),
    [
        ("PatientName", b"M\xdcLLER^J\xd6RG"),
        ("PatientName", b"m\xfcller^J\xf6rg "),
        ("PatientName", b"M\xfcller ^  J\xf6rg"),
        ("PatientName", b"M\xfcller^J\xf6rg^^ "),
        ("PatientName", b"M\xfcller^J\xf6rg^=="),
        ("PatientBirthDate", b"1970.01.31"),
        ("PatientBirthDate", b"1970-01-31"),
        ("PatientSex", b"o "),
    ],
)
def test_a_difference_in_formatting_is_reported_and_stops_nothing(keyword, found):
    blocks = [
        identity.read_block(with_values()),
        identity.read_block(with_values(**{keyword: found})),
    ]
    assert identity.check_agreement(blocks) == (keyword,)


@pytest.mark.promise("C2")
@pytest.mark.parametrize("keyword", ["PatientID", "IssuerOfPatientID"])
def test_nothing_said_by_any_instance_is_allowed(keyword):
    blocks = [identity.read_block(with_values(**{keyword: empty})) for empty in (b"", b"  ", None)]
    assert identity.check_agreement(blocks) == ()


NAMES = {
    # in GB 18030 the first bytes below are two family names, and in Latin-1 one in capitals
    "no character set": (b"", b"\xc0\xee", b"\xe0\xee", ()),
    "an unknown one": (b"ISO_IR 999", b"\xc0\xee", b"\xe0\xee", ()),
    "the right one": (b"GB18030 ", b"\xc0\xee", b"\xe0\xee", ()),
    "bytes that are no text": (b"ISO_IR 192", b"\xff^A", b"\xfe^A ", ()),
    "the same bytes, which are no text": (b"ISO_IR 192", b"\xff^A", b"\xff^A^ ", ("PatientName",)),
    "letters of no character set": (b"", b"\xc0BC", b"\xc0bc", ("PatientName",)),
    "composed letters": (b"ISO_IR 192", "Müller".encode(), b"MU\xcc\x88ller ", ("PatientName",)),
    "ideographs": (
        b"\\ISO 2022 IR 87 ",
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B",
        b"YAMADA^TAROU=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B^^",
        ("PatientName",),
    ),
    "other ideographs": (
        b"\\ISO 2022 IR 87 ",
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B",
        b"Yamada^Tarou=\x1b$B;3EC\x1b(B^\x1b$BB@O:\x1b(B",
        (),
    ),
}


@pytest.mark.promise("C2")
@pytest.mark.parametrize(("charset", "one", "other", "agree"), NAMES.values(), ids=NAMES.keys())
def test_names_are_compared_by_form_only_where_they_can_be_read(charset, one, other, agree):
    blocks = [
        identity.read_block(with_values(SpecificCharacterSet=charset, PatientName=name))
        for name in (one, other)
    ]
    if agree:
        assert identity.check_agreement(blocks) == agree
    else:
        with pytest.raises(IdentityError, match=r"PatientName$"):
            identity.check_agreement(blocks)


@pytest.mark.promise("C2")
def test_what_qualifies_the_issuer_is_compared_where_both_instances_say_it():
    def block(entity: str | None) -> identity.Block:
        ds = header("CR", 4, 4)
        if entity is not None:
            qualifier = Dataset()
            qualifier.UniversalEntityID, qualifier.UniversalEntityIDType = entity, "ISO"
            if entity.endswith(" "):
                qualifier.IdentifierTypeCode = ""  # as good as absent
            ds.IssuerOfPatientIDQualifiersSequence = [qualifier]
        return identity.read_block(as_file(ds))

    assert identity.check_agreement([block("1.2.3"), block(None), block("1.2.3  ")]) == ()
    with pytest.raises(IdentityError, match=r"IssuerOfPatientIDQualifiersSequence$"):
        identity.check_agreement([block("1.2.3"), block(None), block("1.2.4")])


def test_our_mark_is_found_on_the_object_and_on_what_was_made_from_it():
    ours, derived, item = Dataset(), Dataset(), Dataset()
    ours.ManufacturerModelName = item.ManufacturerModelName = identity.MODEL_NAME
    derived.ManufacturerModelName = "Converter"
    derived.ContributingEquipmentSequence = [Dataset(), item]
    assert identity.is_ours(ours)
    assert identity.is_ours(derived)
    for other in (Dataset(), header("CR", 4, 4), header("CT", 4, 4)):
        assert not identity.is_ours(other)


def test_our_mark_is_read_from_received_bytes():
    ds = Dataset()
    ds.ManufacturerModelName = identity.MODEL_NAME
    merged = header("CR", 4, 4)
    merged.update(ds)
    read = dcmread(BytesIO(as_file(merged, ExplicitVRLittleEndian)), stop_before_pixels=True)
    assert identity.is_ours(read)
