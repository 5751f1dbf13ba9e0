"""Attention within windows: which places of the grid a window holds, shifted or not.

Nothing is assumed of how the grid is cut. The model's own nodes do it, and as they only move
elements, they are used both ways: a copy of them cuts, their transpose puts together.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from ..backward import pull_back
from ..emit import Graph, Tensor, attributes_of
from ..expand import renamed
from ..layers import path
from ..positions import Layout, layouts
from ..rules import GRADIENT

MOVES = frozenset({"Reshape", "Transpose", "Slice", "Concat", "Pad", "Identity"})
"""Operators that put elements elsewhere."""


@dataclass(frozen=True)
class Windows:
    """How one layer's grid is cut.

    Attributes
    ----------
    whole : Tensor
        ``(batch, *grid, channels)``, or with the grid flat on one axis.
    layout : Layout
        Where its positions lie.
    moves : tuple of onnx.NodeProto
        From there to the windows, in order.
    windows : Tensor
        ``(batch * windows, tokens, channels)``.
    """

    whole: Tensor
    layout: Layout
    moves: tuple[onnx.NodeProto, ...]
    windows: Tensor

    @property
    def grid(self) -> tuple[int, ...]:
        """Sizes of the grid."""
        return self.layout.grid or tuple(map(self.whole.size, range(1, self.whole.rank - 1)))

    def cut(self, row: Tensor) -> Tensor:
        """``(batch, 1, *grid)`` as ``(batch * windows, 1, tokens)``; 0 where windows are padded."""
        sizes = (self.whole.size(axis) for axis in range(1, self.whole.rank - 1))
        spread = row.reshape(0, *sizes, 1).expand_like(self.whole)
        graph = row.graph
        mark = f"{graph.prefix}cut_{spread.name.removeprefix(graph.prefix)}/"
        made = {self.whole.name, *(name for node in self.moves for name in node.output)}
        copies = []
        for index, node in enumerate(self.moves):
            copy = renamed(node, [name for name in node.input if name not in made], mark, index)
            first = mark + self.whole.name
            copy.input[:] = [spread.name if name == first else name for name in copy.input]
            copies.append(copy)
        graph.copy(copies)
        return graph.tensor(mark + self.windows.name).slice(2, 0, 1).transpose([0, 2, 1])

    def joined(self, row: Tensor) -> Tensor:
        """``(batch * windows, 1, tokens)`` as ``(batch, 1, *grid)``; padding is cut off."""
        spread = {self.windows.name: row.transpose([0, 2, 1]).expand_like(self.windows)}
        found = pull_back(row.graph, self.moves, spread, [self.whole.name], GRADIENT)
        return self.layout.opened(found[self.whole.name]).slice(1, 0, 1)


def windows_of(graph: Graph, image: str, a: Tensor) -> Windows | None:
    """The windows that attention probabilities ``(batch * windows, heads, tokens, tokens)`` are in.

    They are what the last linear layer before the attention reads; None where the nodes before
    that cannot be followed back to a grid with known positions.
    """
    reads = (
        node.input[0]
        for node in reversed(path(graph, image, a.name))
        if node.op_type == "MatMul" and graph.facts.constant(node.input[1]) is not None
    )
    name = next(reads, None)
    if name is None or (graph.facts.shape(name) or ())[1:-1] != a.shape[-1:]:
        return None
    known = layouts(graph, image)
    open_ends, moves = {name}, []
    for node in reversed(graph.forward):
        if open_ends.isdisjoint(node.output) or not open_ends.isdisjoint(
            known.keys() & node.output
        ):
            continue
        if not keeps_channels(graph, node):
            return None
        open_ends.difference_update(node.output)
        open_ends.update(node.input if node.op_type == "Concat" else node.input[:1])
        moves.append(node)
    whole = graph.tensor(open_ends.pop())
    layout = known.get(whole.name)
    if open_ends or layout is None or layout.prefix or layout.channel != whole.rank - 1:
        return None
    if not moves or None in whole.shape[1:]:
        return None
    return Windows(whole, layout, tuple(reversed(moves)), graph.tensor(name))


def keeps_channels(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node moves whole positions: the last axis, that of the channels, stays."""
    if node.op_type not in MOVES:
        return False
    before, after = graph.facts.shape(node.input[0]), graph.facts.shape(node.output[0])
    if not before or not after or before[-1] != after[-1]:
        return False
    # Without an order, a Transpose reverses the axes.
    order = attributes_of(node).get("perm", [0])
    return node.op_type != "Transpose" or bool(order[-1] == len(before) - 1)
