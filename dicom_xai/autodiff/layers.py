"""Which tensors a method looks at: the explained score, the image input, the target layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from ..errors import ConfigError, UnsupportedOperatorError
from .backward import dependents, reads
from .emit import Graph, Tensor, attributes_of, is_float
from .positions import SKIP_NORM, Layout, layouts
from .prepare import node_label
from .select import Scores

ACTIVATIONS = frozenset({"Sigmoid", "Softmax", "LogSoftmax"})
PASSED = frozenset({"Identity", "Cast", "Dropout"})
"""Nodes that hide the score behind them without changing it."""

POOLS = frozenset({"GlobalAveragePool", "ReduceMean"})
AFFINE = frozenset(
    {"Gemm", "MatMul", "Add", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Dropout",
     "Cast", "Concat"}
)  # fmt: skip

HOMOGENEOUS = AFFINE | POOLS | frozenset(
    {"Conv", "ConvTranspose", "BatchNormalization", "Relu", "LeakyRelu", "PRelu", "MaxPool",
     "AveragePool", "GlobalMaxPool", "ReduceMax", "ReduceSum", "Split", "Slice", "Pad",
     "Transpose", "Expand", "Sub", "Sum", "Resize"}
)  # fmt: skip
"""Operators that are linear on each side of their kinks."""

SUMS = frozenset({"Add", "Sub", "Sum", "Concat"})
"""Those that stay so in several operands; a product of two is none."""


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
        raise unknown_type(graph, name)
    producers = {item: node for node in graph.model.graph.node for item in node.output}
    is_exclusive, is_second = True, True
    while name in producers and producers[name].op_type in PASSED:
        name = producers[name].input[0]
    last = producers.get(name)
    if last is not None and last.op_type in ACTIVATIONS:
        name = last.input[0]
        is_exclusive = last.op_type != "Sigmoid"
        if is_exclusive:
            rank = graph.tensor(name).rank
            is_second = rank < 2 or attributes_of(last).get("axis", -1) % rank == 1
    tensor = graph.tensor(name)
    if graph.facts.shape(name) is None:
        raise ConfigError(
            f"the number of axes of {name!r} is not known: something before it, as a loop, gives "
            "what shape inference cannot follow; export the model with a Reshape behind that"
        )
    if not is_float(tensor.dtype) or tensor.rank < 1:
        raise ConfigError(
            f"output {name!r} holds no real numbers per image; explain another output"
        )
    return Scores(tensor, is_exclusive, is_second)


def unknown_type(graph: Graph, name: str) -> ConfigError:
    """The error that names the operator behind which types are not known, if there is one."""
    facts = graph.facts
    for node in graph.forward:
        if all(facts.has(item) for item in node.input if item) and not facts.has(node.output[0]):
            opset = facts.opsets.get(node.domain, 0)
            return UnsupportedOperatorError(
                node.op_type, node.domain, opset, node_label(node),
                f"this form of it is not known, nor then the type of output {name!r}; export the "
                "model without it",
            )  # fmt: skip
    return ConfigError(f"the type of output {name!r} cannot be worked out; explain another output")


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


FUSED_ATTENTION = frozenset({"Attention", "MultiHeadAttention"})
"""Softmax and both products in one node, of the standard or of ONNX Runtime."""

NORMS = frozenset({"LayerNormalization", "RMSNormalization"})
"""Over the channels of each position."""

NONNEGATIVE = frozenset(
    {"Relu", "Sigmoid", "HardSigmoid", "Softplus", "Softmax", "Exp", "Abs", "Sqrt"}
)
KEEPING_SIGN = frozenset(
    {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "Dropout", "Cast",
     "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Concat", "Add",
     "Sum", "Mul", "Max"}
)  # fmt: skip
"""Operators that give no negative number where none goes in."""


@dataclass(frozen=True)
class Layer:
    """A tensor that a CAM method looks at, and where its positions are.

    Attributes
    ----------
    tensor : Tensor
    layout : Layout
    seen_through : str
        Output of the normalisation over channels through which alone the score sees the positions,
        empty where there is none: the gradient before it is at right angles to the activation, so
        that their products sum to 0 over the channels of every position.
    """

    tensor: Tensor
    layout: Layout
    seen_through: str = ""


def target_layer(graph: Graph, scores: Scores, image: Tensor, layer: str) -> Layer:
    """The feature map that a CAM method looks at.

    Parameters
    ----------
    graph : Graph
    scores : Scores
    image : Tensor
    layer : str
        A tensor's name, a node's name, or ``auto``: the last tensor that has positions and that
        everything passes through before it is pooled. Of a transformer with a class token, what
        the last attention reads: the output of the normalisation before it. Of a segmentation, the
        last one on the coarsest grid (Seg-Grad-CAM's bottleneck).

    Raises
    ------
    ConfigError
        There is no such layer, it has no positions, or the score does not depend on it.
    """
    known = layouts(graph, image.name)
    if layer != "auto":
        return named_layer(graph, scores, known, layer)
    nodes = path(graph, image.name, scores.tensor.name)
    choose = coarsest if scores.has_positions else narrowest
    name = choose(graph, nodes, scores, image, known)
    if name is None:
        raise ConfigError(
            "no tensor whose positions on the image can be followed lies before the pooled "
            "features; name the layer to explain, or use a method that explains the input"
        )
    while after := seen_through(graph, scores, known, name):
        name = after
    return Layer(graph.tensor(name), known[name])


def named_layer(graph: Graph, scores: Scores, known: dict[str, Layout], layer: str) -> Layer:
    """A layer by the name of a tensor or of the node that makes it."""
    outputs = {node.name: node.output[0] for node in graph.forward if node.name}
    made = {name for node in graph.forward for name in node.output}
    name = layer if layer in made else outputs.get(layer, "")
    if not name:
        raise ConfigError(f"the model has no tensor or node {layer!r}; leave the layer at 'auto'")
    if name not in known or not has_positions(graph, name, known):
        raise ConfigError(f"positions cannot be followed to layer {layer!r}; name another")
    if scores.tensor.name not in dependents(graph, graph.forward, {name}):
        raise ConfigError(f"the explained score does not depend on layer {layer!r}; name another")
    return Layer(graph.tensor(name), known[name], seen_through(graph, scores, known, name))


def path(graph: Graph, source: str, end: str) -> list[onnx.NodeProto]:
    """The nodes that `end` depends on and that depend on `source`, in order."""
    reached = dependents(graph, graph.forward, {source})
    needed, found = {end}, []
    for node in reversed(graph.forward):
        if not needed.isdisjoint(node.output) and not reached.isdisjoint(node.input):
            needed.update(name for name in node.input if name in reached)
            found.append(node)
    return found[::-1]


def has_positions(graph: Graph, name: str, known: dict[str, Layout]) -> bool:
    """Whether a tensor has more than one position and real values."""
    return (
        name in known
        and is_float(graph.facts.dtype(name))
        and known[name].count(graph.tensor(name).shape) != 1
    )


def narrowest(
    graph: Graph,
    nodes: Sequence[onnx.NodeProto],
    scores: Scores,
    image: Tensor,
    known: dict[str, Layout],
) -> str | None:
    """The last tensor with positions through which everything passes on its way to the score."""
    reached = dependents(graph, nodes, {image.name})
    open_ends, is_mixed = {scores.tensor.name}, False
    for node in reversed(nodes):
        if open_ends.isdisjoint(node.output):
            continue
        is_mixed = is_mixed or node.op_type in FUSED_ATTENTION | {"Softmax"}
        open_ends.difference_update(node.output)
        open_ends.update(name for name in node.input if name in reached)
        name = next(iter(open_ends))
        is_gate = len(open_ends) == 1 and name != image.name
        if is_mixed and (normed := beside_its_sum(graph, nodes, scores, known, open_ends)):
            return normed
        if is_gate and has_positions(graph, name, known) and (is_mixed or not known[name].prefix):
            return name
    return None


def beside_its_sum(
    graph: Graph,
    nodes: Sequence[onnx.NodeProto],
    scores: Scores,
    known: dict[str, Layout],
    names: set[str],
) -> str | None:
    """The normalised sum, of the two outputs of a SkipLayerNormalization that are `names`.

    None where these are others, or where patches go on through the sum itself.
    """
    for node in nodes:
        if node.op_type == SKIP_NORM and names == {node.output[0], node.output[-1]}:
            patches_end = drops_patches(graph, scores, known, nodes, {node.output[-1]})
            return str(node.output[0]) if patches_end and node.output[0] in known else None
    return None


def coarsest(
    graph: Graph,
    nodes: Sequence[onnx.NodeProto],
    scores: Scores,
    image: Tensor,
    known: dict[str, Layout],
) -> str | None:
    """The last tensor of the smallest grid that still has more than one position."""
    best, size = None, None
    for name in (name for node in nodes for name in node.output):
        if has_positions(graph, name, known) and name != scores.tensor.name:
            count = known[name].count(graph.facts.shapes(name)[0] or ())
            if count is not None and (size is None or count <= size):
                best, size = name, count
    return best


def seen_through(graph: Graph, scores: Scores, known: dict[str, Layout], name: str) -> str:
    """The normalisation over channels through which alone the score sees a tensor's positions.

    What goes past it (a shortcut) must be kept position by position until all but the class tokens
    is dropped. Empty where there is no such normalisation.
    """
    nodes, rank = path(graph, name, scores.tensor.name), graph.tensor(name).rank
    norms = [
        node
        for node in nodes
        if (
            (node.op_type in NORMS and node.input[0] == name)
            or (node.op_type == SKIP_NORM and name in node.input[:2])
        )
        and known[name].channel == rank - 1 == attributes_of(node).get("axis", -1) % rank
    ]
    if len(norms) != 1 or norms[0].output[0] not in known:
        return ""
    after, *others = filter(None, norms[0].output)
    rest = [node for node in nodes if node.output[0] != after]
    return str(after) if drops_patches(graph, scores, known, rest, {name, *others}) else ""


def drops_patches(
    graph: Graph,
    scores: Scores,
    known: dict[str, Layout],
    nodes: Sequence[onnx.NodeProto],
    names: set[str],
) -> bool:
    """Whether nothing but class tokens is ever taken of some tensors that hold patches too."""
    past = set(names)
    for node in nodes:
        if past.isdisjoint(node.input):
            continue
        if node.output[0] in known and node.output[0] != scores.tensor.name:
            past.update(filter(None, node.output))
        elif not takes_class_tokens(graph, node, known.get(node.input[0])):
            return False
    return True


def takes_class_tokens(graph: Graph, node: onnx.NodeProto, layout: Layout | None) -> bool:
    """Whether a node keeps nothing but tokens before the grid."""
    if layout is None or not layout.prefix:
        return False
    values = [graph.facts.constant(name) for name in node.input[1:] if name]
    if any(value is None for value in values):
        return False
    numbers = [np.ravel(value).tolist() for value in values if value is not None]
    if node.op_type == "Gather" and attributes_of(node).get("axis", 0) == layout.token:
        return all(0 <= number < layout.prefix for number in numbers[0])
    if node.op_type == "Slice" and len(numbers) > 2:
        rank = graph.tensor(node.input[0]).rank
        return any(
            axis % rank == layout.token and start >= 0 and 0 < end <= layout.prefix
            for start, end, axis in zip(*numbers[:3], strict=True)
        )
    return False


def is_nonnegative(graph: Graph, name: str) -> bool:
    """Whether a tensor of the model holds no negative number, whatever the image."""
    makers = {item: node for node in graph.forward for item in node.output}
    node = makers.get(name)
    if node is None:
        value = graph.facts.constant(name) if graph.facts.has(name) else None
        return value is not None and min(np.ravel(value).tolist(), default=0) >= 0
    if node.op_type == "Clip":
        low = graph.facts.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        return low is not None and float(low) >= 0
    if node.op_type == "FusedConv":
        return attributes_of(node).get("activation") in NONNEGATIVE
    count = 1 if node.op_type in ("Reshape", "Slice", "Split") else len(node.input)
    return node.op_type in NONNEGATIVE or (
        node.op_type in KEEPING_SIGN
        and all(is_nonnegative(graph, item) for item in node.input[:count])
    )


def is_pooled(graph: Graph, layer: Layer, scores: Scores) -> bool:
    """Whether the score sees a layer through its mean over positions alone.

    Then every gradient is the same at all positions, and Grad-CAM, XGrad-CAM and HiRes-CAM are one
    map up to a positive factor.
    """
    name = layer.tensor.name
    nodes = path(graph, name, scores.tensor.name)
    if not nodes or nodes[0].op_type not in POOLS or nodes[0].input[0] != name:
        return False
    before, after = layer.tensor.shape, graph.facts.shape(nodes[0].output[0]) or ()
    pooled = [axis for axis in range(len(before)) if axis not in (0, layer.layout.channel)]
    keeps = len(after) == len(before)
    kept = tuple(1 if axis in pooled else size for axis, size in enumerate(before))
    dropped = tuple(size for axis, size in enumerate(before) if axis not in pooled)
    if layer.layout.prefix or after != (kept if keeps else dropped):
        return False
    return not any(name in reads(node) for node in nodes[1:])


def is_linear_behind_pool(graph: Graph, layer: Layer, scores: Scores) -> bool:
    """Whether what follows the pool is one affine map, so that CAM is that one map too."""
    name = layer.tensor.name
    nodes = path(graph, name, scores.tensor.name)
    reached = dependents(graph, nodes, {name})
    return all(
        node.op_type in AFFINE and sum(name in reached for name in node.input) == 1
        for node in nodes[1:]
    )


def is_homogeneous(graph: Graph, scores: Scores, image: Tensor) -> bool:
    """Whether the score is linear in the image wherever no kink is crossed, biases aside.

    Then relevance under the epsilon rule is the image times the gradient.
    """
    nodes = path(graph, image.name, scores.tensor.name)
    reached = dependents(graph, nodes, {image.name})
    return all(
        node.op_type in HOMOGENEOUS
        and (node.op_type in SUMS or sum(name in reached for name in node.input) == 1)
        for node in nodes
    )
