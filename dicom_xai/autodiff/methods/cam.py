"""Class activation maps: a layer's channels, weighed by what the class's score makes of them.

With A the layer ``(batch, channels, *spatial)`` and g the score's gradient there. Only the part of
the graph after the layer is differentiated. Maps are raw: not scaled per image, at the layer's own
grid.
"""

from __future__ import annotations

from ..emit import Tensor


def grad_cam(a: Tensor, g: Tensor) -> Tensor:
    """Relu(sum_k mean(g_k) A_k); Selvaraju et al. 2017, equations 1 and 2."""
    return a.graph.op("Relu", weighed(a, g.mean(spatial(a))))


def weighed(a: Tensor, weights: Tensor) -> Tensor:
    """Channels summed with one weight each: ``(batch, 1, *spatial)``."""
    row = weights.reshape(0, 1, a.size(1))
    flat = a.reshape(0, a.size(1), -1)
    grid = [size if size is not None else -1 for size in a.shape[2:]]
    return (row @ flat).reshape(0, 1, *grid)


def spatial(a: Tensor) -> list[int]:
    """The axes that hold positions."""
    return list(range(2, a.rank))
