"""Explanation in, DICOM objects out: the picture (SC), the region (SEG), or the reason (note).

Read `results` first: what is made of a job. `picture` composes what is seen, with `color` and
`legend`; `sc` and `seg` write the two kinds; `note` writes the reason; `source` is what an object's
header may tell, `provenance` what all results have in common, `objects` what is given and taken.

Rules: no clock, no random number; the same inputs give the same bytes. No object leaves that does
not carry its source's identity block byte for byte. Nothing is imported here: the processes that
only describe sources load neither torch nor highdicom.
"""
