"""All objects of one job: which frames get a picture, what goes into the region, where it goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from dicom_xai import identity
from dicom_xai.config import InputKind, ModelCard
from dicom_xai.encode import color, sc, seg
from dicom_xai.encode.objects import (
    DisplayOf,
    Encoded,
    EncodedResults,
    HeatOf,
    Planned,
    encoded,
)
from dicom_xai.encode.picture import compose, outlines_of, threshold_of
from dicom_xai.encode.provenance import Run
from dicom_xai.encode.source import Described, Source
from dicom_xai.errors import EncodeError
from dicom_xai.study import Explanation, Finding, Job, ObjectKind, Volume

#: At most so many pictures of a unit of images; a series says how many slices it wants.
MAX_PICTURES = 16

#: ``(rows, columns)`` bool on the source's pixels, by frame index and class index; none is empty.
_Masks = dict[tuple[int, int], torch.Tensor]


def encode_results(
    job: Job,
    card: ModelCard,
    volume: Volume,
    explanation: Explanation,
    plan: Sequence[Planned],
    described: Mapping[str, Described],
    display_of: DisplayOf,
    heat_of: HeatOf,
) -> EncodedResults:
    """All that a job sends.

    Parameters
    ----------
    plan : sequence of Planned
        SC and SEG entries. Segmentations are never compressed, so their entries become one.
    described : mapping of str to Described
        What `source.describe` says of each instance of the unit, by its SOP Instance UID.
    display_of, heat_of : callable
        See `DisplayOf` and `HeatOf`; tensors on the worker's device.

    Raises
    ------
    IdentityError
        The instances of the unit disagree about patient or study, or a result would not carry
        its source's identity: the job fails, nothing is sent.
    EncodeError
        The job cannot be written down at all (its `created_at` is malformed).
    """
    sources = _Sources(volume, described)
    identity.check_agreement(sources.blocks())
    run = Run(job, card, explanation.method)
    pictured = [p for p in plan if p.kind is ObjectKind.SC]
    chosen = {p: _chosen(card, volume, explanation, p.slices) for p in pictured}
    active = _active(explanation, len(volume.frames))
    wanted = sorted({i for frames in chosen.values() for i in frames})
    region_destinations = _destinations(plan, ObjectKind.SEG)

    objects: list[Encoded] = []
    masks: _Masks = {}
    outlines = outlines_of(explanation)
    for i in sorted({*wanted, *(active if region_destinations else ())}):
        layers: dict[int, color.Layer] = {}
        for finding in active.get(i, ()):
            outline = outlines[finding.class_index]
            drawn = color.layer(heat_of(finding, i), threshold_of(finding), outline)
            if drawn is not None:
                layers[finding.class_index] = drawn
                masks[i, finding.class_index] = drawn.mask
        if i in wanted:
            picture = compose(
                run, card, volume, explanation, i, sources.of(i), display_of(i), layers
            )
            for offset, p in _with_offsets(chosen):
                if i in chosen[p]:
                    nth = chosen[p].index(i)
                    objects.append(
                        _captured(run, volume, i, picture, p, offset + nth, nth, sources)
                    )
    objects.sort(key=lambda encoded: encoded.ordinal)

    skipped: list[tuple[ObjectKind, str]] = []
    total = len(volume.frames)
    if pictured and card.inputs[0].kind is InputKind.IMAGE2D and total > MAX_PICTURES:
        reason = f"{total} images in the unit, the first {MAX_PICTURES} pictured"
        skipped.append((ObjectKind.SC, reason))
    if region_destinations and not masks:
        skipped.append((ObjectKind.SEG, _why_no_region(explanation)))
    elif region_destinations:
        regions, reasons = _regions(run, card, volume, explanation, masks, sources)
        objects += [replace(region, destinations=region_destinations) for region in regions]
        skipped += [(ObjectKind.SEG, reason) for reason in reasons]
    return EncodedResults(tuple(objects), tuple(skipped))


# ------------------------------------------------------------------ what to make


class _Sources:
    """What is known of each frame's source."""

    def __init__(self, volume: Volume, described: Mapping[str, Described]) -> None:
        self._frames, self._described = volume.frames, described

    def of(self, i: int) -> Source:
        return self._instance(i).frames[self._frames[i].number - 1]

    def block_of(self, i: int) -> identity.Block:
        return self._instance(i).block

    def blocks(self) -> Iterable[identity.Block]:
        """Of each instance, once."""
        uids = dict.fromkeys(frame.instance.sop_instance_uid for frame in self._frames)
        return [self._described[uid].block for uid in uids]

    def _instance(self, i: int) -> Described:
        return self._described[self._frames[i].instance.sop_instance_uid]


def _chosen(
    card: ModelCard, volume: Volume, explanation: Explanation, slices: int
) -> tuple[int, ...]:
    """The frames that get a picture, in the volume's order."""
    total = len(volume.frames)
    if card.inputs[0].kind is InputKind.IMAGE2D:
        return tuple(range(min(total, MAX_PICTURES)))
    scores = explanation.findings[0].frame_weights if explanation.findings else (0.0,) * total
    ranked = sorted(range(total), key=lambda i: (-scores[i], i))
    return tuple(sorted(ranked[:slices]))


def _active(explanation: Explanation, total: int) -> dict[int, tuple[Finding, ...]]:
    """The positive findings whose map reaches its threshold, frame by frame."""
    active: dict[int, tuple[Finding, ...]] = {}
    for finding in explanation.findings:
        if finding.is_positive and finding.attribution is not None:
            peaks = finding.attribution.frame_peaks
            for i in range(total):
                if peaks[i] >= finding.attribution.threshold:
                    active[i] = (*active.get(i, ()), finding)
    return active


def _why_no_region(explanation: Explanation) -> str:
    positives = [finding for finding in explanation.findings if finding.is_positive]
    if not positives:
        return "no finding above threshold"
    if all(finding.attribution is None for finding in positives):
        return "no heat map was made"
    return "no pixel at or above the heat threshold"


def _destinations(plan: Sequence[Planned], kind: ObjectKind) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for p in plan if p.kind is kind for name in p.destinations))


def _with_offsets(chosen: dict[Planned, tuple[int, ...]]) -> list[tuple[int, Planned]]:
    """Each planned entry and the ordinal of its first picture."""
    offset, pairs = 0, []
    for planned, frames in chosen.items():
        pairs.append((offset, planned))
        offset += len(frames)
    return pairs


def _captured(
    run: Run,
    volume: Volume,
    i: int,
    picture: sc.Picture,
    planned: Planned,
    ordinal: int,
    nth: int,
    sources: _Sources,
) -> Encoded:
    frame, source = volume.frames[i], sources.of(i)
    assert run.card is not None
    made_by = f"model {run.card.name} {run.card.version}"
    captured = sc.capture(
        run,
        ObjectKind.SC,
        picture,
        planned.compression,
        ordinal,
        nth + 1,
        source,
        (frame.instance, (frame.number,) if source.is_multi_frame else ()),
        sources.block_of(i),
        f"heat map {run.method}" if run.method else "prediction",
        f"Windowed to 8 bits; {run.method or 'prediction'} of {made_by} drawn over it; "
        "legend added beside it",
    )
    return encoded(run, ObjectKind.SC, ordinal, captured, frame.instance, planned.destinations)


# ------------------------------------------------------------------ the region


def _regions(
    run: Run,
    card: ModelCard,
    volume: Volume,
    explanation: Explanation,
    masks: _Masks,
    sources: _Sources,
) -> tuple[list[Encoded], list[str]]:
    """One Segmentation for each group of planes that fit together."""
    indices = sorted({i for i, _ in masks})
    frames = volume.frames
    planes = [seg.Plane(i, frames[i], sources.of(i)) for i in indices]
    groups, skipped = seg.groups(planes)
    outlines = outlines_of(explanation)
    regions = []
    for ordinal, group in enumerate(groups):
        inside = {plane.index for plane in group}
        present = {c for i, c in masks if i in inside}
        findings = [f for f in explanation.findings if f.class_index in present]
        segments = [
            seg.Segment(
                card.classes[f.class_index], outlines[f.class_index], threshold_of(f), f.score
            )
            for f in findings
        ]
        source = group[0].source
        array = np.zeros((len(group), source.rows, source.columns, len(findings)), np.uint8)
        for at, plane in enumerate(group):
            for s, finding in enumerate(findings):
                mask = masks.get((plane.index, finding.class_index))
                if mask is not None:
                    array[at, :, :, s] = mask.cpu().numpy()
        first = group[0].frame.instance
        try:
            made = seg.segmentation(
                run,
                card,
                group,
                array,
                segments,
                ordinal,
                volume.geometry.slice_spacing_mm,
                sources.block_of(group[0].index),
                explanation.layer,
            )
        except EncodeError as error:
            skipped.append(str(error))
            continue
        regions.append(encoded(run, ObjectKind.SEG, ordinal, made, first, ()))
    return regions, skipped
