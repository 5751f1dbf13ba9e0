"""Averages and maxima over windows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from onnx import helper

from ..call import Call, Cotangents, Rules
from ..emit import Tensor
from ..prepare import Array
from .index import SCATTER_ADD_OPSET, added, zeros_like
from .layout import place, repeat
from .linear import transposed
from .window import Window, window_of


def average_pool(n: Call, g: Tensor) -> Cotangents:
    """Each window gives g / count to every element that it covers."""
    x, kernel = n.input(), n.attribute("kernel_shape")
    spec = window_of(n, kernel)
    share = g / n.graph.constant(window_counts(n, spec))
    sizes = [x.size(axis) for axis in range(2, x.rank)]
    if spec.kernel == spec.strides and not any(spec.starts + spec.ends):
        return repeat(share, spec.kernel)
    ones = np.ones((1, 1, *kernel), helper.tensor_dtype_to_np_dtype(x.dtype))
    folded = share.reshape(-1, 1, *(g.size(axis) for axis in range(2, g.rank)))
    spread = transposed(n.graph, folded, n.graph.constant(ones), spec)
    return spread.reshape(-1, x.size(1), *sizes)


def window_counts(n: Call, spec: Window) -> Array:
    """How many elements each window averages: ``(1, 1, *output sizes)``.

    Padding counts where `count_include_pad` says so; what ceil mode adds beyond it never does.
    """
    x, y = n.input(), n.output()
    total = np.ones((1, 1), np.float64)
    for axis, kernel in enumerate(spec.kernel):
        size, far = x.size(axis + 2), n.attribute("pads", [0] * 2 * len(spec.kernel))
        first = np.arange(y.size(axis + 2)) * spec.strides[axis] - spec.starts[axis]
        taps = first[:, None] + np.arange(kernel) * spec.dilations[axis]
        low, high = 0, size
        if n.attribute("count_include_pad", 0):
            padded = far[len(spec.kernel) + axis] if "pads" in n.attributes else spec.ends[axis]
            low, high = -spec.starts[axis], size + padded
        inside = ((taps >= low) & (taps < high)).sum(axis=1)
        total = total[..., None] * inside
    return total.astype(helper.tensor_dtype_to_np_dtype(x.dtype))


def max_pool(n: Call, g: Tensor) -> Cotangents:
    """Each window gives g to its first maximum.

    The positions come from a second MaxPool node: an output added to the vendor's own node would
    change it.
    """
    if n.attribute("storage_order", 0):
        raise n.refuse("it counts positions by column; set storage_order to 0")
    if n.graph.facts.opset < SCATTER_ADD_OPSET:
        return first_hits(n, g)
    x, graph = n.input(), n.graph
    _, position = graph.ops("MaxPool", x, outputs=2, **n.attributes)
    zeros = zeros_like(x, g.dtype).reshape(-1)
    spread = added("ScatterElements", zeros, position.reshape(-1), g.reshape(-1), axis=0)
    return spread.reshape_like(x)


def first_hits(n: Call, g: Tensor) -> Tensor:
    """The same without indices: of all taps the first that equals the maximum.

    Taps are cut out by Slice, which copies: a one-hot Conv would round them where a GPU has TF32,
    and nothing would equal the maximum.
    """
    x, y, graph = n.input(), n.output(), n.graph
    spec = window_of(n, n.attribute("kernel_shape"))
    dtype = helper.tensor_dtype_to_np_dtype(x.dtype)
    taps = list(itertools.product(*map(range, spec.kernel)))
    onehot = np.zeros((len(taps), 1, *spec.kernel), dtype)
    for index, tap in enumerate(taps):
        onehot[(index, 0, *tap)] = 1
    weights = graph.constant(onehot)
    sizes = [x.size(axis) for axis in range(2, x.rank)]
    windows = [y.size(axis) for axis in range(2, y.rank)]
    over = [max(end, 0) for end in spec.ends]
    padded = x.reshape(-1, 1, *sizes)
    for axis, (start, size, end) in enumerate(zip(spec.starts, sizes, over, strict=True)):
        if start or end:
            padded = place(padded, axis + 2, range(start, start + size), start + size + end)
    patches = graph.concat([tap_of(padded, spec, tap, windows) for tap in taps], 1)
    hit = patches.equals(y.reshape(-1, 1, *windows)) & graph.constant(
        inside_of(spec, sizes, windows)
    )
    before = graph.op("CumSum", hit.cast(x.dtype), graph.scalar(1, 7), exclusive=1)
    first = hit & before.equals(0)
    given = graph.where(first, g.reshape(-1, 1, *windows), 0)
    return transposed(graph, given, weights, spec).reshape_like(x)


def tap_of(padded: Tensor, spec: Window, tap: Sequence[int], windows: Sequence[int]) -> Tensor:
    """One tap of every window, ``(images, 1, *windows)``."""
    ints, axes = padded.graph.ints, range(2, padded.rank)
    first = [index * dilation for index, dilation in zip(tap, spec.dilations, strict=True)]
    stops = [
        start + (count - 1) * stride + 1
        for start, count, stride in zip(first, windows, spec.strides, strict=True)
    ]
    return padded.graph.op(
        "Slice", padded, ints(first), ints(stops), ints(axes), ints(spec.strides)
    )


def inside_of(spec: Window, sizes: list[int], windows: list[int]) -> Array:
    """Which taps lie on the image, not on its padding: ``(1, taps, *windows)`` bool."""
    result = np.ones((1, 1), bool)
    for axis, (size, count) in enumerate(zip(sizes, windows, strict=True)):
        first = np.arange(count) * spec.strides[axis] - spec.starts[axis]
        taps = np.arange(spec.kernel[axis])[:, None] * spec.dilations[axis] + first
        lies = (taps >= 0) & (taps < size)
        joined = result[:, :, None, ..., None] & lies.reshape(1, 1, -1, *[1] * axis, count)
        result = joined.reshape(1, -1, *joined.shape[3:])
    return result


RULES: Rules = {
    "AveragePool": average_pool,
    "MaxPool": max_pool,
}
