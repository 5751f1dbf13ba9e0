"""Layer-wise relevance propagation: what the walk hands on is relevance, not a derivative.

A linear layer with input a, weights w and output z gives ``R_i = sum_j a_i w_ij / z_j R_j``, which
is its own vector-Jacobian product: ``a * VJP(R / z)``. The rules differ in which parts of a and w
take part (`Term`). Bach et al. 2015; Montavon et al. 2019, "Layer-Wise Relevance Propagation: An
Overview", table 1. Biases take their share of relevance with them, as in zennit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx

from ..call import Call, Cotangents, Rule, Rules
from ..emit import Graph, Tensor, attributes_of
from . import recurrent
from .activation import is_rectifier

STABILISER = 1e-6
"""Keeps denominators from 0; Epsilon's own epsilon is a parameter."""

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CONVOLUTIONS = ("Conv", "ConvTranspose")

HOMOGENEOUS = (
    "Add", "Sub", "Sum", "Mean", "BatchNormalization", "AveragePool", "GlobalAveragePool",
    "ReduceMean", "ReduceSum", "Resize",
)  # fmt: skip
"""Operators that share relevance out by each input's part of the output."""

SCALED = ("Mul", "Div")
"""The same, where one operand is constant."""

REARRANGED = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Concat", "Split", "Slice",
    "Pad", "Gather", "Identity", "Dropout", "Cast", "MaxPool", "GlobalMaxPool", "ReduceMax",
    "DepthToSpace", "SpaceToDepth",
)  # fmt: skip
"""Operators that hand relevance on as they hand on a derivative; a maximum's winner takes all."""

PASSED = (
    "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Softplus", "ThresholdedRelu", "Tanh",
    "Gelu", "Swish", "Mish", "HardSwish", "Clip",
)  # fmt: skip
"""Activations: relevance goes through unchanged."""

KINKED = ("Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Clip")
"""Those that deep Taylor decomposition is derived for; of Clip, the one that begins at 0."""

Part = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """A part of a linear layer: some of its input times some of its weights.

    Attributes
    ----------
    data, weights : callable
        Which part.
    bias : callable or None
        Which part of the bias; None for no bias.
    sign : float
        Whether the part is added or taken off.
    """

    data: Part
    weights: Part
    bias: Part | None
    sign: float = 1.0


def whole(x: Tensor) -> Tensor:
    """All of it."""
    return x


def positive(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return x.graph.op("Relu", x)


def negative(x: Tensor) -> Tensor:
    """min(x, 0)."""
    return -x.graph.op("Relu", -x)


def ones(x: Tensor) -> Tensor:
    """1 everywhere."""
    return x.graph.scalar(1, x.dtype).expand_like(x)


def level(value: float) -> Part:
    """One number everywhere."""
    return lambda x: x.graph.scalar(value, x.dtype).expand_like(x)


def more(gamma: float, part: Part) -> Part:
    """Weights with one part of them emphasised."""
    return lambda w: w + part(w) * gamma


EPSILON = (Term(whole, whole, whole),)
POSITIVE = (Term(positive, positive, positive), Term(negative, negative, None))
NEGATIVE = (Term(positive, negative, negative), Term(negative, positive, None))
FLAT: tuple[Term, ...] = (Term(ones, ones, None),)
SQUARED = (Term(ones, lambda w: w * w, lambda b: b * b),)


def box(low: float, high: float) -> tuple[Term, ...]:
    """z^B for inputs between two bounds; Montavon et al. 2017, equation 17."""
    return (
        Term(whole, whole, whole),
        Term(level(low), positive, positive, -1.0),
        Term(level(high), negative, negative, -1.0),
    )


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """z moved away from 0 by epsilon."""
    return z + z.graph.where(z < 0, -z.graph.scalar(epsilon, z.dtype), epsilon)


def shared_out(
    gradient: Rules, n: Call, r: Tensor, terms: Sequence[Term], epsilon: float = STABILISER
) -> Tensor:
    """Relevance of the data of a linear layer, of which only some terms count."""
    calls = [again(n, term) for term in terms]
    z = calls[0].output() * terms[0].sign
    for call, term in zip(calls[1:], terms[1:], strict=True):
        z = z + call.output() * term.sign
    s = r / stabilised(z, epsilon)
    found: Tensor | None = None
    for call, term in zip(calls, terms, strict=True):
        given = gradient[n.node.op_type](call, s)
        g = given if isinstance(given, Tensor) or given is None else given[0]
        assert g is not None
        part = call.input() * g * term.sign
        found = part if found is None else found + part
    assert found is not None
    return found


def again(n: Call, term: Term) -> Call:
    """The same linear node of other operands."""
    data, weights, bias = term.data(n.input(0)), term.weights(n.input(1)), n.optional(2)
    operands: list[Tensor | None] = [data, weights]
    if bias is not None and term.bias is not None:
        operands.append(term.bias(bias))
    z = n.graph.op(n.node.op_type, *operands, **n.attributes)
    return replace(n, x=tuple(operands), y=(z,), wanted=(True, False, False)[: len(operands)])


def linear_rule(gradient: Rules, terms: Sequence[Term], epsilon: float = STABILISER) -> Rule:
    """The rule of a linear layer for these terms."""

    def rule(n: Call, r: Tensor) -> Cotangents:
        check_weights(n)
        return shared_out(gradient, n, r, terms, epsilon)

    return rule


def alpha_beta_rule(gradient: Rules, alpha: float, beta: float) -> Rule:
    """alpha times the positive contributions less beta times the negative; alpha - beta = 1."""

    def rule(n: Call, r: Tensor) -> Cotangents:
        check_weights(n)
        gain = shared_out(gradient, n, r, POSITIVE) * alpha
        return gain - shared_out(gradient, n, r, NEGATIVE) * beta if beta else gain

    return rule


def gamma_rule(gradient: Rules, gamma: float) -> Rule:
    """Contributions that go along with the output's sign count 1 + gamma times.

    The form for inputs of either sign, as in zennit.
    """
    up = (Term(positive, more(gamma, positive), more(gamma, positive)),
          Term(negative, more(gamma, negative), None))  # fmt: skip
    down = (Term(positive, more(gamma, negative), more(gamma, negative)),
            Term(negative, more(gamma, positive), None))  # fmt: skip

    def rule(n: Call, r: Tensor) -> Cotangents:
        check_weights(n)
        z, where = n.output(), n.graph.where
        above = shared_out(gradient, n, where(z > 0, r, 0), up)
        return above + shared_out(gradient, n, where(z < 0, r, 0), down)

    return rule


def check_weights(n: Call) -> None:
    """Refuse a product of two things that both depend on the image."""
    if n.wanted[1] or not n.wanted[0]:
        raise n.refuse("relevance of a product of two activations is undefined here; use attn-lrp")


def shared_rule(gradient: Rules, op_type: str) -> Rule:
    """Each input gets the part of the relevance that its part of the output is."""

    def rule(n: Call, r: Tensor) -> Cotangents:
        if op_type in SCALED and sum(n.wanted) > 1:
            raise n.refuse("relevance of a product of two activations is undefined; use attn-lrp")
        given = gradient[op_type](n, r / stabilised(n.output(), STABILISER))
        grads = (given,) if isinstance(given, Tensor) or given is None else tuple(given)
        pairs = zip(n.x, grads, n.wanted, strict=False)
        return [x * g if x is not None and g is not None and w else None for x, g, w in pairs]

    return rule


def passed(n: Call, r: Tensor) -> Cotangents:
    """Unchanged."""
    return r


def only_kinked(n: Call, r: Tensor) -> Cotangents:
    """Unchanged where deep Taylor decomposition is defined; Montavon et al. 2017, section 3."""
    if n.node.op_type not in KINKED or (n.node.op_type == "Clip" and not is_rectifier(n)):
        raise n.refuse(
            "deep Taylor decomposition is defined for Relu and its kin only; use lrp-epsilon, or "
            "attn-lrp where the model also normalises its activations"
        )
    return r


def undefined(n: Call, r: Tensor) -> Cotangents:
    """A normalisation, a gate, or whatever else relevance is not shared out by."""
    raise n.refuse("relevance has no rule for it; use attn-lrp, or input-x-gradient")


def with_norms_folded(graph: Graph, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes for the walk, batch norms taken into the linear layer whose output they alone read.

    A rule that looks at signs (z+, gamma, alpha-beta) has to see the weights that act, as the norm
    may turn their sign round; what comes out is the same.
    """
    makers = {node.output[0]: node for node in nodes}
    readers = Counter(name for node in nodes for name in node.input)
    folded = {}
    for norm in nodes:
        linear = makers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if linear is not None and readers[norm.input[0]] == 1:
            whole = taken_in(graph, linear, norm)
            if whole is not None:
                folded.update({linear.output[0]: None, norm.output[0]: whole})
    found = (folded.get(node.output[0], node) for node in nodes)
    return [node for node in found if node is not None]


def taken_in(graph: Graph, linear: onnx.NodeProto, norm: onnx.NodeProto) -> onnx.NodeProto | None:
    """One linear node that does what a linear node and a batch norm do; None where there is none.

    W' = f W and b' = f (b - mean) + beta with f = scale / sqrt(var + epsilon).
    """
    given = attributes_of(linear)
    first = {
        "Conv": True,
        "ConvTranspose": False,
        "Gemm": bool(given.get("transB", 0)),
    }.get(linear.op_type)
    weights = graph.tensor(linear.input[1]) if len(linear.input) > 1 else None
    is_plain = all(given.get(name, 1) == 1 for name in ("alpha", "beta"))
    is_grouped = linear.op_type == "ConvTranspose" and given.get("group", 1) != 1
    if first is None or weights is None or weights.value is None or is_grouped or not is_plain:
        return None
    scale, beta, mean, var = (graph.tensor(name) for name in norm.input[1:5])
    if any(item.value is None for item in (scale, beta, mean, var)):
        return None
    factor = scale / graph.op("Sqrt", var + float(attributes_of(norm).get("epsilon", 1e-5)))
    shape = [-1, *[1] * (weights.rank - 1)] if first else [1, -1, *[1] * (weights.rank - 2)]
    has_bias = len(linear.input) > 2 and linear.input[2]
    bias = beta - mean * factor
    if has_bias:
        bias = graph.tensor(linear.input[2]) * factor + bias
    whole = onnx.NodeProto()
    whole.CopyFrom(linear)
    whole.output[:] = norm.output[:1]
    whole.input[:] = [linear.input[0], (weights * factor.reshape(*shape)).name, bias.name]
    return whole


def table(gradient: Rules, convolution: Rule, dense: Rule, bent: Rule = passed) -> Rules:
    """A table of relevance rules.

    Parameters
    ----------
    gradient : mapping of str to Rule
    convolution, dense : Rule
        For convolutions, and for Gemm and MatMul.
    bent : Rule
        For activations.
    """
    return {
        **dict.fromkeys(gradient, undefined),
        **recurrent.RULES,
        **{name: gradient[name] for name in REARRANGED},
        **{name: shared_rule(gradient, name) for name in (*HOMOGENEOUS, *SCALED)},
        **dict.fromkeys(PASSED, bent),
        **dict.fromkeys(CONVOLUTIONS, convolution),
        "Gemm": dense,
        "MatMul": dense,
    }


def with_first(rules: Rules, first: Rule, nodes: Sequence[onnx.NodeProto], image: str) -> Rules:
    """The table with another rule for the linear layers that see the image itself."""
    seen, firsts = {image}, set()
    for node in nodes:
        if seen.isdisjoint(node.input):
            continue
        if node.op_type in LINEAR:
            firsts.add(node.output[0])
        else:
            seen.update(node.output)

    def choose(rule: Rule) -> Rule:
        def chosen(n: Call, r: Tensor) -> Cotangents:
            return (first if n.node.output[0] in firsts else rule)(n, r)

        return chosen

    return {**rules, **{name: choose(rules[name]) for name in LINEAR}}
