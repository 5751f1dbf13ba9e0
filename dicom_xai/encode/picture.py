"""What pictures show: the windowed image, the maps over it, and the legend beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from dicom_xai.config import InputKind
from dicom_xai.encode import color, legend, provenance
from dicom_xai.encode.legend import Band, HeatBar, Layout, Line, StackBand
from dicom_xai.encode.maps import ClassMap
from dicom_xai.encode.sc import Picture
from dicom_xai.encode.source import Source
from dicom_xai.encode.unit import EncodedUnit

#: At most so many findings below their thresholds are listed in the legend.
MAX_NEGATIVES_LISTED = 5


def compose(
    display: torch.Tensor,
    layers: Sequence[color.Layer],
    bands: Sequence[tuple[Layout, Band]],
) -> list[Picture]:
    """A picture of each frame.

    Parameters
    ----------
    display : Tensor, (frames, rows, columns) float32
        The windowed images, 0 black, 1 white.
    layers : sequence of Layer
        What is drawn over them.
    bands : sequence of (Layout, Band)
        Each frame's legend, as `band` gave it.
    """
    rows, columns = display.shape[1:]
    canvases = [
        torch.empty(layout.height, layout.width, 3, dtype=torch.uint8, device=display.device)
        for layout, _ in bands
    ]
    for canvas in canvases:
        canvas[rows:] = 0
        canvas[:, columns:] = 0
    color.composite(display, layers, [canvas[:rows, :columns] for canvas in canvases])
    pictures = []
    for canvas, (layout, band) in zip(canvases, bands, strict=True):
        picture = canvas.cpu().numpy()
        top, left = layout.band_top, layout.band_left
        picture[top : top + band.shape[0], left : left + band.shape[1]] = band
        pictures.append(picture)
    return pictures


def compose_stack(
    display: torch.Tensor, layers: Sequence[color.Layer], beside: StackBand, first: int
) -> list[Picture]:
    """Pictures of one size of some frames of a stack, the legend beside them.

    Parameters
    ----------
    display, layers
        As in `compose`.
    beside : StackBand
        The stack's, as `band_of_stack` gave it.
    first : int
        Which frame of the stack is the first of these; the others follow it.
    """
    (rows, columns), layout = display.shape[1:], beside.layout
    size = (len(display), layout.height, layout.width, 3)
    canvas = torch.empty(size, dtype=torch.uint8, device=display.device)
    canvas[:, rows:] = 0
    canvas[:, :, columns:] = 0
    color.composite(display, layers, list(canvas[:, :rows, :columns]))
    pictures = canvas.cpu().numpy()
    top, left = layout.band_top, layout.band_left
    pictures[:, top : top + beside.band.shape[0], left:] = beside.band
    top += beside.strip_top
    pictures[:, top : top + beside.strips.shape[1], left:] = beside.strips[first:][: len(display)]
    return list(pictures)


def band(
    unit: EncodedUnit, i: int, maps: Sequence[ClassMap], drawn: Collection[int]
) -> tuple[Layout, Band]:
    """The legend of the picture of frame `i` of the volume.

    Parameters
    ----------
    maps : sequence of ClassMap
        That are drawn wherever they reach their thresholds.
    drawn : collection of int
        The class indices of those that do so on this frame: the legend shows their outlines alone.
    """
    total, place, source = len(unit.volume.frames), _place(unit), unit.source(i)
    here = (place, i) if total > 1 else None
    parts = [*_head(unit), *_finding_lines(unit, maps, drawn, here)]
    if drawn:
        parts += _scale(maps)
    elif maps:
        parts.append(Line(f"no region at or above the {_quantity(maps)} threshold in this {place}"))
    parts += _made_by(unit)
    if drawn:
        parts += _cell(maps, i, source)
    if total > 1:
        parts.append(_position(unit, i))
    parts.append(Line(provenance.SOFTWARE, legend.GREY))
    return legend.band_beside(source.rows, source.columns, parts)


def band_of_stack(unit: EncodedUnit, frames: Sequence[int], maps: Sequence[ClassMap]) -> StackBand:
    """The legend of a stack: drawn once, but for what is said of each frame alone.

    Parameters
    ----------
    frames : sequence of int
        Which frames of the volume the stack holds, all of one size.
    maps : sequence of ClassMap
        That are drawn wherever they reach their thresholds.
    """
    source = unit.source(frames[0])
    anywhere = {map_.finding.class_index for map_ in maps if map_.frames}
    above = [*_head(unit), *_finding_lines(unit, maps, anywhere, None)]
    strips = []
    for i in frames:
        lines = [_position(unit, i)]
        for finding in (finding for finding in unit.explanation.findings if finding.is_positive):
            label = provenance.ascii_text(unit.card.classes[finding.class_index].label, 32)
            if finding.frame_scores:
                lines.append(Line(f"{label} here: {finding.frame_scores[i]:.2f}", legend.GREY))
        strips.append(lines)
    below = [*(_scale(maps) if anywhere else []), *_made_by(unit)]
    if anywhere:
        below += _cell(maps, frames[0], source)
    below.append(Line(provenance.SOFTWARE, legend.GREY))
    return legend.band_of_stack(source.rows, source.columns, above, strips, below)


def _place(unit: EncodedUnit) -> str:
    return "image" if unit.card.inputs[0].kind is InputKind.IMAGE2D else "slice"


def _quantity(maps: Sequence[ClassMap]) -> str:
    return "probability" if maps[0].is_probability else "heat"


def _head(unit: EncodedUnit) -> list[Line | HeatBar]:
    text = unit.run.amended
    amended = [Line(text, legend.YELLOW)] if text else []
    return [Line(provenance.BANNER, legend.YELLOW), *amended]


def _scale(maps: Sequence[ClassMap]) -> list[Line | HeatBar]:
    lowest = min(map_.threshold for map_ in maps)
    end = "1.0" if maps[0].is_probability else "1.0 = full scale"
    line = Line(f"{_quantity(maps)}, drawn from its threshold up", legend.GREY)
    return [line, HeatBar(lowest, end)]


def _made_by(unit: EncodedUnit) -> list[Line | HeatBar]:
    card, explanation = unit.card, unit.explanation
    lines: list[Line | HeatBar] = []
    if explanation.note:
        lines.append(Line(provenance.ascii_text(explanation.note, 300)))
    lines.append(Line(f"model {card.name} {card.version}", legend.GREY))
    if explanation.method:
        text = f"method {explanation.method}, layer {explanation.layer}"
        lines.append(Line(provenance.ascii_text(text, 120), legend.GREY))
    return lines


def _position(unit: EncodedUnit, i: int) -> Line:
    volume = unit.volume
    text = f"{_place(unit)} {i + 1} of {len(volume.frames)}"
    if volume.geometry.positions_mm:
        text += f", position {volume.geometry.positions_mm[i]:.1f} mm"
    return Line(text, legend.GREY)


def _finding_lines(
    unit: EncodedUnit,
    maps: Sequence[ClassMap],
    drawn: Collection[int],
    here: tuple[str, int] | None,
) -> list[Line | HeatBar]:
    """Each finding with its score; `here` adds that of one frame: what it is called, its index."""
    card, explanation = unit.card, unit.explanation
    word = "probability" if card.calibrated else "score"
    outlines = {map_.finding.class_index: map_.outline for map_ in maps}
    lines: list[Line | HeatBar] = []
    below = [finding for finding in explanation.findings if not finding.is_positive]
    for finding in explanation.findings:
        name = card.classes[finding.class_index]
        text = f"{provenance.ascii_text(name.label, 48)}: {word} {finding.score:.2f}"
        if finding.is_positive:
            region = finding.region
            if region is not None and region.volume_ml is not None:
                text += f", {region.volume_ml:.1f} ml"
            own = ""
            if here and finding.frame_scores:
                own = f", this {here[0]} {finding.frame_scores[here[1]]:.2f}"
            is_drawn = finding.class_index in drawn
            text += f" (threshold {name.threshold:.2f}{own})"
            if drawn and finding.class_index in outlines and not is_drawn:
                text += ", no region"
            swatch = outlines[finding.class_index] if is_drawn else None
            lines.append(Line(text, legend.WHITE, swatch))
    if not lines:
        lines.append(Line("no finding above threshold"))
    for finding in below[:MAX_NEGATIVES_LISTED]:
        label = provenance.ascii_text(card.classes[finding.class_index].label, 48)
        lines.append(Line(f"{label}: {word} {finding.score:.2f}", legend.GREY))
    if len(below) > MAX_NEGATIVES_LISTED:
        more = len(below) - MAX_NEGATIVES_LISTED
        lines.append(Line(f"and {more} more below threshold", legend.GREY))
    return lines


def _cell(maps: Sequence[ClassMap], i: int, source: Source) -> list[Line | HeatBar]:
    """How much of the image one cell of a heat map stands for: its true resolution."""
    attribution = maps[0].finding.attribution
    if maps[0].is_probability or attribution is None:
        return []
    placement = attribution.placements[i]
    # a map of images has one more axis, the frames
    sides = placement.pixels_per_cell(tuple(attribution.heat.shape)[-len(placement.input_size) :])
    text = f"map cell {sides[0]:.0f} x {sides[1]:.0f} px"
    if source.pixel_spacing:
        mm = [side * float(s) for side, s in zip(sides, source.pixel_spacing, strict=True)]
        text += f" = {mm[0]:.0f} x {mm[1]:.0f} mm"
    return [Line(text, legend.GREY)]
