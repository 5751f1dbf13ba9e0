"""Pad and Resize: linear and separable, one matrix per axis, its transpose on the way back.

The matrices are built here, at compile time, from the operator's definition. Where a position is a
tie by that, its float32 rounding decides which input a nearest one copies; it is ONNX Runtime's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import helper

from ..call import Call, Cotangents, Rules
from ..emit import Tensor
from .index import along
from .layout import place

TIE = 1e-6
"""ONNX Runtime takes what is so close to the middle of two elements for the middle."""

Positions = npt.NDArray[np.floating]

Matrix = npt.NDArray[np.float64]
"""``(output size, input size)``: the output is the matrix times the input."""


def pad(n: Call, g: Tensor) -> Cotangents:
    """What lies inside the padding; reflected and repeated elements add to where they came from."""
    x, mode = n.input(), n.attribute("mode", "constant")
    pads = n.ints(1, "pads") or []
    axes = n.ints(3, "axes", list(range(x.rank))) or []
    for index, axis in enumerate(axes):
        before, after = pads[index], pads[index + len(axes)]
        if before == after == 0:
            continue
        axis, size = axis % x.rank, x.size(axis)
        if mode != "constant":
            g = apply(g, axis, pad_matrix(size, before, after, mode))
            continue
        g = g.slice(axis, max(before, 0), g.size(axis) - max(after, 0))
        g = place(g, axis, range(max(-before, 0), size - max(-after, 0)), size)
    return g


def pad_matrix(size: int, before: int, after: int, mode: str) -> Matrix:
    """Row i has its 1 where output i was copied from."""
    grown: npt.NDArray[np.int64] = np.pad(  # type: ignore[call-overload]
        np.arange(size), (max(before, 0), max(after, 0)), mode=mode
    )
    source = grown[max(-before, 0) : len(grown) - max(-after, 0)]
    return np.asarray(np.eye(size)[source], np.float64)


def apply(g: Tensor, axis: int, matrix: Matrix) -> Tensor:
    """The transpose of a matrix along one axis; a block of equal repeats is summed instead."""
    out, into = matrix.shape
    times = out // into
    if out == into * times and np.array_equal(matrix, np.repeat(np.eye(into), times, axis=0)):
        head, tail = [0] * axis, [-1 if size is None else size for size in g.shape[axis + 1 :]]
        return g.reshape(*head, into, times, *tail).sum([axis + 1], keep=False)
    dtype = helper.tensor_dtype_to_np_dtype(g.dtype)
    return along(g, axis, g.graph.constant(matrix.astype(dtype)))


def resize(n: Call, g: Tensor) -> Cotangents:
    """Axis by axis."""
    x, y = n.input(), n.output()
    if n.attribute("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise n.refuse("it crops by a region of interest; crop with Slice before it")
    shapes = n.graph.facts.shapes
    if shapes(x.name) == shapes(y.name):
        return g  # runtimes copy then, whatever the scales are
    scales = scales_of(n)
    for axis in range(x.rank):
        if scales[axis] == 1 and x.shape[axis] == y.shape[axis]:
            continue
        g = apply(g, axis, resize_matrix(n, x.size(axis), y.size(axis), scales[axis]))
    return g


def scales_of(n: Call) -> list[float]:
    """The scale of every axis: as given, or as the given sizes make it."""
    x, y = n.input(), n.output()
    scales = [1.0] * x.rank
    axes = [axis % x.rank for axis in n.attribute("axes", range(x.rank))]
    given, sizes = n.optional(2), n.ints(3, "sizes")
    if given is not None and given.shape != (0,):
        if given.value is None:
            raise n.refuse("its scales must be constant; fold them and compile again")
        found = [float(item) for item in given.value]
    else:
        policy = n.attribute("keep_aspect_ratio_policy", "stretch")
        assert sizes is not None
        found = [
            1.0 if x.shape[axis] is None and y.shape[axis] is None else size / x.size(axis)
            for axis, size in zip(axes, sizes, strict=True)
        ]
        if policy != "stretch":
            found = [(min if policy == "not_larger" else max)(found)] * len(found)
    for axis, scale in zip(axes, found, strict=True):
        scales[axis] = scale
    return scales


def resize_matrix(n: Call, size: int, out: int, scale: float) -> Matrix:
    """One axis of Resize: row i holds the weights of the inputs that make output i."""
    mode = n.attribute("mode", "nearest")
    where = n.attribute("coordinate_transformation_mode", "half_pixel")
    if mode == "nearest":
        x = positions(where, size, out, scale, np.float32)
        return np.eye(size)[nearest(x, n.attribute("nearest_mode", "round_prefer_floor"), size)]
    x = positions(where, size, out, scale, np.float64)
    stretch = min(scale, 1.0) if n.attribute("antialias", 0) else 1.0
    reach = (2 if mode == "cubic" else 1) / stretch
    first = np.floor(x - reach).astype(int)
    taps = first[:, None] + np.arange(int(np.ceil(2 * reach)) + 2)
    distance = np.abs(taps - x[:, None]) * stretch
    weights = (
        cubic(distance, n.attribute("cubic_coeff_a", -0.75))
        if mode == "cubic"
        else np.maximum(1 - distance, 0)
    )
    if n.attribute("exclude_outside", 0):
        weights = weights * ((taps >= 0) & (taps < size))
    weights = weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((out, size))
    rows = np.broadcast_to(np.arange(out)[:, None], taps.shape)
    np.add.at(matrix, (rows, taps.clip(0, size - 1)), weights)
    return matrix


def positions(mode: str, size: int, out: int, scale: float, real: type[np.floating]) -> Positions:
    """Where each output lies on the input's axis; the table of Resize's schema."""
    i, step, half = np.arange(out, dtype=real), real(scale), real(0.5)
    if mode == "align_corners":
        return np.asarray(i * real(size - 1) / real(max(out - 1, 1)))
    if mode == "asymmetric":
        return np.asarray(i / step)
    if mode == "pytorch_half_pixel" and out == 1:
        return i
    if mode == "half_pixel_symmetric":
        apart = real(size / 2) * (1 - real(out) / (step * real(size)))
        wide = float(apart) + (i.astype(np.float64) + 0.5) / float(step) - 0.5
        return wide.astype(real)
    return np.asarray((i + half) / step - half)


def nearest(x: Positions, mode: str, size: int) -> npt.NDArray[np.int64]:
    """The input that each output copies."""
    wide = x.astype(np.float64)
    below = np.floor(wide)
    past = wide - below - 0.5
    rounded = {
        "round_prefer_floor": below + (past >= TIE),
        "round_prefer_ceil": below + (past > -TIE),
        "floor": below,
        "ceil": np.ceil(wide),
    }[mode]
    return rounded.clip(0, size - 1).astype(np.int64)


def cubic(distance: npt.NDArray[np.float64], a: float) -> npt.NDArray[np.float64]:
    """Keys' kernel; IEEE Trans. ASSP 29(6), 1981, equation 15."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


RULES: Rules = {
    "Pad": pad,
    "Resize": resize,
}
