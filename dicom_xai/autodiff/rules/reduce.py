"""Sums, means, maxima over whole axes."""

from __future__ import annotations

from ..call import Call, Cotangents, Rules
from ..emit import Tensor


def axes_of(n: Call) -> list[int]:
    """The reduced axes, counted from the front."""
    rank = n.input().rank
    axes = n.ints(1, "axes")
    if not axes:
        axes = [] if n.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return [axis % rank for axis in axes]


def opened(n: Call, t: Tensor) -> Tensor:
    """A reduced tensor with its reduced axes back, each of size 1."""
    axes = axes_of(n)
    if n.attribute("keepdims", 1) or not axes:
        return t
    return t.unsqueeze(*axes)


def count_of(x: Tensor, axes: list[int]) -> Tensor:
    """How many elements lie along `axes`."""
    graph = x.graph
    known = [x.shape[axis] for axis in axes]
    if None not in known:
        count = 1
        for size in known:
            count *= size or 0
        return graph.scalar(count, x.dtype)
    sizes = graph.op("Gather", graph.op("Shape", x), graph.ints(axes))
    return graph.op("ReduceProd", sizes, keepdims=0).cast(x.dtype)


def reduce_sum(n: Call, g: Tensor) -> Cotangents:
    """Every element gets g."""
    return opened(n, g)


def reduce_mean(n: Call, g: Tensor) -> Cotangents:
    """Every element gets g / count."""
    return opened(n, g) / count_of(n.input(), axes_of(n))


def reduce_extremum(n: Call, g: Tensor) -> Cotangents:
    """Maximum and minimum: the elements that equal it share g."""
    x, axes = n.input(), axes_of(n)
    return shared(x, opened(n, n.output()), opened(n, g), axes)


def shared(x: Tensor, extremum: Tensor, g: Tensor, axes: list[int]) -> Tensor:
    """g in equal parts to the elements that equal the extremum."""
    taken = x.equals(extremum).cast(x.dtype)
    return taken * (g / taken.sum(axes))


def reduce_l1(n: Call, g: Tensor) -> Cotangents:
    """sign(x)."""
    return opened(n, g) * n.graph.op("Sign", n.input())


def reduce_l2(n: Call, g: Tensor) -> Cotangents:
    """x / y, 0 where y is 0."""
    y = opened(n, n.output())
    slope = n.graph.where(y.equals(0), 0, opened(n, g) / n.graph.where(y.equals(0), 1, y))
    return n.input() * slope


def reduce_sum_square(n: Call, g: Tensor) -> Cotangents:
    """2 x."""
    return opened(n, g) * n.input() * 2


def reduce_log_sum_exp(n: Call, g: Tensor) -> Cotangents:
    """exp(x - y)."""
    return opened(n, g) * n.graph.op("Exp", n.input() - opened(n, n.output()))


def reduce_log_sum(n: Call, g: Tensor) -> Cotangents:
    """1 / sum(x) = exp(-y)."""
    return opened(n, g) * n.graph.op("Exp", -opened(n, n.output()))


def global_average_pool(n: Call, g: Tensor) -> Cotangents:
    """Every position gets g / count."""
    x = n.input()
    return g / count_of(x, list(range(2, x.rank)))


def global_max_pool(n: Call, g: Tensor) -> Cotangents:
    """The positions that equal the maximum share g."""
    x = n.input()
    return shared(x, n.output(), g, list(range(2, x.rank)))


RULES: Rules = {
    "ReduceSum": reduce_sum,
    "ReduceMean": reduce_mean,
    "ReduceMax": reduce_extremum,
    "ReduceMin": reduce_extremum,
    "ReduceL1": reduce_l1,
    "ReduceL2": reduce_l2,
    "ReduceSumSquare": reduce_sum_square,
    "ReduceLogSumExp": reduce_log_sum_exp,
    "ReduceLogSum": reduce_log_sum,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
}
