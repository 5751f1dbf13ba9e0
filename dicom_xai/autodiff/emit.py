"""Writes the new nodes: tensors that add and multiply, each operation one standard node.

Rules say ``g * y * (1 - y)`` and get nodes that fit the model's opset, its element type and its
free sizes. Equal nodes are written once, and what depends on constants alone becomes an
initializer. Operators whose schema keeps changing (Pad, ConstantOfShape, Size) are not offered:
execution providers lag behind them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .fusion import recognised, rounded, swallowed
from .prepare import Array, Facts, Shape

INT64_MIN, INT64_MAX = np.iinfo(np.int64).min, np.iinfo(np.int64).max
FOLD_ELEMENTS = 4096
"""A constant result may be at most so large, or as large as what it is made of."""


class Tensor:
    """A tensor of the graph, old or new; arithmetic on it writes nodes.

    Sizes that follow a free size of the model are None in `shape`.
    """

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph = graph
        self.name = name

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, shape={self.graph.facts.shape(self.name)})"

    @property
    def dtype(self) -> int:
        """Element type, as in onnx.TensorProto."""
        return self.graph.facts.dtype(self.name)

    @property
    def shape(self) -> Shape:
        """Static sizes; None for one that follows a free size of the model."""
        shape = self.graph.facts.shape(self.name)
        if shape is None:
            raise UnknownShapeError(self.name)
        return shape

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def value(self) -> Array | None:
        """The value, where it is the same in every run."""
        return self.graph.facts.constant(self.name)

    def size(self, axis: int) -> int:
        """The static size of an axis."""
        found = self.shape[axis]
        if found is None:
            raise UnknownShapeError(self.name)
        return found

    def __add__(self, other: Tensor | float) -> Tensor:
        return self._binary("Add", self, other)

    def __radd__(self, other: float) -> Tensor:
        return self._binary("Add", other, self)

    def __sub__(self, other: Tensor | float) -> Tensor:
        return self._binary("Sub", self, other)

    def __rsub__(self, other: float) -> Tensor:
        return self._binary("Sub", other, self)

    def __mul__(self, other: Tensor | float) -> Tensor:
        number = self._as_number(other)
        if number is None:
            return self._before_number("Mul", other)
        return self._times(number)

    def __rmul__(self, other: float) -> Tensor:
        return self._binary("Mul", other, self)

    def __truediv__(self, other: Tensor | float) -> Tensor:
        number = self._as_number(other)
        if not number:
            return self._before_number("Div", other)
        return self._times(1 / number)

    def __rtruediv__(self, other: float) -> Tensor:
        return self._binary("Div", other, self)

    def __pow__(self, other: Tensor | float) -> Tensor:
        return self._binary("Pow", self, other)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.graph.op("MatMul", self, other)

    def __neg__(self) -> Tensor:
        return self.graph.op("Neg", self)

    def __gt__(self, other: Tensor | float) -> Tensor:
        return self._binary("Greater", self, other)

    def __lt__(self, other: Tensor | float) -> Tensor:
        return self._binary("Less", self, other)

    def __and__(self, other: Tensor) -> Tensor:
        return self.graph.op("And", self, other)

    def equals(self, other: Tensor | float) -> Tensor:
        """Elementwise ``==``, a boolean tensor."""
        return self._binary("Equal", self, other)

    def _binary(self, op_type: str, left: Tensor | float, right: Tensor | float) -> Tensor:
        operands = (
            item if isinstance(item, Tensor) else self.graph.scalar(item, self.dtype)
            for item in (left, right)
        )
        return self.graph.op(op_type, *operands)

    def _as_number(self, other: Tensor | float) -> float | None:
        """What every element is multiplied with, if it is one constant of float32 or float64."""
        if self.dtype not in (TensorProto.FLOAT, TensorProto.DOUBLE):
            return None
        if not isinstance(other, Tensor):
            return float(other)
        is_one = math.prod(size or 0 for size in other.shape) == 1 and other.rank <= self.rank
        value = other.value if is_one else None
        return None if value is None else float(value.ravel()[0])

    def _times(self, number: float) -> Tensor:
        """The product with a number and with the one that waits, as one."""
        inner, waiting = self.graph.factors.get(self.name, (self, 1.0))
        if number * waiting == 1:
            return inner
        found = self._binary("Mul", inner, number * waiting)
        self.graph.factors[found.name] = inner, number * waiting
        return found

    def _before_number(self, op_type: str, other: Tensor | float) -> Tensor:
        """A product or quotient behind which a number waits on, if it is no larger for that."""
        inner, waiting = self.graph.factors.get(self.name, (self, 1.0))
        found, shapes = self._binary(op_type, inner, other), self.graph.facts.shapes
        if waiting == 1 or shapes(found.name) != shapes(self.name):
            return self._binary(op_type, self, other)
        return found._times(waiting)

    def masked(self, condition: Tensor) -> Tensor:
        """The same where the condition holds, else 0; a product, as Where is slow on the CPU."""
        return self * condition.cast(self.dtype)

    def is_positive(self) -> Tensor:
        """1 where an element is above 0, else 0, in the own element type.

        In float32 one node: ONNX Runtime keeps HardSigmoid, unlike a comparison, in the blocked
        layout of its convolutions. Only subnormal numbers get less than 1.
        """
        if self.dtype != TensorProto.FLOAT:
            return (self > 0).cast(self.dtype)
        steepest = float(np.finfo(np.float32).max)
        return self.graph.op("HardSigmoid", self, alpha=steepest, beta=0.0)

    def cast(self, dtype: int) -> Tensor:
        """The same values as another element type."""
        return self if dtype == self.dtype else self.graph.op("Cast", self, to=dtype)

    def sum(self, axes: Sequence[int], *, keep: bool = True) -> Tensor:
        """Sum over `axes`."""
        if self._is_flat(axes, keep):
            return self
        return self.graph.op("ReduceSum", self, self.graph.ints(axes), keepdims=int(keep))

    def mean(self, axes: Sequence[int], *, keep: bool = True) -> Tensor:
        """Mean over `axes`."""
        return self._reduce("ReduceMean", axes, keep)

    def max(self, axes: Sequence[int], *, keep: bool = True) -> Tensor:
        """Maximum over `axes`."""
        return self._reduce("ReduceMax", axes, keep)

    def _is_flat(self, axes: Sequence[int], keep: bool) -> bool:
        """Whether there is nothing to reduce."""
        return not len(axes) or (keep and all(self.shape[axis] == 1 for axis in axes))

    def _reduce(self, op_type: str, axes: Sequence[int], keep: bool) -> Tensor:
        if self._is_flat(axes, keep):
            return self
        if self.graph.facts.opset < 18:
            return self.graph.op(op_type, self, axes=list(axes), keepdims=int(keep))
        return self.graph.op(op_type, self, self.graph.ints(axes), keepdims=int(keep))

    def transpose(self, order: Sequence[int]) -> Tensor:
        """The axes in another order."""
        if list(order) == sorted(order):
            return self
        return self.graph.op("Transpose", self, perm=list(order))

    def reshape(self, *sizes: int) -> Tensor:
        """Another shape; 0 keeps the size at that place, -1 takes what is left."""
        if self.graph.facts.shape(self.name) == sizes:
            return self
        return self.graph.op("Reshape", self, self.graph.ints(sizes))

    def reshape_like(self, other: Tensor) -> Tensor:
        """The shape of `other`, which holds as many elements."""
        graph = self.graph
        if graph.facts.shapes(self.name) == graph.facts.shapes(other.name):
            return self
        if other.shape.count(None) <= 1:
            return self.reshape(*(-1 if size is None else size for size in other.shape))
        return graph.op("Reshape", self, graph.op("Shape", other))

    def expand_like(self, other: Tensor) -> Tensor:
        """Repeated along axes of size 1 until the shape is that of `other`."""
        graph = self.graph
        mine, wanted = graph.facts.shapes(self.name), graph.facts.shapes(other.name)
        if mine == wanted:
            return self
        sizes = [
            1 if graph.agrees(self, axis - other.rank, other, axis - other.rank) else size
            for axis, size in enumerate(other.shape)
        ]
        if None not in sizes:
            return self.expand(sizes)
        if self.dtype != other.dtype:
            return graph.op("Expand", self, graph.op("Shape", other))
        return self.expand(sizes) + other.zero_along_free(sizes)

    def expand(self, sizes: Sequence[int | None]) -> Tensor:
        """Repeated along axes of size 1; an axis whose wanted size is free stays as it is."""
        return self.graph.op("Expand", self, self.graph.ints([size or 1 for size in sizes]))

    def zero_along_free(self, sizes: Sequence[int | None]) -> Tensor:
        """0, along the axes whose wanted size is free as long as this tensor and of size 1 else.

        Without reading the shape: that would start a chain of small integers which ONNX Runtime
        works out on the CPU, whatever the device.
        """
        graph, zero = self.graph, self.graph.scalar(0, self.dtype)
        fixed = [axis for axis, size in enumerate(sizes) if size is not None]
        if len(fixed) == len(sizes):
            return zero
        first = self
        if 0 in self.shape:
            first = self.sum(fixed)  # of nothing: there is no first element to take
        elif fixed:
            ones = graph.ints([1] * len(fixed))
            first = graph.op("Slice", self, graph.ints([0] * len(fixed)), ones, graph.ints(fixed))
        return graph.where(first.equals(first), zero, zero)

    def unsqueeze(self, *axes: int) -> Tensor:
        """New axes of size 1 at `axes` of the result."""
        return self.graph.op("Unsqueeze", self, self.graph.ints(axes))

    def slice(self, axis: int, start: int, stop: int = INT64_MAX, step: int = 1) -> Tensor:
        """``start:stop:step`` along one axis."""
        ints = self.graph.ints
        return self.graph.op("Slice", self, ints([start]), ints([stop]), ints([axis]), ints([step]))


@dataclass(frozen=True)
class Stretch:
    """What a tensor holds besides zeros: `inner`, at the places `taken` of one axis."""

    inner: Tensor
    axis: int
    taken: range


class UnknownShapeError(Exception):
    """A rule asked for a size that is not static; the walk turns it into a refusal."""


class Graph:
    """A model's graph and the nodes that are written after it.

    Parameters
    ----------
    model : onnx.ModelProto
        Is read only.

    Attributes
    ----------
    forward : list of onnx.NodeProto
        The model's nodes for the walk: functions that are spelled out are one node.
    stretches : dict of str to Stretch
        Tensors that are known to be zero elsewhere, by name.
    factors : dict of str to (Tensor, float)
        Tensors that are another one times a number, by name.
    notes : list of str
        What rules have to say to a reader of the map.
    labels : dict of str to str
        What nodes that were copied are called in the model, by the copy's name.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.facts = Facts(model)
        self.forward = recognised(model, self.facts)
        self._swallowed = swallowed(model, self.facts, self.forward)
        self._rounded = rounded(model, self.facts, self.forward)
        self._ends = {name: node for node in model.graph.node for name in node.output if name}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.prefix = free_prefix(model)
        self._written: dict[Any, tuple[Tensor, ...]] = {}
        self._makers: dict[str, onnx.NodeProto] = {}
        self.stretches: dict[str, Stretch] = {}
        self.factors: dict[str, tuple[Tensor, float]] = {}
        self.notes: list[str] = []
        self.labels: dict[str, str] = {}
        self._constants: dict[Any, Tensor] = {}

    def original(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The model's own node that ends where this one does, if it stands for several."""
        ends = self._ends.get(node.output[0], node)
        return node if ends.op_type == node.op_type else ends

    def tensor(self, name: str) -> Tensor:
        """A tensor of the graph by its name."""
        return Tensor(self, name)

    def maker(self, tensor: Tensor) -> onnx.NodeProto | None:
        """The new node that makes a tensor; None for what the model makes or holds."""
        return self._makers.get(tensor.name)

    def constant(self, array: Array) -> Tensor:
        """An array as an initializer; equal arrays are stored once."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.dtype.str, str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            proto = numpy_helper.from_array(array, f"{self.prefix}constant_{len(self._constants)}")
            self.initializers.append(proto)
            self.facts.add_constant(proto)
            self._constants[key] = Tensor(self, proto.name)
        return self._constants[key]

    def scalar(self, value: float, dtype: int) -> Tensor:
        """A number as an initializer of rank 0."""
        return self.constant(np.array(value, helper.tensor_dtype_to_np_dtype(dtype)))

    def ints(self, values: Sequence[int]) -> Tensor:
        """Integers as an int64 initializer of rank 1."""
        return self.constant(np.array(values, np.int64))

    def op(self, op_type: str, *inputs: Tensor | None, **attributes: Any) -> Tensor:
        """Write a node with one output."""
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: Tensor | None,
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[Tensor, ...]:
        """Write a node, or find the equal one that was written before.

        Parameters
        ----------
        op_type : str
            A standard operator.
        *inputs : Tensor or None
            None leaves an optional input out.
        outputs : int
            How many outputs are asked for.
        domain : str
            Empty for standard operators.
        **attributes
            The node's attributes; None leaves one out.
        """
        names = [self.readable(item.name) if item is not None else "" for item in inputs]
        while names and not names[-1]:
            names.pop()
        given = {key: item for key, item in attributes.items() if item is not None}
        label = f"{self.prefix}{op_type}_{len(self._written)}"
        ends = [f"{label}:{index}" for index in range(outputs)] if outputs > 1 else [label]
        node = helper.make_node(op_type, names, ends, name=label, domain=domain, **given)
        described = sorted(item.SerializeToString(deterministic=True) for item in node.attribute)
        key = (domain, op_type, tuple(names), tuple(described), outputs)
        if key not in self._written:
            self._written[key] = self._write(node)
        return self._written[key]

    def copy(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Write nodes as they stand, unless that was done before."""
        if not self.facts.has(nodes[-1].output[0]):
            for node in nodes:
                self.facts.learn(node)
            self.nodes.extend(nodes)

    def agrees(self, one: Tensor, axis: int, other: Tensor, other_axis: int) -> bool:
        """Whether two axes, counted from the end, always have the same size."""
        pairs = zip(self.facts.shapes(one.name), self.facts.shapes(other.name), strict=True)
        return all(
            a is not None and b is not None
            and -axis <= len(a) and -other_axis <= len(b)
            and a[axis] is not None and a[axis] == b[other_axis]
            for a, b in pairs
        )  # fmt: skip

    def where(self, condition: Tensor, yes: Tensor | float, no: Tensor | float) -> Tensor:
        """``yes`` where the condition holds, else ``no``; at least one is a tensor."""
        dtype = next(item.dtype for item in (yes, no) if isinstance(item, Tensor))
        chosen = (
            item if isinstance(item, Tensor) else self.scalar(item, dtype) for item in (yes, no)
        )
        return self.op("Where", condition, *chosen)

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Parts joined along an axis; the parts of what was joined along it before, at once."""
        flat: list[Tensor] = []
        for part in parts:
            node = self.maker(part)
            is_same = node is not None and node.op_type == "Concat"
            if node is not None and is_same and attributes_of(node)["axis"] == axis:
                flat.extend(map(self.tensor, node.input))
            else:
                flat.append(part)
        return flat[0] if len(flat) == 1 else self.op("Concat", *flat, axis=axis)

    def split(self, whole: Tensor, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
        """A tensor cut along an axis into parts of the given sizes."""
        if len(sizes) == 1:
            return (whole,)
        return self.ops("Split", whole, self.ints(sizes), outputs=len(sizes), axis=axis)

    def readable(self, name: str) -> str:
        """The name under which a tensor can be read without stopping a fusion."""
        if name in self._rounded:
            quantise = self._rounded[name]
            levels = [self.tensor(item) for item in (quantise.output[0], *quantise.input[1:])]
            axis = attributes_of(quantise).get("axis")
            return self.op("DequantizeLinear", *levels, axis=axis).name
        if name not in self._swallowed:
            return name
        left, right = self._swallowed[name].input
        return self.op("Add", self.tensor(right), self.tensor(left)).name

    def _write(self, node: onnx.NodeProto) -> tuple[Tensor, ...]:
        self.facts.learn(node)
        made = tuple(Tensor(self, name) for name in node.output)
        if self._is_foldable(node):
            values = [item.value for item in made]
            if all(value is not None for value in values):
                return tuple(self.constant(value) for value in values if value is not None)
        self.nodes.append(node)
        self._makers.update((name, node) for name in node.output)
        return made

    def _is_foldable(self, node: onnx.NodeProto) -> bool:
        sizes = [elements(self.facts.shape(name)) for name in (*node.input, *node.output) if name]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            return False
        into = known[-len(node.output) :]
        return max(into) <= max([FOLD_ELEMENTS, *known[: -len(into)]])


def elements(shape: Shape | None) -> int | None:
    """How many elements a static shape holds; None for one that is not static."""
    if shape is None or None in shape:
        return None
    return math.prod(size for size in shape if size is not None)


def free_prefix(model: onnx.ModelProto) -> str:
    """A name prefix that no tensor or node of the model has."""
    taken = {name for node in model.graph.node for name in (*node.input, *node.output, node.name)}
    taken |= {item.name for item in (*model.graph.input, *model.graph.initializer)}
    prefix = "explain/"
    while any(name.startswith(prefix) for name in taken):
        prefix = "_" + prefix
    return prefix


def attributes_of(node: onnx.NodeProto) -> Mapping[str, Any]:
    """A node's attributes as Python values; text is str."""
    found = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return {key: item.decode() if isinstance(item, bytes) else item for key, item in found.items()}


def is_float(dtype: int) -> bool:
    """Whether gradients of this element type exist."""
    return dtype in (
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
    )
