"""All objects of one job: the pictures, the regions, and where they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dicom_xai.config import Compression, ModelCard, SegmentationKind
from dicom_xai.encode import seg
from dicom_xai.encode.captures import Captures
from dicom_xai.encode.maps import ClassMap, maps_of
from dicom_xai.encode.objects import (
    DisplayOf,
    Encoded,
    EncodedResults,
    HeatOf,
    Planned,
    ProbabilityOf,
    encoded,
)
from dicom_xai.encode.pixeldata import Image
from dicom_xai.encode.provenance import Run
from dicom_xai.encode.regions import LOWEST_FRACTION, Gathered
from dicom_xai.encode.source import Described
from dicom_xai.encode.unit import EncodedUnit
from dicom_xai.errors import EncodeError
from dicom_xai.study import Explanation, Job, ObjectKind, Volume


def encode_results(
    job: Job,
    card: ModelCard,
    volume: Volume,
    explanation: Explanation,
    plan: Sequence[Planned],
    described: Mapping[str, Described],
    display_of: DisplayOf,
    heat_of: HeatOf,
    probability_of: ProbabilityOf,
) -> EncodedResults:
    """All that a job sends.

    Parameters
    ----------
    plan : sequence of Planned
        SC and SEG entries. SEG entries of one kind that end up in one compression become one.
    described : mapping of str to Described
        What `source.describe` says of each instance of the unit, by its SOP Instance UID.
    display_of, heat_of, probability_of : callable
        See `DisplayOf`, `HeatOf`, `ProbabilityOf`; tensors on the worker's device.

    Raises
    ------
    IdentityError
        A result would not carry its source's identity: the job fails, nothing is sent. That the
        instances of the unit agree about patient and study is for the caller to see to.
    EncodeError
        The job cannot be written down at all (its `created_at` is malformed).
    """
    run = Run(job, card, explanation.method)
    unit = EncodedUnit(run, card, volume, explanation, described)
    wanted = _region_plan(plan)
    regions = {kind: Gathered(kind) for kind, _ in wanted}
    if not card.segments:
        regions.pop(SegmentationKind.FRACTIONAL, None)
    lowest = LOWEST_FRACTION if SegmentationKind.FRACTIONAL in regions else None
    maps = maps_of(explanation, heat_of, probability_of, lowest)
    captures = Captures(unit, maps.drawn, [p for p in plan if p.kind is ObjectKind.SC])
    segmented = {i for map_ in maps.segmented for i in map_.frames} if regions else set()
    needed = maps.wanted(captures.frames, segmented)
    for batch in unit.batches({*captures.frames, *segmented}):
        found = {map_: map_.on(batch, wanted) for map_, wanted in needed.items()}
        for region in regions.values():
            region.add(batch, [found[map_] for map_ in maps.segmented])
        captures.add(batch, display_of, [found[map_] for map_ in maps.drawn])
    objects, skipped = captures.finished()
    for (kind, compression), destinations in wanted.items():
        if kind not in regions:
            skipped.append((ObjectKind.SEG, "the model gives no probability of each pixel"))
            continue
        ordinal = sum(each.kind is ObjectKind.SEG for each in objects)
        made, reasons = _segmentations(
            unit, maps.segmented, regions[kind], compression, ordinal, destinations
        )
        objects += made
        skipped += [(ObjectKind.SEG, reason) for reason in reasons]
    return EncodedResults(tuple(objects), tuple(dict.fromkeys(skipped)))


def _region_plan(
    plan: Sequence[Planned],
) -> dict[tuple[SegmentationKind, Compression], tuple[str, ...]]:
    """Destinations of each Segmentation, by kind and by how it is compressed in the end."""
    wanted: dict[tuple[SegmentationKind, Compression], tuple[str, ...]] = {}
    for p in plan:
        if p.kind is ObjectKind.SEG:
            key = p.region, seg.compression_of(p.region, p.compression)
            wanted[key] = tuple(dict.fromkeys((*wanted.get(key, ()), *p.destinations)))
    return wanted


def _segmentations(
    unit: EncodedUnit,
    maps: Sequence[ClassMap],
    gathered: Gathered,
    compression: Compression,
    ordinal: int,
    destinations: tuple[str, ...],
) -> tuple[list[Encoded], list[str]]:
    """One Segmentation for each group of planes that fit together, and why others have none."""
    if not gathered.present:
        return [], [_why_no_region(unit.explanation, maps)]
    frames = unit.volume.frames
    indices = sorted({i for _, i in gathered.present})
    groups, skipped = seg.groups([seg.Plane(i, frames[i], unit.source(i)) for i in indices])
    spacing_mm = seg.slice_spacing(unit.volume.geometry)
    made: list[Encoded] = []
    for group in groups:
        first = group[0]
        try:
            segmented = seg.segmentation(
                unit.run,
                unit.card,
                group,
                _region(unit, maps, gathered, {plane.index for plane in group}),
                compression,
                ordinal + len(made),
                spacing_mm,
                unit.block(first.index),
                unit.explanation.layer,
            )
        except EncodeError as error:
            skipped.append(str(error))
            continue
        instance = first.frame.instance
        made.append(
            encoded(
                unit.run, ObjectKind.SEG, ordinal + len(made), segmented, instance, destinations
            )
        )
    return made, skipped


def _region(
    unit: EncodedUnit, maps: Sequence[ClassMap], gathered: Gathered, inside: set[int]
) -> seg.Region:
    """What was gathered of these frames, its segments numbered without gaps."""
    present = sorted({m for m, i in gathered.present if i in inside})
    number = {m: n for n, m in enumerate(present, 1)}
    mine = {key: image for key, image in gathered.frames.items() if key[1] in inside}
    if gathered.kind is SegmentationKind.LABELMAP:
        images = {key: _renumbered(image, number) for key, image in mine.items()}
    else:
        images = {(number[m], i): image for (m, i), image in mine.items()}
    segments = tuple(
        seg.Segment(
            unit.card.classes[maps[m].finding.class_index],
            maps[m].outline,
            maps[m].threshold,
            maps[m].finding.score,
            maps[m].is_probability,
        )
        for m in present
    )
    return seg.Region(gathered.kind, segments, images, bool(gathered.overlapping & inside))


def _renumbered(labels: Image, number: Mapping[int, int]) -> Image:
    """Labels, which are 1 + the index of a map, as segment numbers."""
    if all(n == m + 1 for m, n in number.items()):
        return labels
    table = np.zeros(max(number) + 2, np.uint16)
    for m, n in number.items():
        table[m + 1] = n
    renumbered = table[labels]
    return renumbered.astype(np.uint8) if len(number) <= 255 else renumbered


def _why_no_region(explanation: Explanation, maps: Sequence[ClassMap]) -> str:
    if not any(finding.is_positive for finding in explanation.findings):
        return "no finding above threshold"
    if not maps:
        return "no heat map was made"
    quantity = "probability" if maps[0].is_probability else "heat"
    return f"no pixel at or above the {quantity} threshold"
