"""Normalisations. With xh the normalised input, the mean and the deviation depend on x too."""

from __future__ import annotations

import numpy as np
from onnx import helper

from ..call import Call, Cotangents, Rules
from ..emit import Tensor
from ..prepare import Array
from .linear import scaled


def batch_normalization(n: Call, g: Tensor) -> Cotangents:
    """At inference a constant factor per channel: scale / sqrt(var + epsilon)."""
    if n.attribute("training_mode", 0) or len(n.y) > 1:
        raise n.refuse("it is in training mode; export the model after model.eval()")
    rank, scale, var = n.input().rank, n.input(1), n.input(4)
    factor = scale.cast(var.dtype) / n.graph.op("Sqrt", var + n.attribute("epsilon", 1e-5))
    return scaled(g, per_channel(factor, rank).cast(g.dtype))


def per_channel(x: Tensor, rank: int) -> Tensor:
    """A vector over channels, ready to multiply ``(batch, channels, *spatial)``."""
    return x.reshape(-1, *[1] * (rank - 2)) if rank > 2 else x


def through_statistics(g: Tensor, x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    """Cotangent of x where ``xh = (x - mean) / std`` got g.

    (g - mean(g) - xh mean(g xh)) / std; Ioffe and Szegedy 2015, section 3, simplified. Written
    without xh, which would be one more pass over x.
    """
    centred = x - x.mean(axes)
    variance = (centred * centred).mean(axes) + epsilon
    along = (g * centred).mean(axes) / variance
    return (g - g.mean(axes) - centred * along) / x.graph.op("Sqrt", variance)


def layer_normalization(n: Call, g: Tensor) -> Cotangents:
    """Statistics over the axes from `axis` on."""
    x = n.input()
    axes = list(range(n.attribute("axis", -1) % x.rank, x.rank))
    return through_statistics(scaled(g, n.input(1)), x, axes, n.attribute("epsilon", 1e-5))


def instance_normalization(n: Call, g: Tensor) -> Cotangents:
    """Statistics over space, per image and channel."""
    x = n.input()
    axes, gamma = list(range(2, x.rank)), per_channel(n.input(1), x.rank)
    return through_statistics(g * gamma, x, axes, n.attribute("epsilon", 1e-5))


def group_normalization(n: Call, g: Tensor) -> Cotangents:
    """Statistics over space and the channels of a group, scale per channel: opset 21 and later."""
    x, groups = n.input(), n.attribute("num_groups")
    each = x.size(1) // groups
    spatial = [-1 if size is None else size for size in x.shape[2:]]
    weighed = (g * per_channel(n.input(1), x.rank)).reshape(0, groups, each, *spatial)
    cells = x.reshape(0, groups, each, *spatial)
    axes = list(range(2, cells.rank))
    found = through_statistics(weighed, cells, axes, n.attribute("epsilon", 1e-5))
    return found.reshape_like(x)


def rms_normalization(n: Call, g: Tensor) -> Cotangents:
    """No mean is taken off: (g - xh mean(g xh)) / rms."""
    x = n.input()
    axes = list(range(n.attribute("axis", -1) % x.rank, x.rank))
    rms = n.graph.op("Sqrt", (x * x).mean(axes) + n.attribute("epsilon", 1e-5))
    xh, weighed = x / rms, g * n.input(1)
    return (weighed - xh * (weighed * xh).mean(axes)) / rms


def lp_normalization(n: Call, g: Tensor) -> Cotangents:
    """x / |x|: (g - y sum(g y)) / |x| for p = 2, (g - sum(g y) sign(x)) / |x| for p = 1."""
    x, y, axis = n.input(), n.output(), n.attribute("axis", -1)
    along = (g * y).sum([axis])
    if n.attribute("p", 2) == 2:
        return (g - y * along) / n.graph.op("Sqrt", (x * x).sum([axis]))
    return (g - n.graph.op("Sign", x) * along) / n.graph.op("Abs", x).sum([axis])


def lrn(n: Call, g: Tensor) -> Cotangents:
    """y = x s^-beta with s = bias + alpha/size sum of x^2 over neighbouring channels."""
    x, size = n.input(), int(n.attribute("size"))
    alpha, beta = float(n.attribute("alpha", 1e-4)), float(n.attribute("beta", 0.75))
    channels = np.arange(x.size(1))
    step = channels[None, :] - channels[:, None]
    near = (step >= -((size - 1) // 2)) & (step <= size // 2)
    dtype = helper.tensor_dtype_to_np_dtype(x.dtype)
    spatial = [-1 if size is None else size for size in x.shape[2:]]

    def over_channels(t: Tensor, matrix: Array) -> Tensor:
        flat = t.reshape(0, x.size(1), -1)
        summed = n.graph.constant(matrix.astype(dtype)) @ flat
        return summed.reshape(0, x.size(1), *spatial)

    s = over_channels(x * x, near) * (alpha / size) + float(n.attribute("bias", 1.0))
    back = over_channels(g * x * s ** (-beta - 1), near.T)
    power = s ** (-beta)
    return g * power - x * back * (2 * alpha * beta / size)


RULES: Rules = {
    "BatchNormalization": batch_normalization,
    "LayerNormalization": layer_normalization,
    "InstanceNormalization": instance_normalization,
    "GroupNormalization": group_normalization,
    "RMSNormalization": rms_normalization,
    "LpNormalization": lp_normalization,
    "LRN": lrn,
}
