"""Nonlinearities. Slopes come from the output where they can, so that Conv+Relu fusions survive."""

from __future__ import annotations

import math

from ..call import Call, Cotangents, Rules
from ..emit import Tensor


def relu(n: Call, g: Tensor) -> Cotangents:
    """1[y > 0]."""
    return g * n.output().is_positive()


def leaky_relu(n: Call, g: Tensor) -> Cotangents:
    """1 where y > 0, else alpha; a negative alpha hides the sign of x in y."""
    alpha = float(n.attribute("alpha", 0.01))
    sign = n.output() if alpha >= 0 else n.input()
    return g * ((sign > 0).cast(g.dtype) * (1 - alpha) + alpha)


def prelu(n: Call, g: Tensor) -> Cotangents:
    """1 where x > 0, else the slope, itself a possible source."""
    x, slope = n.input(0), n.input(1)
    above = (x > 0).cast(g.dtype)
    below = 1 - above
    return g * (above + below * slope), g * x * below if n.wanted[1] else None


def elu(n: Call, g: Tensor) -> Cotangents:
    """1 where y > 0, else y + alpha; a negative alpha hides the sign of x in y."""
    y, alpha = n.output(), n.attribute("alpha", 1.0)
    sign = y if alpha >= 0 else n.input()
    return n.graph.where(sign > 0, g, g * (y + alpha))


def selu(n: Call, g: Tensor) -> Cotangents:
    """gamma where y > 0, else y + alpha gamma; another gamma hides the sign of x in y."""
    alpha = n.attribute("alpha", 1.67326319217681884765625)
    gamma = n.attribute("gamma", 1.05070102214813232421875)
    sign = n.output() if gamma > 0 else n.input()
    return n.graph.where(sign > 0, g * gamma, g * (n.output() + alpha * gamma))


def celu(n: Call, g: Tensor) -> Cotangents:
    """1 where x > 0, else exp(x / alpha) = y / alpha + 1."""
    alpha = n.attribute("alpha", 1.0)
    return n.graph.where(n.input() > 0, g, g * (n.output() / alpha + 1))


def sigmoid(n: Call, g: Tensor) -> Cotangents:
    """y (1 - y)."""
    y = n.output()
    return g * y * (1 - y)


def tanh(n: Call, g: Tensor) -> Cotangents:
    """1 - y^2."""
    y = n.output()
    return g * (1 - y * y)


def softplus(n: Call, g: Tensor) -> Cotangents:
    """sigmoid(x)."""
    return g * n.graph.op("Sigmoid", n.input())


def softsign(n: Call, g: Tensor) -> Cotangents:
    """1 / (1 + |x|)^2."""
    below = n.graph.op("Abs", n.input()) + 1
    return g / (below * below)


def hard_sigmoid(n: Call, g: Tensor) -> Cotangents:
    """alpha where 0 < y < 1, else 0."""
    y = n.output()
    return (g * float(n.attribute("alpha", 0.2))).masked((y > 0) & (y < 1))


def hard_swish(n: Call, g: Tensor) -> Cotangents:
    """0 up to -3, 1 from 3 on, x/3 + 1/2 between."""
    x, where = n.input(), n.graph.where
    return where(x > -3, where(x < 3, g * (x / 3 + 0.5), g), 0)


def swish(n: Call, g: Tensor) -> Cotangents:
    """s (1 + alpha x (1 - s)) with s = sigmoid(alpha x).

    1 - s is taken as sigmoid(-alpha x): the forward's own sigmoid, where it is a node, must keep
    one reader or the runtime does not fuse it.
    """
    x, alpha = n.input(), float(n.attribute("alpha", 1.0))
    rest = n.graph.op("Sigmoid", x * -alpha)
    return g * ((1 - rest) * (x * alpha * rest + 1))


def mish(n: Call, g: Tensor) -> Cotangents:
    """t + x sigmoid(x) (1 - t^2) with t = tanh(softplus(x))."""
    x, op = n.input(), n.graph.op
    t = op("Tanh", op("Softplus", x))
    return g * (t + x * op("Sigmoid", x) * (1 - t * t))


def gelu(n: Call, g: Tensor) -> Cotangents:
    """Phi(x) + x phi(x), or the derivative of the tanh form.

    Hendrycks and Gimpel, arXiv 1606.08415, section 2.
    """
    x, op = n.input(), n.graph.op
    if n.attribute("approximate", "none") == "none":
        z = x * math.sqrt(0.5)
        slope = z / op("Exp", z * z) * (1 / math.sqrt(math.pi))
        return g * ((op("Erf", z) + 1) * 0.5 + slope)
    c = math.sqrt(2 / math.pi)
    t = op("Tanh", (x + x * x * x * 0.044715) * c)
    return g * ((t + 1) * 0.5 + x * 0.5 * (1 - t * t) * (x * x * (3 * 0.044715) + 1) * c)


def thresholded_relu(n: Call, g: Tensor) -> Cotangents:
    """1[x > alpha]."""
    return g.masked(n.input() > n.attribute("alpha", 1.0))


def clip(n: Call, g: Tensor) -> Cotangents:
    """1 where y is between the bounds, 0 at them (as torch's hardtanh); none for the bounds."""
    y, inside = n.output(), g
    for index, above in ((1, True), (2, False)):
        bound = n.optional(index)
        if bound is not None:
            inside = inside.masked(y > bound if above else y < bound)
    return inside


def is_rectifier(n: Call) -> bool:
    """Whether a Clip begins at 0, as ReLU6 and a clamp do."""
    low = n.optional(1)
    return low is not None and low.value is not None and not low.value.any()


def softmax(n: Call, g: Tensor) -> Cotangents:
    """y (g - sum(g y)) along the axis."""
    y, axis = n.output(), n.attribute("axis", -1)
    return y * (g - (g * y).sum([axis]))


def log_softmax(n: Call, g: Tensor) -> Cotangents:
    """g - exp(y) sum(g) along the axis."""
    return g - n.graph.op("Exp", n.output()) * g.sum([n.attribute("axis", -1)])


RULES: Rules = {
    "Relu": relu,
    "LeakyRelu": leaky_relu,
    "PRelu": prelu,
    "Elu": elu,
    "Selu": selu,
    "Celu": celu,
    "Sigmoid": sigmoid,
    "Tanh": tanh,
    "Softplus": softplus,
    "Softsign": softsign,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Swish": swish,
    "Mish": mish,
    "Gelu": gelu,
    "ThresholdedRelu": thresholded_relu,
    "Clip": clip,
    "Softmax": softmax,
    "LogSoftmax": log_softmax,
}
