"""Less work where a cotangent is zero but for a stretch of one axis.

A class token that is read at the end leaves zeros at every patch. Through an operator that treats
the places of an axis alike, what is zero stays zero: its rule need only see the stretch, cut out of
its inputs and outputs. The zeros are put back behind it, in nodes that vanish from the graph where
nobody reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce

from .call import Call
from .emit import INT64_MAX, Stretch, Tensor
from .positions import POINTWISE
from .prepare import Shape
from .rules.layout import place
from .rules.linear import spelled_out

Cuts = list[int | None]
"""For each input the axis along which it is cut, None where all of it takes part."""


def narrowed(
    call: Call, arriving: Sequence[Tensor | None]
) -> tuple[Call, Tensor, Callable[[int, Tensor], Tensor]] | None:
    """The same operator on a stretch, where the cotangent is zero elsewhere.

    Parameters
    ----------
    call : Call
        The node as it is.
    arriving : sequence of Tensor or None
        Cotangents of its outputs.

    Returns
    -------
    call : Call
        The node on the stretch alone.
    cotangent : Tensor
        Of its one output.
    restored : callable
        From an input's number and its cotangent on the stretch to that on the whole.

    None where nothing can be left out.
    """
    g = arriving[0]
    if g is None or len(arriving) > 1 or g.name not in g.graph.stretches:
        return None
    stretch = g.graph.stretches[g.name]
    find = CUTS.get(call.node.op_type) if not call.node.domain else None
    cuts = find(call, stretch.axis) if find is not None else None
    if cuts is None:
        return None
    whole = tuple(
        x if x is None or axis is None else cut(x, axis, stretch)
        for x, axis in zip(call.x, cuts, strict=True)
    )
    ends = tuple(y and cut(y, stretch.axis, stretch) for y in call.y)

    def restored(index: int, found: Tensor) -> Tensor:
        axis, x = cuts[index], call.input(index)
        return found if axis is None else place(found, axis, stretch.taken, x.size(axis))

    return replace(call, x=whole, y=ends), stretch.inner, restored


def cut(x: Tensor, axis: int, stretch: Stretch) -> Tensor:
    """The stretch of a tensor."""
    return x.slice(axis, stretch.taken.start, stretch.taken.stop)


def summed(cotangents: Sequence[Tensor]) -> Tensor:
    """The sum of cotangents; what is zero in most places is added, or joined, only where it is not.

    The parts of a tensor that was cut up (query, key and value of one product) come back so.
    """

    def start(item: Tensor) -> int:
        stretch = item.graph.stretches.get(item.name)
        return INT64_MAX if stretch is None else stretch.taken.start

    return reduce(plus, sorted(cotangents, key=start))


def plus(one: Tensor, other: Tensor) -> Tensor:
    """The sum of two, the first starting no later than the second."""
    first, second = (item.graph.stretches.get(item.name) for item in (one, other))
    if first is None or second is None or first.axis != second.axis:
        return one + other
    axis, size = first.axis, one.size(first.axis)
    if first.taken == second.taken:
        return place(first.inner + second.inner, axis, first.taken, size)
    if first.taken.stop == second.taken.start:
        joined = one.graph.concat([first.inner, second.inner], axis)
        return place(joined, axis, range(first.taken.start, second.taken.stop), size)
    return one + other


def pointwise(call: Call, axis: int) -> Cuts:
    """Every input is cut but for what is broadcast along the axis."""
    rank, cuts = call.output().rank, []
    for x in call.x:
        own = -1 if x is None else axis - rank + x.rank
        is_cut = x is not None and own >= 0 and x.shape[own] == call.output().shape[axis]
        cuts.append(own if is_cut else None)
    return cuts


def along_last(call: Call, axis: int) -> Cuts | None:
    """An operator over the axes from `axis` on leaves those before it alone."""
    first = call.attribute("axis", -1) % call.output().rank
    return [axis] + [None] * (len(call.x) - 1) if axis < first else None


def along_one(call: Call, axis: int) -> Cuts | None:
    """An operator over one axis leaves all others alone."""
    return [axis] if axis != call.attribute("axis", -1) % call.output().rank else None


def matmul(call: Call, axis: int) -> Cuts | None:
    """Rows of the left, columns of the right, leading axes of both."""
    a, b, rank = call.input(0), call.input(1), call.output().rank
    if a.rank < 2 or b.rank < 2:
        return None
    if axis >= rank - 2:
        is_row = axis == rank - 2
        return [a.rank - 2, None] if is_row else [None, b.rank - 1]
    return pointwise(call, axis)


def einsum(call: Call, axis: int) -> Cuts | None:
    """Wherever the axis' letter stands."""
    terms, result = spelled_out(call)
    letter = result[axis]
    if any(term.count(letter) > 1 for term in terms):
        return None
    return [term.index(letter) if letter in term else None for term in terms]


def transpose(call: Call, axis: int) -> Cuts:
    """The axis where it was before."""
    rank = call.output().rank
    return [int(call.attribute("perm", list(range(rank))[::-1])[axis])]


def reshape(call: Call, axis: int) -> Cuts | None:
    """An axis that lies in the same place of the same elements before and after."""
    x, after = call.input(), call.output().shape
    for own, size in enumerate(x.shape):
        if size == after[axis] and before(x.shape, own) == before(after, axis):
            return [own] + [None] * (len(call.x) - 1)
    return None


def before(shape: Shape, axis: int) -> tuple[int, int]:
    """How many sizes before an axis are free, and how many elements the others hold."""
    sizes = shape[:axis]
    return sizes.count(None), math.prod(size for size in sizes if size is not None)


CUTS: dict[str, Callable[[Call, int], Cuts | None]] = {
    **dict.fromkeys(POINTWISE - {"QuantizeLinear", "DequantizeLinear"}, pointwise),
    "LayerNormalization": along_last,
    "RMSNormalization": along_last,
    "Softmax": along_one,
    "LogSoftmax": along_one,
    "MatMul": matmul,
    "Einsum": einsum,
    "Transpose": transpose,
    "Reshape": reshape,
    "Squeeze": reshape,
    "Unsqueeze": reshape,
}
"""How operators that treat the places of an axis alike are cut along it."""
