"""What the encoders give, and what they are given to look with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dicom_xai.config import Compression, Layout, SegmentationKind
from dicom_xai.encode import sc, seg
from dicom_xai.encode.provenance import Run
from dicom_xai.study import Finding, Instance, ObjectKind, Reference

#: Frame indices, all of one size -> ``(frames, rows, columns)`` float32, the windowed images, 0
#: black, 1 white; finite.
DisplayOf = Callable[[Sequence[int]], torch.Tensor]
#: Finding, frame indices, all of one size -> ``(frames, rows, columns)`` float32, heat on the
#: source's pixels, 1.0 = the card's full scale, zero outside the model's field. Interpolation must
#: not exceed the map's own maximum: frames whose map stays below the threshold are not asked for.
HeatOf = Callable[[Finding, Sequence[int]], torch.Tensor]
#: The same of a finding's region: its probability, 0..1, that a pixel belongs to the class.
ProbabilityOf = Callable[[Finding, Sequence[int]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Planned:
    """One kind of object in one compression, and where it goes."""

    kind: ObjectKind
    compression: Compression
    destinations: tuple[str, ...]
    slices: int = 1  #: SC, of a series: at most so many pictures
    layout: Layout = Layout.SINGLE  #: SC
    region: SegmentationKind = SegmentationKind.BINARY  #: SEG


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One finished object, ready for the spool."""

    kind: ObjectKind
    ordinal: int
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    transfer_syntax_uid: str
    file: bytes
    source: Instance  #: whose identity block it carries
    references: tuple[Reference, ...]
    destinations: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedResults:
    """All objects of a job, pictures first, and why planned ones are missing.

    `skipped` holds kinds and short reasons without patient data; that there was nothing to segment
    is one of them.
    """

    objects: tuple[Encoded, ...]
    skipped: tuple[tuple[ObjectKind, str], ...] = ()


def encoded(
    run: Run,
    kind: ObjectKind,
    ordinal: int,
    made: sc.Captured | seg.Segmented,
    source: Instance,
    destinations: tuple[str, ...],
) -> Encoded:
    """A written object with where it came from and where it goes."""
    return Encoded(
        kind=kind,
        ordinal=ordinal,
        sop_class_uid=made.sop_class_uid,
        sop_instance_uid=made.sop_instance_uid,
        series_instance_uid=made.series_instance_uid,
        study_instance_uid=source.study_instance_uid,
        transfer_syntax_uid=made.transfer_syntax_uid,
        file=made.file,
        source=source,
        references=run.job.predecessors,
        destinations=destinations,
    )
