"""What a runtime fuses in the forward graph, so that new nodes do not stop it.

A tensor that has one reader may vanish into a fused kernel. A second reader would keep it alive,
the runtime would fall back to the unfused kernels, and the prediction would change in its last
bits. Two things prevent that:

- a function that exporters spell out in small nodes (Gelu, LayerNormalization) is differentiated as
  one *virtual* node, which reads nothing between its ends;
- a sum that is about to be fused with what follows is worked out anew for the backward, with its
  operands swapped: the same value, yet no common subexpression. A sum that becomes one Gemm with
  the product before it may be read; there it is the product that no new node reads.

The forward nodes themselves are never touched.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import onnx
from onnx import TensorProto, helper

from .prepare import Facts

SWALLOWED = frozenset(
    {"Gelu", "FastGelu", "LayerNormalization", "SimplifiedLayerNormalization",
     "SkipLayerNormalization"}
)  # fmt: skip
"""What ONNX Runtime fuses with an Add before it (BiasGelu, SkipLayerNormalization)."""

GEMM_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
"""Element types for which it makes MatMul and Add one Gemm."""


class Reader:
    """Who makes and who reads each tensor of a graph."""

    def __init__(self, nodes: Sequence[onnx.NodeProto], facts: Facts, kept: set[str]) -> None:
        self.facts = facts
        self.kept = kept
        self.makers = {name: node for node in nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in nodes:
            for name in node.input:
                self.readers[name].append(node)

    def maker(self, name: str, *op_types: str) -> onnx.NodeProto | None:
        """The node that makes a tensor, if it is of one of these kinds."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type in op_types else None

    def only_reader(self, name: str, *op_types: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor, if there is one and it is of one of these kinds."""
        readers = self.readers[name]
        if len(readers) != 1 or name in self.kept or readers[0].op_type not in op_types:
            return None
        return readers[0]

    def number(self, name: str) -> float | None:
        """The value of a constant of one element."""
        value = self.facts.constant(name) if self.facts.has(name) else None
        return float(value.ravel()[0]) if value is not None and value.size == 1 else None

    def is_constant(self, name: str) -> bool:
        """Whether a tensor has the same value in every run."""
        return self.facts.has(name) and self.facts.constant(name) is not None

    def operand(self, node: onnx.NodeProto, value: float) -> str | None:
        """The other operand of a node that has a constant of this value."""
        for index in (0, 1):
            found = self.number(node.input[index])
            if found is not None and math.isclose(found, value, rel_tol=1e-3):
                return str(node.input[1 - index])
        return None


def recognised(model: onnx.ModelProto, facts: Facts) -> list[onnx.NodeProto]:
    """The forward nodes with spelled-out functions as one virtual node each.

    Parameters
    ----------
    model : onnx.ModelProto
        Is read only.
    facts : Facts
        Of that model.

    Returns
    -------
    list of onnx.NodeProto
        For the walk only; topologically ordered like the model's.
    """
    reader = Reader(model.graph.node, facts, {item.name for item in model.graph.output})
    virtual: dict[str, onnx.NodeProto] = {}
    hidden: set[str] = set()
    for node in model.graph.node:
        match = MATCHERS.get(node.op_type)
        found = match(reader, node) if match else None
        if found is not None:
            inside, whole = found
            virtual[whole.output[0]] = whole
            hidden.update(name for item in inside for name in item.output)
    return [
        virtual.get(node.output[0], node)
        for node in model.graph.node
        if node.output[0] in virtual or node.output[0] not in hidden
    ]


Match = tuple[list[onnx.NodeProto], onnx.NodeProto] | None
"""The nodes of a pattern, and the one that stands for them."""


def gelu(reader: Reader, erf: onnx.NodeProto) -> Match:
    """0.5 x (1 + erf(x / sqrt 2)), the product in either order."""
    scaled = reader.maker(erf.input[0], "Div", "Mul")
    if scaled is None or reader.only_reader(erf.input[0], "Erf") is None:
        return None
    factor = reader.number(scaled.input[1])
    wanted = math.sqrt(2) if scaled.op_type == "Div" else math.sqrt(0.5)
    if factor is None or not math.isclose(factor, wanted, rel_tol=1e-3):
        return None
    x = scaled.input[0]
    plus = reader.only_reader(erf.output[0], "Add")
    if plus is None or reader.operand(plus, 1) is None:
        return None
    inside = [scaled, erf, plus]
    product = reader.only_reader(plus.output[0], "Mul")
    if product is None:
        return None
    other = next(name for name in product.input if name != plus.output[0])
    inside.append(product)
    half = reader.maker(other, "Mul")
    if other == x:
        last = reader.only_reader(product.output[0], "Mul")
        if last is None or reader.operand(last, 0.5) != product.output[0]:
            return None
        inside.append(last)
    elif half is not None and reader.operand(half, 0.5) == x and reader.only_reader(other, "Mul"):
        inside.append(half)
        last = product
    else:
        return None
    return inside, helper.make_node("Gelu", [x], [last.output[0]], name=last.name)


def layer_norm(reader: Reader, root: onnx.NodeProto) -> Match:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale + bias, over the last axes."""
    plus = reader.maker(root.input[0], "Add")
    if plus is None:
        return None
    epsilon = next((n for n in map(reader.number, plus.input) if n is not None), None)
    mean_square = next(
        (n for n in (reader.maker(name, "ReduceMean") for name in plus.input) if n), None
    )
    square = reader.maker(mean_square.input[0], "Pow") if mean_square is not None else None
    centred = reader.maker(square.input[0], "Sub") if square is not None else None
    mean = reader.maker(centred.input[1], "ReduceMean") if centred is not None else None
    over = reader.only_reader(root.output[0], "Div")
    if epsilon is None or mean is None or over is None:
        return None
    assert centred is not None
    assert square is not None
    assert mean_square is not None
    if (
        over.input[0] != centred.output[0]
        or mean.input[0] != centred.input[0]
        or len(reader.readers[centred.output[0]]) != 2
        or reader.number(square.input[1]) != 2
    ):
        return None
    x, axis = mean.input[0], last_axis(reader, mean)
    scaled = reader.only_reader(over.output[0], "Mul")
    shifted = reader.only_reader(scaled.output[0], "Add") if scaled is not None else None
    if scaled is None or shifted is None or axis is None or axis != last_axis(reader, mean_square):
        return None
    scale = next(name for name in scaled.input if name != over.output[0])
    bias = next(name for name in shifted.input if name != scaled.output[0])
    if not (reader.is_constant(scale) and reader.is_constant(bias)):
        return None
    whole = helper.make_node(
        "LayerNormalization",
        [x, scale, bias],
        [shifted.output[0]],
        name=shifted.name,
        axis=axis,
        epsilon=epsilon,
    )
    return [mean, centred, square, mean_square, plus, root, over, scaled, shifted], whole


def last_axis(reader: Reader, mean: onnx.NodeProto) -> int | None:
    """The first of the reduced axes, if they are all the last ones."""
    shape = reader.facts.shape(mean.input[0])
    given = next((item.ints for item in mean.attribute if item.name == "axes"), None)
    if given is None and len(mean.input) > 1:
        value = reader.facts.constant(mean.input[1])
        given = None if value is None else value.tolist()
    if shape is None or not given:
        return None
    axes = sorted(axis % len(shape) for axis in given)
    return axes[0] if axes == list(range(axes[0], len(shape))) else None


MATCHERS: dict[str, Callable[[Reader, onnx.NodeProto], Match]] = {
    "Erf": gelu,
    "Sqrt": layer_norm,
}
"""Patterns by the operator that gives them away."""


def swallowed(
    model: onnx.ModelProto, facts: Facts, nodes: Sequence[onnx.NodeProto]
) -> dict[str, onnx.NodeProto]:
    """Sums that a runtime fuses with their only reader, and biases added just before, by name.

    Parameters
    ----------
    model : onnx.ModelProto
    facts : Facts
    nodes : sequence of onnx.NodeProto
        What `recognised` gave.
    """
    reader = Reader(nodes, facts, {item.name for item in model.graph.output})
    found: dict[str, onnx.NodeProto] = {}
    for node in reversed(nodes):
        last = reader.only_reader(node.output[0], "Add", *SWALLOWED)
        if node.op_type == "Add" and last is not None and not becomes_gemm(reader, node):
            is_bias = last.output[0] in found and any(map(reader.is_constant, node.input))
            if last.op_type in SWALLOWED or is_bias:
                found[node.output[0]] = node
    return found


def becomes_gemm(reader: Reader, add: onnx.NodeProto) -> bool:
    """Whether a runtime makes this sum and the product before it one Gemm, which it does first.

    Of more than two axes ONNX Runtime makes two where it knows all sizes. The sum can then be read
    without harm, and the product cannot.
    """
    facts = reader.facts
    for name, other in (add.input, add.input[::-1]):
        product = reader.maker(name, "MatMul")
        if product is not None and reader.only_reader(name, "Add") is not None:
            x, weights, bias = map(facts.shape, (*product.input, other))
            if x is None or weights is None or bias is None or facts.dtype(name) not in GEMM_TYPES:
                return False
            is_vector = bias == weights[-1:]
            return len(weights) == 2 and (
                (len(x) == 2 and (is_vector or len(bias) == 2)) or (is_vector and None not in x)
            )
    return False
