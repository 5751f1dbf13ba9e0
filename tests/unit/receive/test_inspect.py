"""A data set is whole, or it is refused."""

from __future__ import annotations

import random
import struct
from io import BytesIO

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    BasicTextSRStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    generate_uid,
)

from dicom_xai.errors import CannotUnderstandError, DataSetMismatchError, RefusedError
from dicom_xai.receive.inspect import (
    MAX_DEPTH,
    MAX_ELEMENTS,
    MAX_HEADER_BYTES,
    file_meta,
    inspect,
)
from tests.make.associations import an_image, encoded

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]


def looked_at(ds: Dataset, data: bytes | None = None, syntax: str = SYNTAXES[0]) -> Dataset:
    data = encoded(ds, syntax) if data is None else data
    return inspect(data, syntax, ds.SOPClassUID, ds.SOPInstanceUID).data_set


def with_sequences() -> Dataset:
    """Sequences of both lengths, nested, known and private, before the pixels."""
    inner = Dataset()
    inner.CodeValue = "1"
    item = Dataset()
    item.ReferencedSOPInstanceUID = "1.2.3"
    item.PurposeOfReferenceCodeSequence = Sequence([inner])
    ds = an_image(rows=4, columns=4, ReferencedImageSequence=Sequence([item, Dataset()]))
    undefined = Dataset()
    undefined.CodeMeaning = "x"
    undefined.is_undefined_length_sequence_item = True
    ds.AnatomicRegionSequence = Sequence([undefined])
    ds["AnatomicRegionSequence"].is_undefined_length = True
    private = ds.private_block(0x0029, "OURS", create=True)
    private.add_new(0x01, "SQ", Sequence([inner]))
    return ds


def nested(levels: int) -> Dataset:
    ds = Dataset()
    for _ in range(levels):
        outer = Dataset()
        outer.ReferencedImageSequence = Sequence([ds])
        ds = outer
    return an_image(ReferencedImageSequence=ds.ReferencedImageSequence)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_whole_data_set_gives_its_header_without_the_pixels(syntax: str) -> None:
    ds = with_sequences()
    header = looked_at(ds, syntax=syntax)
    assert "PixelData" not in header
    assert header.PatientName == ds.PatientName
    assert header.Rows == 4
    assert header.ReferencedImageSequence[0].PurposeOfReferenceCodeSequence[0].CodeValue == "1"
    assert header.AnatomicRegionSequence[0].CodeMeaning == "x"


@pytest.mark.promise("D6")
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_beginning_of_a_data_set_is_refused(syntax: str) -> None:
    # every length, hence every element boundary and one byte to each side of it
    ds = with_sequences()
    whole = encoded(ds, syntax)
    for length in range(len(whole)):
        with pytest.raises(RefusedError):
            looked_at(ds, whole[:length], syntax)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("extra", range(1, 9))
def test_bytes_after_the_last_element_are_refused(syntax: str, extra: int) -> None:
    ds = an_image()
    with pytest.raises(CannotUnderstandError):
        looked_at(ds, encoded(ds, syntax) + b"\x00" * extra, syntax)


def compressed(frames: int = 1, fragments: int = 1, **attributes: object) -> Dataset:
    """Frames of a few bytes that no codec ever sees."""
    ds = an_image(NumberOfFrames=frames, **attributes)
    ds.PixelData = encapsulate([b"\xff\xd8\xff\xd9" * 4] * frames, fragments_per_frame=fragments)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return ds


@pytest.mark.parametrize("frames", [1, 3])
def test_compressed_pixels_are_walked_to_their_delimiter(frames: int) -> None:
    ds = compressed(frames, fragments=2, DataSetTrailingPadding=bytes(6))
    header = looked_at(ds, syntax=JPEGLSLossless)
    assert header.Rows == 16
    assert "PixelData" not in header


@pytest.mark.promise("D6")
def test_every_beginning_of_a_compressed_data_set_is_refused() -> None:
    ds = compressed(2)
    whole = encoded(ds, JPEGLSLossless)
    for length in range(len(whole)):
        with pytest.raises(RefusedError):
            looked_at(ds, whole[:length], JPEGLSLossless)


def test_fewer_fragments_than_frames_are_refused() -> None:
    ds = compressed(2)
    ds.NumberOfFrames = 3
    with pytest.raises(CannotUnderstandError, match="has 2 fragments, at least 3 are wanted"):
        looked_at(ds, syntax=JPEGLSLossless)


def test_native_pixels_in_a_compressed_syntax_are_refused() -> None:
    with pytest.raises(CannotUnderstandError, match="has a defined length, fragments were wanted"):
        looked_at(an_image(), syntax=JPEGLSLossless)


def test_fragments_in_an_uncompressed_syntax_are_refused() -> None:
    with pytest.raises(CannotUnderstandError, match="no defined length"):
        looked_at(compressed())


def test_what_is_no_fragment_among_fragments_is_refused() -> None:
    ds = compressed(2)
    whole = encoded(ds, JPEGLSLossless)
    second = whole.rindex(struct.pack("<HH", 0xFFFE, 0xE000))
    damaged = whole[:second] + struct.pack("<HH", 0xFFFE, 0xE00D) + whole[second + 4 :]
    with pytest.raises(CannotUnderstandError, match=r"\(FFFE,E00D\) where a fragment was wanted"):
        looked_at(ds, damaged, JPEGLSLossless)


def test_a_compressed_icon_is_walked_inside_its_sequence() -> None:
    icon = compressed()
    ds = compressed(2, IconImageSequence=Sequence([icon]))
    assert looked_at(ds, syntax=JPEGLSLossless).IconImageSequence[0].Rows == 16


def test_damaged_compressed_bytes_are_refused_or_read_and_nothing_else() -> None:
    ds = compressed(3)
    rng = random.Random(7)
    whole = encoded(ds, JPEGLSLossless)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            header = looked_at(ds, bytes(damaged), JPEGLSLossless)
        except RefusedError:
            continue
        assert header.SOPInstanceUID == ds.SOPInstanceUID


def test_elements_after_the_pixels_are_walked_too() -> None:
    ds = an_image(DataSetTrailingPadding=b"\x00" * 10)
    assert looked_at(ds).Rows == 16
    with pytest.raises(CannotUnderstandError, match="truncated"):
        looked_at(ds, encoded(ds)[:-1])


def test_damaged_bytes_are_refused_or_read_and_nothing_else() -> None:
    ds = with_sequences()
    rng = random.Random(7)
    for syntax in SYNTAXES:
        whole = encoded(ds, syntax)
        for _ in range(400):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                header = looked_at(ds, bytes(damaged), syntax)
            except RefusedError:
                continue
            assert header.SOPInstanceUID == ds.SOPInstanceUID


@pytest.mark.parametrize("keyword", ["SOPClassUID", "SOPInstanceUID"])
def test_command_and_data_set_must_name_the_same_object(keyword: str) -> None:
    ds = an_image()
    data = encoded(ds)
    setattr(ds, keyword, generate_uid())
    with pytest.raises(DataSetMismatchError, match=keyword):
        looked_at(ds, data)


@pytest.mark.parametrize(
    "keyword", ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"]
)
@pytest.mark.parametrize("value", [None, "", "../pwned", "1.02.3", "1." + "2" * 70, "1.2\\1.3"])
def test_a_missing_or_invalid_uid_is_refused(keyword: str, value: str | None) -> None:
    ds = an_image()
    sop_class, sop_instance = ds.SOPClassUID, ds.SOPInstanceUID
    # written past pydicom's own validation, as a careless sender does
    raw = encoded(ds)
    tag, length = ds[keyword].tag, len(str(ds[keyword].value))
    old = struct.pack("<HH2sH", tag.group, tag.element, b"UI", length + length % 2)
    at = raw.index(old)
    end = at + 8 + struct.unpack_from("<H", raw, at + 6)[0]
    if value is None:
        raw = raw[:at] + raw[end:]
    else:
        text = value.encode() + b"\x00" * (len(value) % 2)
        raw = raw[:at] + old[:6] + struct.pack("<H", len(text)) + text + raw[end:]
    with pytest.raises(CannotUnderstandError, match=keyword):
        inspect(raw, ExplicitVRLittleEndian, sop_class, sop_instance)


def test_an_invalid_uid_in_the_command_set_is_refused() -> None:
    ds = an_image()
    with pytest.raises(CannotUnderstandError, match="command set"):
        inspect(encoded(ds), ExplicitVRLittleEndian, ds.SOPClassUID, "../pwned")


def test_pixels_shorter_than_the_header_says_are_refused() -> None:
    ds = an_image(rows=16, columns=16)
    ds.Rows = 17
    with pytest.raises(CannotUnderstandError, match="PixelData has 512 bytes, 544 are wanted"):
        looked_at(ds)
    ds.Rows = 16
    ds.NumberOfFrames = 2
    with pytest.raises(CannotUnderstandError, match="PixelData"):
        looked_at(ds)


def test_padded_and_subsampled_pixels_are_let_through() -> None:
    looked_at(an_image(rows=4, columns=4, PixelData=bytes(40)))
    subsampled = an_image(
        rows=4,
        columns=4,
        SamplesPerPixel=3,
        BitsAllocated=8,
        PhotometricInterpretation="YBR_FULL_422",
        PixelData=bytes(32),
    )
    looked_at(subsampled)
    single_bits = an_image(rows=3, columns=3, BitsAllocated=1, PixelData=bytes(2))
    looked_at(single_bits)


def test_an_image_without_pixels_is_refused_and_a_report_is_not() -> None:
    ds = an_image()
    del ds.PixelData
    with pytest.raises(CannotUnderstandError, match="PixelData"):
        looked_at(ds)
    ds.SOPClassUID = BasicTextSRStorage
    looked_at(ds)


@pytest.mark.promise("C4")
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_sequences_too_deep_are_refused_without_recursion(syntax: str) -> None:
    looked_at(nested(MAX_DEPTH - 1), syntax=syntax)
    with pytest.raises(CannotUnderstandError, match="deeper"):
        looked_at(nested(MAX_DEPTH + 1), syntax=syntax)
    # 200 levels: where pydicom ends in a RecursionError
    item = b""
    for _ in range(200):
        item = (
            struct.pack("<HH2sHL", 8, 0x1140, b"SQ", 0, len(item) + 8)
            + struct.pack("<HHL", 0xFFFE, 0xE000, len(item))
            + item
        )
    with pytest.raises(CannotUnderstandError, match="deeper"):
        inspect(item, ExplicitVRLittleEndian, "1.2", "1.3")


@pytest.mark.promise("C4")
def test_too_many_elements_are_refused() -> None:
    tiny = struct.pack("<HH2sH", 9, 1, b"LO", 0) * (MAX_ELEMENTS + 1)
    data = (
        struct.pack("<HH2sHL", 8, 0x1140, b"SQ", 0, len(tiny) + 8)
        + struct.pack("<HHL", 0xFFFE, 0xE000, len(tiny))
        + tiny
    )
    with pytest.raises(CannotUnderstandError, match=str(MAX_ELEMENTS)):
        inspect(data, ExplicitVRLittleEndian, "1.2", "1.3")


@pytest.mark.promise("N3")
def test_items_count_as_elements() -> None:
    items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * (MAX_ELEMENTS + 1)
    data = struct.pack("<HH2sHL", 8, 0x1140, b"SQ", 0, len(items)) + items
    with pytest.raises(CannotUnderstandError, match=str(MAX_ELEMENTS)):
        inspect(data, ExplicitVRLittleEndian, "1.2", "1.3")


@pytest.mark.promise("N3")
@pytest.mark.parametrize("is_defined", [True, False])
def test_a_long_sequence_is_walked_and_left_out_of_the_header(is_defined: bool) -> None:
    ds = an_image()
    data = encoded(ds)
    pixels = data.index(b"\xe0\x7f\x10\x00")
    items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 5000
    length, end = len(items), b""
    if not is_defined:
        length, end = 0xFFFFFFFF, struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    sequence = struct.pack("<HH2sHL", 0x5200, 0x9230, b"SQ", 0, length) + items + end
    header = looked_at(ds, data[:pixels] + sequence + data[pixels:])
    assert "PerFrameFunctionalGroupsSequence" not in header
    assert header.Rows == ds.Rows
    with pytest.raises(CannotUnderstandError, match="truncated"):
        looked_at(ds, data[:pixels] + sequence[:-8])


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_elements_of_a_header_can_be_had_as_they_came(syntax: str) -> None:
    ds = with_sequences()
    data = encoded(ds, syntax)
    header = inspect(data, syntax, ds.SOPClassUID, ds.SOPInstanceUID)
    assert header.text(0x00100020) == ds.PatientID
    assert header.value(0x00280010) == (4).to_bytes(2, "little" if header.is_little else "big")
    assert header.value(0x00102160) == header.element(0x00102160) == b""  # absent
    assert header.element(0x7FE00010) == b""  # no header
    tags = [element.tag for element in ds if element.tag < 0x7FE00000]
    assert data.startswith(b"".join(map(header.element, tags)))
    # of undefined length: whole, items and delimiters with it, and without a value of its own
    region = header.element(0x00082218)
    assert region in data
    assert b"x " in region
    assert header.value(0x00082218) == b""


def test_what_no_reader_understands_is_refused_where_somebody_asks() -> None:
    ds = an_image()
    data = encoded(ds)
    charset = struct.pack("<HH2sH", 8, 5, b"FD", 8) + struct.pack("<d", 1.5)
    header = inspect(charset + data, ExplicitVRLittleEndian, ds.SOPClassUID, ds.SOPInstanceUID)
    with pytest.raises(CannotUnderstandError, match="no reader makes sense"):
        header.data_set  # noqa: B018  # read on access


@pytest.mark.promise("N3")
def test_a_header_of_many_short_values_is_refused() -> None:
    ds = an_image()
    data = encoded(ds)
    pixels = data.index(b"\xe0\x7f\x10\x00")
    values = b"".join(
        struct.pack("<HH2sH", 0x0031 + 2 * (n // 60_000), n % 60_000, b"LO", 0)
        for n in range(MAX_HEADER_BYTES // 8)
    )
    with pytest.raises(CannotUnderstandError, match="the header has 640"):
        looked_at(ds, data[:pixels] + values + data[pixels:])


@pytest.mark.parametrize(
    ("element", "problem"),
    [
        (struct.pack("<HH2sH", 2, 0x10, b"UI", 0), "belongs to a command or a file"),
        (struct.pack("<HH2sH", 8, 0x16, b"xx", 0), "no known VR"),
        (struct.pack("<HH2sHL", 8, 0x16, b"OB", 0, 0xFFFFFFFF), "no defined length"),
        (struct.pack("<HHL", 0xFFFE, 0xE00D, 0), "outside a sequence"),
        (struct.pack("<HH2sH", 8, 0x16, b"UI", 0) * 2, "comes twice"),
    ],
)
def test_what_is_no_data_set_is_refused_with_the_reason(element: bytes, problem: str) -> None:
    with pytest.raises(CannotUnderstandError, match=problem):
        inspect(element, ExplicitVRLittleEndian, "1.2", "1.3")


def test_a_patient_name_after_the_pixels_is_refused() -> None:
    # two identities in one object, of which readers would take different ones
    ds = an_image()
    late = struct.pack("<HH2sH", 0x10, 0x10, b"PN", 4) + b"Roe^"
    with pytest.raises(CannotUnderstandError, match="after the pixels"):
        looked_at(ds, encoded(ds) + late)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_stored_file_is_part_10_around_the_received_bytes(syntax: str) -> None:
    ds = an_image()
    data = encoded(ds, syntax)
    head = file_meta(syntax, ds.SOPClassUID, ds.SOPInstanceUID, "SENDER")
    read = dcmread(BytesIO(head + data))
    assert read.file_meta.TransferSyntaxUID == syntax
    assert read.file_meta.MediaStorageSOPClassUID == ds.SOPClassUID
    assert read.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
    assert read.file_meta.SourceApplicationEntityTitle == "SENDER"
    assert read.file_meta.FileMetaInformationGroupLength == len(head) - 144
    assert read.PixelData == ds.PixelData
    assert head == file_meta(syntax, ds.SOPClassUID, ds.SOPInstanceUID, "SENDER")
