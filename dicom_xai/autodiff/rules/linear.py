"""Products with weights: Gemm, MatMul, Einsum, Conv, ConvTranspose.

The derivative with respect to the data is the transposed map, which needs the weights only.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..call import Call, Cotangents, Rules
from ..emit import INT64_MIN, Graph, Tensor, attributes_of
from .layout import once
from .window import Window, crop, transposed_window_of, window_of

BLOCK = 16
"""Channels that a convolution of ONNX Runtime works out at once, needed or not: at an image of one
channel all but one would be thrown away."""

MADE_BY_WEIGHTS = ("Conv", "ConvTranspose", "MatMul")
"""What the derivatives of layers with weights are, their second input the weights."""


def matmul(n: Call, g: Tensor) -> Cotangents:
    """d(AB) = dA B + A dB, so that gA = g B^T and gB = A^T g; vectors are one-row matrices."""
    a, b = n.input(0), n.input(1)
    if a.rank == 1:
        g = g.unsqueeze(g.rank - 1 if b.rank > 1 else 0)
    if b.rank == 1:
        g = g.unsqueeze(g.rank)
    left = a.unsqueeze(0) if a.rank == 1 else a
    right = b.unsqueeze(1) if b.rank == 1 else b
    ga = g @ swap(right) if n.wanted[0] else None
    gb = swap(left) @ g if n.wanted[1] else None
    if ga is not None and a.rank == 1:
        ga = ga.sum([ga.rank - 2], keep=False)
    if gb is not None and b.rank == 1:
        gb = gb.sum([gb.rank - 1], keep=False)
    return ga, gb


def gemm(n: Call, g: Tensor) -> Cotangents:
    """y = alpha A' B' + beta C, where ' is an optional transpose."""
    a, b = n.input(0), n.input(1)
    alpha, beta = n.attribute("alpha", 1.0), n.attribute("beta", 1.0)
    flip_a, flip_b = n.attribute("transA", 0), n.attribute("transB", 0)
    op, wants_c = n.graph.op, len(n.x) > 2 and n.wanted[2]
    ga = gb = None
    if n.wanted[0] and flip_a:
        ga = op("Gemm", b, g, alpha=alpha, transA=flip_b, transB=1)
    elif n.wanted[0]:
        ga = op("Gemm", g, b, alpha=alpha, transB=1 - flip_b)
    if n.wanted[1] and flip_b:
        gb = op("Gemm", g, a, alpha=alpha, transA=1, transB=flip_a)
    elif n.wanted[1]:
        gb = op("Gemm", a, g, alpha=alpha, transA=1 - flip_a)
    return ga, gb, g * beta if wants_c else None


def einsum(n: Call, g: Tensor) -> Cotangents:
    """The same equation with the result and the wanted operand in each other's place."""
    terms, result = spelled_out(n)
    if any(len(set(term)) < len(term) for term in terms):
        raise n.refuse("its equation takes a diagonal; write it with other operators")
    grads: list[Tensor | None] = []
    for index, term in enumerate(terms):
        if not n.wanted[index]:
            grads.append(None)
            continue
        others = [(item, n.input(i)) for i, item in enumerate(terms) if i != index]
        seen = set(result).union(*(item for item, _ in others))
        kept = "".join(item for item in term if item in seen)
        found = contracted([(result, g), *others], kept)
        missing = [axis for axis, item in enumerate(term) if item not in seen]
        grads.append(found.unsqueeze(*missing) if missing else found)
    return grads


def contracted(operands: Sequence[tuple[str, Tensor]], kept: str) -> Tensor:
    """An Einsum, of two (batches of) matrices as MatMul, which need not copy what it reads."""
    terms, tensors = [term for term, _ in operands], [tensor for _, tensor in operands]
    if len(terms) == 2 and all(t[:-2] == kept[:-2] and len(t) == len(kept) for t in terms):
        (left, a), (right, b) = sorted(operands, key=lambda item: kept[-2] not in item[0])
        if set(left[-2:]) ^ set(right[-2:]) == set(kept[-2:]):
            a = a if left[-2] == kept[-2] else swap(a)
            b = b if right[-1] == kept[-1] else swap(b)
            if a.graph.agrees(a, -1, b, -2):
                return a @ b
    return tensors[0].graph.op("Einsum", *tensors, equation=",".join(terms) + "->" + kept)


def spelled_out(n: Call) -> tuple[list[str], str]:
    """The letters of each operand and of the result; an ellipsis gets capitals, last axis last."""
    left, arrow, result = n.attribute("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted(set(left) - set(",."))
        once = "".join(item for item in letters if left.count(item) == 1)
        result = "..." + once if "." in left else once
    wide = [n.input(index).rank - len(term.replace("...", "")) for index, term in enumerate(terms)]
    counts = [count if "." in term else 0 for term, count in zip(terms, wide, strict=True)]
    free = [item for item in string.ascii_uppercase if item not in left]

    def filled(term: str, count: int) -> str:
        return term.replace("...", "".join(free[len(free) - count :]))

    pairs = zip(terms, counts, strict=True)
    return [filled(term, count) for term, count in pairs], filled(result, max(counts))


def conv(n: Call, g: Tensor) -> Cotangents:
    """The transposed convolution of g with the same weights."""
    x, w, group = n.input(0), n.input(1), n.attribute("group", 1)
    spec = window_of(n, [w.size(axis) for axis in range(2, w.rank)])
    is_wide = group > 1 or w.size(1) >= BLOCK
    transpose = correlate if max(spec.strides) == 1 and is_wide else transposed

    def back(part: Tensor) -> Tensor:
        return transpose(n.graph, part, w, spec, group)

    is_one_place = max(*spec.reach, *spec.strides) == 1 and not any(spec.starts + spec.ends)
    found = (once(g, back) if is_one_place else back(g)) if n.wanted[0] else None
    return (
        found,
        weights_part(x, g, spec, group) if n.wanted[1] else None,
        bias_part(n, g),
    )


def weights_part(wide: Tensor, narrow: Tensor, spec: Window, group: int) -> Tensor:
    """What each weight of a convolution from `wide` to `narrow` meets, summed over all windows.

    A convolution too, of channels by channels: batch and channel change places within each group,
    strides and dilations theirs.
    """
    graph, ends = wide.graph, [max(end, 0) for end in spec.ends]
    for axis, end in enumerate(spec.ends, start=2):
        wide = wide.slice(axis, 0, end) if end < 0 else wide
    space = list(range(3, wide.rank + 1))

    def by_group(t: Tensor) -> tuple[Tensor, list[int]]:
        sizes = [t.size(axis) for axis in range(2, t.rank)]
        return t.reshape(-1, group, t.size(1) // group, *sizes), sizes

    (across, data), (down, taps) = by_group(wide), by_group(narrow)
    found = graph.op(
        "Conv",
        across.transpose([2, 1, 0, *space]).reshape(wide.size(1) // group, -1, *data),
        down.transpose([1, 2, 0, *space]).reshape(narrow.size(1), -1, *taps),
        strides=spec.dilations,
        dilations=spec.strides,
        pads=[*spec.starts, *ends],
        group=group,
    )
    return found.transpose([1, 0, *range(2, found.rank)])


def bias_part(n: Call, g: Tensor) -> Tensor | None:
    """The bias is added at every position of every image."""
    if len(n.x) < 3 or not n.wanted[2]:
        return None
    return g.sum([0, *range(2, g.rank)], keep=False)


def correlate(graph: Graph, g: Tensor, w: Tensor, spec: Window, group: int = 1) -> Tensor:
    """The transpose of a stride-1 convolution as a convolution with the weights turned round.

    Faster than ConvTranspose, at the price of a second copy of the weights in the file.
    """
    reach = [size - 1 for size in spec.reach]
    direct = spec.starts == spec.ends and all(
        0 <= p <= r for p, r in zip(spec.starts, reach, strict=True)
    )
    pads = [r - p if direct else r for p, r in zip(spec.starts, reach, strict=True)]
    found = graph.op(
        "Conv",
        g,
        turned(graph, w, group),
        kernel_shape=spec.kernel,
        dilations=spec.dilations,
        pads=pads + pads,
        group=group,
    )
    return found if direct else crop(found, spec.starts, spec.ends)


def turned(graph: Graph, w: Tensor, group: int) -> Tensor:
    """Weights with inputs and outputs swapped within each group, and every kernel mirrored."""
    out, into, *kernel = (w.size(axis) for axis in range(w.rank))
    order = [0, 2, 1, *range(3, w.rank + 1)]
    if w.value is not None:
        value = w.value.reshape(group, out // group, into, *kernel).transpose(order)
        value = np.flip(value, tuple(range(3, w.rank + 1)))
        return graph.constant(value.reshape(group * into, out // group, *kernel))
    for axis, size in enumerate(kernel, start=2):
        w = w if size == 1 else w.slice(axis, -1, INT64_MIN, -1)
    w = w.reshape(group, out // group, into, *kernel).transpose(order)
    return w.reshape(group * into, out // group, *kernel)


def transposed(graph: Graph, g: Tensor, w: Tensor, spec: Window, group: int = 1) -> Tensor:
    """The transpose of any convolution as ConvTranspose.

    Pads are symmetric or none, with a Slice after: execution providers on a GPU take no others.
    """
    slack = [p - q for p, q in zip(spec.starts, spec.ends, strict=True)]
    direct = all(0 <= rest < s for rest, s in zip(slack, spec.strides, strict=True))
    found = graph.op(
        "ConvTranspose",
        g,
        w,
        kernel_shape=spec.kernel,
        strides=spec.strides,
        dilations=spec.dilations,
        pads=spec.starts * 2 if direct else None,
        output_padding=slack if direct else [max(-end, 0) for end in spec.ends],
        group=group,
    )
    return found if direct else crop(found, spec.starts, [max(end, 0) for end in spec.ends])


def scaled(g: Tensor, factor: Tensor) -> Tensor:
    """g times a factor per channel, ``(channels, 1, ...)``, or per place of the last axis.

    Where constant weights made g, masked since or not, they take the factor up: one pass over the
    tensor less, and in a DenseNet there are as many as layers.
    """
    graph, node = g.graph, g.graph.maker(g)
    if node is not None and node.op_type in MADE_BY_WEIGHTS and factor.value is not None:
        a, w = (graph.tensor(name) for name in node.input)
        attributes, share = attributes_of(node), None
        if node.op_type == "MatMul":
            share = factor if factor.rank == 1 else None
        elif factor.shape[1:] == (1,) * (w.rank - 2):
            is_turned = node.op_type == "ConvTranspose"
            share = factor if is_turned else factor.reshape(-1, *[1] * (w.rank - 1))
            share = None if is_turned and attributes["group"] > 1 else share
        if w.value is not None and share is not None:
            return graph.op(node.op_type, a, w * share, **attributes)
    if node is not None and node.op_type == "Resize" and factor.shape[1:] == (1,) * (g.rank - 2):
        return once(g, lambda part: scaled(part, factor))
    if node is not None and node.op_type == "Mul":
        left, right = (graph.tensor(name) for name in node.input)
        inner = graph.maker(left)
        if inner is not None and inner.op_type in (*MADE_BY_WEIGHTS, "Resize"):
            return scaled(left, factor) * right
    return g * factor


def conv_transpose(n: Call, g: Tensor) -> Cotangents:
    """The convolution of g with the same weights."""
    x, w, bias = n.input(0), n.input(1), bias_part(n, g)
    group = n.attribute("group", 1)
    spec = transposed_window_of(n, [w.size(axis) for axis in range(2, w.rank)])
    # Output padding shows as a negative far pad: no weight reaches those positions of g.
    for axis, end in enumerate(spec.ends):
        if end < 0:
            g = g.slice(axis + 2, 0, end)
    ends = [max(end, 0) for end in spec.ends]
    weights = None
    if n.wanted[1]:
        weights = weights_part(g, x, replace(spec, ends=ends), group)
    if not n.wanted[0]:
        return None, weights, bias
    found = n.graph.op(
        "Conv",
        g,
        w,
        kernel_shape=spec.kernel,
        strides=spec.strides,
        dilations=spec.dilations,
        pads=[*spec.starts, *ends],
        group=group,
    )
    return found, weights, bias


def swap(matrix: Tensor) -> Tensor:
    """The last two axes in each other's place."""
    rank = matrix.rank
    return matrix.transpose([*range(rank - 2), rank - 1, rank - 2])


RULES: Rules = {
    "MatMul": matmul,
    "Gemm": gemm,
    "Einsum": einsum,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
}
