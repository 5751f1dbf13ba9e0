"""Picking elements by number: the transpose puts them back where they were taken."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from ..call import Call, Cotangents, Rules
from ..emit import Tensor
from .layout import place, zeros

SCATTER_ADD_OPSET = 16
"""ScatterElements and ScatterND can add from here on."""


def gather(n: Call, g: Tensor) -> Cotangents:
    """The picked slices back in place; a product with a 0/1 matrix where they are not in a row."""
    x, index = n.input(0), n.input(1)
    axis, picked = n.attribute("axis", 0) % x.rank, index.rank
    size = x.size(axis)
    if picked == 0:
        g = g.unsqueeze(axis)
    elif picked > 1:
        tail = [-1 if item is None else item for item in x.shape[axis + 1 :]]
        g = g.reshape(*[0] * axis, int(np.prod([index.size(i) for i in range(picked)])), *tail)
    if index.value is not None:
        steps = progression([int(item) % size for item in index.value.ravel()])
        if steps is not None:
            return place(g, axis, steps, size)
    flat = index.reshape(-1, 1)
    flat = n.graph.where(flat < 0, flat + size, flat)
    numbers = n.graph.constant(np.arange(size, dtype=helper.tensor_dtype_to_np_dtype(index.dtype)))
    return along(g, axis, flat.equals(numbers).cast(g.dtype))


def progression(numbers: list[int]) -> range | None:
    """The range that lists the same distinct numbers, if there is one."""
    first = numbers[0] if numbers else 0
    step = numbers[1] - first if len(numbers) > 1 else 1
    if step == 0:
        return None
    found = range(first, first + step * len(numbers), step)
    return found if list(found) == numbers else None


def along(g: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Contract one axis of g with the rows of a matrix ``(size of the axis, new size)``."""
    shape = list(g.shape)
    if axis == len(shape) - 1:
        return g @ matrix
    tail = [-1 if size is None else size for size in shape[axis + 1 :]]
    wide = g if len(tail) == 1 else g.reshape(*[0] * (axis + 1), -1)
    found = matrix.transpose([1, 0]) @ wide
    return found if len(tail) == 1 else found.reshape(*[0] * (axis + 1), *tail)


def zeros_like(x: Tensor, dtype: int) -> Tensor:
    """Zeros of x's shape."""
    return zeros(x, {}).cast(dtype)


def scatter_add(n: Call, op_type: str, index: Tensor, g: Tensor, **attributes: int) -> Tensor:
    """g added into zeros of the first input's shape."""
    if n.graph.facts.opset < SCATTER_ADD_OPSET:
        raise n.refuse(
            f"its derivative needs opset {SCATTER_ADD_OPSET}; convert the model with "
            f"onnx.version_converter.convert_version(model, {SCATTER_ADD_OPSET})"
        )
    return added(op_type, zeros_like(n.input(), g.dtype), index, g, **attributes)


def added(op_type: str, zeros: Tensor, index: Tensor, g: Tensor, **attributes: int) -> Tensor:
    """g added into zeros; in float32 where the runtime cannot add halves."""
    is_half = g.dtype in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    dtype = TensorProto.FLOAT if is_half else g.dtype
    found = g.graph.op(
        op_type, zeros.cast(dtype), index, g.cast(dtype), reduction="add", **attributes
    )
    return found.cast(g.dtype)


def gather_elements(n: Call, g: Tensor) -> Cotangents:
    """g added at the positions it was read from."""
    return scatter_add(n, "ScatterElements", n.input(1), g, axis=n.attribute("axis", 0))


def gather_nd(n: Call, g: Tensor) -> Cotangents:
    """g added at the positions it was read from."""
    if n.attribute("batch_dims", 0):
        raise n.refuse("it has batch_dims; export the model without them")
    return scatter_add(n, "ScatterND", n.input(1), g)


def scatter_elements(n: Call, g: Tensor) -> Cotangents:
    """Overwritten elements had no effect; updates get what was written in their place."""
    axis, reduction = n.attribute("axis", 0), n.attribute("reduction", "none")
    updates = n.graph.op("GatherElements", g, n.input(1), axis=axis)
    if reduction == "add":
        return g, None, updates
    if reduction != "none":
        raise n.refuse(f"its reduction is {reduction!r}; none or add can be differentiated")
    cleared = zeros_like(n.input(2), g.dtype)
    return n.graph.op("ScatterElements", g, n.input(1), cleared, axis=axis), None, updates


def scatter_nd(n: Call, g: Tensor) -> Cotangents:
    """Overwritten slices had no effect; updates get what was written in their place."""
    reduction = n.attribute("reduction", "none")
    updates = n.graph.op("GatherND", g, n.input(1))
    if reduction == "add":
        return g, None, updates
    if reduction != "none":
        raise n.refuse(f"its reduction is {reduction!r}; none or add can be differentiated")
    cleared = zeros_like(n.input(2), g.dtype)
    return n.graph.op("ScatterND", g, n.input(1), cleared), None, updates


def top_k(n: Call, g: Tensor) -> Cotangents:
    """The chosen values' cotangents back at their positions, which are all different."""
    _, index = n.graph.ops("TopK", n.input(0), n.input(1), outputs=2, **n.attributes)
    axis = n.attribute("axis", -1)
    return n.graph.op("ScatterElements", zeros_like(n.input(), g.dtype), index, g, axis=axis)


RULES: Rules = {
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "TopK": top_k,
}
