"""Compiles a model and an explanation of it into one graph.

The vendor's nodes stay as they are; the vector-Jacobian product and the map are written after
them as standard ONNX nodes, so one run of any ONNX runtime gives prediction and heatmap.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from ..errors import ConfigError
from .check import check_untouched
from .emit import Graph, Tensor, is_float
from .layers import (
    explained_scores,
    image_input,
    is_homogeneous,
    is_linear_behind_pool,
    is_nonnegative,
    is_pooled,
    target_layer,
)
from .methods import (
    METHODS,
    Method,
    Parametrised,
    method_of,
)
from .methods.question import Box, Question
from .select import ByTarget, Chosen, Scores, Selection

COMPILER_VERSION = "10"
"""Changes whenever a compiled file could; part of the key under which compiled files are kept."""

ATTRIBUTION = "attribution"
ATTRIBUTION_CLASS = "attribution_class"


@dataclass(frozen=True)
class Report:
    """What was compiled.

    Attributes
    ----------
    method : str
    output : str
        The tensor that is explained: the score before a final sigmoid or softmax.
    layer : str
        The tensor whose grid the map has: the layer of a CAM method, else the image.
    layer_shape : tuple of int or None
        Its shape, None for sizes that the model leaves free.
    backward : tuple of str
        Names of the nodes that were added.
    on_device : tuple of str
        Those among them that hold real numbers or compare them, which a device has to take. The
        others work out shapes, which ONNX Runtime does on the CPU whatever the device.
    equals : tuple of str
        Methods that give the same map on this model, up to a positive factor: no independent
        evidence.
    warnings : tuple of str
        What a reader of the map has to know.
    """

    method: str
    output: str
    layer: str
    layer_shape: tuple[int | None, ...]
    backward: tuple[str, ...]
    on_device: tuple[str, ...]
    equals: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """A model that explains itself, and the report of how it was made."""

    model: onnx.ModelProto
    report: Report


def compile(
    model: onnx.ModelProto,
    method: str | Parametrised = "grad-cam",
    *,
    select: Selection = ByTarget(),  # noqa: B008
    layer: str = "auto",
    output: str | None = None,
    image: str | None = None,
    box: Box | None = None,
) -> Compiled:
    """Append an explanation to a model.

    Parameters
    ----------
    model : onnx.ModelProto
        Opset 13 or later; is not changed. Free sizes other than the batch should be fixed.
    method : str or a method with parameters
        A key of `METHODS`, or for example ``IntegratedGradients(steps=32)``.
    select : ByTarget, BySeed or TopClasses
        How the explained class is found; see each for the input or output that it adds.
    layer : str
        Tensor or node that a CAM method looks at; ``auto`` takes the last one before pooling.
    output : str, optional
        Name of the explained output; the first by default. A final sigmoid or softmax is left out:
        the score before it is explained.
    image : str, optional
        Name of the input that holds the image; by default the first with real values and three or
        more axes.
    box : tuple of float, float, optional
        Lowest and highest value that an image can hold as the model takes it, for the methods that
        have `takes_box`; the others do not look at it.

    Returns
    -------
    Compiled
        The model keeps its nodes, inputs and outputs. Added: the selection's input or output, and
        `attribution`, float32 ``(batch, maps, *spatial)`` on the grid of the layer for CAM methods
        and of the image for the others, raw: in the score's unit, not scaled per image. Some
        methods add a quality, float32 ``(batch, maps)``: `explained_variance`,
        `completeness_residual`.

    Raises
    ------
    UnsupportedOperatorError
        An operator between score and layer has no right derivative; the message names it.
    ConfigError
        The model's form, the method, the layer or the output do not fit; the message says what to
        change.

    Examples
    --------
    >>> compiled = compile(onnx.load("chest.onnx"), "grad-cam")
    >>> onnx.save(compiled.model, "explained.onnx")
    """
    way = method_of(method)
    if way is None:
        raise ConfigError(f"there is no method {method!r}; known: {', '.join(METHODS)}")
    graph = Graph(model)
    scores = explained_scores(graph, output)
    picture = image_input(graph, image)
    where = None if way.looks_at == "image" else target_layer(graph, scores, picture, layer)
    sees_mean = where is not None and is_pooled(graph, where, scores)
    is_linear = where is not None and sees_mean and is_linear_behind_pool(graph, where, scores)
    if way.needs_pooled_linear and not is_linear:
        raise ConfigError(
            f"{way.name} is defined where the score is the layer's mean through one linear map, "
            f"which this model's is not; use grad-cam"
        )
    if way.sums_over_channels and where is not None and where.seen_through:
        raise ConfigError(
            f"{way.name} is 0 but for rounding at layer {where.tensor.name!r}: the score sees it "
            f"through a normalisation over channels alone, before which activation times gradient "
            f"sums to 0; name the normalisation's output, {where.seen_through!r}"
        )
    chosen = select.choose(graph, scores)
    ends = outputs(
        way, [Question(graph, scores, seed, picture, where, box) for seed in chosen.seeds]
    )
    if chosen.classes is not None:
        ends[ATTRIBUTION_CLASS] = chosen.classes
    compiled, added = assemble(graph, chosen, ends, picture)
    check_untouched(model, compiled)
    looked_at = where.tensor if where is not None and way.looks_at == "layer" else picture
    is_signed = where is not None and not is_nonnegative(graph, where.tensor.name)
    report = Report(
        method=way.name,
        output=scores.tensor.name,
        layer=looked_at.name,
        layer_shape=looked_at.shape,
        backward=tuple(node.name for node in added),
        on_device=tuple(node.name for node in added if touches_reals(graph, node)),
        equals=equal_methods(graph, way, scores, picture, sees_mean=sees_mean, is_linear=is_linear),
        warnings=(
            *way.warnings,
            *(way.warnings_when_signed if is_signed else ()),
            *dict.fromkeys(graph.notes),
        ),
    )
    return Compiled(compiled, report)


def equal_methods(
    graph: Graph,
    way: Method,
    scores: Scores,
    picture: Tensor,
    *,
    sees_mean: bool,
    is_linear: bool,
) -> tuple[str, ...]:
    """Methods that are the same on this model, up to a positive factor."""
    if sees_mean and way.equals:
        return tuple(
            name for name in way.equals if is_linear or not METHODS[name].needs_pooled_linear
        )
    if way.equals_when_homogeneous and is_homogeneous(graph, scores, picture):
        return way.equals_when_homogeneous
    return ()


def outputs(way: Method, questions: list[Question]) -> dict[str, Tensor]:
    """What the graph gives for all questions, by output name; one map per question."""
    answers = [way.explain(question) for question in questions]
    graph = questions[0].graph
    found = {ATTRIBUTION: graph.concat([item.attribution for item in answers], 1)}
    for name in answers[0].quality:
        found[name] = graph.concat([item.quality[name] for item in answers], 1)
    return {name: tensor.cast(TensorProto.FLOAT) for name, tensor in found.items()}


def assemble(
    graph: Graph, chosen: Chosen, ends: dict[str, Tensor], picture: Tensor
) -> tuple[onnx.ModelProto, list[onnx.NodeProto]]:
    """The model with what was written and is needed, and the added nodes."""
    whole = graph.model.graph
    taken = {name for node in whole.node for name in node.output}
    taken |= {item.name for item in (*whole.input, *whole.initializer)}
    for name in taken.intersection(ends):
        raise ConfigError(f"the model has a tensor {name!r} of its own; rename it in the model")
    named = [
        helper.make_node("Identity", [tensor.name], [name], name=f"{graph.prefix}{name}")
        for name, tensor in ends.items()
    ]
    needed = {name for node in named for name in node.input}
    added = named[::-1]
    for node in reversed(graph.nodes):
        if any(name in needed for name in node.output):
            needed.update(node.input)
            added.append(node)
    added.reverse()
    compiled = onnx.ModelProto()
    compiled.CopyFrom(graph.model)
    compiled.graph.node.extend(added)
    compiled.graph.initializer.extend(item for item in graph.initializers if item.name in needed)
    for tensor in chosen.inputs:
        compiled.graph.input.append(described(graph, tensor.name, tensor, picture))
    for name, tensor in ends.items():
        compiled.graph.output.append(described(graph, name, tensor, picture))
    return compiled, added


def touches_reals(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node takes or gives real numbers, other than to read their shape."""
    names = [name for name in (*node.input, *node.output) if name and graph.facts.has(name)]
    is_real = any(is_float(graph.facts.dtype(name)) for name in names)
    return is_real and node.op_type not in ("Shape", "Size")


def described(graph: Graph, name: str, tensor: Tensor, picture: Tensor) -> onnx.ValueInfoProto:
    """A new input or output; its free batch axis bears the name that the image's has."""
    first = next(item for item in graph.model.graph.input if item.name == picture.name)
    batch = first.type.tensor_type.shape.dim[0].dim_param or None
    sizes = [
        batch if axis == 0 and size is None else size for axis, size in enumerate(tensor.shape)
    ]
    return helper.make_tensor_value_info(name, tensor.dtype, sizes)
