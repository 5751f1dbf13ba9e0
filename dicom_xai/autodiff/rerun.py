"""The model once more, on other images, in the same graph: for methods that look around the image.

The copy shares the weights. The vendor's own run, and with it the prediction, is not touched.
"""

from __future__ import annotations

import onnx

from ..errors import ConfigError
from .backward import pull_back, reads
from .emit import Graph, Tensor
from .expand import renamed
from .prepare import node_label
from .rules import GRADIENT


def rerun(graph: Graph, image: Tensor, other: Tensor, score: Tensor) -> list[onnx.NodeProto]:
    """Copy what leads from the image to the score, fed with another image.

    Parameters
    ----------
    graph : Graph
    image : Tensor
        The model's input.
    other : Tensor
        What takes its place; its batch may be larger.
    score : Tensor

    Returns
    -------
    list of onnx.NodeProto
        The copied nodes, which are written to the graph. The copy of a tensor bears the name that
        `copied` gives.

    Raises
    ------
    ConfigError
        The model has further inputs, whose values at the other image are not known.
    """
    inputs = {item.name for item in graph.model.graph.input} - {image.name}
    inputs -= {item.name for item in graph.model.graph.initializer}
    needed, chosen, changed = {score.name}, [], {image.name}
    for node in graph.model.graph.node:
        if not changed.isdisjoint(reads(node)):
            changed.update(node.output)
    for node in reversed(graph.model.graph.node):
        if not needed.isdisjoint(node.output) and not changed.isdisjoint(reads(node)):
            needed.update(reads(node))
            chosen.append(node)
    if not inputs.isdisjoint(needed):
        raise ConfigError(
            f"the model also reads {', '.join(sorted(inputs & needed))}; a method that runs it at "
            "other images needs a model with one input"
        )
    kept = [name for name in needed if name not in changed]
    nodes = []
    for index, node in enumerate(reversed(chosen)):
        copy = renamed(node, kept, mark_of(graph, other), index)
        first = mark_of(graph, other) + image.name
        copy.input[:] = [other.name if name == first else name for name in copy.input]
        graph.labels[copy.name] = node_label(node)
        nodes.append(copy)
    graph.copy(nodes)
    return nodes


def copied(graph: Graph, other: Tensor, tensor: Tensor) -> Tensor:
    """The copy of a tensor in the run at another image."""
    return graph.tensor(mark_of(graph, other) + tensor.name)


def mark_of(graph: Graph, other: Tensor) -> str:
    """What the names of the run at another image begin with."""
    return f"{graph.prefix}at_{other.name.removeprefix(graph.prefix)}/"


def gradients_at(
    graph: Graph, image: Tensor, points: Tensor, score: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the seeded score at several images around each image.

    Parameters
    ----------
    graph : Graph
    image : Tensor
        ``(batch, channels, *spatial)``.
    points : Tensor
        ``(batch, points, channels, *spatial)``.
    score, seed : Tensor
        ``(batch, classes, ...)``.

    Returns
    -------
    Tensor
        Gradients, shaped as `points`.
    Tensor
        The seeded score at each point, ``(batch, points)``.

    Notes
    -----
    With a free batch all points go through one larger batch; with a fixed one each point has its
    own copy of the nodes.
    """
    count = points.size(1)
    if image.shape[0] is None:
        return batched(graph, image, points, score, seed)
    each = [
        batched(graph, image, points.slice(1, index, index + 1), score, seed)
        for index in range(count)
    ]
    grads, scores = zip(*each, strict=True)
    return graph.concat(grads, 1), graph.concat(scores, 1)


def batched(
    graph: Graph, image: Tensor, points: Tensor, score: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """All points of all images as one batch."""
    count = points.size(1)
    flat = points.reshape(-1, *(image.size(axis) for axis in range(1, image.rank)))
    nodes = rerun(graph, image, flat, score)
    there = copied(graph, flat, score)
    seeds = seed.unsqueeze(1)
    if count > 1:
        repeats = [1, count, *[1] * (seed.rank - 1)]
        seeds = graph.op("Expand", seeds, graph.ints(repeats))
    seeds = seeds.reshape_like(there)
    found = pull_back(graph, nodes, {there.name: seeds}, [flat.name], GRADIENT)
    if flat.name not in found:
        raise ConfigError(f"no derivative of {score.name!r} reaches the image")
    sums = (there * seeds).sum(range(1, there.rank), keep=False).reshape(-1, count)
    return found[flat.name].reshape_like(points), sums
