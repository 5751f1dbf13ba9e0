"""The band of text beside the image: what every viewer shows, whatever it makes of the header.

It tells what was found, by what, how sure, and that it is research. It never holds patient data.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from dicom_xai.encode.color import Rgb, heat_table

MIN_WIDTH = 512  #: of image and band together, in pixels

WHITE: Rgb = (235, 235, 235)
GREY: Rgb = (150, 150, 150)
YELLOW: Rgb = (255, 235, 130)
BACKGROUND: Rgb = (16, 16, 16)

Band = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Line:
    """One paragraph; `swatch` draws a square of a finding's outline colour before it."""

    text: str
    color: Rgb = WHITE
    swatch: Rgb | None = None


@dataclass(frozen=True, slots=True)
class HeatBar:
    """The colour scale: 0 to 1, with nothing drawn below the threshold."""

    threshold: float
    end: str = "1.0 = full scale"  #: what stands at its upper end


@dataclass(frozen=True, slots=True)
class Layout:
    """Where image and band lie on the canvas, in pixels."""

    height: int
    width: int
    band_top: int
    band_left: int
    font_px: int


def band_beside(rows: int, columns: int, parts: Sequence[Line | HeatBar]) -> tuple[Layout, Band]:
    """Draw the band for an image of a size, and say where it goes.

    The image lies at the top left, pixel for pixel. The band is right of an image that is at least
    as tall as wide, below any other, so that a screen shows the image as large as it can.

    Returns
    -------
    Layout
        Width is even (4:2:2 sampling) and at least `MIN_WIDTH`.
    ndarray, (band rows, band columns, 3) uint8
        Reaches the canvas' right and bottom border.
    """
    font_px = _font_px(rows, columns)
    width = _band_width(rows, columns, font_px)
    band = _draw(parts, width, rows if rows >= columns else 0, font_px)
    return _layout(rows, columns, band, font_px), band


@dataclass(frozen=True, slots=True, eq=False)
class StackBand:
    """The band of a stack: the same on all frames, but for one strip of it.

    `band` is ``(band rows, band columns, 3)`` uint8 with nothing in the strip; `strips`,
    ``(frames, strip rows, band columns, 3)`` uint8, belong at `strip_top` of it.
    """

    layout: Layout
    band: Band
    strips: Band
    strip_top: int


def band_of_stack(
    rows: int,
    columns: int,
    above: Sequence[Line | HeatBar],
    strips: Sequence[Sequence[Line]],
    below: Sequence[Line | HeatBar],
) -> StackBand:
    """Draw the band for all frames of a stack: what they share once, and each one's own lines.

    Parameters
    ----------
    above, below : sequence of Line or HeatBar
        What is the same on all frames, over and under the strip.
    strips : sequence of sequence of Line
        For each frame what is said of it alone.
    """
    font_px = _font_px(rows, columns)
    width = _band_width(rows, columns, font_px)
    top = _draw(above, width, 0, font_px)
    drawn = [_draw(strip, width, 0, font_px) for strip in strips]
    strip_height = max(strip.shape[0] for strip in drawn)
    drawn_strips = np.full((len(drawn), strip_height, width, 3), BACKGROUND, np.uint8)
    for place, strip in zip(drawn_strips, drawn, strict=True):
        place[: strip.shape[0]] = strip
    rest = rows - top.shape[0] - strip_height if rows >= columns else 0
    bottom = _draw(below, width, max(rest, 0), font_px)
    gap = np.full((strip_height, width, 3), BACKGROUND, np.uint8)
    band = np.concatenate([top, gap, bottom])
    layout = _layout(rows, columns, band, font_px)
    return StackBand(layout, band, drawn_strips, top.shape[0])


def _font_px(rows: int, columns: int) -> int:
    return min(max(round(max(rows, columns) / 64), 14), 40)


def _band_width(rows: int, columns: int, font_px: int) -> int:
    if rows >= columns:
        width = max(MIN_WIDTH - columns, 23 * font_px)
        return width + (columns + width) % 2
    width = max(MIN_WIDTH, columns)
    return width + width % 2


def _layout(rows: int, columns: int, band: Band, font_px: int) -> Layout:
    height, width = band.shape[:2]
    if rows >= columns:
        return Layout(height, columns + width, 0, columns, font_px)
    return Layout(rows + height, width, rows, 0, font_px)


def _draw(parts: Sequence[Line | HeatBar], width: int, min_height: int, font_px: int) -> Band:
    font = _font(font_px)
    margin, line_px = font_px // 2, round(font_px * 1.3)
    inner = min(width - 2 * margin, 60 * font_px)
    laid: list[tuple[int, Line | HeatBar, list[str]]] = []
    y = margin
    for part in parts:
        if isinstance(part, HeatBar):
            laid.append((y, part, []))
            y += round(2.6 * line_px)
        else:
            indent = line_px if part.swatch else 0
            rows = _wrapped(part.text, font_px, inner - indent)
            laid.append((y, part, rows))
            y += line_px * len(rows) + font_px // 4
    height = max(y + margin, min_height)
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for y, part, rows in laid:
        if isinstance(part, HeatBar):
            _draw_bar(image, draw, part, (margin, y, inner), font, font_px)
            continue
        x = margin
        if part.swatch:
            side = round(font_px * 0.7)
            box = (x, y + font_px // 4, x + side, y + font_px // 4 + side)
            draw.rectangle(box, outline=part.swatch, width=max(2, font_px // 7))
            x += line_px
        for i, row in enumerate(rows):
            draw.text((x, y + i * line_px), row, fill=part.color, font=font)
    return np.asarray(image)


def _draw_bar(
    image: Image.Image,
    draw: ImageDraw.ImageDraw,
    bar: HeatBar,
    place: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
    font_px: int,
) -> None:
    x, y, width = place
    start = min(max(round(width * bar.threshold), 0), width - 1)
    height = font_px
    table = heat_table().numpy().astype(np.uint8)
    index = np.rint(np.linspace(0, 255, width)).astype(np.intp)[start:]
    strip = np.broadcast_to(table[index], (height, len(index), 3))
    image.paste(Image.fromarray(np.ascontiguousarray(strip)), (x + start, y))
    draw.rectangle((x, y, x + width - 1, y + height), outline=GREY)
    below = y + height + font_px // 5
    draw.text((x, below), "0", fill=GREY, font=font)
    mark = f"{bar.threshold:.2f}"
    centre = min(max(start, 2 * font_px), width - 10 * font_px)
    draw.text((x + centre, below), mark, fill=WHITE, font=font, anchor="ma")
    draw.text((x + width, below), bar.end, fill=GREY, font=font, anchor="ra")


def _wrapped(text: str, font_px: int, width: int) -> list[str]:
    rows, row, taken = [], "", 0.0
    space = _length(" ", font_px)
    for word in text.split():
        while _length(word, font_px) > width and len(word) > 1:
            cut = max(1, int(len(word) * width / _length(word, font_px)) - 1)
            rows += [row] if row else []
            rows, row, word = [*rows, word[:cut]], "", word[cut:]
        needed = _length(word, font_px)
        if row and taken + space + needed > width:
            rows.append(row)
            row = ""
        taken = taken + space + needed if row else needed
        row = f"{row} {word}" if row else word
    return [*rows, row] if row else rows


@functools.lru_cache(maxsize=4096)
def _length(word: str, font_px: int) -> float:
    """In pixels; the words of a legend come again on each frame of a stack."""
    return _font(font_px).getlength(word)


@functools.lru_cache(maxsize=32)
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font; basic layout, since the other depends on what is installed."""
    font = ImageFont.load_default(size_px)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)
