"""Elements as bytes: what pydicom writes, and no more than a VR can hold."""

from __future__ import annotations

import pytest
from pydicom import Dataset

from dicom_xai.encode import elements
from dicom_xai.errors import EncodeError


def written(**values: object) -> bytes:
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return elements.dump(ds)


def test_text_is_padded_as_its_representation_wants():
    assert elements.text("SOPInstanceUID", "1.2.3") == written(SOPInstanceUID="1.2.3")
    assert elements.text("Modality", "SEG") == written(Modality="SEG")
    assert elements.text("PixelSpacing", "0.5", "0.25") == written(PixelSpacing=["0.5", "0.25"])


def test_numbers_and_pointers_are_little_endian():
    assert elements.numbers("Rows", 513) == written(Rows=513)
    assert elements.numbers("DimensionIndexValues", 1, 70_000) == written(
        DimensionIndexValues=[1, 70_000]
    )
    assert elements.tag("FrameIncrementPointer", "PageNumberVector") == written(
        FrameIncrementPointer=0x00182001
    )


def test_a_sequence_has_the_items_given():
    item = Dataset()
    item.ReferencedSegmentNumber = 2
    expected = written(SegmentIdentificationSequence=[item, item])
    inner = elements.numbers("ReferencedSegmentNumber", 2)
    assert elements.sequence("SegmentIdentificationSequence", [inner, inner]) == expected
    assert elements.sequence("DerivationImageSequence", []) == written(DerivationImageSequence=[])


def test_a_value_that_its_representation_cannot_hold_is_refused_by_name():
    numbers = map(str, range(20_000))
    with pytest.raises(EncodeError, match="ReferencedFrameNumber would be 108890 bytes"):
        elements.text("ReferencedFrameNumber", *numbers)
