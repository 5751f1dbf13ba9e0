"""The reason why there is no result, as a picture of text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dicom_xai import identity
from dicom_xai.config import Compression
from dicom_xai.encode import legend, provenance, sc
from dicom_xai.encode.objects import Encoded, Planned, encoded
from dicom_xai.encode.provenance import Run
from dicom_xai.study import Instance, Job, ObjectKind


def encode_note(
    job: Job,
    reason: str,
    source: Instance,
    block: identity.Block,
    plan: Sequence[Planned],
) -> list[Encoded]:
    """A picture of text that says why there is no result.

    Parameters
    ----------
    reason : str
        For a radiologist to read; without patient data.
    source : Instance
        Whose study the note joins, and to which it refers.
    block : Block
        Of `source`. A note takes nothing else from it: whatever made the study fail may stand
        there.
    plan : sequence of Planned
        NOTE entries; without any, a note goes wherever an SC would; without those, everywhere.

    Raises
    ------
    IdentityError
        The source has no study: nothing is sent.
    """
    run = Run(job, None, "")
    parts: list[legend.Line | legend.HeatBar] = [
        legend.Line(provenance.BANNER, legend.YELLOW),
        *([legend.Line(run.amended, legend.YELLOW)] if run.amended else []),
        legend.Line(f"AI not performed: {provenance.ascii_text(reason, 600)}"),
        legend.Line(f"model {job.model}, route {job.route}", legend.GREY),
        legend.Line(provenance.SOFTWARE, legend.GREY),
    ]
    _, picture = legend.band_beside(0, legend.MIN_WIDTH, parts)
    notes = []
    for ordinal, (compression, destinations) in enumerate(_note_plan(plan).items()):
        captured = sc.capture(
            run,
            ObjectKind.NOTE,
            np.ascontiguousarray(picture),
            compression,
            ordinal,
            1,
            None,
            (source, ()),
            block,
            sc.Caption("not performed", ""),
        )
        notes.append(encoded(run, ObjectKind.NOTE, ordinal, captured, source, destinations))
    return notes


def _note_plan(plan: Sequence[Planned]) -> dict[Compression, tuple[str, ...]]:
    """Destinations by compression."""
    kinds = {p.kind for p in plan}
    kind = next((k for k in (ObjectKind.NOTE, ObjectKind.SC) if k in kinds), ObjectKind.SEG)
    wanted: dict[Compression, tuple[str, ...]] = {}
    for p in plan:
        if p.kind is kind:
            names = (*wanted.get(p.compression, ()), *p.destinations)
            wanted[p.compression] = tuple(dict.fromkeys(names))
    return wanted
