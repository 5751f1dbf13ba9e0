"""Which tensors a method looks at: the explained score, the image input, the target layer."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from ..errors import ConfigError
from .backward import dependents
from .emit import Graph, Tensor, elements, is_float
from .select import Scores

ACTIVATIONS = frozenset({"Sigmoid", "Softmax", "LogSoftmax"})
PASSED = frozenset({"Identity", "Cast", "Dropout"})
"""Nodes that hide the score behind them without changing it."""

POOLS = frozenset({"GlobalAveragePool", "ReduceMean"})
AFFINE = frozenset(
    {"Gemm", "MatMul", "Add", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Dropout",
     "Cast"}
)  # fmt: skip


def explained_scores(graph: Graph, output: str | None) -> Scores:
    """The explained output, before a final sigmoid or softmax.

    Parameters
    ----------
    graph : Graph
    output : str or None
        Name of a graph output; None for the first.

    Raises
    ------
    ConfigError
        There is no such output, or it is not made of real numbers.
    """
    names = [item.name for item in graph.model.graph.output]
    name = names[0] if output is None else output
    if name not in names:
        raise ConfigError(f"the model has no output {name!r}; it has {', '.join(map(repr, names))}")
    if not graph.facts.has(name):
        raise ConfigError(
            f"the type of output {name!r} cannot be worked out; explain another output"
        )
    producers = {item: node for node in graph.model.graph.node for item in node.output}
    is_exclusive = None
    while name in producers and producers[name].op_type in ACTIVATIONS | PASSED:
        node = producers[name]
        if node.op_type in ACTIVATIONS:
            if is_exclusive is not None:
                break
            is_exclusive = node.op_type != "Sigmoid"
        name = node.input[0]
    tensor = graph.tensor(name)
    if not is_float(tensor.dtype) or tensor.rank < 1:
        raise ConfigError(
            f"output {name!r} holds no real numbers per image; explain another output"
        )
    return Scores(tensor, True if is_exclusive is None else is_exclusive)


def image_input(graph: Graph, name: str | None) -> Tensor:
    """The input that holds the image.

    Raises
    ------
    ConfigError
        There is no such input, or none looks like an image.
    """
    stored = {item.name for item in graph.model.graph.initializer}
    names = [item.name for item in graph.model.graph.input if item.name not in stored]
    if name is not None:
        if name not in names:
            raise ConfigError(
                f"the model has no input {name!r}; it has {', '.join(map(repr, names))}"
            )
        return graph.tensor(name)
    for item in names:
        tensor = graph.tensor(item)
        if is_float(tensor.dtype) and tensor.rank >= 3:
            return tensor
    raise ConfigError(
        f"no input of {', '.join(map(repr, names))} has real values and shape "
        "(batch, channels, *spatial); name the image's input"
    )


def target_layer(graph: Graph, scores: Scores, image: Tensor, layer: str) -> Tensor:
    """The feature map that a CAM method looks at, ``(batch, channels, *spatial)``.

    Parameters
    ----------
    graph : Graph
    scores : Scores
    image : Tensor
    layer : str
        A tensor's name, a node's name, or ``auto``: the last tensor that has positions and that
        everything passes through before it is pooled. Of a segmentation, the last one on the
        coarsest grid (Seg-Grad-CAM's bottleneck).

    Raises
    ------
    ConfigError
        There is no such layer, it has no positions, or the score does not depend on it.
    """
    if layer != "auto":
        return named_layer(graph, scores, image, layer)
    nodes = path(graph, image.name, scores.tensor.name)
    found = (
        coarsest(graph, nodes, image)
        if scores.has_positions
        else narrows(graph, nodes, scores, image)
    )
    if found is None:
        raise ConfigError(
            "no tensor with positions lies between the image and the pooled features; name the "
            "layer to explain, or use a method that explains the input"
        )
    return found


def named_layer(graph: Graph, scores: Scores, image: Tensor, layer: str) -> Tensor:
    """A layer by the name of a tensor or of the node that makes it."""
    outputs = {node.name: node.output[0] for node in graph.model.graph.node if node.name}
    known = {name for node in graph.model.graph.node for name in node.output}
    name = layer if layer in known else outputs.get(layer, "")
    if not name:
        raise ConfigError(f"the model has no tensor or node {layer!r}; leave the layer at 'auto'")
    tensor = graph.tensor(name)
    if not has_positions(graph, name, image):
        raise ConfigError(f"layer {layer!r} is not (batch, channels, *spatial); name another")
    if scores.tensor.name not in dependents(graph, graph.model.graph.node, {name}):
        raise ConfigError(f"the explained score does not depend on layer {layer!r}; name another")
    return tensor


def path(graph: Graph, source: str, end: str) -> list[onnx.NodeProto]:
    """The nodes that `end` depends on and that depend on `source`, in order."""
    nodes = graph.model.graph.node
    reached = dependents(graph, nodes, {source})
    needed, found = {end}, []
    for node in reversed(nodes):
        if any(name in needed for name in node.output) and any(n in reached for n in node.input):
            needed.update(name for name in node.input if name in reached)
            found.append(node)
    return found[::-1]


def has_positions(graph: Graph, name: str, image: Tensor) -> bool:
    """Whether a tensor is ``(batch, channels, *spatial)`` with more than one position."""
    shape = graph.facts.shape(name) if graph.facts.has(name) else None
    return (
        shape is not None
        and len(shape) == image.rank
        and is_float(graph.facts.dtype(name))
        and elements(shape[2:]) != 1
        and shape[1] != 1
    )


def narrows(
    graph: Graph, nodes: Sequence[onnx.NodeProto], scores: Scores, image: Tensor
) -> Tensor | None:
    """The last tensor with positions through which everything passes on its way to the score."""
    if not nodes:
        return None
    reached = dependents(graph, nodes, {image.name})
    open_ends = {scores.tensor.name}
    for node in reversed(nodes):
        if not open_ends.intersection(node.output):
            continue
        open_ends.difference_update(node.output)
        open_ends.update(name for name in node.input if name in reached)
        if len(open_ends) == 1 and has_positions(graph, next(iter(open_ends)), image):
            return graph.tensor(next(iter(open_ends)))
    return None


def coarsest(graph: Graph, nodes: Sequence[onnx.NodeProto], image: Tensor) -> Tensor | None:
    """The last tensor of the smallest grid that still has more than one position."""
    best, size = None, None
    for name in (name for node in nodes for name in node.output):
        if has_positions(graph, name, image):
            count = elements(tuple(graph.facts.shapes(name)[0] or ())[2:])
            if count is not None and (size is None or count <= size):
                best, size = graph.tensor(name), count
    return best


def is_pooled_linear(graph: Graph, layer: Tensor, scores: Scores) -> bool:
    """Whether the score is the layer's mean over positions through one affine map.

    Then every gradient is the same at all positions, and CAM, Grad-CAM, XGrad-CAM and HiRes-CAM are
    one map up to a positive factor.
    """
    nodes = path(graph, layer.name, scores.tensor.name)
    if not nodes or nodes[0].op_type not in POOLS or nodes[0].input[0] != layer.name:
        return False
    pooled = graph.facts.shape(nodes[0].output[0]) or ()
    if layer.shape[1] != pooled[1] or any(size != 1 for size in pooled[2:]):
        return False
    reached = dependents(graph, nodes, {layer.name})
    return all(
        node.op_type in AFFINE and sum(name in reached for name in node.input) == 1
        for node in nodes[1:]
    )
