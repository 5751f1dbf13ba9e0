"""Arithmetic, one element at a time. The walk sums over broadcast axes."""

from __future__ import annotations

import math

from ..call import Call, Cotangents, Rules
from ..emit import Tensor


def add(n: Call, g: Tensor) -> Cotangents:
    """d(a + b) = da + db; for any number of operands (Sum)."""
    return [g] * len(n.x)


def sub(n: Call, g: Tensor) -> Cotangents:
    """d(a - b) = da - db."""
    return g, -g if n.wanted[1] else None


def mul(n: Call, g: Tensor) -> Cotangents:
    """d(ab) = b da + a db."""
    a, b = n.input(0), n.input(1)
    return g * b if n.wanted[0] else None, g * a if n.wanted[1] else None


def div(n: Call, g: Tensor) -> Cotangents:
    """d(a/b) = da/b - (a/b) db/b."""
    b, y = n.input(1), n.output()
    return g / b if n.wanted[0] else None, -g * y / b if n.wanted[1] else None


def neg(n: Call, g: Tensor) -> Cotangents:
    """d(-x) = -dx."""
    return -g


def power(n: Call, g: Tensor) -> Cotangents:
    """d(a^b) = b a^(b-1) da + y log(a) db, the first 0 where b is 0, the second where a is 0."""
    a, y = n.input(0), n.output()
    b = n.input(1).cast(a.dtype)
    where, slope, growth = n.graph.where, None, None
    if n.wanted[0]:
        if b.value is not None and b.value.size == 1 and float(b.value.ravel()[0]) == 2:
            return g * a * 2
        slope = g * where(b.equals(0), b * 0, b * a ** (b - 1))
    if n.wanted[1]:
        is_positive = a > 0
        growth = g * y * where(is_positive, n.graph.op("Log", where(is_positive, a, 1)), 0)
    return slope, growth


def sqrt(n: Call, g: Tensor) -> Cotangents:
    """d sqrt(x) = dx / (2 y)."""
    return g / (n.output() * 2)


def reciprocal(n: Call, g: Tensor) -> Cotangents:
    """d(1/x) = -y^2 dx."""
    return -g * n.output() * n.output()


def exp(n: Call, g: Tensor) -> Cotangents:
    """d exp(x) = y dx."""
    return g * n.output()


def log(n: Call, g: Tensor) -> Cotangents:
    """d log(x) = dx / x."""
    return g / n.input()


def absolute(n: Call, g: Tensor) -> Cotangents:
    """d|x| = sign(x) dx, 0 at 0."""
    return g * n.graph.op("Sign", n.input())


def erf(n: Call, g: Tensor) -> Cotangents:
    """d erf(x) = 2/sqrt(pi) exp(-x^2) dx."""
    x = n.input()
    return g / n.graph.op("Exp", x * x) * (2 / math.sqrt(math.pi))


def sin(n: Call, g: Tensor) -> Cotangents:
    """d sin(x) = cos(x) dx."""
    return g * n.graph.op("Cos", n.input())


def cos(n: Call, g: Tensor) -> Cotangents:
    """d cos(x) = -sin(x) dx."""
    return -g * n.graph.op("Sin", n.input())


def atan(n: Call, g: Tensor) -> Cotangents:
    """d atan(x) = dx / (1 + x^2)."""
    x = n.input()
    return g / (x * x + 1)


def extremum(n: Call, g: Tensor) -> Cotangents:
    """Max and Min: to the operand that was taken, in equal parts where several were."""
    y = n.output()
    taken = [n.input(i).equals(y).cast(y.dtype) for i in range(len(n.x))]
    count = taken[0]
    for mask in taken[1:]:
        count = count + mask
    share = g / count
    return [share * mask if want else None for mask, want in zip(taken, n.wanted, strict=True)]


def mean(n: Call, g: Tensor) -> Cotangents:
    """Mean of the operands."""
    return [g / len(n.x)] * len(n.x)


def where(n: Call, g: Tensor) -> Cotangents:
    """To the operand that was taken; the condition has no derivative."""
    condition = n.input(0)
    other = n.graph.op("Not", condition)
    return (
        None,
        g.masked(condition) if n.wanted[1] else None,
        g.masked(other) if n.wanted[2] else None,
    )


def cast(n: Call, g: Tensor) -> Cotangents:
    """The same values as another real type; the walk stops at integers."""
    return g.cast(n.input().dtype)


def identity(n: Call, g: Tensor) -> Cotangents:
    """The same again."""
    return g


def dropout(n: Call, g: Tensor) -> Cotangents:
    """At inference the same again."""
    training = n.optional(2)
    if training is not None and (training.value is None or training.value.any()):
        raise n.refuse("it is in training mode; export the model after model.eval()")
    return g


def step(n: Call, g: Tensor) -> Cotangents:
    """Floor, Ceil, Round, Sign: zero wherever the derivative exists."""
    return g * 0


RULES: Rules = {
    "Add": add,
    "Sum": add,
    "Sub": sub,
    "Mul": mul,
    "Div": div,
    "Neg": neg,
    "Pow": power,
    "Sqrt": sqrt,
    "Reciprocal": reciprocal,
    "Exp": exp,
    "Log": log,
    "Abs": absolute,
    "Erf": erf,
    "Sin": sin,
    "Cos": cos,
    "Atan": atan,
    "Max": extremum,
    "Min": extremum,
    "Mean": mean,
    "Where": where,
    "Cast": cast,
    "Identity": identity,
    "Dropout": dropout,
    "Floor": step,
    "Ceil": step,
    "Round": step,
    "Sign": step,
}
