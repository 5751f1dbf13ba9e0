"""Moving elements: the transpose of a rearrangement is the rearrangement undone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import numpy as np

from ..call import Call, Cotangents, Rules
from ..emit import INT64_MAX, INT64_MIN, Stretch, Tensor, UnknownShapeError, attributes_of


def reshape(n: Call, g: Tensor) -> Cotangents:
    """Reshape, Flatten, Squeeze, Unsqueeze: the shape of x again."""
    return g.reshape_like(n.input())


def transpose(n: Call, g: Tensor) -> Cotangents:
    """The inverse permutation."""
    rank = n.input().rank
    order = n.attribute("perm", list(range(rank))[::-1])
    return g.transpose([int(axis) for axis in np.argsort(order)])


def expand(n: Call, g: Tensor) -> Cotangents:
    """The walk sums over what was repeated."""
    return g


def tile(n: Call, g: Tensor) -> Cotangents:
    """The sum over the copies."""
    x, times = n.input(), n.ints(1, "repeats")
    assert times is not None
    sizes = [item for count, size in zip(times, x.shape, strict=True) for item in (count, size)]
    if sizes.count(None) > 1:
        raise UnknownShapeError(x.name)
    parts = g.reshape(*(-1 if size is None else size for size in sizes))
    return parts.sum(range(0, 2 * x.rank, 2), keep=False)


def concat(n: Call, g: Tensor) -> Cotangents:
    """To each part its own piece."""
    axis = n.attribute("axis")
    return n.graph.split(g, [n.input(i).size(axis) for i in range(len(n.x))], axis)


def split(n: Call, *gs: Tensor | None) -> Cotangents:
    """The pieces joined; a piece that nobody used is zero."""
    axis = n.attribute("axis", 0)
    pieces = [g or zeros(y, {}) for y, g in zip_longest(n.y, gs) if y is not None]
    return n.graph.concat(pieces, axis)


def slice_(n: Call, g: Tensor) -> Cotangents:
    """g where it was taken from, zero elsewhere."""
    x = n.input()
    starts, ends = n.ints(1, "starts"), n.ints(2, "ends")
    assert starts is not None
    assert ends is not None
    axes = n.ints(3, "axes", list(range(len(starts)))) or []
    steps = n.ints(4, "steps", [1] * len(starts)) or []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis %= x.rank
        if x.shape[axis] is None and (start, step) == (0, 1) and end >= INT64_MAX // 2:
            continue
        size = x.size(axis)
        taken = range(size)[slice(start, None if step < 0 and end < -size else end, step)]
        g = place(g, axis, taken, size)
    return g


def place(g: Tensor, axis: int, taken: range, size: int) -> Tensor:
    """Spread g along an axis of `size` elements to the places `taken`; zero elsewhere."""
    graph = g.graph
    if not len(taken):
        return zeros(g, {axis: size})
    if taken.step < 0:
        g, taken = g.slice(axis, -1, INT64_MIN, -1), taken[::-1]
    if taken.step > 1:
        wide = g.unsqueeze(axis + 1)
        wide = graph.concat([wide, zeros(wide, {axis + 1: taken.step - 1})], axis + 1)
        g = merged(wide, axis).slice(axis, 0, taken[-1] - taken[0] + 1)
    parts = [(taken[0], None), (0, g), (size - 1 - taken[-1], None)]
    found = graph.concat(
        [t or zeros(g, {axis: count}) for count, t in parts if t is not None or count], axis
    )
    if g.shape[axis] != size:
        graph.stretches[found.name] = Stretch(g, axis, range(taken[0], taken[-1] + 1))
    return found


def merged(x: Tensor, axis: int) -> Tensor:
    """Two neighbouring axes as one."""
    head = [0] * axis
    tail = [-1 if size is None else size for size in x.shape[axis + 2 :]]
    return x.reshape(*head, x.size(axis) * x.size(axis + 1), *tail)


def zeros(like: Tensor, sizes: dict[int, int]) -> Tensor:
    """Zeros shaped as `like`, but for the given sizes of some axes."""
    shape = [sizes.get(axis, size) for axis, size in enumerate(like.shape)]
    return like.zero_along_free(shape).expand(shape)


def repeat(x: Tensor, times: list[int]) -> Tensor:
    """Every element repeated along each spatial axis."""
    scales = x.graph.constant(np.array([1, 1, *times], np.float32))
    return x.graph.op(
        "Resize", x, None, scales, mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def once(x: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """What is linear and the same at every place, done before elements were repeated if they were.

    A mean over windows and a convolution of one place are often neighbours (DenseNet).
    """
    graph, node = x.graph, x.graph.maker(x)
    if node is None or node.op_type != "Resize":
        return apply(x)
    inner, _, scales = node.input
    done = apply(graph.tensor(inner))
    return graph.op("Resize", done, None, graph.tensor(scales), **attributes_of(node))


def depth_to_space(n: Call, g: Tensor) -> Cotangents:
    """Blocks of pixels back into channels."""
    x, block = n.input(), n.attribute("blocksize")
    channels, height, width = x.size(1), x.size(2), x.size(3)
    deep = channels // block**2
    cells = g.reshape(-1, deep, height, block, width, block)
    is_dcr = n.attribute("mode", "DCR") == "DCR"
    order = [0, 3, 5, 1, 2, 4] if is_dcr else [0, 1, 3, 5, 2, 4]
    return cells.transpose(order).reshape(-1, channels, height, width)


def space_to_depth(n: Call, g: Tensor) -> Cotangents:
    """Channels back into blocks of pixels."""
    x, block = n.input(), n.attribute("blocksize")
    channels, height, width = x.size(1), x.size(2), x.size(3)
    cells = g.reshape(-1, block, block, channels, height // block, width // block)
    return cells.transpose([0, 3, 4, 1, 5, 2]).reshape(-1, channels, height, width)


def trilu(n: Call, g: Tensor) -> Cotangents:
    """The same triangle of g."""
    return n.graph.op("Trilu", g, n.optional(1), upper=n.attribute("upper", 1))


def cumsum(n: Call, g: Tensor) -> Cotangents:
    """The cumulative sum from the other end."""
    reverse, exclusive = 1 - n.attribute("reverse", 0), n.attribute("exclusive", 0)
    return n.graph.op("CumSum", g, n.input(1), reverse=reverse, exclusive=exclusive)


RULES: Rules = {
    "Reshape": reshape,
    "Flatten": reshape,
    "Squeeze": reshape,
    "Unsqueeze": reshape,
    "Transpose": transpose,
    "Expand": expand,
    "Tile": tile,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Trilu": trilu,
    "CumSum": cumsum,
}
