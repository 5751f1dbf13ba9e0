"""What a rule is: the node as it sees it, and what it has to give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from ..errors import UnsupportedOperatorError
from .emit import Graph, Tensor
from .prepare import node_label

Cotangents = Tensor | None | Sequence[Tensor | None]
"""What a rule gives: one per input, a lone tensor for the first input only."""


@dataclass(frozen=True)
class Call:
    """One node of the forward graph as its rule sees it.

    Attributes
    ----------
    graph : Graph
        Where new nodes go.
    node : onnx.NodeProto
    x, y : tuple of Tensor or None
        Inputs and outputs; None for one that is left out.
    wanted : tuple of bool
        For which inputs a cotangent is asked; no other needs to be worked out.
    attributes : mapping of str to object
    """

    graph: Graph
    node: onnx.NodeProto
    x: tuple[Tensor | None, ...]
    y: tuple[Tensor | None, ...]
    wanted: tuple[bool, ...]
    attributes: Mapping[str, Any]

    def input(self, index: int = 0) -> Tensor:
        """An input that the operator cannot do without."""
        found = self.x[index]
        assert found is not None
        return found

    def output(self, index: int = 0) -> Tensor:
        """An output that is there."""
        found = self.y[index]
        assert found is not None
        return found

    def optional(self, index: int) -> Tensor | None:
        """An input, or None where it is left out."""
        return self.x[index] if index < len(self.x) else None

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, or the schema's default."""
        return self.attributes.get(name, default)

    def ints(self, index: int, name: str, default: Sequence[int] | None = None) -> list[int] | None:
        """Integers that older opsets keep in an attribute and newer ones in a constant input."""
        if name in self.attributes:
            return [int(item) for item in self.attributes[name]]
        given = self.optional(index)
        if given is None:
            return None if default is None else list(default)
        if given.value is None:
            raise self.refuse(f"its input {name!r} must be a constant; fold it and compile again")
        return [int(item) for item in given.value.ravel()]

    def refuse(self, remedy: str) -> UnsupportedOperatorError:
        """The error to raise where no right answer can be written."""
        node = self.graph.original(self.node)
        version = self.graph.facts.opsets.get(node.domain, 0)
        label = self.graph.labels.get(node.name, node_label(node))
        if node is not self.node:
            remedy = f"it ends what is a {self.node.op_type} in small nodes: {remedy}"
        return UnsupportedOperatorError(node.op_type, node.domain, version, label, remedy)


Rule = Callable[..., Cotangents]
"""``rule(call, *cotangents of the outputs)``; a cotangent is None where none arrives."""

Rules = Mapping[str, Rule]
"""Rules by operator; another domain's operator as ``domain.operator``."""
