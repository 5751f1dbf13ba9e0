"""Explanation in, DICOM objects out: the picture (SC), the region (SEG), or the reason (note).

Read `encode_results` first. `source` is what a header may tell, `color` and `legend` draw, `sc` and
`seg` write the two kinds, `provenance` is what both have in common.

Rules: no clock, no random number; the same inputs give the same bytes. No object leaves that does
not carry its source's identity block byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydicom import Dataset

from dicom_xai import identity
from dicom_xai.config import Compression, InputKind, ModelCard
from dicom_xai.encode import color, legend, provenance, sc, seg
from dicom_xai.encode.provenance import Run
from dicom_xai.encode.source import Source, normalise
from dicom_xai.errors import EncodeError
from dicom_xai.study import (
    Explanation,
    Finding,
    Instance,
    Job,
    ObjectKind,
    Reference,
    Volume,
)

#: At most so many pictures of a unit of images; a series says how many slices it wants.
MAX_PICTURES = 16
#: At most so many findings below their thresholds are listed in the legend.
MAX_NEGATIVES_LISTED = 5

ReadSource = Callable[[Instance], bytes]
#: Frame index -> ``(rows, columns)`` float32, the windowed image, 0 black, 1 white.
DisplayOf = Callable[[int], torch.Tensor]
#: Finding, frame index -> ``(rows, columns)`` float32, heat on the source's pixels, 1.0 = the
#: card's full scale, zero outside the model's field. Interpolation must not exceed the map's own
#: maximum: frames whose map stays below the threshold are not asked for.
HeatOf = Callable[[Finding, int], torch.Tensor]


#: ``(rows, columns)`` bool on the source's pixels, by frame index and class index; none is empty.
_Masks = dict[tuple[int, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Planned:
    """One kind of object in one compression, and where it goes."""

    kind: ObjectKind
    compression: Compression
    destinations: tuple[str, ...]
    slices: int = 1  #: of a series: at most so many pictures


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


def encode_results(
    job: Job,
    card: ModelCard,
    volume: Volume,
    explanation: Explanation,
    plan: Sequence[Planned],
    read_source: ReadSource,
    display_of: DisplayOf,
    heat_of: HeatOf,
) -> EncodedResults:
    """All that a job sends.

    Parameters
    ----------
    plan : sequence of Planned
        SC and SEG entries. Segmentations are never compressed, so their entries become one.
    read_source : callable
        The bytes of a stored instance, as received.
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
    _check_unit(volume)
    run = Run(job, card, explanation.method)
    blocks = _Blocks(read_source)
    pictured = [p for p in plan if p.kind is ObjectKind.SC]
    chosen = {p: _chosen(card, volume, explanation, p.slices) for p in pictured}
    active = _active(explanation, len(volume.frames))
    wanted = sorted({i for frames in chosen.values() for i in frames})
    region_destinations = _destinations(plan, ObjectKind.SEG)

    objects: list[Encoded] = []
    masks: _Masks = {}
    outlines = _outlines(explanation)
    for i in sorted({*wanted, *(active if region_destinations else ())}):
        layers = []
        for finding in active.get(i, ()):
            outline = outlines[finding.class_index]
            drawn = color.layer(heat_of(finding, i), _threshold(finding), outline)
            if drawn is not None:
                layers.append(drawn)
                masks[i, finding.class_index] = drawn.mask
        if i in wanted:
            picture, source = _picture(run, card, volume, explanation, i, display_of(i), layers)
            for offset, p in _with_offsets(chosen):
                if i in chosen[p]:
                    nth = chosen[p].index(i)
                    objects.append(
                        _captured(run, volume, i, picture, source, p, offset + nth, nth, blocks)
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
        regions, reasons = _regions(run, card, volume, explanation, masks, blocks)
        objects += [replace(region, destinations=region_destinations) for region in regions]
        skipped += [(ObjectKind.SEG, reason) for reason in reasons]
    return EncodedResults(tuple(objects), tuple(skipped))


def encode_note(
    job: Job,
    reason: str,
    source: Instance,
    header: Dataset,
    plan: Sequence[Planned],
    read_source: ReadSource,
) -> list[Encoded]:
    """A picture of text that says why there is no result.

    Parameters
    ----------
    reason : str
        For a radiologist to read; without patient data.
    source : Instance
        Whose study the note joins, and to which it refers.
    header : Dataset
        Of `source`, as far as it could be read. A note takes nothing from it: whatever made the
        study fail may stand there.
    plan : sequence of Planned
        NOTE entries; without any, a note goes wherever an SC would; without those, everywhere.

    Raises
    ------
    IdentityError
        The source cannot be read as far as its identity goes: nothing is sent.
    """
    run = Run(job, None, "")
    block = identity.read_block(read_source(source))
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
            "not performed",
            "",
        )
        notes.append(_encoded(run, ObjectKind.NOTE, ordinal, captured, source, destinations))
    return notes


# ------------------------------------------------------------------ what to make


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


class _Blocks:
    """The identity blocks of the sources that give a result theirs, each read once."""

    def __init__(self, read_source: ReadSource) -> None:
        self._read_source = read_source
        self._known: dict[str, identity.Block] = {}

    def of(self, instance: Instance) -> identity.Block:
        uid = instance.sop_instance_uid
        if uid not in self._known:
            self._known[uid] = identity.read_block(self._read_source(instance))
        return self._known[uid]


def _check_unit(volume: Volume) -> None:
    headers = {frame.instance.sop_instance_uid: frame.header for frame in volume.frames}
    identity.check_agreement(map(identity.agreement_of, headers.values()))


def _chosen(
    card: ModelCard, volume: Volume, explanation: Explanation, slices: int
) -> tuple[int, ...]:
    """The frames that get a picture, in the volume's order."""
    total = len(volume.frames)
    if card.inputs[0].kind is InputKind.IMAGE2D:
        return tuple(range(min(total, MAX_PICTURES)))
    scores = explanation.findings[0].frame_scores if explanation.findings else (0.0,) * total
    ranked = sorted(range(total), key=lambda i: (-scores[i], i))
    return tuple(sorted(ranked[:slices]))


def _active(explanation: Explanation, total: int) -> dict[int, tuple[Finding, ...]]:
    """The positive findings whose map reaches its threshold, frame by frame."""
    active: dict[int, tuple[Finding, ...]] = {}
    for finding in explanation.findings:
        if finding.is_positive and finding.attribution is not None:
            peaks = finding.attribution.heat.amax(dim=(1, 2)).tolist()
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


def _threshold(finding: Finding) -> float:
    assert finding.attribution is not None
    return finding.attribution.threshold


def _destinations(plan: Sequence[Planned], kind: ObjectKind) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for p in plan if p.kind is kind for name in p.destinations))


def _with_offsets(chosen: dict[Planned, tuple[int, ...]]) -> list[tuple[int, Planned]]:
    """Each planned entry and the ordinal of its first picture."""
    offset, pairs = 0, []
    for planned, frames in chosen.items():
        pairs.append((offset, planned))
        offset += len(frames)
    return pairs


# ------------------------------------------------------------------ the picture


def _picture(
    run: Run,
    card: ModelCard,
    volume: Volume,
    explanation: Explanation,
    i: int,
    display: torch.Tensor,
    layers: Sequence[color.Layer],
) -> tuple[sc.Picture, Source]:
    source = normalise(volume.frames[i])
    rows, columns = source.rows, source.columns
    parts = _legend(run, card, volume, explanation, i, source, is_drawn=bool(layers))
    layout, band = legend.band_beside(rows, columns, parts)
    canvas = torch.empty(layout.height, layout.width, 3, dtype=torch.uint8, device=display.device)
    canvas[rows:] = 0
    canvas[:, columns:] = 0
    color.composite(display, layers, canvas[:rows, :columns])
    picture = canvas.cpu().numpy()
    top, left = layout.band_top, layout.band_left
    picture[top : top + band.shape[0], left : left + band.shape[1]] = band
    return picture, source


def _outlines(explanation: Explanation) -> dict[int, color.Rgb]:
    positives = [finding for finding in explanation.findings if finding.is_positive]
    return {
        finding.class_index: color.OUTLINES[n % len(color.OUTLINES)]
        for n, finding in enumerate(positives)
    }


def _legend(
    run: Run,
    card: ModelCard,
    volume: Volume,
    explanation: Explanation,
    i: int,
    source: Source,
    *,
    is_drawn: bool,
) -> list[legend.Line | legend.HeatBar]:
    total = len(volume.frames)
    is_series = card.inputs[0].kind is not InputKind.IMAGE2D
    place = "slice" if is_series else "image"
    parts: list[legend.Line | legend.HeatBar] = [legend.Line(provenance.BANNER, legend.YELLOW)]
    if run.amended:
        parts.append(legend.Line(run.amended, legend.YELLOW))
    parts += _finding_lines(card, explanation, i, place if total > 1 else "")
    drawable = [f for f in explanation.findings if f.is_positive and f.attribution is not None]
    if is_drawn:
        parts.append(legend.Line("heat, drawn from its threshold up", legend.GREY))
        parts.append(legend.HeatBar(min(_threshold(finding) for finding in drawable)))
    elif drawable:
        parts.append(legend.Line(f"no region at or above the heat threshold in this {place}"))
    if explanation.note:
        parts.append(legend.Line(provenance.ascii_text(explanation.note, 300)))
    parts.append(legend.Line(f"model {card.name} {card.version}", legend.GREY))
    if explanation.method:
        text = f"method {explanation.method}, layer {explanation.layer}"
        parts.append(legend.Line(provenance.ascii_text(text, 120), legend.GREY))
    if is_drawn:
        parts.append(legend.Line(_cell(drawable[0], i, source), legend.GREY))
    if total > 1:
        text = f"{place} {i + 1} of {total}"
        if volume.geometry.positions_mm:
            text += f", position {volume.geometry.positions_mm[i]:.1f} mm"
        parts.append(legend.Line(text, legend.GREY))
    parts.append(legend.Line(provenance.SOFTWARE, legend.GREY))
    return parts


def _finding_lines(
    card: ModelCard, explanation: Explanation, i: int, place: str
) -> list[legend.Line | legend.HeatBar]:
    word = "probability" if card.calibrated else "score"
    outlines = _outlines(explanation)
    lines: list[legend.Line | legend.HeatBar] = []
    below = [finding for finding in explanation.findings if not finding.is_positive]
    for finding in explanation.findings:
        name = card.classes[finding.class_index]
        text = f"{provenance.ascii_text(name.label, 48)}: {word} {finding.score:.2f}"
        if finding.is_positive:
            here = f", this {place} {finding.frame_scores[i]:.2f}" if place else ""
            swatch = outlines[finding.class_index] if finding.attribution else None
            text += f" (threshold {name.threshold:.2f}{here})"
            lines.append(legend.Line(text, legend.WHITE, swatch))
    if not lines:
        lines.append(legend.Line("no finding above threshold"))
    for finding in below[:MAX_NEGATIVES_LISTED]:
        label = provenance.ascii_text(card.classes[finding.class_index].label, 48)
        lines.append(legend.Line(f"{label}: {word} {finding.score:.2f}", legend.GREY))
    if len(below) > MAX_NEGATIVES_LISTED:
        more = len(below) - MAX_NEGATIVES_LISTED
        lines.append(legend.Line(f"and {more} more below threshold", legend.GREY))
    return lines


def _cell(finding: Finding, i: int, source: Source) -> str:
    """How much of the image one cell of the map stands for: its true resolution."""
    assert finding.attribution is not None
    placement = finding.attribution.placements[i]
    map_size = finding.attribution.heat.shape[1:]
    sides = [placement.input_size[axis] / map_size[axis] / placement.scale[axis] for axis in (0, 1)]
    text = f"map cell {sides[0]:.0f} x {sides[1]:.0f} px"
    if source.pixel_spacing:
        mm = [side * float(s) for side, s in zip(sides, source.pixel_spacing, strict=True)]
        text += f" = {mm[0]:.0f} x {mm[1]:.0f} mm"
    return text


def _captured(
    run: Run,
    volume: Volume,
    i: int,
    picture: sc.Picture,
    source: Source,
    planned: Planned,
    ordinal: int,
    nth: int,
    blocks: _Blocks,
) -> Encoded:
    frame = volume.frames[i]
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
        blocks.of(frame.instance),
        f"heat map {run.method}" if run.method else "prediction",
        f"Windowed to 8 bits; {run.method or 'prediction'} of {made_by} drawn over it; "
        "legend added beside it",
    )
    return _encoded(run, ObjectKind.SC, ordinal, captured, frame.instance, planned.destinations)


def _encoded(
    run: Run,
    kind: ObjectKind,
    ordinal: int,
    made: sc.Captured | seg.Segmented,
    source: Instance,
    destinations: tuple[str, ...],
) -> Encoded:
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


# ------------------------------------------------------------------ the region


def _regions(
    run: Run,
    card: ModelCard,
    volume: Volume,
    explanation: Explanation,
    masks: _Masks,
    blocks: _Blocks,
) -> tuple[list[Encoded], list[str]]:
    """One Segmentation for each group of planes that fit together."""
    indices = sorted({i for i, _ in masks})
    frames = volume.frames
    planes = [seg.Plane(i, frames[i], normalise(frames[i])) for i in indices]
    groups, skipped = seg.groups(planes)
    outlines = _outlines(explanation)
    regions = []
    for ordinal, group in enumerate(groups):
        inside = {plane.index for plane in group}
        present = {c for i, c in masks if i in inside}
        findings = [f for f in explanation.findings if f.class_index in present]
        segments = [
            seg.Segment(
                card.classes[f.class_index], outlines[f.class_index], _threshold(f), f.score
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
                blocks.of(first),
                explanation.layer,
            )
        except EncodeError as error:
            skipped.append(str(error))
            continue
        regions.append(_encoded(run, ObjectKind.SEG, ordinal, made, first, ()))
    return regions, skipped
