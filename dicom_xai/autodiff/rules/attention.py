"""AttnLRP: relevance through transformers, as a gradient with four other rules.

With the cotangent as relevance per unit of activation, linear layers keep their own rule, and the
map is the image times what arrives. Achtibat et al. 2024, arXiv 2402.05602, sections 3.2 and 3.3.
"""

from __future__ import annotations

from ..call import Call, Cotangents, Rule, Rules
from ..contrib import DOMAIN
from ..emit import Tensor
from .norm import per_channel

BENT = (
    "Elu", "Selu", "Celu", "Softplus", "Softsign", "Tanh", "Sigmoid", "HardSigmoid", "Gelu",
    "Swish", "Mish", "HardSwish", "Clip", "ThresholdedRelu",
)  # fmt: skip
"""Activations for which y / x is not the derivative, as it is for Relu and its leaky kin."""

FUSED = tuple(f"{DOMAIN}.{name}" for name in ("Gelu", "BiasGelu", "FastGelu", "QuickGelu"))
"""The same in ONNX Runtime's optimised files; spelled out they would be products."""


def straight(n: Call, g: Tensor) -> Cotangents:
    """Identity rule: relevance passes an activation, so that g becomes g y / x."""
    return ratio(g, n.output(), n.input())


def ratio(g: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """g y / x, 0 where x is 0."""
    is_zero = x.equals(0)
    return g.graph.where(is_zero, 0, g * y / g.graph.where(is_zero, 1, x))


def straight_behind_bias(n: Call, g: Tensor) -> Cotangents:
    """The same of the sum that ONNX Runtime's fused activations start with."""
    bias = n.optional(1)
    x = n.input() if bias is None else n.input() + bias
    return [ratio(g, n.output(), x)] * len(n.x)


def uniform(rule: Rule) -> Rule:
    """A product of two activations gives half of its relevance to each."""

    def halved(n: Call, g: Tensor) -> Cotangents:
        return rule(n, g * 0.5 if sum(n.wanted[:2]) > 1 else g)

    return halved


def centred(g: Tensor, x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    """Normalisation with its deviation held constant."""
    away = x - x.mean(axes)
    std = x.graph.op("Sqrt", (away * away).mean(axes) + epsilon)
    g = g / std
    return g - g.mean(axes)


def layer_normalization(n: Call, g: Tensor) -> Cotangents:
    """Over the axes from `axis` on."""
    x = n.input()
    axes = list(range(n.attribute("axis", -1) % x.rank, x.rank))
    return centred(g * n.input(1), x, axes, n.attribute("epsilon", 1e-5))


def instance_normalization(n: Call, g: Tensor) -> Cotangents:
    """Over space."""
    x = n.input()
    gamma = per_channel(n.input(1), x.rank)
    return centred(g * gamma, x, list(range(2, x.rank)), n.attribute("epsilon", 1e-5))


def rms_normalization(n: Call, g: Tensor) -> Cotangents:
    """A constant factor."""
    x = n.input()
    axes = list(range(n.attribute("axis", -1) % x.rank, x.rank))
    rms = n.graph.op("Sqrt", (x * x).mean(axes) + n.attribute("epsilon", 1e-5))
    return g * n.input(1) / rms


def replaced(gradient: Rules) -> Rules:
    """The gradient's table with AttnLRP's rules."""
    return {
        **gradient,
        **dict.fromkeys(BENT, straight),
        **dict.fromkeys(FUSED, straight_behind_bias),
        "MatMul": uniform(gradient["MatMul"]),
        "Mul": uniform(gradient["Mul"]),
        "Einsum": uniform(gradient["Einsum"]),
        "LayerNormalization": layer_normalization,
        "InstanceNormalization": instance_normalization,
        "RMSNormalization": rms_normalization,
    }
