"""Where on the image the elements of a tensor lie, followed through the graph.

A map is only worth something if its positions are right. So positions are never guessed from a
shape: they start at the image, every operator that is known to keep them hands them on, and a
tensor that they cannot be followed to is no target for a CAM method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx

from .emit import Graph, Tensor, attributes_of
from .prepare import Shape

WINDOWED = frozenset(
    {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool",
     "Resize", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "LRN",
     "DepthToSpace", "SpaceToDepth", "FusedConv"}
)  # fmt: skip
"""Operators that are defined on (batch, channels, *spatial) and give the same."""

POINTWISE = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "Tanh", "Softplus", "Softsign",
     "HardSigmoid", "HardSwish", "Swish", "Mish", "Gelu", "Clip", "ThresholdedRelu", "Add", "Sub",
     "Mul", "Div", "Sum", "Max", "Min", "Pow", "Sqrt", "Exp", "Log", "Abs", "Neg", "Erf", "Where",
     "Cast", "Identity", "Dropout", "LayerNormalization", "RMSNormalization", "Reciprocal",
     "QuantizeLinear", "DequantizeLinear", "BiasGelu", "FastGelu", "QuickGelu"}
)  # fmt: skip
"""Operators that leave every element where it is."""


SKIP_NORM = "SkipLayerNormalization"
"""ONNX Runtime's sum of two tensors, normalised; the fourth output is the sum itself."""


@dataclass(frozen=True)
class Layout:
    """How a tensor holds positions.

    Attributes
    ----------
    channel : int
        The axis of the channels; axis 0 is the batch, all others are positions.
    grid : tuple of int, optional
        Sizes of the grid whose positions lie flat on one axis; None where each has its own.
    prefix : int
        Tokens before the grid on that axis (class tokens).
    """

    channel: int = 1
    grid: tuple[int, ...] | None = None
    prefix: int = 0

    @property
    def token(self) -> int:
        """The axis of flat positions."""
        return 3 - self.channel

    def count(self, shape: Shape) -> int | None:
        """How many positions a tensor of this layout has; None where that is free."""
        if self.grid is not None:
            return math.prod(self.grid)
        sizes = [size for axis, size in enumerate(shape) if axis not in (0, self.channel)]
        return None if None in sizes else math.prod(size or 0 for size in sizes)

    def opened(self, x: Tensor) -> Tensor:
        """The tensor as ``(batch, channels, *grid)``."""
        if self.grid is None:
            axes = [axis for axis in range(x.rank) if axis not in (0, self.channel)]
            return x.transpose([0, self.channel, *axes])
        if self.prefix:
            x = x.slice(self.token, self.prefix)
        return x.transpose([0, self.channel, self.token]).reshape(
            0, x.size(self.channel), *self.grid
        )


def layouts(graph: Graph, image: str) -> dict[str, Layout]:
    """The layout of every tensor that positions can be followed to.

    Parameters
    ----------
    graph : Graph
    image : str
        Name of the input.
    """
    known = {image: image_layout(graph, image)}
    for node in graph.forward:
        from_ = next((name for name in node.input if name in known), None)
        if from_ is None:
            continue
        found = followed(graph, node, known)
        name = node.output[0]
        if found is not None and fits(graph, found, name):
            known[name] = found
            if node.op_type == SKIP_NORM and len(node.output) > 3 and node.output[3]:
                known[node.output[3]] = found
    return known


def image_layout(graph: Graph, image: str) -> Layout:
    """Channels second, or last where all that reads the image first turns it round."""
    rank = graph.tensor(image).rank
    readers = [node for node in graph.forward if image in node.input and node.op_type != "Shape"]
    turned = [0, rank - 1, *range(1, rank - 1)]
    is_last = bool(readers) and all(
        node.op_type == "Transpose" and list(attributes_of(node).get("perm", ())) == turned
        for node in readers
    )
    return Layout(rank - 1) if is_last else Layout()


def fits(graph: Graph, layout: Layout, name: str) -> bool:
    """Whether a tensor's shape is that of its layout."""
    shape = graph.facts.shape(name) if graph.facts.has(name) else None
    if shape is None or len(shape) < 3:
        return False
    if layout.grid is None:
        return layout.channel < len(shape)
    return len(shape) == 3 and shape[layout.token] == math.prod(layout.grid) + layout.prefix


def followed(graph: Graph, node: onnx.NodeProto, known: dict[str, Layout]) -> Layout | None:
    """The layout of a node's first output."""
    first = known.get(node.input[0])
    if node.op_type in WINDOWED:
        return Layout() if first == Layout() else None
    if node.op_type in POINTWISE or node.op_type == SKIP_NORM:
        return of_operands(graph, node, known)
    if node.op_type in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm"):
        keeps = first is not None and first.channel == len(graph.tensor(node.input[0]).shape) - 1
        is_turned = node.op_type == "FusedMatMul" and attributes_of(node).get("transA", 0)
        return first if keeps and not is_turned and node.input[1] not in known else None
    if node.op_type == "Concat":
        return of_concat(graph, node, known)
    if first is None:
        return None
    match node.op_type:
        case "Transpose":
            order = list(attributes_of(node).get("perm", ()))
            keeps_batch = order[:1] == [0]
            return replace(first, channel=order.index(first.channel)) if keeps_batch else None
        case "Reshape" | "Flatten":
            return of_reshape(graph, node, first)
        case "Slice":
            return of_slice(graph, node, first)
        case "Pad" if first == Layout():
            return first
    return None


def of_operands(graph: Graph, node: onnx.NodeProto, known: dict[str, Layout]) -> Layout | None:
    """Elementwise: what the operands with positions agree on."""
    rank = len(graph.facts.shape(node.output[0]) or ())
    found = {
        known[name]
        for name in node.input
        if name in known and len(graph.facts.shape(name) or ()) == rank
    }
    return found.pop() if len(found) == 1 else None


def of_concat(graph: Graph, node: onnx.NodeProto, known: dict[str, Layout]) -> Layout | None:
    """Joined channels keep their places; class tokens before the grid are counted."""
    layout = known.get(node.input[-1])
    if layout is None:
        return None
    axis = attributes_of(node)["axis"] % graph.tensor(node.input[-1]).rank
    if axis == layout.channel:
        return layout if all(known.get(name) == layout for name in node.input) else None
    if layout.grid is not None and axis == layout.token and len(node.input) == 2:
        before = graph.tensor(node.input[0]).shape[axis]
        return None if before is None else replace(layout, prefix=layout.prefix + before)
    return None


def of_reshape(graph: Graph, node: onnx.NodeProto, layout: Layout) -> Layout | None:
    """The grid flattened to tokens."""
    before, after = graph.tensor(node.input[0]).shape, graph.facts.shape(node.output[0])
    if after is None or layout.grid is not None or None in before[1:]:
        return layout if after == before else None
    grid = tuple(size or 0 for axis, size in enumerate(before) if axis not in (0, layout.channel))
    channels, tokens = before[layout.channel], math.prod(grid)
    if layout.channel == 1 and after[1:] == (channels, tokens):
        return Layout(1, grid)
    if layout.channel == len(before) - 1 and after[1:] == (tokens, channels):
        return Layout(2, grid)
    return None


def of_slice(graph: Graph, node: onnx.NodeProto, layout: Layout) -> Layout | None:
    """Class tokens cut off, or every n-th position taken; all else loses its place."""
    values: Sequence[list[int] | None] = [
        None if value is None else value.ravel().tolist()
        for value in (graph.facts.constant(name) for name in node.input[1:] if name)
    ]
    if len(values) < 3 or any(value is None for value in values):
        return None
    starts, ends, axes = (value or [] for value in values[:3])
    steps = (values[3] if len(values) > 3 else None) or [1] * len(starts)
    x = graph.tensor(node.input[0])
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis, size = axis % x.rank, x.shape[axis]
        to_end = end >= (size if size is not None else 2**31)
        if start == 0 and to_end and (step == 1 or (axis != 0 and layout.grid is None)):
            continue
        if layout.grid is None and 0 < start < step and to_end and axis not in (0, layout.channel):
            continue
        if layout.grid is not None and axis == layout.token and to_end and step == 1:
            if start > layout.prefix:
                return None
            layout = replace(layout, prefix=layout.prefix - start)
            continue
        return None
    return layout
