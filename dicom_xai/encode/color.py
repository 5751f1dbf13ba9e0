"""Heat over grey: what the radiologist sees.

The colour of a pixel depends on its heat alone, on the card's absolute scale, never on the image's
own maximum. Below the threshold nothing is drawn.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Rgb = tuple[int, int, int]

#: Heat 0..1 and its colour, linear in between: dark red, red, orange, yellow.
_STOPS: tuple[tuple[float, Rgb], ...] = (
    (0.0, (110, 0, 10)),
    (0.35, (200, 10, 0)),
    (0.7, (255, 130, 0)),
    (1.0, (255, 240, 80)),
)
#: Opacity at heat 0 and 1: the anatomy stays visible under the strongest colour.
_OPACITY = (0.30, 0.50)
#: Outlines that tell findings apart, in the order of the findings; none is used by the heat.
OUTLINES: tuple[Rgb, ...] = (
    (0, 220, 255),
    (120, 255, 120),
    (255, 120, 255),
    (120, 160, 255),
    (240, 240, 240),
)


Box = tuple[slice, slice]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The part of one finding's map that is drawn: where it reaches the threshold.

    `mask` is ``(rows, columns)`` bool over the frame. `box` holds all of it, `heat` is the map
    within the box, float32, 1.0 = full scale.
    """

    mask: torch.Tensor
    box: Box
    heat: torch.Tensor
    outline: Rgb


def layer(heat: torch.Tensor, threshold: float, outline: Rgb) -> Layer | None:
    """What is drawn of a map ``(rows, columns)`` float32; None when nothing reaches `threshold`."""
    mask = heat >= threshold
    set_bytes = mask.view(torch.uint8)  # reducing bytes is 20 times quicker than `any` on a CPU
    rows = set_bytes.amax(dim=1).nonzero()
    if len(rows) == 0:
        return None
    columns = set_bytes.amax(dim=0).nonzero()
    box = (
        slice(int(rows[0]), int(rows[-1]) + 1),
        slice(int(columns[0]), int(columns[-1]) + 1),
    )
    return Layer(mask, box, heat[box], outline)


def composite(display: torch.Tensor, layers: Sequence[Layer], canvas: torch.Tensor) -> None:
    """Draw the windowed image and the heat over it into a canvas.

    Parameters
    ----------
    display : Tensor, (rows, columns) float32
        The windowed image, 0 black, 1 white; finite.
    layers : sequence of Layer
        Where several overlap, the strongest gives the colour.
    canvas : Tensor, (rows, columns, 3) uint8
        Same device; overwritten.
    """
    grey = display.clamp(0, 1).mul_(255).round_().to(torch.uint8)
    for channel in range(3):  # one strided copy each is ten times quicker than one broadcast
        canvas[..., channel] = grey
    if not layers:
        return
    window = (
        slice(min(x.box[0].start for x in layers), max(x.box[0].stop for x in layers)),
        slice(min(x.box[1].start for x in layers), max(x.box[1].stop for x in layers)),
    )
    level = torch.zeros_like(grey[window], dtype=torch.int32)
    for one in layers:
        inside = _within(one.box, window)
        # 0 means that nothing is drawn
        mine = (one.heat * 255).round_().clamp_(1, 255).to(torch.int32) * one.mask[one.box]
        level[inside] = torch.maximum(level[inside], mine)
    index = (level << 8) | grey[window]
    drawn = blend_table().to(display.device).index_select(0, index.flatten())
    canvas[window] = drawn.view(*level.shape, 3)
    width = max(1, round(max(display.shape) / 700))
    for one in layers:
        paint = torch.tensor(one.outline, dtype=torch.uint8, device=display.device)
        canvas[one.box][_edge(one.mask[one.box], width)] = paint


def _within(box: Box, window: Box) -> Box:
    (rows, columns), (top, left) = box, (window[0].start, window[1].start)
    return (
        slice(rows.start - top, rows.stop - top),
        slice(columns.start - left, columns.stop - left),
    )


def heat_table() -> torch.Tensor:
    """``(256, 3)`` float32, 0..255: the colour of heat ``i / 255``."""
    at = torch.linspace(0, 1, 256, dtype=torch.float64)
    table = torch.empty(256, 3, dtype=torch.float64)
    for (low, a), (high, b) in itertools.pairwise(_STOPS):
        inside = (at >= low) & (at <= high)
        share = ((at[inside] - low) / (high - low))[:, None]
        table[inside] = torch.tensor(a) * (1 - share) + torch.tensor(b) * share
    return table.round().to(torch.float32)


@functools.cache
def blend_table() -> torch.Tensor:
    """``(65536, 3)`` uint8: what heat level ``i >> 8`` makes of grey ``i & 255``; level 0: grey."""
    grey = torch.arange(256, dtype=torch.float32)[None, :, None]
    heat = torch.linspace(0, 1, 256)[:, None, None]
    opacity = _OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * heat
    opacity[0] = 0.0
    blended = grey * (1 - opacity) + heat_table()[:, None, :] * opacity
    return blended.round().to(torch.uint8).reshape(65536, 3)


def _edge(mask: torch.Tensor, width: int) -> torch.Tensor:
    """The pixels of a mask within `width` of its outside; the box's border counts as outside."""
    inner = mask
    for axis in (0, 1):
        size = mask.shape[axis]
        padded = F.pad(inner, [0, 0, width, width] if axis == 0 else [width, width, 0, 0])
        inner = padded.narrow(axis, 0, size)
        for shift in range(1, 2 * width + 1):
            inner = inner & padded.narrow(axis, shift, size)
    return mask & ~inner
