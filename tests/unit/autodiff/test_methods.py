"""Every method's map against its formula, worked out by autograd and numpy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

from dicom_xai.autodiff import (
    METHODS,
    ExpectedGradients,
    IntegratedGradients,
    SmoothGrad,
    TopClasses,
    compile,
)
from dicom_xai.autodiff.emit import Graph
from dicom_xai.errors import ConfigError, UnsupportedOperatorError
from tests.make.networks import (
    ConvNeXt,
    DynUNet,
    ResNet,
    Swin,
    UNet,
    ViT,
    exported,
    image,
    seeded,
)

CLOSE = 1e-4
"""Relative to the largest value: float32, sums over some thousand products."""

TARGET = [2, 0]


@cache
def case(dims: int = 2) -> tuple[ResNet, torch.Tensor, onnx.ModelProto]:
    """A small residual network, two images, its export with the old exporter."""
    network, x = seeded(ResNet(dims)), image(2, 1, *[33 if dims < 3 else 17] * dims)
    return network, x, exported(network, x, "torchscript", 17)


def run(model: onnx.ModelProto, x: torch.Tensor, **feeds: object) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    given = {name: np.asarray(value) for name, value in feeds.items()}
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": x.numpy(), **given}), strict=True))


def assert_close(
    found: np.ndarray, wanted: torch.Tensor | np.ndarray, close: float = CLOSE
) -> None:
    expected = np.asarray(wanted.detach() if isinstance(wanted, torch.Tensor) else wanted)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= close * np.abs(expected).max()


def at_stem(network: ResNet, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activation and gradient after the stem, where gradients differ from place to place."""
    a = network.stem(x).detach().requires_grad_()
    scores = network.head(torch.flatten(network.pool(network.blocks(a)), 1))
    scores[range(2), TARGET].sum().backward()
    return a.detach(), a.grad


def total(x: torch.Tensor) -> torch.Tensor:
    return x.sum(tuple(range(2, x.ndim)), keepdim=True)


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def over_channels(x: torch.Tensor) -> torch.Tensor:
    return x.sum(1, keepdim=True)


def plus_plus(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Equation 19 as it is printed, in float64."""
    a, g = a.double(), g.double()
    alpha = torch.where(g == 0, 0, g**2 / (2 * g**2 + total(a) * g**3))
    return over_channels(total(alpha * g.relu()) * a).relu()


def principal(x: torch.Tensor, along: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first principal component by a full decomposition, and its share of the variance."""
    maps, shares = [], []
    for one, direction in zip(x.double(), along.double(), strict=True):
        columns = one.flatten(1).T
        columns = columns - columns.mean(0)
        _, values, vectors = np.linalg.svd(columns.numpy(), full_matrices=False)
        component = columns.numpy() @ vectors[0]
        sign = np.sign((component * (direction.flatten() - direction.mean()).numpy()).sum())
        maps.append(np.maximum(component * sign, 0).reshape(1, *one.shape[1:]))
        shares.append([values[0] ** 2 / (values**2).sum()])
    return torch.tensor(np.stack(maps)), torch.tensor(np.array(shares))


FORMULAS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "grad-cam": lambda a, g: over_channels(mean(g) * a).relu(),
    "grad-cam++": plus_plus,
    "xgrad-cam": lambda a, g: over_channels(total(a * g) / total(a) * a).relu(),
    "hires-cam": lambda a, g: over_channels(a * g).relu(),
    "layer-cam": lambda a, g: over_channels(a * g.relu()).relu(),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_map_of_an_inner_layer_is_that_of_the_formula(name: str, dims: int) -> None:
    network, x, plain = case(dims)
    layer = next(node.output[0] for node in plain.graph.node if node.op_type == "MaxPool")
    found = run(compile(plain, name, layer=layer).model, x, target=TARGET)
    assert_close(found["attribution"], FORMULAS[name](*at_stem(network, x)))


@pytest.mark.parametrize("name", ["eigen-cam", "eigengrad-cam"])
def test_a_principal_component_is_that_of_a_full_decomposition(name: str) -> None:
    network, x, plain = case()
    layer = next(node.output[0] for node in plain.graph.node if node.op_type == "MaxPool")
    a, g = at_stem(network, x)
    matrix = a if name == "eigen-cam" else a * g
    wanted, share = principal(matrix, over_channels(matrix))
    found = run(compile(plain, name, layer=layer).model, x, target=TARGET)
    # Power iteration: the error shrinks by the ratio of the first two singular values per step.
    assert_close(found["attribution"], wanted, 1e-2)
    assert_close(found["explained_variance"], share, 1e-3)


def test_cam_is_the_head_s_weights_on_the_features() -> None:
    network, x, plain = case()
    found = run(compile(plain, "cam").model, x, target=TARGET)
    features, weights = network.features(x), network.head.weight[TARGET]
    assert_close(found["attribution"], torch.einsum("bkhw,bk->bhw", features, weights)[:, None])


def test_methods_that_are_reported_equal_are_equal() -> None:
    _, x, plain = case()
    compiled = {
        name: compile(plain, name) for name in ("cam", "grad-cam", "xgrad-cam", "hires-cam")
    }
    maps = {name: run(c.model, x, target=TARGET)["attribution"] for name, c in compiled.items()}
    count = maps["cam"][0].size
    for name in ("grad-cam", "xgrad-cam", "hires-cam"):
        assert name in compiled["cam"].report.equals
        assert_close(maps[name] * count, np.maximum(maps["cam"], 0))


class Behind(nn.Module):
    """Two convolutions and a head behind their mean, which may see their maximum too."""

    def __init__(self, *, sees_maximum: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.ReLU()
        )
        self.sees_maximum = sees_maximum
        self.head = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.features(x)
        seen = a.mean((2, 3))
        return self.head(seen + a.amax((2, 3)) if self.sees_maximum else seen)


def test_maps_behind_a_mean_are_reported_equal_whatever_the_head() -> None:
    network, x = seeded(Behind(sees_maximum=False)), image(2, 1, 16, 16)
    plain = exported(network, x, "dynamo", 18)
    names = ("grad-cam", "xgrad-cam", "hires-cam")
    compiled = {name: compile(plain, name) for name in names}
    maps = {name: run(c.model, x, target=TARGET)["attribution"] for name, c in compiled.items()}
    for name in names:
        assert {name, *compiled[name].report.equals} == set(names)
        assert_close(maps[name], maps["grad-cam"])
    assert np.abs(maps["grad-cam"]).max() > 0


def test_maps_are_not_reported_equal_where_the_score_sees_more_than_the_mean() -> None:
    network, x = seeded(Behind(sees_maximum=True)), image(2, 1, 16, 16)
    plain = exported(network, x, "dynamo", 18)
    layer = next(node.input[0] for node in plain.graph.node if node.op_type == "ReduceMean")
    assert compile(plain, "grad-cam", layer=layer).report.equals == ()


def input_gradient(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    network(x)[range(len(x)), TARGET].sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_saliency_and_input_times_gradient(dims: int) -> None:
    network, x, plain = case(dims)
    g = input_gradient(network, x)
    found = run(compile(plain, "saliency").model, x, target=TARGET)["attribution"]
    assert_close(found, g.abs().amax(1, keepdim=True))
    found = run(compile(plain, "input-x-gradient").model, x, target=TARGET)["attribution"]
    assert_close(found, over_channels(x * g))


def test_saliency_takes_the_strongest_channel() -> None:
    network, x = seeded(ResNet(channels=3)), image(2, 3, 33, 33)
    found = run(compile(exported(network, x), "saliency").model, x, target=TARGET)["attribution"]
    assert_close(found, input_gradient(network, x).abs().amax(1, keepdim=True))


class GuidedRelu(torch.autograd.Function):
    """The guided rule, for the oracle."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        y = x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return g * (y > 0) * (g > 0)


class DeconvRelu(GuidedRelu):
    """The deconvnet rule, for the oracle."""

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: torch.Tensor) -> torch.Tensor:
        return g * (g > 0)


def ruled_gradient(
    rule: type[GuidedRelu], monkeypatch: pytest.MonkeyPatch, network: nn.Module, x: torch.Tensor
) -> torch.Tensor:
    """The gradient with another backward for every ReLU, module or function."""
    with monkeypatch.context() as patch:
        patch.setattr(functional, "relu", lambda y, inplace=False: rule.apply(y))
        patch.setattr(torch, "relu", rule.apply)
        return input_gradient(network, x)


@pytest.mark.parametrize(
    ("name", "rule"), [("guided-backpropagation", GuidedRelu), ("deconvnet", DeconvRelu)]
)
def test_another_rule_for_relu(
    name: str, rule: type[GuidedRelu], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x, plain = case()
    wanted = ruled_gradient(rule, monkeypatch, network, x)
    assert_close(run(compile(plain, name).model, x, target=TARGET)["attribution"], wanted)


def test_guided_grad_cam_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, plain = case()
    cam = run(compile(plain, "grad-cam").model, x, target=TARGET)["attribution"]
    grown = functional.interpolate(torch.tensor(cam), x.shape[2:], mode="bilinear")
    wanted = grown * ruled_gradient(GuidedRelu, monkeypatch, network, x)
    found = run(compile(plain, "guided-grad-cam").model, x, target=TARGET)
    assert_close(found["attribution"], wanted)


class Bent(nn.Module):
    """Two convolutions, each with an activation behind it, and a linear head."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.activation, self.head = activation, nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.second(self.activation(self.first(x))))
        return self.head(x.mean((2, 3)))


HOOKS = {
    "guided-backpropagation": lambda _, given, arriving: (given[0].relu(),),
    "deconvnet": lambda _, given, arriving: (arriving[0].relu(),),
}


@pytest.mark.parametrize("name", HOOKS)
def test_relu6_is_guided_as_torch_hooks_guide_it(name: str) -> None:
    network, x = seeded(Bent(nn.ReLU6())), image(2, 1, 10, 10)
    with torch.no_grad():
        network.first.weight *= 30  # some activations lie above 6
    plain = exported(network, x, "torchscript", 17)
    assert "Clip" in {node.op_type for node in plain.graph.node}
    assert (network.first(x) > 6).any()
    hook = network.activation.register_full_backward_hook(HOOKS[name])
    wanted = input_gradient(network, x)
    hook.remove()
    assert not torch.allclose(wanted, input_gradient(network, x))
    assert_close(run(compile(plain, name).model, x, target=TARGET)["attribution"], wanted)


@pytest.mark.parametrize("name", HOOKS)
def test_a_clamp_at_zero_is_guided_as_a_relu(name: str) -> None:
    x = image(2, 1, 10, 10)
    maps = [
        run(compile(exported(seeded(Bent(way)), x, "torchscript", 17), name).model, x,
            target=TARGET)["attribution"]
        for way in (torch.relu, lambda y: y.clamp(min=0))
    ]  # fmt: skip
    assert_close(maps[1], maps[0])


@pytest.mark.parametrize("name", ["guided-backpropagation", "deconvnet", "guided-grad-cam"])
def test_a_rule_for_relu_is_refused_on_other_activations(name: str) -> None:
    network, x = seeded(ConvNeXt()), image(2, 1, 32, 32)
    with pytest.raises(UnsupportedOperatorError, match="Clip from 0 only"):
        compile(exported(network, x, "torchscript", 20), name)


@pytest.mark.parametrize("name", ["guided-backpropagation", "deconvnet", "guided-grad-cam"])
@pytest.mark.parametrize(
    ("activation", "op_type"),
    [
        (nn.Hardtanh(), "Clip"),
        (lambda y: torch.maximum(y, torch.zeros(1)), "Max"),
        (lambda y: torch.minimum(y, torch.ones(1)), "Min"),
        (lambda y: torch.where(y > 0, y, torch.zeros_like(y)), "Where"),
    ],
)
def test_a_rule_for_relu_is_refused_where_another_operator_may_bend(
    name: str, activation: Callable[[torch.Tensor], torch.Tensor], op_type: str
) -> None:
    plain = exported(seeded(Bent(activation)), image(2, 1, 10, 10), "torchscript", 17)
    with pytest.raises(UnsupportedOperatorError, match="saliency") as caught:
        compile(plain, name)
    assert caught.value.op_type == op_type


def test_a_choice_that_is_the_same_for_every_image_is_not_taken_for_an_activation() -> None:
    keep = torch.arange(100).reshape(10, 10) % 3 > 0

    def masked(y: torch.Tensor) -> torch.Tensor:
        return torch.where(keep, y.relu(), torch.zeros(1))

    network, x = seeded(Bent(masked)), image(2, 1, 10, 10)
    compile(exported(network, x, "torchscript", 17), "guided-backpropagation")


def integrated(
    network: nn.Module, x: torch.Tensor, at: list[float], weights: list[float]
) -> torch.Tensor:
    steps = [w * input_gradient(network, a * (x + 2) - 2) for a, w in zip(at, weights, strict=True)]
    return over_channels((x + 2) * torch.stack(steps).sum(0))


@pytest.mark.parametrize("quadrature", ["midpoint", "gauss-legendre"])
@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_integrated_gradients(quadrature: str, dynamic_batch: bool) -> None:
    network, x, _ = case()
    plain = exported(network, x, "torchscript", 17, dynamic_batch=dynamic_batch)
    at, weights = (np.arange(6) + 0.5) / 6, np.full(6, 1 / 6)
    if quadrature == "gauss-legendre":
        nodes, weights = np.polynomial.legendre.leggauss(6)
        at, weights = (nodes + 1) / 2, weights / 2
    method = IntegratedGradients(steps=6, baseline=-2.0, quadrature=quadrature)
    found = run(compile(plain, method).model, x, target=TARGET)
    wanted = integrated(network, x, at.tolist(), weights.tolist())
    assert_close(found["attribution"], wanted)
    rise = (network(x) - network(torch.full_like(x, -2)))[range(2), TARGET]
    gap = (wanted.sum((1, 2, 3)) - rise).abs() / rise.abs()
    assert np.allclose(found["completeness_residual"][:, 0], gap.detach(), atol=1e-3)


def test_integrated_gradients_becomes_complete_with_more_steps() -> None:
    _, x, plain = case()
    residuals = [
        run(compile(plain, IntegratedGradients(steps)).model, x, target=TARGET)[
            "completeness_residual"
        ].max()
        for steps in (4, 64)
    ]
    assert residuals[1] < residuals[0]
    assert residuals[1] < 0.02


def test_smoothgrad_is_the_mean_gradient_under_fixed_noise() -> None:
    network, x, plain = case()
    method = SmoothGrad(samples=4, noise=0.1, seed=3)
    noise = torch.tensor(np.random.default_rng(3).standard_normal([1, 4, *x.shape[1:]], np.float32))
    spread = (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)) * 0.1
    g = torch.stack([input_gradient(network, x + spread * noise[:, i]) for i in range(4)]).mean(0)
    session = compile(plain, method).model
    first, second = (run(session, x, target=TARGET)["attribution"] for _ in range(2))
    assert_close(first, g.abs())
    assert np.array_equal(first, second)


def test_expected_gradients_sum_to_the_rise_over_the_backgrounds() -> None:
    network, x, plain = case()
    backgrounds = image(200, 1, 33, 33, seed=9).numpy()
    found = run(compile(plain, ExpectedGradients(backgrounds)).model, x[:1], target=TARGET[:1])
    rise = (network(x[:1]) - network(torch.tensor(backgrounds)).mean(0))[0, TARGET[0]]
    # 200 draws: the standard error is about a tenth of the spread of single differences.
    assert abs(found["attribution"].sum() - rise.item()) < 0.1 * abs(rise.item())


def test_several_classes_are_explained_at_the_image_in_one_run() -> None:
    network, x, plain = case()
    found = run(compile(plain, "saliency", select=TopClasses(2)).model, x)
    best = network(x).topk(2).indices
    for rank in range(2):
        picture = x.clone().requires_grad_()
        network(picture)[range(2), best[:, rank]].sum().backward()
        assert_close(found["attribution"][:, rank], picture.grad.abs()[:, 0])


def test_cam_is_refused_where_the_head_is_not_linear() -> None:
    network, x = seeded(ViT()), image(2, 1, 32, 32)
    with pytest.raises(ConfigError, match="cam is defined"):
        compile(exported(network, x, "torchscript", 17), "cam")


EXPORTS = [("torchscript", 13), ("torchscript", 17), ("dynamo", 23)]


@pytest.mark.parametrize(("exporter", "opset"), EXPORTS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_transformer_with_a_class_token_is_explained_where_its_last_attention_reads(
    exporter: str, opset: int, fused: bool
) -> None:
    if fused and opset == 13:
        opset = 20
    network, x = seeded(ViT(fused=fused)), image(2, 1, 32, 32)
    plain = exported(network, x, exporter, opset)
    before, a = at_last_norm(network, x)
    for name in ("grad-cam", "hires-cam"):
        compiled = compile(plain, name)
        assert compiled.report.layer_shape == (None, 17, 24)
        wanted = FORMULAS[name](*a)
        assert_close(run(compiled.model, x, target=TARGET)["attribution"], wanted)
    assert (
        over_channels(before[0] * before[1]).abs().max()
        < 1e-4 * over_channels((before[0] * before[1]).abs()).max()
    )


Pair = tuple[torch.Tensor, torch.Tensor]


def at_last_norm(network: ViT, x: torch.Tensor) -> tuple[Pair, Pair]:
    """Activations and gradients of the patches before and after the last block's first norm."""
    tokens = network.patches(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([network.token.expand(2, -1, -1), tokens], 1) + network.positions
    block, before = network.blocks[1], network.blocks[0](tokens).detach().requires_grad_()
    after = block.norm1(before)
    after.retain_grad()
    y = before + block.attention(after)
    y = y + block.mlp(block.norm2(y))
    network.head(network.norm(y)[:, 0])[range(2), TARGET].sum().backward()

    def on_grid(t: torch.Tensor) -> torch.Tensor:
        return t.detach()[:, 1:].transpose(1, 2).reshape(2, -1, 4, 4)

    return tuple((on_grid(t), on_grid(t.grad)) for t in (before, after))


@pytest.mark.parametrize(("exporter", "opset"), EXPORTS)
@pytest.mark.parametrize("name", ["hires-cam", "eigengrad-cam"])
def test_a_sum_that_vanishes_before_a_norm_is_refused_with_the_layer_that_serves(
    name: str, exporter: str, opset: int
) -> None:
    plain = exported(seeded(ViT()), image(2, 1, 32, 32), exporter, opset)
    served = compile(plain, name).report.layer
    maker = {item: node for node in Graph(plain).forward for item in node.output}[served]
    stream = maker.input[0]
    with pytest.raises(ConfigError, match=f"name the normalisation's output, '{served}'"):
        compile(plain, name, layer=stream)
    assert compile(plain, "grad-cam", layer=stream).report.layer == stream


def test_xgrad_cam_warns_of_negative_sums_on_signed_layers_alone() -> None:
    _, _, plain = case()
    assert not compile(plain, "xgrad-cam").report.warnings
    signed = next(n.output[0] for n in plain.graph.node if n.op_type == "Conv" and n.input[0] !=
                  "image" and "Relu" not in n.output[0])  # fmt: skip
    assert "negative" in compile(plain, "xgrad-cam", layer=signed).report.warnings[0]
    vit = exported(seeded(ViT()), image(2, 1, 32, 32), "torchscript", 17)
    assert "negative" in compile(vit, "xgrad-cam").report.warnings[0]


@pytest.mark.parametrize(("exporter", "opset"), EXPORTS)
def test_channels_last_features_are_explained_at_their_positions(exporter: str, opset: int) -> None:
    network, x = seeded(Swin()), image(2, 1, 32, 32)
    compiled = compile(exported(network, x, exporter, opset))
    y = network.first(network.patches(x).permute(0, 2, 3, 1))
    corners = [y[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    a = network.norm(network.second(network.merge(torch.cat(corners, -1))))
    a = a.detach().permute(0, 3, 1, 2)
    weights = network.head.weight[TARGET][:, :, None, None] / 16
    assert compiled.report.layer_shape == (None, 4, 4, 24)
    assert_close(
        run(compiled.model, x, target=TARGET)["attribution"], over_channels(weights * a).relu()
    )


@pytest.mark.parametrize(("make", "channels"), [(UNet, 16), (DynUNet, 8)])
def test_a_segmentation_is_explained_by_the_region_of_a_class(
    make: type[nn.Module], channels: int
) -> None:
    network, x = seeded(make()), image(2, 1, 16, 16)
    plain = exported(network, x, "torchscript", 17)
    found = run(compile(plain, "saliency").model, x, target=[1, 1])
    picture = x.clone().requires_grad_()
    y = network(picture)
    (y[:, 1] * (y.argmax(1) == 1)).sum().backward()
    assert_close(found["attribution"], picture.grad.abs())
    assert compile(plain).report.layer_shape == (None, channels, 4, 4)


def test_the_top_class_of_a_segmentation_is_not_the_background() -> None:
    network, x = seeded(UNet()), image(2, 1, 16, 16)
    compiled = compile(exported(network, x, "torchscript", 17), select=TopClasses(2))
    assert run(compiled.model, x)["attribution_class"].tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("is_exclusive", [True, False])
def test_whether_classes_compete_may_be_said_where_the_graph_does_not(is_exclusive: bool) -> None:
    network, x = seeded(UNet()), image(2, 1, 16, 16)
    plain = exported(network, x, "torchscript", 17)
    select = TopClasses(1, is_exclusive=is_exclusive)
    found = run(compile(plain, "saliency", select=select).model, x)
    picture = x.clone().requires_grad_()
    y = network(picture)
    best = found["attribution_class"][:, 0].tolist()
    regions = y.argmax(1, keepdim=True) == torch.arange(2)[:, None, None] if is_exclusive else y > 0
    sum((y[n, c] * regions[n, c]).sum() for n, c in enumerate(best)).backward()
    assert_close(found["attribution"], picture.grad.abs())


BOX = (-6.0, 6.0)
"""No value of the images is beyond."""


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"gradient-attention-rollout"}))
def test_no_method_moves_a_prediction_or_depends_on_the_rest_of_the_batch(name: str) -> None:
    _, x, plain = case()
    compiled = compile(plain, name, box=BOX)
    together = run(compiled.model, x, target=TARGET)
    alone = run(compiled.model, x[1:], target=TARGET[1:])
    assert np.array_equal(together["scores"], run(plain, x)["scores"])
    assert_close(alone["attribution"], together["attribution"][1:])


SCORE_IS_SHARED_OUT = {
    "lrp", "lrp-epsilon", "lrp-epsilon-plus", "lrp-alpha-beta", "lrp-epsilon-gamma-box",
    "deep-taylor",
}  # fmt: skip
"""Relevance adds up to the score, biases included: a constant is part of what is shared out."""


@pytest.mark.parametrize(
    "name", sorted(set(METHODS) - {"gradient-attention-rollout"} - SCORE_IS_SHARED_OUT)
)
def test_a_constant_added_to_the_scores_changes_no_map(name: str) -> None:
    network, x, plain = case()
    moved = onnx.ModelProto()
    moved.CopyFrom(plain)
    bias = next(item for item in moved.graph.initializer if item.name == "head.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(network.head.bias.detach().numpy() + 5, bias.name))
    before, after = (
        run(compile(model, name).model, x, target=TARGET)["attribution"] for model in (plain, moved)
    )
    assert np.array_equal(before, after)
