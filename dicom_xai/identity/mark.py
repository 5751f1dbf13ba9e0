"""The mark by which we know our own results, so that none of them is ever explained again."""

from __future__ import annotations

import struct

from pydicom import Dataset
from pydicom import Sequence as DicomSequence
from pydicom.errors import BytesLengthException

from dicom_xai.identity.block import tag_of

#: ManufacturerModelName of everything that we make: our mark, see `is_ours`.
MODEL_NAME = "dicom_xai"
#: All that `is_ours` looks at.
MARK_TAGS = frozenset((tag_of("ManufacturerModelName"), tag_of("ContributingEquipmentSequence")))
#: What pydicom raises on a sequence that is none.
_UNREADABLE = (
    *(EOFError, ValueError, TypeError, LookupError, AttributeError, struct.error),
    *(OSError, NotImplementedError, BytesLengthException),
)


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
    except _UNREADABLE:
        return False  # an unreadable sequence is not of our making
    return isinstance(items, DicomSequence) and any(map(_is_model_name, items))


def _is_model_name(dataset: Dataset) -> bool:
    tag = tag_of("ManufacturerModelName")
    if tag not in dataset:
        return False
    item = dataset.get_item(tag)
    value = item.value
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
    return text.strip(" \0") == MODEL_NAME
