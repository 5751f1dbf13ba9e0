"""What an operator without a rule is made of: its schema's function body, or the model's own.

The forward node stays; the body is a second copy that only the backward uses.
"""

from __future__ import annotations

import onnx
from onnx import defs, helper, inliner

from .emit import Graph


def equivalent(graph: Graph, node: onnx.NodeProto) -> tuple[list[onnx.NodeProto], list[str]]:
    """Nodes that compute the same as one node, and the new names of its outputs.

    Parameters
    ----------
    graph : Graph
        Gives types, versions and fresh names.
    node : onnx.NodeProto
        Is not changed.

    Returns
    -------
    list of onnx.NodeProto
        Empty where the operator is not made of others.
    list of str
        One per output of `node`.
    """
    if not has_body(graph, node):
        return [], []
    inlined = inliner.inline_selected_functions(
        alone(graph, node), [(node.domain, node.op_type)], inline_schema_functions=True
    ).graph.node
    kept = {name: name for name in node.input}
    mark = f"{graph.prefix}copy_{len(graph.nodes)}/"
    body = [renamed(item, kept, f"{mark}{index}/", mark) for index, item in enumerate(inlined)]
    return body, [mark + name if name else "" for name in node.output]


def has_body(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether the operator is a function of the model or of its schema at this opset."""
    if any(
        (item.domain, item.name) == (node.domain, node.op_type) for item in graph.model.functions
    ):
        return True
    if not defs.has(node.op_type, node.domain):
        return False
    schema = defs.get_schema(node.op_type, graph.facts.opsets[node.domain], node.domain)
    return bool(schema.has_function or schema.has_context_dependent_function)


def alone(graph: Graph, node: onnx.NodeProto) -> onnx.ModelProto:
    """A model of one node, with what is known of its inputs."""
    facts = graph.facts
    inputs = [
        helper.make_tensor_value_info(name, facts.dtype(name), facts.shape(name))
        for name in dict.fromkeys(name for name in node.input if name)
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    return helper.make_model(
        helper.make_graph([node], "one", inputs, outputs),
        opset_imports=graph.model.opset_import,
        functions=graph.model.functions,
        ir_version=graph.model.ir_version,
    )


def renamed(node: onnx.NodeProto, kept: dict[str, str], name: str, mark: str) -> onnx.NodeProto:
    """A copy of a node in which every tensor but the kept ones bears a mark."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{name}{node.op_type}"
    copy.input[:] = [kept.get(item, mark + item) if item else "" for item in node.input]
    copy.output[:] = [mark + item if item else "" for item in node.output]
    return copy
