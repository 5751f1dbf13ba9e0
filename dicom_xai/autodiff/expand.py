"""What an operator is made of: its schema's function body, or the model's own function.

The forward node stays as it is. The body serves the shapes of operators that tell none, and as a
second copy that the backward of operators without a rule is taken of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import defs, helper, inliner

from .contrib import body_nodes


def body_of(
    node: onnx.NodeProto,
    types: Mapping[str, onnx.TypeProto],
    constants: Sequence[onnx.TensorProto],
    model: onnx.ModelProto,
) -> onnx.GraphProto | None:
    """A graph of one node's inputs and outputs in which simpler nodes stand for the node.

    Parameters
    ----------
    node : onnx.NodeProto
        Is not changed.
    types : mapping of str to onnx.TypeProto
        Of its inputs.
    constants : sequence of onnx.TensorProto
        Inputs whose value is known and may decide shapes.
    model : onnx.ModelProto
        Gives versions and functions.

    Returns
    -------
    onnx.GraphProto or None
        None where the operator is not made of others.
    """
    fused = body_nodes(node, types)
    if not fused and not has_body(node, model):
        return None
    inputs = [
        helper.make_value_info(name, types[name])
        for name in dict.fromkeys(node.input)
        if name and name in types
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    if fused:
        return helper.make_graph(fused, "fused", inputs, outputs, constants)
    alone = helper.make_model(
        helper.make_graph([with_defaults(node, model)], "one", inputs, outputs, constants),
        opset_imports=model.opset_import,
        functions=model.functions,
        ir_version=model.ir_version,
    )
    if "" in node.input:
        # The inliner asks for the type of every input, also of one that is left out.
        alone.graph.value_info.append(helper.make_value_info("", onnx.TypeProto()))
    key = (node.domain, node.op_type)
    body = inliner.inline_selected_functions(alone, [key], inline_schema_functions=True).graph
    if key == ("", "Attention") and any(node.input[3:]):
        guard_blind_rows(body)
    return body


def guard_blind_rows(body: onnx.GraphProto) -> None:
    """Give weights of 0 to a query whose mask lets it see nothing, as runtimes and torch do.

    The schema's body divides 0 by 0 there, and not a number would spread to every key.
    """
    make = helper.make_node
    nodes = list(body.node)
    (index,) = (i for i, node in enumerate(nodes) if node.op_type == "Softmax")
    scores, weights = nodes[index].input[0], nodes[index].output[0]
    nodes[index : index + 1] = [
        make("Constant", [], ["blind_axis"], value_ints=[-1]),
        make("ReduceMax", [scores, "blind_axis"], ["blind_top"]),
        make("IsInf", ["blind_top"], ["is_blind"], detect_positive=0),
        make("Constant", [], ["blind_number"], value_float=0.0),
        make("CastLike", ["blind_number", scores], ["blind_zero"]),
        make("Where", ["is_blind", "blind_zero", scores], ["seeing_scores"]),
        make("Softmax", ["seeing_scores"], ["seeing_weights"], axis=-1),
        make("Where", ["is_blind", "blind_zero", "seeing_weights"], [weights]),
    ]
    del body.node[:]
    body.node.extend(nodes)


def has_body(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Whether the operator is a function of the model or of its schema."""
    if any((item.domain, item.name) == (node.domain, node.op_type) for item in model.functions):
        return True
    schema = schema_of(node, model)
    return schema is not None and bool(schema.has_function or schema.has_context_dependent_function)


def schema_of(node: onnx.NodeProto, model: onnx.ModelProto) -> defs.OpSchema | None:
    """The operator's schema at the version that the model imports; None where it has none."""
    imports = {item.domain.removeprefix("ai.onnx"): item.version for item in model.opset_import}
    version = imports.get(node.domain, 0)
    if not defs.has(node.op_type, version, node.domain):
        return None
    return defs.get_schema(node.op_type, version, node.domain)


def with_defaults(node: onnx.NodeProto, model: onnx.ModelProto) -> onnx.NodeProto:
    """The node with the defaults of its schema written out, which function bodies refer to."""
    schema = schema_of(node, model)
    if schema is None:
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    given = {item.name for item in node.attribute}
    for name, attribute in schema.attributes.items():
        if name not in given and attribute.default_value.name:
            copy.attribute.append(attribute.default_value)
    return copy


def renamed(node: onnx.NodeProto, kept: Sequence[str], mark: str, index: int) -> onnx.NodeProto:
    """A copy of a node in which every tensor but the kept ones bears a mark."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{mark}{index}/{node.op_type}"
    copy.input[:] = [item if item in kept or not item else mark + item for item in node.input]
    copy.output[:] = [mark + item if item else "" for item in node.output]
    return copy
