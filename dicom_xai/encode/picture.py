"""What a picture shows: the windowed image, the heat over it, and the legend beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from dicom_xai.config import InputKind, ModelCard
from dicom_xai.encode import color, legend, provenance, sc
from dicom_xai.encode.provenance import Run
from dicom_xai.encode.source import Source
from dicom_xai.study import Explanation, Finding, Volume

#: At most so many findings below their thresholds are listed in the legend.
MAX_NEGATIVES_LISTED = 5


def compose(
    run: Run,
    card: ModelCard,
    volume: Volume,
    explanation: Explanation,
    i: int,
    source: Source,
    display: torch.Tensor,
    layers: Mapping[int, color.Layer],
) -> sc.Picture:
    """One frame's picture.

    Parameters
    ----------
    i : int
        Which frame of the volume.
    source : Source
        What its header says.
    display : Tensor, (rows, columns) float32
        The windowed image, 0 black, 1 white.
    layers : mapping of int to Layer
        What is drawn, by class index; the legend shows the outlines of these alone.
    """
    rows, columns = source.rows, source.columns
    parts = _legend(run, card, volume, explanation, i, source, layers.keys())
    layout, band = legend.band_beside(rows, columns, parts)
    canvas = torch.empty(layout.height, layout.width, 3, dtype=torch.uint8, device=display.device)
    canvas[rows:] = 0
    canvas[:, columns:] = 0
    color.composite(display, list(layers.values()), canvas[:rows, :columns])
    picture = canvas.cpu().numpy()
    top, left = layout.band_top, layout.band_left
    picture[top : top + band.shape[0], left : left + band.shape[1]] = band
    return picture


def outlines_of(explanation: Explanation) -> dict[int, color.Rgb]:
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
    drawn: Collection[int],
) -> list[legend.Line | legend.HeatBar]:
    total = len(volume.frames)
    is_series = card.inputs[0].kind is not InputKind.IMAGE2D
    place = "slice" if is_series else "image"
    parts: list[legend.Line | legend.HeatBar] = [legend.Line(provenance.BANNER, legend.YELLOW)]
    if run.amended:
        parts.append(legend.Line(run.amended, legend.YELLOW))
    parts += _finding_lines(card, explanation, i, place if total > 1 else "", drawn)
    drawable = [f for f in explanation.findings if f.is_positive and f.attribution is not None]
    if drawn:
        parts.append(legend.Line("heat, drawn from its threshold up", legend.GREY))
        parts.append(legend.HeatBar(min(threshold_of(finding) for finding in drawable)))
    elif drawable:
        parts.append(legend.Line(f"no region at or above the heat threshold in this {place}"))
    if explanation.note:
        parts.append(legend.Line(provenance.ascii_text(explanation.note, 300)))
    parts.append(legend.Line(f"model {card.name} {card.version}", legend.GREY))
    if explanation.method:
        text = f"method {explanation.method}, layer {explanation.layer}"
        parts.append(legend.Line(provenance.ascii_text(text, 120), legend.GREY))
    if drawn:
        parts.append(legend.Line(_cell(drawable[0], i, source), legend.GREY))
    if total > 1:
        text = f"{place} {i + 1} of {total}"
        if volume.geometry.positions_mm:
            text += f", position {volume.geometry.positions_mm[i]:.1f} mm"
        parts.append(legend.Line(text, legend.GREY))
    parts.append(legend.Line(provenance.SOFTWARE, legend.GREY))
    return parts


def _finding_lines(
    card: ModelCard, explanation: Explanation, i: int, place: str, drawn: Collection[int]
) -> list[legend.Line | legend.HeatBar]:
    word = "probability" if card.calibrated else "score"
    outlines = outlines_of(explanation)
    lines: list[legend.Line | legend.HeatBar] = []
    below = [finding for finding in explanation.findings if not finding.is_positive]
    for finding in explanation.findings:
        name = card.classes[finding.class_index]
        text = f"{provenance.ascii_text(name.label, 48)}: {word} {finding.score:.2f}"
        if finding.is_positive:
            here = f", this {place} {finding.frame_scores[i]:.2f}" if place else ""
            is_drawn = finding.class_index in drawn
            swatch = outlines[finding.class_index] if is_drawn else None
            text += f" (threshold {name.threshold:.2f}{here})"
            if drawn and finding.attribution is not None and not is_drawn:
                text += ", no region"
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
    # a map of images has one more axis, the frames
    grid = tuple(finding.attribution.heat.shape)[-len(placement.input_size) :]
    sides = placement.pixels_per_cell(grid)
    text = f"map cell {sides[0]:.0f} x {sides[1]:.0f} px"
    if source.pixel_spacing:
        mm = [side * float(s) for side, s in zip(sides, source.pixel_spacing, strict=True)]
        text += f" = {mm[0]:.0f} x {mm[1]:.0f} mm"
    return text


def threshold_of(finding: Finding) -> float:
    assert finding.attribution is not None
    return finding.attribution.threshold
