"""Requests and reports as bytes: what pydicom writes is read, what is written it reads."""

from __future__ import annotations

from io import BytesIO

import pytest
from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicom_xai.commitment import (
    SYNTAXES,
    CommitmentReport,
    CommitmentRequest,
    Failure,
    read_report,
    read_request,
    written,
)
from dicom_xai.errors import CannotUnderstandError
from dicom_xai.study import Reference

CT = "1.2.840.10008.5.1.4.1.1.2"
REQUEST = CommitmentRequest("2.25.7", (Reference(CT, "1.2.3"), Reference(CT, "1.2.34")))
REPORT = CommitmentReport(
    "2.25.7", (Reference(CT, "1.2.3"),), (Failure(Reference(CT, "1.2"), 274),)
)


def by_pydicom(
    syntax: str, held: int = 1, failed: int = 0, *, undefined: bool = False, **more: object
) -> bytes:
    """A data set that pydicom writes, with other elements in it and around it."""
    ds = Dataset()
    ds.TransactionUID = "1.2.840.99"
    ds.RetrieveAETitle = "ELSEWHERE"
    for keyword, value in more.items():
        setattr(ds, keyword, value)
    for keyword, count in (("ReferencedSOPSequence", held), ("FailedSOPSequence", failed)):
        items = []
        for number in range(count):
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CT, f"1.2.{number}"
            item.StorageMediaFileSetID = "none"
            if keyword == "FailedSOPSequence":
                item.FailureReason = 0x0112
            item.is_undefined_length_sequence_item = undefined
            items.append(item)
        if items:
            setattr(ds, keyword, Sequence(items))
            ds[keyword].is_undefined_length = undefined
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = syntax == ImplicitVRLittleEndian, True
    write_dataset(buffer, ds)
    return buffer.getvalue()


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_what_pydicom_writes_is_read(syntax: str, undefined: bool) -> None:
    nested = Dataset()
    nested.CodeValue = "1"
    data_set = by_pydicom(
        syntax, 2, 1, undefined=undefined, ConceptNameCodeSequence=Sequence([nested])
    )
    report = read_report(data_set, syntax)
    assert report.transaction_uid == "1.2.840.99"
    assert report.committed == (Reference(CT, "1.2.0"), Reference(CT, "1.2.1"))
    assert report.failed == (Failure(Reference(CT, "1.2.0"), 0x0112),)
    assert report.event_type == 2
    assert read_request(data_set, syntax).references == report.committed


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_what_is_written_pydicom_reads(syntax: str) -> None:
    is_implicit = syntax == ImplicitVRLittleEndian
    ds = read_dataset(BytesIO(written(REPORT, syntax)), is_implicit, True)
    assert ds.TransactionUID == "2.25.7"
    assert ds.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.3"
    assert ds.FailedSOPSequence[0].FailureReason == 274
    assert read_request(written(REQUEST, syntax), syntax) == REQUEST
    assert read_report(written(REPORT, syntax), syntax) == REPORT


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_beginning_of_a_data_set_is_refused(syntax: str) -> None:
    for whole in (written(REQUEST, syntax), by_pydicom(syntax, undefined=True)):
        for end in range(len(whole)):
            with pytest.raises(CannotUnderstandError):
                read_request(whole[:end], syntax)


def test_a_failure_without_a_reason_is_a_processing_failure() -> None:
    whole = written(REPORT, ImplicitVRLittleEndian)
    # the reason's tag becomes one that nobody looks at
    without = whole.replace(b"\x08\x00\x97\x11\x02", b"\x08\x00\x96\x11\x02")
    [failure] = read_report(without, ImplicitVRLittleEndian).failed
    assert failure.reason == 0x0110


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff" * 64,
        b"\x08\x00\x99\x11SQ\0\0\xff\xff\xff\xff" * 50,  # sequences in sequences
        b"\x08\x00\x99\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * 9,  # empty items
        b"\x08\x00\x99\x11SQ\0\0\x08\0\0\0\xfe\xff\x00\xe0\xff\0\0\0",  # an item past its sequence
    ],
)
def test_bytes_that_are_no_request_are_refused(damage: bytes) -> None:
    for syntax in SYNTAXES:
        with pytest.raises(CannotUnderstandError):
            read_request(written(REQUEST, syntax)[:18] + damage, syntax)


def test_a_request_about_nothing_is_refused() -> None:
    with pytest.raises(CannotUnderstandError, match="no object"):
        read_request(by_pydicom(ExplicitVRLittleEndian, 0), ExplicitVRLittleEndian)
