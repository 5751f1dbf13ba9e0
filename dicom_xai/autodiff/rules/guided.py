"""Guided backpropagation and deconvnet: replacements of the Relu rule.

On a graph every Relu is seen, functional or not, so none can be missed. The rules have no meaning
for other activations; a network that has them is refused.
"""

from __future__ import annotations

from ..call import Call, Cotangents, Rule, Rules
from ..emit import Tensor


def guided_relu(n: Call, g: Tensor) -> Cotangents:
    """1[y > 0] 1[g > 0] g; Springenberg et al. 2015, section 3.4."""
    return n.graph.op("Relu", g).masked(n.output() > 0)


def deconvnet_relu(n: Call, g: Tensor) -> Cotangents:
    """1[g > 0] g; Zeiler and Fergus 2014, section 2.1."""
    return n.graph.op("Relu", g)


def undefined(n: Call, g: Tensor) -> Cotangents:
    """Any other activation, and what may hold one."""
    raise n.refuse(
        "guided backpropagation and deconvnet are defined for Relu only; use saliency, "
        "input-x-gradient or a CAM method"
    )


OTHERS = (
    "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Swish", "Mish", "HardSwish", "Softplus",
    "Softsign", "ThresholdedRelu", "Erf", "Sigmoid", "Tanh", "HardSigmoid", "QuantizeLinear",
)  # fmt: skip
"""Quantising tools drop a Relu before QuantizeLinear, whose lower end then takes its place."""


def replaced(gradient: Rules, relu: Rule) -> Rules:
    """The gradient's table with another rule for Relu and none for other activations."""
    return {**gradient, **dict.fromkeys(OTHERS, undefined), "Relu": relu}
