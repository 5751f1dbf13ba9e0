"""What ONNX Runtime's own fused operators stand for, in standard operators.

Vendors ship models that the runtime has optimised. Their fused nodes stay as they are; shapes and
derivatives are taken of what is written here. Source: ContribOperators.md of onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import onnx
from onnx import helper

DOMAIN = "com.microsoft"


class Body:
    """Collects the nodes that one fused node stands for."""

    def __init__(self, node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto]) -> None:
        self.node = node
        self.types = types
        self.nodes: list[onnx.NodeProto] = []
        self.given = {item.name: helper.get_attribute_value(item) for item in node.attribute}

    def input(self, index: int) -> str:
        """The name of an input, empty where it is left out."""
        return str(self.node.input[index]) if index < len(self.node.input) else ""

    def sizes(self, index: int) -> list[int]:
        """The sizes of an input, 0 for one that is free; empty where its rank is not known."""
        kind = self.types.get(self.input(index))
        return [] if kind is None else [dim.dim_value for dim in kind.tensor_type.shape.dim]

    def ints(self, *values: int) -> str:
        """An int64 constant of rank 1."""
        return self.op("Constant", value_ints=list(values))

    def op(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a standard node; returns the name of its output."""
        name = output or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def number(self, value: float) -> str:
        """A float32 constant."""
        return self.op("Constant", value_float=float(value))

    def finish(self, name: str, index: int = 0) -> None:
        """Make a tensor an output of the fused node."""
        if index < len(self.node.output) and self.node.output[index]:
            self.op("Identity", name, output=self.node.output[index])


def activated(b: Body, x: str) -> str:
    """The activation that a fused convolution or product ends with."""
    name = b.given.get("activation", b"").decode()
    params = [float(item) for item in b.given.get("activation_params", ())]
    if not name:
        return x
    if name == "Clip":
        return b.op("Clip", x, *map(b.number, params))
    if name == "HardSigmoid":
        return b.op("HardSigmoid", x, alpha=params[0], beta=params[1])
    if name == "LeakyRelu":
        alpha = params[0] if params else float(b.given.get("activation_alpha", 0.01))
        return b.op("LeakyRelu", x, alpha=alpha)
    return b.op(name, x)


def fused_conv(b: Body) -> None:
    """Conv, plus another tensor, then an activation."""
    known = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    y = b.op(
        "Conv",
        *[name for name in (b.input(i) for i in range(3)) if name],
        **{key: b.given[key] for key in known if key in b.given},
    )
    b.finish(activated(b, b.op("Add", y, b.input(3)) if b.input(3) else y))


def fused_gemm(b: Body) -> None:
    """Gemm, then an activation."""
    known = ("alpha", "beta", "transA", "transB")
    attributes = {key: b.given[key] for key in known if key in b.given}
    b.finish(activated(b, b.op("Gemm", *b.node.input, **attributes)))


def fused_mat_mul(b: Body) -> None:
    """alpha A' B' with the last two axes swapped where asked."""
    if b.given.get("transBatchA") or b.given.get("transBatchB"):
        return
    a, c = b.input(0), b.input(1)
    if b.given.get("transA"):
        a = b.op("Einsum", a, equation="...ij->...ji")
    if b.given.get("transB"):
        c = b.op("Einsum", c, equation="...ij->...ji")
    y = b.op("MatMul", a, c)
    alpha = float(b.given.get("alpha", 1.0))
    b.finish(y if alpha == 1 else b.op("Mul", y, b.number(alpha)))


def exact_gelu(b: Body, x: str) -> str:
    """x/2 (1 + erf(x / sqrt 2))."""
    grown = b.op("Add", b.op("Erf", b.op("Mul", x, b.number(math.sqrt(0.5)))), b.number(1))
    return b.op("Mul", b.op("Mul", x, b.number(0.5)), grown)


def gelu(b: Body) -> None:
    """Of the input."""
    b.finish(exact_gelu(b, b.input(0)))


def bias_gelu(b: Body) -> None:
    """Of the sum."""
    b.finish(exact_gelu(b, b.op("Add", b.input(0), b.input(1))))


def fast_gelu(b: Body) -> None:
    """The tanh form, of the sum where there is a bias."""
    x = b.op("Add", b.input(0), b.input(1)) if b.input(1) else b.input(0)
    cube = b.op("Mul", b.op("Mul", b.op("Mul", x, x), x), b.number(0.044715))
    inner = b.op("Mul", b.op("Add", x, cube), b.number(math.sqrt(2 / math.pi)))
    grown = b.op("Add", b.op("Tanh", inner), b.number(1))
    b.finish(b.op("Mul", b.op("Mul", x, b.number(0.5)), grown))


def quick_gelu(b: Body) -> None:
    """x sigmoid(alpha x)."""
    x, alpha = b.input(0), float(b.given.get("alpha", 1.702))
    b.finish(b.op("Mul", x, b.op("Sigmoid", b.op("Mul", x, b.number(alpha)))))


def skip_layer_normalization(b: Body) -> None:
    """LayerNormalization of input + skip + bias; the fourth output is that sum."""
    total = b.op("Add", b.input(0), b.input(1))
    if b.input(4):
        total = b.op("Add", total, b.input(4))
    ends = [total, b.input(2)] + ([b.input(3)] if b.input(3) else [])
    epsilon = float(b.given.get("epsilon", 1e-12))
    b.finish(b.op("LayerNormalization", *ends, axis=-1, epsilon=epsilon))
    b.finish(total, 3)


def attention(b: Body) -> None:
    """softmax(Q K' scale + bias) V of three products of one input, side by side in its weights."""
    sizes, heads = b.sizes(1), int(b.given["num_heads"])
    unequal = len(set(b.given.get("qkv_hidden_sizes", ()))) > 1
    others = (b.input(3), b.input(4), b.given.get("do_rotary"), b.given.get("unidirectional"))
    if len(sizes) != 2 or not sizes[1] or unequal or any(others):
        return
    whole = b.op("MatMul", b.input(0), b.input(1))
    if b.input(2):
        whole = b.op("Add", whole, b.input(2))
    apart = b.op("Reshape", whole, b.ints(0, 0, 3, heads, sizes[1] // 3 // heads))
    each = b.op("Transpose", apart, perm=[2, 0, 3, 1, 4])
    q, k, v = (b.op("Gather", each, b.op("Constant", value_int=i), axis=0) for i in range(3))
    attended(b, q, k, v, sizes[1] // 3 // heads, sizes[1] // 3)


def multi_head_attention(b: Body) -> None:
    """softmax(Q K' scale + bias) V of three tensors ``(batch, tokens, heads x size)``."""
    sizes, heads = [b.sizes(i) for i in range(3)], int(b.given["num_heads"])
    others = (*(b.input(i) for i in (4, 6, 7, 8, 9)), b.given.get("unidirectional"))
    if any(len(size) != 3 or not size[2] for size in sizes) or any(others):
        return
    parts, start = [], 0
    for index, size in enumerate(sizes):
        x = b.input(index)
        if b.input(3):
            ends = (b.ints(start), b.ints(start + size[2]), b.ints(0))
            x, start = b.op("Add", x, b.op("Slice", b.input(3), *ends)), start + size[2]
        apart = b.op("Reshape", x, b.ints(0, 0, heads, size[2] // heads))
        parts.append(b.op("Transpose", apart, perm=[0, 2, 1, 3]))
    q, k, v = parts
    attended(b, q, k, v, sizes[0][2] // heads, sizes[2][2])


def attended(b: Body, q: str, k: str, v: str, size: int, width: int) -> None:
    """The rest, from ``(batch, heads, tokens, size)`` on."""
    scale = float(b.given.get("scale", 0)) or 1 / math.sqrt(size)
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = b.op("Mul", scores, b.number(scale))
    if b.input(5):
        scores = b.op("Add", scores, b.input(5))
    y = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    b.finish(b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.ints(0, 0, width)))


BODIES: dict[str, Callable[[Body], None]] = {
    "FusedConv": fused_conv,
    "FusedGemm": fused_gemm,
    "FusedMatMul": fused_mat_mul,
    "Gelu": gelu,
    "BiasGelu": bias_gelu,
    "FastGelu": fast_gelu,
    "QuickGelu": quick_gelu,
    "SkipLayerNormalization": skip_layer_normalization,
    "Attention": attention,
    "MultiHeadAttention": multi_head_attention,
}


def body_nodes(node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto]) -> list[onnx.NodeProto]:
    """The standard nodes that a fused node stands for; empty where none are known.

    Parameters
    ----------
    node : onnx.NodeProto
    types : mapping of str to onnx.TypeProto
        Of its inputs.
    """
    if node.domain != DOMAIN or node.op_type not in BODIES:
        return []
    body = Body(node, types)
    BODIES[node.op_type](body)
    return body.nodes
