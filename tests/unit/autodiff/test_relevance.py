"""Relevance maps: their rules by formula, their conservation, and where they are refused."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

from dicom_xai.autodiff import LayerwiseRelevance, compile
from dicom_xai.errors import ConfigError, UnsupportedOperatorError
from tests.make.networks import CONV, MAXPOOL, ResNet, ViT, exported, image, seeded
from tests.unit.autodiff.test_methods import Bent, assert_close, run

TARGET = [2, 0]


def plain_network(dims: int, *, bias: bool) -> nn.Sequential:
    """Convolutions, ReLU, pooling and dense layers only: what the rules were made for."""
    conv, pool = CONV[dims], MAXPOOL[dims]
    network = nn.Sequential(
        conv(1, 4, 3, 1, 1, bias=bias), nn.ReLU(), pool(2), conv(4, 6, 3, 2, 1, bias=bias),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4**dims, 8, bias=bias), nn.ReLU(),
        nn.Linear(8, 3, bias=bias),
    )  # fmt: skip
    seeded(network)
    return network


@cache
def case(dims: int, bias: bool) -> tuple[nn.Sequential, torch.Tensor, onnx.ModelProto]:
    network, x = plain_network(dims, bias=bias), image(2, 1, *[16] * dims)
    return network, x, exported(network, x, "torchscript", 17)


def relevance(model: onnx.ModelProto, x: torch.Tensor, method: LayerwiseRelevance) -> np.ndarray:
    return run(compile(model, method).model, x, target=TARGET)["attribution"]


def step_back(
    layer: nn.Module,
    terms: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]],
    r: torch.Tensor,
) -> torch.Tensor:
    """One linear layer by its definition, in float64: terms are data, weights, bias, sign."""
    datas = [data.detach().requires_grad_() for data, *_ in terms]
    outs = []
    for data, (_, weights, bias, sign) in zip(datas, terms, strict=True):
        if isinstance(layer, nn.Linear):
            z = functional.linear(data, weights, bias)
        else:
            conv = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
            z = conv[weights.ndim - 2](data, weights, bias, layer.stride, layer.padding)
        outs.append(sign * z)
    z = sum(outs)
    stable = z + torch.where(z < 0, -1e-6, 1e-6)
    (z * (r / stable).detach()).sum().backward()
    return sum(data.detach() * data.grad for data in datas)


def by_definition(network: nn.Sequential, x: torch.Tensor, composite: str) -> torch.Tensor:
    """The whole composite, layer by layer."""
    network = plain_network(x.ndim - 2, bias=network[0].bias is not None).double()
    with torch.no_grad():
        inputs = [x.double()]
        for layer in network:
            inputs.append(layer(inputs[-1]))
    r = torch.zeros_like(inputs[-1])
    r[range(2), TARGET] = inputs[-1][range(2), TARGET]
    if composite == "deep-taylor":
        r = r.relu()
    for index in reversed(range(len(network))):
        layer, a = network[index], inputs[index]
        if isinstance(layer, nn.ReLU):
            continue
        if isinstance(layer, (nn.Flatten, *MAXPOOL.values())):
            a = a.detach().requires_grad_()
            (layer(a) * r).sum().backward()
            r = a.grad
            continue
        w, b = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        up = None if b is None else b.relu()
        kind = composite.split("-")
        one = torch.ones_like
        if index == 0 and "flat" in kind:
            terms = [(one(a), one(w), None, 1)]
        elif index == 0 and composite == "deep-taylor":
            terms = [(one(a), w**2, None if b is None else b**2, 1)]
        elif composite == "epsilon" or (
            isinstance(layer, nn.Linear) and composite != "deep-taylor"
        ):
            terms = [(a, w, b, 1)]
        else:
            terms = [(a.relu(), w.relu(), up, 1), (-(-a).relu(), -(-w).relu(), None, 1)]
        r = step_back(layer, terms, r)
    return r.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "composite", ["epsilon", "epsilon-plus", "epsilon-plus-flat", "deep-taylor"]
)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_composite_is_its_rules_layer_by_layer(composite: str, dims: int, bias: bool) -> None:
    network, x, model = case(dims, bias)
    found = relevance(model, x, LayerwiseRelevance(composite))
    assert_close(found, by_definition(network, x, composite))


@pytest.mark.parametrize(
    "method",
    [
        LayerwiseRelevance("epsilon"),
        LayerwiseRelevance("epsilon-plus"),
        LayerwiseRelevance("epsilon-plus-flat"),
        LayerwiseRelevance("epsilon-gamma-box", low=-4.0, high=4.0),
    ],
    ids=lambda method: method.composite,
)
def test_relevance_is_conserved_without_biases(method: LayerwiseRelevance) -> None:
    network, x, model = case(2, False)
    scores = network(x)[range(2), TARGET].detach().numpy()
    total = relevance(model, x, method).sum((1, 2, 3))
    # The stabilisers take up to 1e-6 of every denominator, which small ones feel.
    assert np.abs(total - scores).max() <= 1e-2 * np.abs(scores).max()


def test_deep_taylor_is_nowhere_negative() -> None:
    _, x, model = case(2, True)
    assert relevance(model, x, LayerwiseRelevance("deep-taylor", low=-4.0, high=4.0)).min() >= 0


@pytest.mark.parametrize("name", ["lrp-epsilon", "attn-lrp"])
def test_relevance_is_input_times_gradient_on_a_relu_network_and_said_to_be(name: str) -> None:
    network, x = seeded(ResNet()), image(2, 1, 33, 33)
    model = exported(network, x, "torchscript", 17)
    compiled = compile(model, name)
    assert "input-x-gradient" in compiled.report.equals
    other = compile(model, "input-x-gradient")
    assert name in other.report.equals
    found, wanted = (run(c.model, x, target=TARGET)["attribution"] for c in (compiled, other))
    # Epsilon moves every denominator by 1e-6, also those near 0: a few parts in a thousand.
    assert_close(found, wanted, 1e-2)


class Bilinear(nn.Module):
    """Attention without softmax: products of activations, every operator else linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.conv(x).relu().flatten(2)
        return self.head((a @ a.transpose(1, 2) @ a).mean(2))


@pytest.mark.parametrize("name", ["input-x-gradient", "attn-lrp"])
def test_a_product_of_activations_is_not_taken_for_a_linear_layer(name: str) -> None:
    model = exported(seeded(Bilinear()), image(2, 1, 6, 6), "torchscript", 17)
    assert compile(model, name).report.equals == ()


def normalised(*, is_folded: bool, is_shifted: bool) -> onnx.ModelProto:
    """Linear layers of each kind with a batch norm behind each, or with the norms folded by hand.

    Scales of either sign turn some channels round; without shifts there is no bias anywhere.
    """
    rng = np.random.default_rng(5)
    layers = [
        ("Conv", (4, 1, 3, 3), 0, {"pads": [1] * 4}),
        ("ConvTranspose", (4, 5, 2, 2), 1, {"strides": [2, 2]}),
        ("Conv", (6, 5, 3, 3), 0, {"strides": [2, 2]}),
        ("Gemm", (6, 7), 1, {}),
        ("Gemm", (3, 7), 0, {"transB": 1}),
    ]
    nodes, stored, x = [], {}, "image"
    for index, (kind, shape, out, attributes) in enumerate(layers):
        channels = shape[out]
        w = rng.standard_normal(shape)
        scale, mean, beta = rng.standard_normal((3, channels)) * [[1], [is_shifted], [is_shifted]]
        var, b = 0.5 + rng.random(channels), rng.standard_normal(channels) * is_shifted
        names = [f"{word}{index}" for word in ("w", "b", "scale", "beta", "mean", "var")]
        if is_folded:
            factor = scale / np.sqrt(var + 1e-5)
            w = w * np.expand_dims(factor, [axis for axis in range(w.ndim) if axis != out])
            b, names = factor * (b - mean) + beta, names[:2]
        stored.update(zip(names, (w, b, scale, beta, mean, var), strict=False))
        y = f"y{index}" if index < len(layers) - 1 else "scores"
        end = y if is_folded else f"z{index}"
        nodes.append(helper.make_node(kind, [x, *names[:2]], [end], **attributes))
        if not is_folded:
            nodes.append(helper.make_node("BatchNormalization", [end, *names[2:]], [y]))
        x = y
        if index < len(layers) - 1:
            x = f"a{index}"
            nodes.append(helper.make_node("Relu", [y], [x]))
        if index == 2:
            nodes.append(helper.make_node("GlobalAveragePool", [x], ["pooled"]))
            nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
            x = "flat"
    value, single = helper.make_tensor_value_info, TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "normalised",
        [value("image", single, [2, 1, 8, 8])],
        [value("scores", single, [2, 3])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


CONSERVING = [
    LayerwiseRelevance("epsilon"),
    LayerwiseRelevance("epsilon-plus"),
    LayerwiseRelevance("epsilon-plus-flat"),
    LayerwiseRelevance("epsilon-gamma-box", low=-4.0, high=4.0),
    LayerwiseRelevance("deep-taylor"),
]
"""Not alpha-beta: it gives alpha instead of alpha - beta where nothing speaks against."""


@pytest.mark.parametrize(
    "method", [*CONSERVING, LayerwiseRelevance("alpha-beta")], ids=lambda method: method.composite
)
def test_a_batch_norm_is_part_of_the_layer_before_it(method: LayerwiseRelevance) -> None:
    x = image(2, 1, 8, 8)
    plain = normalised(is_folded=False, is_shifted=True)
    found = run(compile(plain, method).model, x, target=TARGET)
    by_hand = normalised(is_folded=True, is_shifted=True)
    assert_close(found["attribution"], relevance(by_hand, x, method), 1e-3)
    assert np.array_equal(found["scores"], run(plain, x)["scores"])


@pytest.mark.parametrize("method", CONSERVING, ids=lambda method: method.composite)
def test_relevance_is_conserved_through_batch_norms_that_do_not_shift(
    method: LayerwiseRelevance,
) -> None:
    x, plain = image(2, 1, 8, 8), normalised(is_folded=False, is_shifted=False)
    scores = run(plain, x)["scores"][range(2), TARGET]
    if method.composite == "deep-taylor":
        scores = np.maximum(scores, 0)
    total = relevance(plain, x, method).sum((1, 2, 3))
    # The stabilisers take up to 1e-6 of every denominator, which small ones feel.
    assert np.abs(total - scores).max() <= 1e-2 * np.abs(scores).max()


@pytest.mark.parametrize(
    "method",
    [
        "lrp-epsilon-gamma-box",
        LayerwiseRelevance("epsilon-gamma-box"),
        LayerwiseRelevance("epsilon-gamma-box", low=0.0),
        LayerwiseRelevance("deep-taylor", low=1.0, high=-1.0),
    ],
)
def test_a_box_needs_its_bounds(method: str | LayerwiseRelevance) -> None:
    _, _, model = case(2, True)
    with pytest.raises(ConfigError, match=r"low and high, and got .* use lrp"):
        compile(model, method)


@pytest.mark.parametrize(
    ("name", "composite"),
    [("lrp-epsilon-gamma-box", "epsilon-gamma-box"), ("deep-taylor", "deep-taylor")],
)
def test_a_method_by_name_takes_the_given_box(name: str, composite: str) -> None:
    _, x, model = case(2, True)
    found = run(compile(model, name, box=(-4.0, 4.0)).model, x, target=TARGET)
    wanted = relevance(model, x, LayerwiseRelevance(composite, low=-4.0, high=4.0))
    assert np.array_equal(found["attribution"], wanted)


@pytest.mark.parametrize(
    "activation", [nn.GELU(), nn.Tanh(), nn.ELU(), nn.Hardswish(), nn.Hardtanh()]
)
def test_deep_taylor_is_refused_on_what_is_no_kin_of_relu(activation: nn.Module) -> None:
    model = exported(seeded(Bent(activation)), image(2, 1, 10, 10), "torchscript", 20)
    for method in ("deep-taylor", LayerwiseRelevance("deep-taylor", low=-4.0, high=4.0)):
        with pytest.raises(UnsupportedOperatorError, match="lrp-epsilon, or attn-lrp"):
            compile(model, method)
    compile(model, "lrp-epsilon")


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.LeakyReLU(), nn.PReLU()])
def test_deep_taylor_passes_the_kin_of_relu(activation: nn.Module) -> None:
    x = image(2, 1, 10, 10)
    model = exported(seeded(Bent(activation)), x, "torchscript", 20)
    assert relevance(model, x, LayerwiseRelevance("deep-taylor")).any()


def test_a_transformer_is_sent_to_attn_lrp() -> None:
    network, x = seeded(ViT()), image(2, 1, 32, 32)
    with pytest.raises(UnsupportedOperatorError, match="attn-lrp"):
        compile(exported(network, x, "torchscript", 17), "lrp")


def attn_lrp_by_hand(network: ViT, x: torch.Tensor) -> torch.Tensor:
    """The rules as autograd takes them: what shall count as constant is detached."""

    def norm(layer: nn.LayerNorm, t: torch.Tensor) -> torch.Tensor:
        away = t - t.mean(-1, keepdim=True)
        std = (away.var(-1, correction=0, keepdim=True) + layer.eps).sqrt().detach()
        return away / std * layer.weight + layer.bias

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.detach() + a.detach() @ b) / 2

    def attention(layer: nn.Module, t: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = t.shape
        qkv = layer.qkv(t).reshape(batch, tokens, 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        weights = torch.softmax(product(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5, -1)
        return layer.out(product(weights, v).transpose(1, 2).reshape(batch, tokens, width))

    def mlp(layers: nn.Sequential, t: torch.Tensor) -> torch.Tensor:
        t = layers[0](t)
        return layers[2](t * (functional.gelu(t) / t).detach())

    x = x.clone().requires_grad_()
    t = network.patches(x).flatten(2).transpose(1, 2)
    t = torch.cat([network.token.expand(len(t), -1, -1), t], 1) + network.positions
    for block in network.blocks:
        t = t + attention(block.attention, norm(block.norm1, t))
        t = t + mlp(block.mlp, norm(block.norm2, t))
    network.head(norm(network.norm, t)[:, 0])[range(2), TARGET].sum().backward()
    return (x * x.grad).sum(1, keepdim=True)


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 13), ("dynamo", 20)])
def test_attn_lrp_is_its_four_rules(exporter: str, opset: int) -> None:
    network, x = seeded(ViT()), image(2, 1, 32, 32)
    compiled = compile(exported(network, x, exporter, opset), "attn-lrp")
    found = run(compiled.model, x, target=TARGET)["attribution"]
    assert_close(found, attn_lrp_by_hand(network, x))
