"""Modality units to 0..1: for the model as its card says, for the eye as the image says.

Frames of one size are done together, as one tensor operation wherever their windows are ramps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydicom.uid import CTImageStorage

from dicom_xai.config import Windowing, WindowSource
from dicom_xai.decode import lut
from dicom_xai.decode.attributes import (
    functional_group,
    integer,
    items,
    number,
    numbers,
    required,
    text,
)
from dicom_xai.errors import DecodeError
from dicom_xai.study import Frame

#: At most so many values, evenly spread over the image, decide a percentile.
_PERCENTILE_SAMPLES = 262_144
#: For display, where the image brings no window of its own.
_DISPLAY = Windowing(source=WindowSource.SOURCE, low_percentile=0.5, high_percentile=99.5)


def display(frames: Sequence[Frame]) -> torch.Tensor:
    """Frames as a radiologist sees them by default.

    The first VOI window, else the VOI LUT, else the percentiles of the valid pixels (also where the
    window is one that the standard does not allow); inverted for MONOCHROME1; padding black.
    Presentation LUT Shape is not looked at: where it is allowed to say INVERSE (DX), it repeats
    what MONOCHROME1 says.

    Source: PS3.3 C.11.2 (VOI LUT), C.7.6.3.1.2 (Photometric Interpretation).

    Parameters
    ----------
    frames : sequence of Frame
        Of one size, at least one.

    Returns
    -------
    Tensor, (frames, rows, columns) float32
        0 black to 1 bright.
    """
    return shown(frames, _DISPLAY, bright_is_high=True)


def shown(frames: Sequence[Frame], windowing: Windowing, *, bright_is_high: bool) -> torch.Tensor:
    """Frames through a window, each its own; padding holds 0.

    Parameters
    ----------
    frames : sequence of Frame
        Of one size, at least one.
    windowing : Windowing
    bright_is_high : bool
        Whether 1 is what a radiologist sees bright (MONOCHROME2), or dark.

    Returns
    -------
    Tensor, (frames, rows, columns) float32
        0..1.
    """
    values = torch.stack([frame.values for frame in frames])
    transforms = [_transform(frame, windowing) for frame in frames]
    ramps = [each for each in transforms if isinstance(each, Ramp)]
    if len(ramps) == len(frames):
        made = _through_ramps(values, ramps)
    else:
        made = torch.stack(
            [
                _through_ramps(value[None], [each])[0] if isinstance(each, Ramp) else each
                for value, each in zip(values, transforms, strict=True)
            ]
        )
    _turn_and_blank(made, frames, bright_is_high=bright_is_high)
    return made


def shown_through(frames: Sequence[Frame], ramp: Ramp, *, bright_is_high: bool) -> torch.Tensor:
    """Frames through one and the same ramp; else as `shown`."""
    made = _through_ramps(torch.stack([frame.values for frame in frames]), [ramp] * len(frames))
    _turn_and_blank(made, frames, bright_is_high=bright_is_high)
    return made


@dataclass(frozen=True, slots=True)
class Ramp:
    """0 up to `low`, 1 from `low + width` on; with no width a step just above `low`."""

    low: float
    width: float


def common_ramp(frames: Sequence[Frame], windowing: Windowing) -> Ramp:
    """The one ramp of a volume: the card's, or between percentiles of all of its valid pixels."""
    if windowing.source is WindowSource.FIXED:
        return _fixed(windowing)
    each = -(-_PERCENTILE_SAMPLES // len(frames))
    samples = torch.cat([_samples(frame, each) for frame in frames])
    return _between_percentiles(samples, windowing)


def _turn_and_blank(made: torch.Tensor, frames: Sequence[Frame], *, bright_is_high: bool) -> None:
    """In place."""
    inverted = [index for index, f in enumerate(frames) if _is_inverted(f) == bright_is_high]
    if len(inverted) == len(frames):
        made.neg_().add_(1)
    elif inverted:
        made[inverted] = 1 - made[inverted]
    for index, frame in enumerate(frames):
        if frame.valid is not None:
            made[index].masked_fill_(~frame.valid, 0.0)


def _is_inverted(frame: Frame) -> bool:
    return text(frame.header, "PhotometricInterpretation") == "MONOCHROME1"


def _through_ramps(values: torch.Tensor, ramps: list[Ramp]) -> torch.Tensor:
    """``(frames, rows, columns)`` through one ramp each, in place where it can be."""
    if not all(ramp.width > 0 for ramp in ramps):
        return torch.stack(
            [
                (value > ramp.low).float()
                if ramp.width <= 0
                else ((value - ramp.low) / ramp.width).clamp_(0, 1)
                for value, ramp in zip(values, ramps, strict=True)
            ]
        )
    if len(set(ramps)) == 1:
        return values.sub_(ramps[0].low).div_(ramps[0].width).clamp_(0, 1)
    low = values.new_tensor([ramp.low for ramp in ramps])[:, None, None]
    width = values.new_tensor([ramp.width for ramp in ramps])[:, None, None]
    return values.sub_(low).div_(width).clamp_(0, 1)


def _transform(frame: Frame, windowing: Windowing) -> Ramp | torch.Tensor:
    """The frame's ramp, or its values already through what is no ramp."""
    if windowing.source is WindowSource.FIXED:
        return _fixed(windowing)
    if windowing.source is WindowSource.SOURCE:
        own = _voi(frame)
        if own is not None:
            return own
    return _between_percentiles(_samples(frame, _PERCENTILE_SAMPLES), windowing)


def _fixed(windowing: Windowing) -> Ramp:
    assert windowing.center is not None
    assert windowing.width is not None
    return Ramp(windowing.center - windowing.width / 2, windowing.width)


def _voi(frame: Frame) -> Ramp | torch.Tensor | None:
    """The frame's own VOI transformation; None when it has no usable one."""
    group = functional_group(frame.header, frame.number, "FrameVOILUTSequence")
    source = frame.header if group is None else group
    try:
        centers, widths = numbers(source, "WindowCenter"), numbers(source, "WindowWidth")
        function = text(source, "VOILUTFunction") or "LINEAR"
    except DecodeError:
        return None
    if centers and widths:
        return _voi_window(frame.values, centers[0], widths[0], function)
    tables = items(source, "VOILUTSequence")
    if not tables:
        return None
    syntax = frame.header.file_meta.TransferSyntaxUID
    try:
        signed = _may_be_negative(frame)
        table = lut.read(tables[0], signed=signed, big_endian=not syntax.is_little_endian)
    except DecodeError:
        return None
    return table.apply(frame.values).div_(2**table.bits - 1)


def _may_be_negative(frame: Frame) -> bool:
    """Whether the input of a VOI LUT is signed (PS3.3 C.11.2.1.1).

    As the stored values are; after a rescale where its range goes below zero, and always for the
    Hounsfield units of a CT image; after a Modality LUT never.
    """
    header = frame.header
    group = functional_group(header, frame.number, "PixelValueTransformationSequence")
    if group is None and items(header, "ModalityLUTSequence"):
        return False
    if text(header, "SOPClassUID") == CTImageStorage:
        return True
    source = header if group is None else group
    slope, intercept = number(source, "RescaleSlope"), number(source, "RescaleIntercept")
    signed, bits = integer(header, "PixelRepresentation") == 1, required(header, "BitsStored")
    if slope is None or intercept is None:
        return signed
    lowest = -(1 << (bits - 1)) if signed else 0
    return min(lowest * slope, (lowest + (1 << bits) - 1) * slope) + intercept < 0


def _voi_window(
    values: torch.Tensor, center: float, width: float, function: str
) -> Ramp | torch.Tensor | None:
    """PS3.3 C.11.2.1.2.1 (LINEAR), C.11.2.1.3.1 (SIGMOID), C.11.2.1.3.2 (LINEAR_EXACT)."""
    if function == "LINEAR" and width >= 1:
        return Ramp(center - 0.5 - (width - 1) / 2, width - 1)
    if function == "LINEAR_EXACT" and width > 0:
        return Ramp(center - width / 2, width)
    if function == "SIGMOID" and width > 0:
        return torch.sigmoid((values - center) * (4 / width))
    return None


def _samples(frame: Frame, count: int) -> torch.Tensor:
    values = frame.values if frame.valid is None else frame.values[frame.valid]
    values = values.flatten()
    return values[:: max(1, -(-values.numel() // count))]


def _between_percentiles(samples: torch.Tensor, windowing: Windowing) -> Ramp:
    if samples.numel() == 0:
        return Ramp(0.0, 1.0)  # all padding, which is blanked whatever the ramp
    parts = [windowing.low_percentile / 100, windowing.high_percentile / 100]
    at = torch.tensor(parts, dtype=samples.dtype, device=samples.device)
    first, last = (float(value) for value in torch.quantile(samples, at))
    return Ramp(first, last - first)
