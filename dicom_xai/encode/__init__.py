"""Explanation in, DICOM objects out: the picture (SC), the region (SEG), or the reason (note).

Read `results` first: what is made of a job. `picture` composes what is seen, with `color` and
`legend`; `sc` and `seg` write the two kinds; `note` writes the reason; `source` is what a header
may tell, `provenance` what all objects have in common.

Rules: no clock, no random number; the same inputs give the same bytes. No object leaves that does
not carry its source's identity block byte for byte.
"""

from dicom_xai.encode.note import encode_note
from dicom_xai.encode.objects import Encoded, EncodedResults, Planned
from dicom_xai.encode.results import MAX_PICTURES, encode_results

__all__ = [
    "MAX_PICTURES",
    "Encoded",
    "EncodedResults",
    "Planned",
    "encode_note",
    "encode_results",
]
