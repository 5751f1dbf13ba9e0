"""Models in 8 bits: rounding is passed straight through.

Between QuantizeLinear and DequantizeLinear the cotangent is that of the integer's own unit.
Straight-through estimator: Bengio et al. 2013, arXiv 1308.3432, section 3.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from ..call import Call, Cotangents, Rules
from ..emit import Tensor
from ..prepare import node_label

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
    """1/scale where the integer type can hold the value, 0 where it was clipped.

    Of an input of the model as it says. Within the model from the integers, so that the runtime's
    own arithmetic with them stays: 0 at the lowest one, where a Relu may be hidden; the highest
    passes, as it is as often reached as clipped, and is where the strongest evidence is.
    """
    kind = helper.tensor_dtype_to_np_dtype(n.output().dtype)
    if kind not in (np.int8, np.uint8, np.int16, np.uint16):
        raise n.refuse("its type is not an integer of 8 or 16 bits; quantise to one")
    n.graph.notes.append(STRAIGHT_THROUGH)
    slope, limits = g / scale_of(n).cast(g.dtype), np.iinfo(kind)
    if takes_an_input(n):
        level = level_of(n)
        return slope.masked((level > limits.min - 1) & (level < limits.max + 1))
    held = n.output().cast(TensorProto.INT32)  # runtimes compare few types
    return slope.masked(held > limits.min)


def level_of(n: Call) -> Tensor:
    """The integer before it is clipped, as a real number."""
    x, zero = n.input(), n.optional(2)
    scale = scale_of(n).cast(x.dtype)
    level = n.graph.op("Round", x / scale)
    if zero is None:
        return level
    shape = (1,) if zero.rank == 0 else scale.shape
    return level + zero.cast(x.dtype).reshape(*[-1 if item is None else item for item in shape])


def takes_an_input(n: Call) -> bool:
    """Whether it rounds an input of the model, itself or as a copy in a run at another image."""
    model = n.graph.model.graph
    given = {item.name for item in model.input}
    label = n.graph.labels.get(n.node.name, node_label(n.node))
    return any(node_label(each) == label and each.input[0] in given for each in model.node)


def dequantize_linear(n: Call, g: Tensor) -> Cotangents:
    """scale."""
    return g * scale_of(n).cast(g.dtype)


RULES: Rules = {
    "QuantizeLinear": quantize_linear,
    "DequantizeLinear": dequantize_linear,
}
