"""Heat over grey: what the radiologist sees.

The colour of a pixel depends on its heat alone, on the card's absolute scale, never on the image's
own maximum. Below the threshold nothing is drawn.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """The frames of one finding's map on which something is drawn: where it reaches the threshold.

    `frames` are indices into the batch. `mask` is ``(len(frames), rows, columns)`` bool, empty on
    none of them; `heat` is the map, float32, 1.0 = full scale.
    """

    frames: tuple[int, ...]
    mask: torch.Tensor
    heat: torch.Tensor
    outline: Rgb
    class_index: int

    def on(self, frames: Sequence[int]) -> Layer:
        """The same layer for a part of the batch: index n now means the old index `frames[n]`."""
        part = self.only([n for n, frame in enumerate(self.frames) if frame in frames])
        return replace(part, frames=tuple(frames.index(frame) for frame in part.frames))

    def only(self, kept: list[int]) -> Layer:
        """These of its maps, by their place in `frames`."""
        if len(kept) == len(self.frames):
            return self
        frames = tuple(self.frames[n] for n in kept)
        is_run = bool(kept) and kept[-1] - kept[0] == len(kept) - 1
        part = slice(kept[0], kept[-1] + 1) if is_run else kept  # a slice copies nothing
        return replace(self, frames=frames, mask=self.mask[part], heat=self.heat[part])


def layer(
    heat: torch.Tensor, frames: Sequence[int], threshold: float, outline: Rgb, class_index: int
) -> Layer:
    """What is drawn of maps.

    Parameters
    ----------
    heat : Tensor, (maps, rows, columns) float32
        1.0 = the card's full scale.
    frames : sequence of int
        Which frame of the batch each map belongs to.
    """
    mask = heat >= threshold
    # reducing bytes is 20 times quicker than `any` on a CPU
    reached = mask.view(torch.uint8).amax(dim=(1, 2)).tolist()
    kept = [n for n, is_reached in enumerate(reached) if is_reached]
    return Layer(tuple(frames), mask, heat, outline, class_index).only(kept)


def composite(
    display: torch.Tensor, layers: Sequence[Layer], canvases: Sequence[torch.Tensor]
) -> None:
    """Draw windowed images and the heat over them into canvases.

    Parameters
    ----------
    display : Tensor, (frames, rows, columns) float32
        The windowed images, 0 black, 1 white; finite.
    layers : sequence of Layer
        Where several overlap, the strongest gives the colour.
    canvases : sequence of Tensor, each (rows, columns, 3) uint8
        Same device; overwritten.
    """
    grey = display.clamp(0, 1).mul_(255).round_().to(torch.uint8)
    for frame, canvas in zip(grey, canvases, strict=True):
        for channel in range(3):  # one strided copy each is ten times quicker than one broadcast
            canvas[..., channel] = frame
    layers = [layer for layer in layers if layer.frames]
    if not layers:
        return
    drawn = sorted({frame for layer in layers for frame in layer.frames})
    box = _box(layers)
    grey = grey[drawn][:, *box]
    level = torch.zeros_like(grey, dtype=torch.int32)
    for one in layers:
        places = [drawn.index(frame) for frame in one.frames]
        # 0 means that nothing is drawn
        mine = (one.heat[:, *box] * 255).round_().clamp_(1, 255).to(torch.int32)
        level[places] = torch.maximum(level[places], mine * one.mask[:, *box])
    index = (level << 8) | grey
    blended = blend_table().to(display.device).index_select(0, index.flatten())
    for picture, frame in zip(blended.view(*level.shape, 3), drawn, strict=True):
        canvases[frame][box] = picture
    width = max(1, round(max(display.shape[1:]) / 700))
    for one in layers:
        paint = torch.tensor(one.outline, dtype=torch.uint8, device=display.device)
        for edge, frame in zip(_edge(one.mask[:, *box], width), one.frames, strict=True):
            canvases[frame][box][edge] = paint


def _box(layers: Sequence[Layer]) -> tuple[slice, slice]:
    """Rows and columns that hold all masks."""
    ends = []
    for other in (2, 1):
        along = [layer.mask.view(torch.uint8).amax(dim=(0, other)) for layer in layers]
        places = torch.stack(along).amax(dim=0).nonzero()
        ends.append(slice(int(places[0]), int(places[-1]) + 1))
    return ends[0], ends[1]


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


def _edge(masks: torch.Tensor, width: int) -> torch.Tensor:
    """The pixels of masks within `width` of their outside; the box's border counts as outside."""
    inner = masks
    for axis in (1, 2):
        size = masks.shape[axis]
        padded = F.pad(inner, [0, 0, width, width] if axis == 1 else [width, width, 0, 0])
        inner = padded.narrow(axis, 0, size)
        for shift in range(1, 2 * width + 1):
            inner = inner & padded.narrow(axis, shift, size)
    return masks & ~inner
