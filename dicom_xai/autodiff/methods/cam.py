"""Class activation maps: a layer's channels, weighed by what the class's score makes of them.

With A the layer and g the score's gradient there, both ``(batch, channels, *spatial)``. Only the
part of the graph after the layer is differentiated. Maps are raw: not scaled per image, at the
layer's own grid, ``(batch, 1, *spatial)``.
"""

from __future__ import annotations

from ..emit import Tensor

POWER_STEPS = 40
"""The error falls with the squared ratio of the first two singular values in each step."""


def cam(a: Tensor, g: Tensor) -> Tensor:
    """sum_k w_k A_k of a pooled linear head, where w_k = sum_p g_k; Zhou et al. 2016, eq. 2."""
    return weighed(a, g.sum(spatial(a)))


def grad_cam(a: Tensor, g: Tensor) -> Tensor:
    """Relu(sum_k mean(g_k) A_k); Selvaraju et al. 2017, equations 1 and 2."""
    return relu(weighed(a, g.mean(spatial(a))))


def grad_cam_plus_plus(a: Tensor, g: Tensor) -> Tensor:
    """Relu(sum_k A_k sum_p alpha Relu(g)); Chattopadhay et al. 2018, equations 9, 10 and 19.

    alpha = g^2 / (2 g^2 + sum(A) g^3) = 1 / (2 + sum(A) g) where g is not 0, which needs no
    epsilon and so does not depend on the score's scale.
    """
    below = a.sum(spatial(a)) * g + 2
    where = a.graph.where
    alpha = where(below.equals(0), 0, 1 / where(below.equals(0), 1, below))
    return relu(weighed(a, (alpha * relu(g)).sum(spatial(a))))


def xgrad_cam(a: Tensor, g: Tensor) -> Tensor:
    """Relu(sum_k A_k sum_p(A_k g_k) / sum_p(A_k)); Fu et al. 2020, equation 8.

    A channel whose sum is 0 has no weight.
    """
    mass, where = a.sum(spatial(a)), a.graph.where
    share = (a * g).sum(spatial(a)) / where(mass.equals(0), 1, mass)
    return relu(weighed(a, where(mass.equals(0), 0, share)))


def hires_cam(a: Tensor, g: Tensor) -> Tensor:
    """Relu(sum_k A_k g_k); Draelos and Carin 2020, equation 3."""
    return relu((a * g).sum([1]))


def layer_cam(a: Tensor, g: Tensor) -> Tensor:
    """Relu(sum_k Relu(g_k) A_k); Jiang et al. 2021, equations 5 and 6."""
    return relu((a * relu(g)).sum([1]))


def eigen_cam(a: Tensor, g: Tensor) -> Tensor:
    """The first principal component of A; Muhammad and Yeasin 2020. No class enters."""
    return relu(shaped(a, principal(a)[0]))


def eigen_grad_cam(a: Tensor, g: Tensor) -> Tensor:
    """The first principal component of A g, as in the library pytorch-grad-cam."""
    return relu(shaped(a, principal(a * g)[0]))


def eigen_share(a: Tensor, g: Tensor) -> Tensor:
    """How much of the variance of A the component explains, ``(batch, 1)``."""
    return principal(a)[1]


def eigen_grad_share(a: Tensor, g: Tensor) -> Tensor:
    """How much of the variance of A g the component explains, ``(batch, 1)``."""
    return principal(a * g)[1]


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """First principal component over channels, by power iteration on X^T X without forming it.

    Parameters
    ----------
    x : Tensor
        ``(batch, channels, *spatial)``; the columns X of positions by channels are centred.

    Returns
    -------
    Tensor
        ``(batch, 1, positions)``, X v, with the sign by which it goes along with the sum over
        channels. (A singular vector's own sign is arbitrary, and libraries' maps flip with it.)
    Tensor
        ``(batch, 1)``, the share of the variance that it explains.
    """
    flat = x.reshape(0, x.size(1), -1)
    columns = flat - flat.mean([2])
    rows = columns.transpose([0, 2, 1])
    along = columns.sum([1])
    component = along
    for _ in range(POWER_STEPS):
        component = unit(component @ rows) @ columns
    sign = x.graph.op("Sign", (component * along).sum([2]))
    variance = (columns * columns).sum([1, 2])
    held = (component * component).sum([1, 2])
    share = held / x.graph.where(variance.equals(0), 1, variance)
    return component * sign, share.reshape(0, 1)


def unit(v: Tensor) -> Tensor:
    """A row of length 1, or 0."""
    length = v.graph.op("Sqrt", (v * v).sum([2]))
    return v / v.graph.where(length.equals(0), 1, length)


def weighed(a: Tensor, weights: Tensor) -> Tensor:
    """Channels summed with one weight each."""
    row = weights.reshape(0, 1, a.size(1))
    return shaped(a, row @ a.reshape(0, a.size(1), -1))


def shaped(a: Tensor, flat: Tensor) -> Tensor:
    """``(batch, 1, positions)`` on the layer's grid."""
    return flat.reshape_like(a.slice(1, 0, 1))


def relu(x: Tensor) -> Tensor:
    """What speaks for the class only."""
    return x.graph.op("Relu", x)


def spatial(a: Tensor) -> list[int]:
    """The axes that hold positions."""
    return list(range(2, a.rank))
