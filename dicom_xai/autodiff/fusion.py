"""What a runtime fuses in the forward graph, so that new nodes do not stop it.

A tensor that has one reader may vanish into a fused kernel. A second reader would keep it alive,
the runtime would fall back to the unfused kernels, and the prediction would change in its last
bits. Three things prevent that:

- a function that exporters spell out in small nodes (Gelu, Swish, LayerNormalization,
  RMSNormalization) is differentiated as one *virtual* node, which reads nothing between its ends;
- a sum that is about to be fused with what follows is worked out anew for the backward, with its
  operands swapped: the same value, yet no common subexpression. A sum that becomes one Gemm with
  the product before it may be read; there it is the product that no new node reads;
- what is rounded to 8 bits next is read as the model goes on with it, from the integers: between
  them the runtime computes with integers alone.

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
     "SkipLayerNormalization", "RMSNormalization"}
)  # fmt: skip
"""What ONNX Runtime fuses with an Add before it (BiasGelu, SkipLayerNormalization and its like)."""

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

    def other(self, node: onnx.NodeProto, name: str) -> str:
        """The operand of a node of two that is not this one, or this one twice."""
        return str(node.input[1] if node.input[0] == name else node.input[0])

    def is_closed(self, inside: Sequence[onnx.NodeProto], last: onnx.NodeProto) -> bool:
        """Whether nothing but these nodes reads what they make, the last one's output aside."""
        outputs = {name for node in inside for name in node.output} - set(last.output)
        return outputs.isdisjoint(self.kept) and all(
            reader in inside for name in outputs for reader in self.readers[name]
        )

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
        matchers = MATCHERS.get(node.op_type, ())
        found = next(filter(None, (match(reader, node) for match in matchers)), None)
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
    tail = half_of_one_plus(reader, erf)
    if tail is None or tail[0] != x:
        return None
    _, inside, last = tail
    return [scaled, erf, *inside], helper.make_node("Gelu", [x], [last.output[0]], name=last.name)


def tanh_gelu(reader: Reader, tanh: onnx.NodeProto) -> Match:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), however the polynomial is written."""
    tail = half_of_one_plus(reader, tanh)
    found = None if tail is None else polynomial(reader, tanh.input[0], tail[0])
    if tail is None or found is None:
        return None
    x, inside, last = tail
    terms, below = found
    inside = [*below, tanh, *inside]
    c = math.sqrt(2 / math.pi)
    wanted = {1: c, 3: c * 0.044715}
    if terms.keys() != wanted.keys() or not reader.is_closed(inside, last):
        return None
    if not all(math.isclose(terms[power], wanted[power], rel_tol=1e-3) for power in wanted):
        return None
    whole = helper.make_node("Gelu", [x], [last.output[0]], name=last.name, approximate="tanh")
    return inside, whole


def half_of_one_plus(
    reader: Reader, bent: onnx.NodeProto
) -> tuple[str, list[onnx.NodeProto], onnx.NodeProto] | None:
    """x, the nodes and the last of them, where they make 0.5 x (1 + bent) in any order."""
    plus = reader.only_reader(bent.output[0], "Add")
    if plus is None or reader.operand(plus, 1) is None:
        return None
    product = reader.only_reader(plus.output[0], "Mul")
    if product is None:
        return None
    other = reader.other(product, plus.output[0])
    half = reader.maker(other, "Mul")
    x = None if half is None else reader.operand(half, 0.5)
    if half is not None and x is not None and reader.only_reader(other, "Mul"):
        return x, [plus, product, half], product
    last = reader.only_reader(product.output[0], "Mul")
    if last is None:
        return None
    if reader.operand(product, 0.5) is not None:
        return reader.other(last, product.output[0]), [plus, product, last], last
    if reader.operand(last, 0.5) != product.output[0]:
        return None
    return other, [plus, product, last], last


Terms = dict[int, float]
"""A polynomial: the factor of each power."""


def polynomial(reader: Reader, name: str, x: str) -> tuple[Terms, list[onnx.NodeProto]] | None:
    """A tensor as a polynomial of another one, and the nodes that work it out."""
    number = reader.number(name)
    if name == x or number is not None:
        return {1: 1.0} if name == x else {0: number or 0.0}, []
    node = reader.maker(name, "Add", "Mul", "Pow")
    if node is None:
        return None
    left = polynomial(reader, node.input[0], x)
    right = polynomial(reader, node.input[1], x)
    if left is None or right is None:
        return None
    (one, before), (other, beside) = left, right
    nodes = [*before, *beside, node]
    if node.op_type == "Add":
        return {power: one.get(power, 0) + other.get(power, 0) for power in one | other}, nodes
    if node.op_type == "Mul":
        return product_of(one, other), nodes
    if other.keys() != {0} or other[0] not in (2, 3):
        return None
    square = product_of(one, one)
    return square if other[0] == 2 else product_of(square, one), nodes


def product_of(one: Terms, other: Terms) -> Terms:
    """Of two polynomials."""
    result: Terms = defaultdict(float)
    for power, factor in one.items():
        for more, times in other.items():
            result[power + more] += factor * times
    return dict(result)


def swish(reader: Reader, sigmoid: onnx.NodeProto) -> Match:
    """x sigmoid(alpha x)."""
    last = reader.only_reader(sigmoid.output[0], "Mul")
    if last is None:
        return None
    x, inside, alpha = reader.other(last, sigmoid.output[0]), [sigmoid, last], 1.0
    if sigmoid.input[0] != x:
        scaled = reader.maker(sigmoid.input[0], "Mul")
        number = None if scaled is None else reader.number(reader.other(scaled, x))
        if scaled is None or number is None or x not in scaled.input:
            return None
        inside, alpha = [scaled, *inside], number
    if not reader.is_closed(inside, last):
        return None
    whole = helper.make_node("Swish", [x], [last.output[0]], name=last.name, alpha=alpha)
    return inside, whole


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


def rms_norm(reader: Reader, root: onnx.NodeProto) -> Match:
    """x / sqrt(mean(x^2) + epsilon) * scale, over the last axes; or x (1 / sqrt(...)) * scale."""
    plus = reader.maker(root.input[0], "Add")
    epsilon = next(filter(None, map(reader.number, plus.input)), None) if plus else None
    means = [reader.maker(name, "ReduceMean") for name in plus.input] if plus else []
    mean = next(filter(None, means), None)
    square = reader.maker(mean.input[0], "Pow") if mean else None
    over = reader.only_reader(root.output[0], "Div", "Reciprocal")
    if plus is None or epsilon is None or mean is None or square is None or over is None:
        return None
    x, inside, normed = square.input[0], [square, mean, plus, root, over], over
    if over.op_type == "Reciprocal" or reader.number(over.input[0]) == 1:
        times = reader.only_reader(over.output[0], "Mul")
        if times is None or reader.other(times, over.output[0]) != x:
            return None
        inside, normed = [*inside, times], times
    elif over.input[0] != x:
        return None
    last, axis = reader.only_reader(normed.output[0], "Mul"), last_axis(reader, mean)
    if last is None or axis is None or reader.number(square.input[1]) != 2:
        return None
    scale = reader.other(last, normed.output[0])
    inside.append(last)
    if not (reader.is_constant(scale) and reader.is_closed(inside, last)):
        return None
    whole = helper.make_node(
        "RMSNormalization", [x, scale], [last.output[0]], name=last.name, axis=axis, epsilon=epsilon
    )
    return inside, whole


def last_axis(reader: Reader, mean: onnx.NodeProto) -> int | None:
    """The first of the reduced axes, if they are all the last ones."""
    if any(item.name == "keepdims" and item.i == 0 for item in mean.attribute):
        return None
    shape = reader.facts.shape(mean.input[0])
    given = next((item.ints for item in mean.attribute if item.name == "axes"), None)
    if given is None and len(mean.input) > 1:
        value = reader.facts.constant(mean.input[1])
        given = None if value is None else value.tolist()
    if shape is None or not given:
        return None
    axes = sorted(axis % len(shape) for axis in given)
    return axes[0] if axes == list(range(axes[0], len(shape))) else None


MATCHERS: dict[str, tuple[Callable[[Reader, onnx.NodeProto], Match], ...]] = {
    "Erf": (gelu,),
    "Tanh": (tanh_gelu,),
    "Sigmoid": (swish,),
    "Sqrt": (layer_norm, rms_norm),
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


EXACT = frozenset(
    {"MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Max", "Min", "Clip", "HardSigmoid",
     "Sqrt", "ReduceL2"}
)  # fmt: skip
"""Their rules compare their own value with another one, or divide by it: it must not be rounded."""


def rounded(
    model: onnx.ModelProto, facts: Facts, nodes: Sequence[onnx.NodeProto]
) -> dict[str, onnx.NodeProto]:
    """What makes integers of a tensor that nothing else reads, by the tensor's name.

    Parameters as `swallowed`.
    """
    reader = Reader(nodes, facts, {item.name for item in model.graph.output})
    found: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        name = node.output[0]
        last = reader.only_reader(name, "QuantizeLinear")
        if last is not None and node.op_type not in EXACT:
            is_same_type = facts.has(name) and facts.dtype(name) == facts.dtype(last.input[1])
            if is_same_type and not any(item.name == "block_size" for item in last.attribute):
                found[name] = last
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
