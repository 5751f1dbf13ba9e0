"""What can be known about a graph before it runs: types, shapes, constants.

A vendor's graph rarely says how large its tensors are, and a rule that guessed would give wrong
numbers. So the graph is looked at in two *worlds*, which differ only in the sizes that the model
leaves free (batch 2 and batch 3). Node by node, shape inference and the evaluation of everything
that follows from sizes and initializers alone make both worlds concrete. What is equal in both is
static; what differs follows a free size and is read at run time.

Images of both worlds can be halved five times, as most networks need. By that alone a remainder
would be static that is not. So where an image's size is free there is a third, odd world: what
differs there is not static either. A network may not bear it; what fails there says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import onnx
from onnx import checker, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from ..errors import ConfigError, UnsupportedOperatorError
from .expand import body_of, schema_of

Array = npt.NDArray[np.generic]
Shape = tuple[int | None, ...]

BATCH_SIZES = (2, 3, 5)
OTHER_SIZES = ((160, 416, 175), (224, 256, 231), (288, 352, 309), (352, 480, 363))
"""What the worlds put for a free batch axis, and for another one by its place behind the batch.

No difference or quotient of two axes is the same in two worlds.
"""

UNBORNE = (ConfigError, ValueError, IndexError, RuntimeError, TypeError, ArithmeticError)
"""What inference and evaluation raise at sizes that a network does not bear."""

OLDEST_OPSET = 13
"""ReduceSum, Squeeze and Unsqueeze take their axes as an input from here on."""

HINT_ELEMENTS = 1024
"""Values up to this size are shown to shape inference (shapes, axes, scales)."""

EVALUATED_FROM = {"QuantizeLinear": 19, "DequantizeLinear": 19}
"""Operators that onnx evaluates from an opset on only; what older ones could do is unchanged."""

ROUNDING_UP = frozenset({"MaxPool", "AveragePool", "LpPool"})
"""Operators that may round the number of their windows up."""

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli",
     "Multinomial"}
)  # fmt: skip


class World:
    """A graph at one choice of its free sizes.

    Parameters
    ----------
    model : onnx.ModelProto
        Gives versions, functions and initializers; its nodes are learnt one by one.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._opsets = versions(model)
        self.types: dict[str, onnx.TypeProto] = {}
        self.values: dict[str, Array] = {}
        self._protos: dict[str, onnx.TensorProto] = {}
        self._producers: dict[str, onnx.NodeProto] = {}
        for item in model.graph.initializer:
            self.add_constant(item)

    def shape(self, name: str) -> Shape | None:
        """Sizes of a tensor, None for one that depends on data, None in all for an unknown rank."""
        kind = self.types.get(name)
        if (
            kind is None
            or not kind.HasField("tensor_type")
            or not kind.tensor_type.HasField("shape")
        ):
            return None
        return tuple(
            dim.dim_value if dim.HasField("dim_value") else None
            for dim in kind.tensor_type.shape.dim
        )

    def is_known(self, name: str) -> bool:
        """Whether the value follows from sizes and initializers alone."""
        return name in self.values or name in self._protos or name in self._producers

    def value(self, name: str) -> Array:
        """The value of a known tensor; worked out on first use."""
        if name not in self.values:
            if name in self._protos:
                self.values[name] = numpy_helper.to_array(self._protos[name])
            else:
                self._evaluate(self._producers[name])
        return self.values[name]

    def add_constant(self, proto: onnx.TensorProto) -> None:
        """Take an initializer in."""
        self._protos[proto.name] = proto
        self.types[proto.name] = helper.make_tensor_type_proto(proto.data_type, list(proto.dims))

    def learn(self, node: onnx.NodeProto) -> None:
        """Work out the types of a node's outputs, and note whether their values are known.

        Raises
        ------
        ConfigError
            The node contradicts itself at these sizes.
        """
        self._infer(node)
        inputs = [name for name in node.input if name]
        if node.op_type in ("Shape", "Size"):
            dims = self.shape(inputs[0])
            if dims is not None and None not in dims:
                self._learn_size(node, [dim for dim in dims if dim is not None])
        elif (
            node.op_type not in RANDOM
            and not any(item.HasField("g") for item in node.attribute)
            and all(self.is_known(name) for name in inputs)
        ):
            self._producers.update((name, node) for name in node.output if name)

    def _learn_size(self, node: onnx.NodeProto, dims: list[int]) -> None:
        if node.op_type == "Size":
            value = np.array(int(np.prod(dims)), np.int64)
        else:
            span = {item.name: item.i for item in node.attribute}
            value = np.array(dims[span.get("start", 0) : span.get("end", len(dims))], np.int64)
        self.values[node.output[0]] = value

    def _infer(self, node: onnx.NodeProto) -> None:
        inputs = [name for name in node.input if name]
        if any(name not in self.types for name in inputs):
            return
        try:
            schema = schema_of(node, self._model)
            if schema is not None:
                self._infer_by_schema(schema, node, inputs)
            elif not node.domain and defs.has(node.op_type):
                # ONNX Runtime saves what it fused so
                raise UnsupportedOperatorError(
                    node.op_type,
                    node.domain,
                    self._opsets.get("", 0),
                    node_label(node),
                    "the opset has no such operator; save the model at a later one",
                )
            if any(self.shape(name) is None for name in node.output if name):
                self._infer_by_body(node)
        except (shape_inference.InferenceError, checker.ValidationError) as error:
            raise ConfigError(
                f"{node.op_type} at node {node_label(node)!r} does not fit its inputs' shapes "
                f"{[self.shape(name) for name in inputs]} ({error}): fix the model's free input "
                f"sizes (export it with the sizes it will be run at) and compile again"
            ) from error

    def _infer_by_schema(
        self, schema: defs.OpSchema, node: onnx.NodeProto, inputs: list[str]
    ) -> None:
        found = shape_inference.infer_node_outputs(
            schema,
            node,
            {name: self.types[name] for name in inputs},
            {item.name: item for item in self._hints(node)},
            opset_imports=self._imports(),
            ir_version=self._model.ir_version,
        )
        self.types.update(found)
        if node.op_type in ROUNDING_UP:
            self._check_last_windows(node)

    def _check_last_windows(self, node: onnx.NodeProto) -> None:
        """Refuse windows that ceil mode would lay wholly behind the data.

        Runtimes leave them out at every opset, but before 22 the standard's shape inference counts
        them, the runtimes' own included: a graph with the right sizes would not load, one with the
        wrong ones would divide by them.
        """
        given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        sizes = (self.shape(node.input[0]) or ())[2:]
        windows = (self.shape(node.output[0]) or ())[2:]
        strides = given.get("strides", [1] * len(sizes))
        starts = given.get("pads", [0] * 2 * len(sizes))[: len(sizes)]
        for size, count, stride, start in zip(sizes, windows, strides, starts, strict=True):
            if size is not None and count is not None and (count - 1) * stride >= size + start:
                raise UnsupportedOperatorError(
                    node.op_type,
                    node.domain,
                    self._opsets[node.domain],
                    node_label(node),
                    f"with ceil_mode its last window would start behind the {size} elements of an "
                    "axis, which opsets before 22 count and runtimes leave out; convert the model "
                    "with onnx.version_converter.convert_version(model, 22)",
                )

    def _infer_by_body(self, node: onnx.NodeProto) -> None:
        body = body_of(node, self.types, self._hints(node), self._model)
        if body is None:
            return
        whole = helper.make_model(
            body, opset_imports=self._imports(), ir_version=self._model.ir_version
        )
        for item in shape_inference.infer_shapes(whole, data_prop=True).graph.output:
            if item.type.HasField("tensor_type"):
                self.types[item.name] = item.type

    def body(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that one node is made of; empty where it is not made of others."""
        found = body_of(node, self.types, self._hints(node), self._model)
        return [] if found is None else list(found.node)

    def _hints(self, node: onnx.NodeProto) -> list[onnx.TensorProto]:
        names = dict.fromkeys(name for name in node.input if name and self._is_hint(name))
        return [numpy_helper.from_array(self.value(name), name) for name in names]

    def _imports(self) -> list[onnx.OperatorSetIdProto]:
        return [helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]

    def _is_hint(self, name: str) -> bool:
        dims = self.shape(name)
        return (
            self.is_known(name)
            and dims is not None
            and None not in dims
            and len(dims) <= 1
            and int(np.prod([dim or 0 for dim in dims])) <= HINT_ELEMENTS
        )

    def _evaluate(self, node: onnx.NodeProto) -> None:
        inputs = sorted({name for name in node.input if name})
        outputs = [name for name in node.output if name]
        opsets = {**self._opsets, "": max(self._opsets[""], EVALUATED_FROM.get(node.op_type, 0))}
        imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
        function = helper.make_function("", "one", inputs, outputs, [node], imports)
        feeds = {name: self.value(name) for name in inputs}
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(function).run(None, feeds, attributes={})
        self.values.update(zip(outputs, map(np.asarray, results), strict=True))


class Facts:
    """What holds for a graph whatever its free sizes are.

    Parameters
    ----------
    model : onnx.ModelProto

    Raises
    ------
    ConfigError
        The opset is older than 13, or the graph contradicts itself.
    UnsupportedOperatorError
        The sizes that an operator gives are not those that its opset tells.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.opsets = versions(model)
        self.opset = self.opsets.get("", 0)
        if self.opset < OLDEST_OPSET:
            raise ConfigError(
                f"the model imports opset {self.opset}; {OLDEST_OPSET} or later is needed: "
                f"convert it with onnx.version_converter.convert_version(model, {OLDEST_OPSET})"
            )
        stored = {item.name for item in model.graph.initializer}
        inputs = [item for item in model.graph.input if item.name not in stored]
        free = free_sizes(inputs)
        count = 2 if all(sizes == BATCH_SIZES for sizes in free.values()) else 3
        self._worlds = tuple(World(model) for _ in range(count))
        for index, world in enumerate(self._worlds):
            for item in inputs:
                world.types[item.name] = sized(item, free, index)
        for node in model.graph.node:
            self.learn(node)

    def learn(self, node: onnx.NodeProto) -> None:
        """Take one more node in, in topological order."""
        for world in self._worlds[:2]:
            world.learn(node)
        for world in self._worlds[2:]:
            with suppress(*UNBORNE):
                world.learn(node)

    def add_input(self, name: str, dtype: int, shapes: Iterable[Shape | None]) -> None:
        """Take a new graph input in, by its shape in each world."""
        for world, shape in zip(self._worlds, shapes, strict=True):
            if shape is not None:
                world.types[name] = helper.make_tensor_type_proto(dtype, shape)

    def add_constant(self, proto: onnx.TensorProto) -> None:
        """Take a new initializer in."""
        for world in self._worlds:
            world.add_constant(proto)

    def has(self, name: str) -> bool:
        """Whether the tensor's type is known."""
        return all(
            name in world.types and world.types[name].HasField("tensor_type")
            for world in self._worlds[:2]
        )

    def dtype(self, name: str) -> int:
        """The element type, as in onnx.TensorProto."""
        return int(self._worlds[0].types[name].tensor_type.elem_type)

    def shapes(self, name: str) -> tuple[Shape | None, ...]:
        """The shape in each world; None where it is not known there."""
        return tuple(world.shape(name) for world in self._worlds)

    def shape(self, name: str) -> Shape | None:
        """The sizes that hold always; None for one that follows a free size; None for no rank."""
        first, second, *odd = self.shapes(name)
        known = [first, second, *(shape for shape in odd if shape is not None)]
        ranks = {None if shape is None else len(shape) for shape in known}
        if first is None or len(ranks) > 1:
            return None
        return tuple(
            size if all(shape is not None and shape[axis] == size for shape in known) else None
            for axis, size in enumerate(first)
        )

    def body(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that one node is made of; empty where it is not made of others.

        Their inner names are their own and must be made fresh.
        """
        return self._worlds[0].body(node)

    def constant(self, name: str) -> Array | None:
        """The value of a tensor that is the same whatever is fed, else None."""
        first, second, *odd = self._worlds
        if not (first.is_known(name) and second.is_known(name)):
            return None
        one, others = first.value(name), [second.value(name)]
        with suppress(*UNBORNE):
            others += [world.value(name) for world in odd if world.is_known(name)]
        return one if all(one is other or np.array_equal(one, other) for other in others) else None


def versions(model: onnx.ModelProto) -> dict[str, int]:
    """The opset version by domain; the standard domain is the empty name."""
    return {
        "" if item.domain == "ai.onnx" else item.domain: item.version for item in model.opset_import
    }


def node_label(node: onnx.NodeProto) -> str:
    """A node's name, or its first output where it has none."""
    return str(node.name or node.output[0])


def free_sizes(inputs: Iterable[onnx.ValueInfoProto]) -> dict[tuple[str, int], tuple[int, ...]]:
    """What the worlds put for each free axis of each input, by the input's name and the axis.

    Axes of the same name are the same; of the nameless and of different names those that stand at
    the same place are, since exporters name what they cannot tell apart by the input.
    """
    names: dict[tuple[str, int], str] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for item in inputs:
        for axis, dim in enumerate(item.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") or dim.dim_value <= 0:
                name = str(dim.dim_param) or f"{item.name}:{axis}"
                names[item.name, axis] = name
                if axis == 0:
                    sizes[name] = BATCH_SIZES
                sizes.setdefault(name, OTHER_SIZES[(axis - 1) % len(OTHER_SIZES)])
    return {key: sizes[name] for key, name in names.items()}


def sized(
    item: onnx.ValueInfoProto, free: Mapping[tuple[str, int], Sequence[int]], index: int
) -> onnx.TypeProto:
    """An input's type with every free size replaced by that of world `index`."""
    kind = onnx.TypeProto()
    kind.CopyFrom(item.type)
    for axis, dim in enumerate(kind.tensor_type.shape.dim):
        if (item.name, axis) in free:
            dim.dim_value = free[item.name, axis][index]
    return kind
