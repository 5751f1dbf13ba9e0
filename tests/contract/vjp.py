"""The judge that every rule meets: one node, its compiled vector-Jacobian product, differences.

``case("Relu", (5, 3))`` is a node fed by random tensors of the given shapes; arrays are constants
of the graph. A first axis of 5 stands for the batch: it is left free in a second run of each case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from dicom_xai.autodiff.backward import pull_back
from dicom_xai.autodiff.emit import Graph
from dicom_xai.autodiff.rules import GRADIENT

BATCH = 5
STEP = 1e-5
CLOSE = 1e-6
"""Relative, for central differences in float64: truncation is about STEP**2, rounding 1e-11."""


class Erf(OpRun):
    """The reference's own rounds to float32."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (np.vectorize(math.erf, otypes=[x.dtype])(x),)


def reference(model: onnx.ModelProto) -> ReferenceEvaluator:
    """The judge's runtime, in float64."""
    return ReferenceEvaluator(model, new_ops=[Erf])


@dataclass(frozen=True)
class Case:
    """One node and what it is fed with."""

    op_type: str
    inputs: tuple[Any, ...]
    opset: int = 18
    outputs: int = 1
    used: int = 0
    domain: str = ""
    low: float = -2.0
    high: float = 2.0
    attributes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = [getattr(item, "shape", item) for item in self.inputs if item is not None]
        given = ",".join(f"{key}={item}" for key, item in self.attributes.items())
        return f"{self.op_type}-{self.opset}-{shapes}-{given}".replace(" ", "")

    @property
    def has_batch(self) -> bool:
        """Whether there is a first axis that can be left free."""
        return any(isinstance(item, tuple) and item[:1] == (BATCH,) for item in self.inputs)

    def feeds(self, dtype: type = np.float64) -> dict[str, np.ndarray]:
        """Random values, no two alike, so that no difference crosses a kink."""
        rng = np.random.default_rng(7)
        feeds = {}
        for index, shape in enumerate(self.inputs):
            if isinstance(shape, tuple):
                count = int(np.prod(shape))
                spread = np.linspace(self.low, self.high, count + 2)[1:-1] + 0.3 / (count + 1)
                feeds[f"x{index}"] = rng.permutation(spread).reshape(shape).astype(dtype)
        return feeds

    def model(self, element: int, *, free_batch: bool) -> onnx.ModelProto:
        """The node alone."""
        names = [f"x{i}" if item is not None else "" for i, item in enumerate(self.inputs)]
        outputs = [f"y{i}" for i in range(self.outputs)]
        inputs, constants = [], []
        for name, item in zip(names, self.inputs, strict=True):
            if isinstance(item, tuple):
                dims: list[Any] = list(item)
                if free_batch and dims[:1] == [BATCH]:
                    dims[0] = "batch"
                inputs.append(helper.make_tensor_value_info(name, element, dims))
            elif item is not None:
                dtype = helper.tensor_dtype_to_np_dtype(element)
                array = item.astype(dtype) if item.dtype == np.float64 else item
                constants.append(numpy_helper.from_array(array, name))
        node = helper.make_node(
            self.op_type, names, outputs, name="it", domain=self.domain, **self.attributes
        )
        ends = [helper.make_empty_tensor_value_info(outputs[self.used])]
        graph = helper.make_graph([node], "one", inputs, ends, constants)
        imports = [helper.make_opsetid("", self.opset)]
        if self.domain:
            imports.append(helper.make_opsetid(self.domain, 1))
        return helper.make_model(graph, opset_imports=imports, ir_version=10)


def case(
    op_type: str,
    *inputs: Any,
    opset: int = 18,
    outputs: int = 1,
    used: int = 0,
    domain: str = "",
    low: float = -2.0,
    high: float = 2.0,
    **attributes: Any,
) -> Case:
    """A line of the table."""
    return Case(op_type, inputs, opset, outputs, used, domain, low, high, attributes)


def with_vjp(model: onnx.ModelProto, output: str, seed_shape: tuple[Any, ...]) -> onnx.ModelProto:
    """The model with a cotangent input `seed` and one output ``g_<input>`` per real input."""
    graph = Graph(model)
    shapes = [tuple(size or 0 for size in shape or ()) for shape in graph.facts.shapes(output)]
    element = graph.facts.dtype(output)
    graph.facts.add_input("seed", element, shapes)
    sources = [item.name for item in model.graph.input]
    found = pull_back(graph, model.graph.node, {output: graph.tensor("seed")}, sources, GRADIENT)
    assert set(found) == set(sources)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    result.graph.node.extend(graph.nodes)
    result.graph.initializer.extend(graph.initializers)
    result.graph.input.append(helper.make_tensor_value_info("seed", element, seed_shape))
    del result.graph.output[:]
    for name in sources:
        result.graph.node.append(helper.make_node("Identity", [found[name].name], [f"g_{name}"]))
        result.graph.output.append(
            helper.make_tensor_value_info(f"g_{name}", found[name].dtype, [None] * found[name].rank)
        )
    onnx.checker.check_model(result)
    return result


def assert_is_derivative(item: Case, *, free_batch: bool) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Compare with central differences along random directions, in float64.

    Returns
    -------
    onnx.ModelProto
        The node with its product, for a second opinion by another runtime.
    dict
        What it was fed with, and ``g_<input>`` for what came out.
    """
    model = item.model(onnx.TensorProto.DOUBLE, free_batch=free_batch)
    forward, feeds = reference(model), item.feeds()
    rng = np.random.default_rng(11)
    y = forward.run(None, feeds)[0]
    seed = rng.standard_normal(y.shape)
    whole = with_vjp(model, f"y{item.used}", (None,) * y.ndim)
    names = [out.name for out in whole.graph.output]
    found = dict(zip(names, reference(whole).run(None, {**feeds, "seed": seed}), strict=True))
    for name, x in feeds.items():
        assert found[f"g_{name}"].shape == x.shape
        for _ in range(4):
            direction = rng.standard_normal(x.shape)
            ends = [
                forward.run(None, {**feeds, name: x + sign * STEP * direction})[0]
                for sign in (1, -1)
            ]
            wanted = float((seed * (ends[0] - ends[1])).sum()) / (2 * STEP)
            terms = np.abs(found[f"g_{name}"] * direction).sum() + np.abs(wanted)
            assert abs(float((found[f"g_{name}"] * direction).sum()) - wanted) <= CLOSE * terms
    return whole, {**feeds, "seed": seed, **found}
