"""Any data set: refused with a reason, or read, routed, identified and prepared.

Damaged frames of the codecs in C are not tried here, for a crash would end the test run; they have
their tests beside the codecs, and a crash costs one object (`service.ahead`).
"""

from __future__ import annotations

import struct
import warnings

import pytest
from hypothesis import strategies as st
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from dicom_xai import identity
from dicom_xai.config import RoutesConfig
from dicom_xai.errors import IdentityError, RefusedError, StudyError
from dicom_xai.prepare import prepare
from dicom_xai.receive.inspect import file_meta, inspect
from dicom_xai.route.plan import plan_instance
from dicom_xai.study import Instance, Sender
from tests.make.associations import an_image, encoded
from tests.make.fuzzing import Fuzz, spoilt

#: The first byte of an input chooses.
SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless)
INSTANCE_UID = "1.2.3"
SENDER = Sender("SENDER", "DICOM_XAI", "127.0.0.1")
ROUTES = RoutesConfig.model_validate(
    {
        "routes": [
            {
                "name": "all-matchers",
                "when": {
                    "Modality": {"in": ["CT", "MR"]},
                    "BodyPartExamined": {"not": {"equals": "FOOT"}},
                    "SliceThickness": {"min": 1, "max": 5},
                    "SeriesDescription": {"contains": "AX"},
                    "ImageType": {"contains": "PRIMARY"},
                    "PatientName": {"exists": True},
                    "ReferencedImageSequence": {"exists": False},
                },
                "trigger": "instance",
                "model": "any",
                "explain": ["grad-cam"],
                "send": [{"object": "sc", "to": ["pacs"]}],
            }
        ]
    }
)

_LONG = ("OB", "OW", "OF", "SQ", "UC", "UN", "UR", "UT")
_VRS = "AE AS AT CS DA DS DT FL FD IS LO LT OB OF OW PN SH SL SQ SS ST TM UC UI UL UN UR US UT"
#: Attributes that routing, identity, geometry, decoding and the results look at.
_TAGS = [
    *(0x00080005, 0x00080008, 0x00080016, 0x00080018, 0x00080020, 0x00080030, 0x00080050),
    *(0x00080060, 0x00080070, 0x0008103E, 0x00081090, 0x00081140, 0x00100010, 0x00100020),
    *(0x00100021, 0x00100024, 0x00100030, 0x00100040, 0x00101000, 0x00101002, 0x0018A001),
    *(0x00180015, 0x00180050, 0x00180088, 0x00181164, 0x0020000D, 0x0020000E, 0x00200010),
    *(0x00200013, 0x00200020, 0x00200032, 0x00200037, 0x00200052, 0x00200060, 0x00280002),
    *(0x00280004, 0x00280006, 0x00280008, 0x00280010, 0x00280011, 0x00280030, 0x00280034),
    *(0x00280100, 0x00280101, 0x00280102, 0x00280103, 0x00280120, 0x00280121, 0x00281050),
    *(0x00281051, 0x00281052, 0x00281053, 0x00281054, 0x00281056, 0x00281101, 0x00281201),
    *(0x00282110, 0x00282112, 0x00282114, 0x00283000, 0x00283002, 0x00283006, 0x00283010),
    *(0x00209116, 0x00209113, 0x00289110, 0x00289145, 0x52009229, 0x52009230, 0x7FE00001),
    *(0x7FE00002, 0x00090010, 0x00091001, 0x00200000, 0x00190000),
]
_VALUES = st.one_of(
    st.sampled_from(
        [
            *(
                b"",
                b" ",
                b"\0\0",
                b"0",
                b"-1",
                b"1\\2\\3",
                b"1e999 ",
                b"NaN ",
                b"inf ",
                b"1.50",
                b"abc ",
            ),
            *(b"\\\\\\", b"1\\0\\0\\0\\1\\0", b"1\\0\\0\\1\\0\\0", b"1e-320\\1e-320", b"0\\0 "),
            *(b"ISO_IR 999", b"ISO 2022 IR 87\\ISO 2022 IR 6", b"\\ISO 2022 IR 149", b"GB18030 "),
            *(b"\x1b$B\x1b(B", b"\x1b$)C\xff\xfe", b"\xff" * 6, b"../../x ", b"1.2.x", b"A" * 70),
            *(b"^^^^^^ ", b"20260231", b"99999999999999999999", b"MONOCHROME1 ", b"PALETTE COLOR "),
            *(b"RGB ", b"YBR_FULL_422", b"\1\0", b"\2\0", b"\3\0", b"\x08\0", b"\x10\0", b"\x20\0"),
            *(
                b"\xff\xff",
                b"\0\x80",
                b"\xff\x7f",
                b"\0\0\xf0\x7f",
                b"\1\0\0\0\x10\0",
                b"4 ",
                b"2 ",
            ),
            *(b"dicom_xai ", b"CT", b"AXIAL\\ORIGINAL", b"<script>", b"%s%n", b"\x1b[31m"),
        ]
    ),
    st.binary(max_size=24),
)
_Element = tuple[int, str, bytes]


def explicit(elements: list[_Element]) -> bytes:
    """Elements in Explicit VR Little Endian, as they stand."""
    parts = []
    for tag, vr, value in elements:
        head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, vr.encode())
        length = struct.pack("<HL", 0, len(value)) if vr in _LONG else struct.pack("<H", len(value))
        parts.append(head + length + value)
    return b"".join(parts)


def elements_of(data: bytes) -> list[_Element]:
    found, at = [], 0
    while at < len(data):
        group, element, vr = struct.unpack_from("<HH2s", data, at)
        name = vr.decode()
        if name in _LONG:
            (length,) = struct.unpack_from("<L", data, at + 8)
            at += 12
        else:
            (length,) = struct.unpack_from("<H", data, at + 6)
            at += 8
        found.append((group << 16 | element, name, data[at : at + length]))
        at += length
    return found


def an_item(elements: list[_Element]) -> bytes:
    encoded_elements = explicit(elements)
    return struct.pack("<HHL", 0xFFFE, 0xE000, len(encoded_elements)) + encoded_elements


def _images() -> list[bytes]:
    """One image in each syntax, after its number."""
    image = an_image(
        rows=4,
        columns=4,
        SOPInstanceUID=INSTANCE_UID,
        RescaleSlope="1",
        RescaleIntercept="-1024",
        PixelSpacing=[1, 1],
        ImagePositionPatient=[0, 0, 0],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
    )
    found = [bytes([n]) + encoded(image, syntax) for n, syntax in enumerate(SYNTAXES[:3])]
    plane = b"\xf1\0"  # a run of 16 zeros
    image.PixelData = encapsulate([struct.pack("<16L", 2, 64, 66, *[0] * 13) + plane + plane])
    image["PixelData"].VR = "OB"
    image["PixelData"].is_undefined_length = True
    return [*found, bytes([3]) + encoded(image)]


IMAGES = _images()


@st.composite
def odd(draw: st.DrawFn) -> bytes:
    """A whole image with a few attributes that are wrong, missing, doubled or nested."""
    elements = {tag: (tag, vr, value) for tag, vr, value in elements_of(IMAGES[0][1:])}
    for _ in range(draw(st.integers(1, 4))):
        tag = draw(st.sampled_from(_TAGS))
        if draw(st.integers(0, 9)) == 0:
            elements.pop(tag, None)
            continue
        known = elements.get(tag, (tag, "LO", b""))[1]
        vr = draw(st.sampled_from([known] * 20 + _VRS.split()))
        value = draw(_VALUES)
        for _ in range(draw(st.sampled_from([0] * 6 + [1, 2, 20]))):
            inner = draw(st.sampled_from(_TAGS))
            vr, value = "SQ", an_item([(inner, vr, value)])
        elements[tag] = (tag, vr, value + b" " * (len(value) % 2))
    return b"\0" + explicit([elements[tag] for tag in sorted(elements)])


@pytest.mark.promise("C4")
def test_every_data_set_ends_in_a_result_or_a_reason(fuzz: Fuzz) -> None:
    fuzz.run("data-sets", _trial, st.one_of(odd(), odd(), spoilt(IMAGES)), 2500)


def _trial(data: bytes) -> None:
    syntax = SYNTAXES[data[0] % len(SYNTAXES)] if data else SYNTAXES[0]
    names = (str(syntax), str(CTImageStorage), INSTANCE_UID)
    file = file_meta(*names, "SENDER") + data[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in the service
        try:
            header = inspect(data[1:], *names).data_set
        except RefusedError:
            header = None
        if header is not None:
            identity.is_ours(header)
            plan_instance(header, SENDER, ROUTES)
        try:
            block = identity.read_block(file)
            identity.check_agreement([block, block])
        except IdentityError:
            block = {}
        spliced = file_meta(SYNTAXES[0], *names[1:], "SENDER") + identity.splice(b"", block)
        identity.compare(block, identity.read_block(spliced))
        instance = Instance(INSTANCE_UID, "1.2", "1.3", CTImageStorage, syntax, "", "", 0, SENDER)
        try:
            prepared = prepare(instance, file, limit_bytes=2**22)
        except StudyError:
            return
    assert prepared.decoded.stored.size <= 2**20
