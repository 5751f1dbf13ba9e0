"""Guided backpropagation and deconvnet: replacements of the Relu rule.

On a graph every Relu is seen, functional or not, so none can be missed. Clip from 0 is one too
(ReLU6, a clamp). The rules have no meaning for other activations; a network that has them is
refused, as is one with an operator that may hold one.
"""

from __future__ import annotations

from collections.abc import Callable

from ..call import Call, Cotangents, Rule, Rules
from ..emit import Tensor
from .activation import is_rectifier


def guided(gradient: Rule) -> Rule:
    """1[g > 0] before the own derivative; Springenberg et al. 2015, section 3.4."""
    return lambda n, g: gradient(n, n.graph.op("Relu", g))


def deconvnet(gradient: Rule) -> Rule:
    """1[g > 0] g whatever went forward; Zeiler and Fergus 2014, section 2.1."""
    return lambda n, g: n.graph.op("Relu", g)


REMEDY = "use saliency, input-x-gradient or a CAM method"


def undefined(n: Call, g: Tensor) -> Cotangents:
    """Any other activation."""
    raise n.refuse(
        f"guided backpropagation and deconvnet are defined for Relu and Clip from 0 only; {REMEDY}"
    )


def unclear(n: Call, g: Tensor) -> Cotangents:
    """What may be an activation that is spelled out."""
    raise n.refuse(
        "guided backpropagation and deconvnet cannot tell whether it stands for a Relu; export "
        f"that as Relu or Clip from 0, or {REMEDY}"
    )


def where_known(gradient: Rule) -> Rule:
    """A choice that is the same for every image bends nothing."""
    return lambda n, g: (unclear if n.input(0).value is None else gradient)(n, g)


def from_zero(rule: Rule) -> Rule:
    """The rule for a Clip that is a Relu."""
    return lambda n, g: (rule if is_rectifier(n) else undefined)(n, g)


OTHERS = (
    "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Swish", "Mish", "HardSwish", "Softplus",
    "Softsign", "ThresholdedRelu", "Erf", "Sigmoid", "Tanh", "HardSigmoid", "QuantizeLinear",
)  # fmt: skip
"""Quantising tools drop a Relu before QuantizeLinear, whose lower end then takes its place."""

CHOICES = ("Max", "Min")


def replaced(gradient: Rules, rectifier: Callable[[Rule], Rule]) -> Rules:
    """The gradient's table with other rules for Relu and its like and none for other activations.

    Parameters
    ----------
    gradient : mapping of str to Rule
    rectifier : callable
        `guided` or `deconvnet`: from a rectifier's derivative to the rule that takes its place.
    """
    return {
        **gradient,
        **dict.fromkeys(OTHERS, undefined),
        **dict.fromkeys(CHOICES, unclear),
        "Where": where_known(gradient["Where"]),
        "Clip": from_zero(rectifier(gradient["Clip"])),
        "Relu": rectifier(gradient["Relu"]),
    }
