"""Whose object is it: the patient and study elements, as received bytes; read, compare, splice.

A result must belong to the same patient and study as its source, whatever the source's header
looks like. So the identity block never passes through a parser that could repair, decode or trim
it: its value bytes go from the received file into the result as they are, and are compared, value
byte by value byte, before anything is sent. Encoding (VR, lengths, byte order) is not part of a
value; padding is.

`block` says which elements those are, `reading`, `comparing` and `splicing` are the verbs. `mark`,
which receiver and encoder need too, is how we know our own results.
"""

from dicom_xai.identity.block import (
    BLOCK_TAGS,
    EMPTY_WHEN_ABSENT,
    PLACE_KEYWORDS,
    Block,
    Element,
    text_of,
    without,
)
from dicom_xai.identity.comparing import check_agreement, compare
from dicom_xai.identity.mark import MARK_TAGS, MODEL_NAME, is_ours
from dicom_xai.identity.reading import read_block
from dicom_xai.identity.splicing import splice

__all__ = [
    "BLOCK_TAGS",
    "EMPTY_WHEN_ABSENT",
    "MARK_TAGS",
    "MODEL_NAME",
    "PLACE_KEYWORDS",
    "Block",
    "Element",
    "check_agreement",
    "compare",
    "is_ours",
    "read_block",
    "splice",
    "text_of",
    "without",
]
