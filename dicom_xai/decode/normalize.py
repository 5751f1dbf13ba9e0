"""A frame becomes the model's input, or what a radiologist sees.

Rule: training uses these functions too, so that a model is served what it was trained on.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from dicom_xai.config import InputKind, ModelInput, ResizeRule, Windowing, WindowSource
from dicom_xai.decode import lut
from dicom_xai.decode.attributes import functional_group, items, numbers, text
from dicom_xai.errors import DecodeError, ModelInputError
from dicom_xai.study import Frame, Placement

#: At most so many values, evenly spread over the image, decide a percentile.
_PERCENTILE_SAMPLES = 262_144
#: For display, where the image brings no window of its own.
_DISPLAY_PERCENTILES = (0.5, 99.5)


def to_model_input(frame: Frame, spec: ModelInput) -> tuple[torch.Tensor, Placement]:
    """One frame on the model's grid.

    Windowed as the card says, bright as the card says, resized with antialiasing, scaled. Padding
    and letterbox margins hold the lowest value.

    Parameters
    ----------
    frame : Frame
        In modality units.
    spec : ModelInput
        From the model card.

    Returns
    -------
    Tensor, (1, rows, columns) float32
        In ``spec.scaling``, on the frame's device.
    Placement
        Where the source lies on that grid.

    Raises
    ------
    ModelInputError
        The input is not two-dimensional.
    """
    if spec.kind is InputKind.VOLUME3D or len(spec.size) != 2:
        raise ModelInputError(
            f"input {spec.name!r}: kind {spec.kind} of size {list(spec.size)}; "
            "a frame fits rows and columns only"
        )
    shown = _windowed(frame, spec.windowing)
    if _is_inverted(frame) != (spec.photometric == "MONOCHROME1"):
        shown = 1 - shown
    shown = _blank_padding(shown, frame)
    rows, columns = spec.size
    placed, placement = _fit(shown, (rows, columns), spec.resize)
    low, high = spec.scaling
    return (placed * (high - low) + low)[None], placement


def stack_inputs(
    frames: tuple[Frame, ...], spec: ModelInput
) -> tuple[torch.Tensor, tuple[Placement, ...]]:
    """All frames of a unit on the model's grid.

    Returns
    -------
    Tensor, (frames, 1, rows, columns) float32
    tuple of Placement
        One for each frame.

    Raises
    ------
    ModelInputError
        There are no frames, or the input is not two-dimensional.
    """
    if not frames:
        raise ModelInputError(f"input {spec.name!r}: no frames")
    inputs, placements = zip(*(to_model_input(frame, spec) for frame in frames), strict=True)
    return torch.stack(inputs), placements


def display(frame: Frame) -> torch.Tensor:
    """The frame as a radiologist sees it by default.

    The first VOI window, else the VOI LUT, else the percentiles of the valid pixels (also where the
    window is one that the standard does not allow); inverted for MONOCHROME1; padding black.
    Presentation LUT Shape is not looked at: where it is allowed to say INVERSE (DX), it repeats
    what MONOCHROME1 says.

    Source: PS3.3 C.11.2 (VOI LUT), C.7.6.3.1.2 (Photometric Interpretation).

    Returns
    -------
    Tensor, (rows, columns) float32
        0 black to 1 bright.
    """
    source = Windowing(source=WindowSource.SOURCE)
    shown = _windowed(frame, source, _DISPLAY_PERCENTILES)
    return _blank_padding(1 - shown if _is_inverted(frame) else shown, frame)


def _is_inverted(frame: Frame) -> bool:
    return text(frame.header, "PhotometricInterpretation") == "MONOCHROME1"


def _blank_padding(shown: torch.Tensor, frame: Frame) -> torch.Tensor:
    return shown if frame.valid is None else shown.masked_fill(~frame.valid, 0.0)


def _windowed(
    frame: Frame, windowing: Windowing, percentiles: tuple[float, float] | None = None
) -> torch.Tensor:
    """Modality units to 0..1, the higher value higher, whatever it means in brightness."""
    if windowing.source is WindowSource.FIXED:
        assert windowing.center is not None
        assert windowing.width is not None
        return _linear_exact(frame.values, windowing.center, windowing.width)
    if windowing.source is WindowSource.SOURCE:
        shown = _voi(frame)
        if shown is not None:
            return shown
    low, high = percentiles or (windowing.low_percentile, windowing.high_percentile)
    return _between_percentiles(frame, low, high)


def _voi(frame: Frame) -> torch.Tensor | None:
    """The frame through its own VOI transformation, 0..1; None when it has no usable one."""
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
        signed = bool(frame.header.get("PixelRepresentation"))
        table = lut.read(tables[0], signed=signed, big_endian=not syntax.is_little_endian)
    except DecodeError:
        return None
    return table.apply(frame.values).div_(2**table.bits - 1)


def _voi_window(
    values: torch.Tensor, center: float, width: float, function: str
) -> torch.Tensor | None:
    """PS3.3 C.11.2.1.2.1 (LINEAR), C.11.2.1.3.1 (SIGMOID), C.11.2.1.3.2 (LINEAR_EXACT)."""
    if function == "LINEAR" and width > 1:
        return _linear_exact(values, center - 0.5, width - 1)
    if function == "LINEAR" and width == 1:
        return (values > center - 0.5).float()
    if function == "LINEAR_EXACT" and width > 0:
        return _linear_exact(values, center, width)
    if function == "SIGMOID" and width > 0:
        return torch.sigmoid((values - center) * (4 / width))
    return None


def _linear_exact(values: torch.Tensor, center: float, width: float) -> torch.Tensor:
    shown: torch.Tensor = (values - (center - width / 2)) / width
    return shown.clamp_(0, 1)


def _between_percentiles(frame: Frame, low: float, high: float) -> torch.Tensor:
    values = frame.values if frame.valid is None else frame.values[frame.valid]
    values = values.flatten()
    if values.numel() == 0:
        return torch.zeros_like(frame.values)
    step = -(-values.numel() // _PERCENTILE_SAMPLES)
    at = torch.tensor([low / 100, high / 100], dtype=values.dtype, device=values.device)
    first, last = (float(value) for value in torch.quantile(values[::step], at))
    if last <= first:
        return (frame.values > first).float()
    return _linear_exact(frame.values, (first + last) / 2, last - first)


def _fit(
    shown: torch.Tensor, size: tuple[int, int], rule: ResizeRule
) -> tuple[torch.Tensor, Placement]:
    """The image on a grid of `size`, and where."""
    rows, columns = shown.shape
    inner = size
    if rule is ResizeRule.LETTERBOX:
        scale = min(size[0] / rows, size[1] / columns)
        inner = (max(1, round(rows * scale)), max(1, round(columns * scale)))
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    resized = shown
    if inner != (rows, columns):
        resized = functional.interpolate(
            shown[None, None], inner, mode="bilinear", antialias=True, align_corners=False
        )[0, 0]
    margins = (left, size[1] - inner[1] - left, top, size[0] - inner[0] - top)
    placement = Placement(
        source_size=(rows, columns),
        input_size=size,
        scale=(inner[0] / rows, inner[1] / columns),
        offset=(float(top), float(left)),
    )
    return functional.pad(resized, margins), placement
