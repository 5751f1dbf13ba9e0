"""The walk: from cotangents of some tensors back to cotangents of others.

It visits the nodes in reverse order, asks each operator's rule for the vector-Jacobian product,
sums what comes back over broadcast axes, and adds up what meets at one tensor. It knows no
operator; the rules know no graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import onnx

from ..errors import UnsupportedOperatorError
from .emit import Graph, Tensor, UnknownShapeError, attributes_of, is_float
from .expand import equivalent
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
        node = self.node
        version = self.graph.facts.opsets.get(node.domain, 0)
        return UnsupportedOperatorError(
            node.op_type, node.domain, version, node_label(node), remedy
        )


Rule = Callable[..., Cotangents]
"""``rule(call, *cotangents of the outputs)``; a cotangent is None where none arrives."""

Rules = Mapping[str, Rule]
"""Rules by operator; another domain's operator as ``domain.operator``."""


def pull_back(
    graph: Graph,
    nodes: Sequence[onnx.NodeProto],
    cotangents: Mapping[str, Tensor],
    sources: Iterable[str],
    rules: Rules,
) -> dict[str, Tensor]:
    """Write the vector-Jacobian product of a piece of graph.

    Parameters
    ----------
    graph : Graph
    nodes : sequence of onnx.NodeProto
        The piece, in topological order.
    cotangents : mapping of str to Tensor
        By name of a tensor that the piece makes, shaped as that tensor.
    sources : iterable of str
        The tensors whose cotangents are wanted. What lies before them is not visited.
    rules : mapping of str to Rule

    Returns
    -------
    dict of str to Tensor
        Cotangent of every source that the given ones depend on, shaped as the source.

    Raises
    ------
    UnsupportedOperatorError
        A node on the way has no right answer; the model cannot be explained by this method.
    """
    wanted = set(sources)
    reached = dependents(graph, nodes, wanted)
    pending: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in cotangents.items():
        pending[name].append(tensor)
    for node in reversed(nodes):
        arriving = [total(pending, name) for name in node.output]
        if any(g is not None for g in arriving) and any(name in reached for name in node.input):
            for name, g in visit(graph, node, arriving, reached, rules):
                pending[name].append(fit(g, graph.tensor(name)))
    found = {name: total(pending, name) for name in wanted}
    return {name: g for name, g in found.items() if g is not None}


def dependents(graph: Graph, nodes: Sequence[onnx.NodeProto], sources: set[str]) -> set[str]:
    """The sources and every real-valued tensor that depends on one of them."""
    reached = set(sources)
    for node in nodes:
        if any(name in reached for name in node.input):
            reached.update(name for name in node.output if name and carries(graph, node, name))
    return reached


def carries(graph: Graph, node: onnx.NodeProto, name: str) -> bool:
    """Whether a gradient may pass: real values, and integers that stand for them (quantised)."""
    if node.op_type == "QuantizeLinear" or not graph.facts.has(name):
        return True
    return is_float(graph.facts.dtype(name))


def visit(
    graph: Graph,
    node: onnx.NodeProto,
    arriving: Sequence[Tensor | None],
    reached: set[str],
    rules: Rules,
) -> list[tuple[str, Tensor]]:
    """Apply one node's rule, or differentiate what the operator is made of."""
    call = Call(
        graph,
        node,
        tuple(graph.tensor(name) if name else None for name in node.input),
        tuple(graph.tensor(name) if name else None for name in node.output),
        tuple(name in reached for name in node.input),
        attributes_of(node),
    )
    rule = rules.get(f"{node.domain}.{node.op_type}" if node.domain else node.op_type)
    try:
        if rule is None:
            return expanded(call, arriving, reached, rules)
        given = rule(call, *arriving)
    except UnknownShapeError as error:
        raise call.refuse(
            f"the size of tensor {error} must be fixed; only the batch may be free in the export"
        ) from error
    grads = (given,) if isinstance(given, Tensor) or given is None else tuple(given)
    for index, name in enumerate(node.input):
        if name in reached and (index >= len(grads) or grads[index] is None):
            raise call.refuse(
                f"it has no derivative with respect to input {index} ({name!r}); "
                "make that input a constant"
            )
    pairs = zip(node.input, grads, strict=False)
    return [(name, g) for name, g in pairs if g is not None and name in reached]


def expanded(
    call: Call, arriving: Sequence[Tensor | None], reached: set[str], rules: Rules
) -> list[tuple[str, Tensor]]:
    """Differentiate a copy of the nodes that the operator stands for; the original stays."""
    body, outputs = equivalent(call.graph, call.node)
    if not body:
        raise call.refuse(
            "there is no rule for it and its schema has no function body; export the model "
            "without it, or add a rule in dicom_xai/autodiff/rules"
        )
    for node in body:
        call.graph.copy(node)
    cotangents = {name: g for name, g in zip(outputs, arriving, strict=False) if g is not None}
    sources = [name for name in call.node.input if name in reached]
    return list(pull_back(call.graph, body, cotangents, sources, rules).items())


def total(pending: dict[str, list[Tensor]], name: str) -> Tensor | None:
    """Everything that arrived at a tensor; stays there for whoever asks next."""
    if not pending.get(name):
        return None
    pending[name] = [reduce(add, pending[name])]
    return pending[name][0]


def fit(g: Tensor, x: Tensor) -> Tensor:
    """Bring a cotangent to the shape of its tensor: the transpose of broadcasting, or broadcasting.

    Axes along which `x` was repeated are summed; axes along which `g` is the same for all are
    repeated.
    """
    extra = g.rank - x.rank
    if extra > 0:
        g = g.sum(range(extra), keep=False)
    sizes = x.shape
    g = g.sum([a for a in range(-g.rank, 0) if sizes[a] == 1 and g.shape[a] != 1])
    return g.expand_like(x)
