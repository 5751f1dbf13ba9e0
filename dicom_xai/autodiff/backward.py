"""The walk: from cotangents of some tensors back to cotangents of others.

It visits the nodes in reverse order, asks each operator's rule for the vector-Jacobian product,
sums what comes back over broadcast axes, and adds up what meets at one tensor. It knows no
operator; the rules know no graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..errors import UnsupportedOperatorError
from .call import Call, Rule, Rules
from .emit import Graph, Tensor, UnknownShapeError, attributes_of, is_float
from .expand import renamed
from .stretch import narrowed, summed


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
        if any(g is not None for g in arriving) and not reached.isdisjoint(reads(node)):
            for name, g in visit(graph, node, arriving, reached, rules):
                pending[name].append(fit(g, graph.tensor(name)))
    found = {name: total(pending, name) for name in wanted}
    return {name: g for name, g in found.items() if g is not None}


def dependents(graph: Graph, nodes: Iterable[onnx.NodeProto], sources: set[str]) -> set[str]:
    """The sources and every tensor that varies smoothly with one of them.

    Integers end the way, as their derivative is zero wherever it exists, unless they stand for
    real numbers (quantised). What nothing is known of is followed, so that it is refused and not
    lost.
    """
    facts, reached = graph.facts, set(sources)
    for node in nodes:
        smooth = [name for name in reads(node) if name in reached]
        if smooth and node.op_type not in ("Shape", "Size"):
            is_quantised = node.op_type == "QuantizeLinear" or not all(
                is_float(facts.dtype(name)) for name in smooth if facts.has(name)
            )
            reached.update(
                name
                for name in node.output
                if name and (is_quantised or not facts.has(name) or is_float(facts.dtype(name)))
            )
    return reached


def reads(node: onnx.NodeProto) -> list[str]:
    """What a node depends on: its inputs, and what its branches take from around them.

    CastLike's second input only tells a type.
    """
    inputs = node.input[:1] if node.op_type == "CastLike" else node.input
    names = [name for name in inputs if name]
    for item in node.attribute:
        for graph in [item.g, *item.graphs] if item.HasField("g") or item.graphs else []:
            names.extend(name for inner in graph.node for name in reads(inner))
            names.extend(output.name for output in graph.output)
    return names


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
    if any(item.HasField("g") or item.graphs for item in node.attribute):
        raise call.refuse("it has branches of its own; export the model without control flow")
    rule = rules.get(f"{node.domain}.{node.op_type}" if node.domain else node.op_type)
    try:
        if rule is None:
            return expanded(call, arriving, reached, rules)
        grads = on_stretch(call, rule, arriving) or on_whole(call, rule, arriving)
    except UnknownShapeError as error:
        raise call.refuse(
            f"the size of tensor {error} must be fixed; only the batch may be free in the export"
        ) from error
    for index, name in enumerate(node.input):
        if name in reached and (index >= len(grads) or grads[index] is None):
            raise call.refuse(
                f"it has no derivative with respect to input {index} ({name!r}); "
                "make that input a constant"
            )
    pairs = zip(node.input, grads, strict=False)
    return [(name, g) for name, g in pairs if g is not None and name in reached]


def on_whole(call: Call, rule: Rule, arriving: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What the rule gives, one per input."""
    given = rule(call, *understood(call, rule, arriving))
    return [given] if isinstance(given, Tensor) or given is None else list(given)


def on_stretch(
    call: Call, rule: Rule, arriving: Sequence[Tensor | None]
) -> list[Tensor | None] | None:
    """The same where all but a stretch of the cotangent is zero; None where it is not."""
    narrow = narrowed(call, arriving)
    if narrow is None:
        return None
    part, g, restored = narrow
    return [
        given and restored(index, fit(given, part.input(index)))
        for index, given in enumerate(on_whole(part, rule, [g]))
    ]


def understood(
    call: Call, rule: Rule, arriving: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The cotangents as the rule takes them: without those of outputs that nobody uses."""
    last = max(index for index, g in enumerate(arriving) if g is not None)
    taken = arriving[: last + 1]
    try:
        signature(rule).bind(call, *taken)
    except TypeError as error:
        raise call.refuse(
            f"its output {last} is used, of which no derivative is known; export without it"
        ) from error
    return taken


def expanded(
    call: Call, arriving: Sequence[Tensor | None], reached: set[str], rules: Rules
) -> list[tuple[str, Tensor]]:
    """Differentiate a copy of the nodes that the operator stands for; the original stays."""
    graph, node = call.graph, call.node
    mark, body = spelled_out(graph, node)
    if not body:
        raise call.refuse(
            "there is no rule for it and its schema has no function body; use eigen-cam, which "
            "needs none, export the model without it, or add a rule in dicom_xai/autodiff/rules"
        )
    pairs = zip(node.output, arriving, strict=True)
    cotangents = {mark + name: g for name, g in pairs if g is not None}
    sources = {graph.readable(name): name for name in node.input if name in reached}
    try:
        found = pull_back(graph, body, cotangents, sources, rules)
    except UnsupportedOperatorError as error:
        # The model has no node of the copy's; its own is named.
        raise call.refuse(error.remedy) from error
    return [(sources[name], g) for name, g in found.items()]


def spelled_out(graph: Graph, node: onnx.NodeProto) -> tuple[str, list[onnx.NodeProto]]:
    """A written copy of the nodes that a node stands for, which computes its outputs once more.

    Returns
    -------
    str
        What the names of the copy's tensors begin with; the node's inputs keep theirs, or are
        read by the name that stops no fusion.
    list of onnx.NodeProto
        In topological order; empty where the node is not made of others.
    """
    mark = f"{graph.prefix}{node.output[0]}/"
    body = [
        renamed(item, node.input, mark, index) for index, item in enumerate(graph.facts.body(node))
    ]
    for item in body:
        item.input[:] = [graph.readable(name) for name in item.input]
    body = [repeated(graph, item) if item.op_type == "ConstantOfShape" else item for item in body]
    if body:
        graph.copy(body)
    return mark, body


def repeated(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto:
    """A ConstantOfShape as an Expand: providers lag behind its schema, see `emit`."""
    given = attributes_of(node).get("value")
    value = np.zeros(1, np.float32) if given is None else numpy_helper.to_array(given)
    number = graph.constant(value.reshape(())).name
    return helper.make_node("Expand", [number, *node.input], node.output, name=node.name)


def total(pending: dict[str, list[Tensor]], name: str) -> Tensor | None:
    """Everything that arrived at a tensor; stays there for whoever asks next."""
    if not pending.get(name):
        return None
    pending[name] = [summed(pending[name])]
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
