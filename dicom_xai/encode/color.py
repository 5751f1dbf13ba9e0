"""Heat over grey: what the radiologist sees.

The colour of a pixel depends on its heat alone, on the card's absolute scale, never on the image's
own maximum. Below the threshold nothing is drawn.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One finding's map over one frame: `heat` is ``(rows, columns)`` float32, 1.0 = full scale."""

    heat: torch.Tensor
    threshold: float
    outline: Rgb


def heat_table(device: torch.device | str = "cpu") -> torch.Tensor:
    """``(256, 3)`` float32, 0..255: the colour of heat ``i / 255``."""
    at = torch.linspace(0, 1, 256, dtype=torch.float64)
    table = torch.empty(256, 3, dtype=torch.float64)
    for (low, a), (high, b) in itertools.pairwise(_STOPS):
        inside = (at >= low) & (at <= high)
        share = ((at[inside] - low) / (high - low))[:, None]
        table[inside] = torch.tensor(a) * (1 - share) + torch.tensor(b) * share
    return table.round().to(torch.float32).to(device)


def composite(display: torch.Tensor, layers: Sequence[Layer], canvas: torch.Tensor) -> None:
    """Draw the windowed image and the heat over it into a canvas.

    Parameters
    ----------
    display : Tensor, (rows, columns) float32
        The windowed image, 0 black, 1 white.
    layers : sequence of Layer
        Where several are at or above their thresholds, the strongest gives the colour.
    canvas : Tensor, (rows, columns, 3) uint8
        Same device; overwritten.
    """
    grey = torch.nan_to_num(display * 255).round_().clamp_(0, 255).to(torch.uint8)
    canvas.copy_(grey[..., None].expand(-1, -1, 3))
    masks = [(layer, layer.heat >= layer.threshold) for layer in layers]
    boxes = [(layer, mask, box) for layer, mask in masks if (box := _box(mask)) is not None]
    if not boxes:
        return
    top, bottom = min(b[0] for *_, b in boxes), max(b[1] for *_, b in boxes)
    left, right = min(b[2] for *_, b in boxes), max(b[3] for *_, b in boxes)
    window = (slice(top, bottom), slice(left, right))
    strongest = torch.zeros(bottom - top, right - left, device=display.device)
    covered = torch.zeros_like(strongest, dtype=torch.bool)
    for layer, mask, _ in boxes:
        strongest = torch.where(mask[window], layer.heat[window].maximum(strongest), strongest)
        covered |= mask[window]
    strongest = strongest.clamp_(0, 1)
    colour = heat_table(display.device)[(strongest * 255).round().to(torch.int64)]
    opacity = _OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * strongest
    opacity = (opacity * covered)[..., None]
    under = canvas[window].to(torch.float32)
    canvas[window] = torch.lerp(under, colour, opacity).round_().to(torch.uint8)
    width = max(1, round(max(display.shape) / 700))
    for layer, mask, (top, bottom, left, right) in boxes:
        inside = (slice(top, bottom), slice(left, right))
        paint = torch.tensor(layer.outline, dtype=torch.uint8, device=display.device)
        canvas[inside][_edge(mask[inside], width)] = paint


def _box(mask: torch.Tensor) -> tuple[int, int, int, int] | None:
    """Top, bottom, left, right of what is set; bottom and right are one past the end."""
    rows = mask.any(dim=1).nonzero()
    if len(rows) == 0:
        return None
    columns = mask.any(dim=0).nonzero()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _edge(mask: torch.Tensor, width: int) -> torch.Tensor:
    """The pixels of a mask within `width` of its outside; the box's border counts as outside."""
    outside = F.pad((~mask).to(torch.float32)[None, None], [width] * 4, value=1.0)
    near = outside
    for _ in range(width):
        near = F.max_pool2d(near, 3, stride=1, padding=1)
    return mask & (near[0, 0, width:-width, width:-width] > 0)
