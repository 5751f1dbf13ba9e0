"""Models in 8 bits: rounding is passed straight through.

Between QuantizeLinear and DequantizeLinear the cotangent is that of the integer's own unit.
Straight-through estimator: Bengio et al. 2013, arXiv 1308.3432, section 3.
"""

from __future__ import annotations

import numpy as np
from onnx import helper

from ..call import Call, Cotangents, Rules
from ..emit import Tensor

STRAIGHT_THROUGH = (
    "the model rounds to few bits, which has no derivative: the gradient passes as if nothing were "
    "rounded (straight-through estimator)"
)


def scale_of(n: Call) -> Tensor:
    """The scale, ready to multiply the data."""
    x, scale, axis = n.input(), n.input(1), n.attribute("axis", 1)
    if n.attribute("block_size", 0):
        raise n.refuse("it scales by blocks; quantise by tensor or by channel")
    if scale.rank != 1 or scale.shape == (1,):
        return scale.reshape()
    return scale.reshape(-1, *[1] * (x.rank - 1 - axis % x.rank))


def quantize_linear(n: Call, g: Tensor) -> Cotangents:
    """1/scale where the integer type can hold the value, 0 where it was clipped."""
    x, kind = n.input(), helper.tensor_dtype_to_np_dtype(n.output().dtype)
    if kind not in (np.int8, np.uint8, np.int16, np.uint16):
        raise n.refuse("its type is not an integer of 8 or 16 bits; quantise to one")
    n.graph.notes.append(STRAIGHT_THROUGH)
    scale = scale_of(n).cast(x.dtype)
    level = n.graph.op("Round", x / scale)
    zero = n.optional(2)
    if zero is not None:
        shape = (1,) if zero.rank == 0 else scale.shape
        level = level + zero.cast(x.dtype).reshape(
            *[-1 if item is None else item for item in shape]
        )
    limits = np.iinfo(kind)
    fits = (level > limits.min - 1) & (level < limits.max + 1)
    return (g / scale).masked(fits)


def dequantize_linear(n: Call, g: Tensor) -> Cotangents:
    """scale."""
    return g * scale_of(n).cast(g.dtype)


RULES: Rules = {
    "QuantizeLinear": quantize_linear,
    "DequantizeLinear": dequantize_linear,
}
