"""One run of a compiled model gives the vendor's prediction and the right map."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from dicom_xai.autodiff import BySeed, ByTarget, Compiled, TopClasses, compile
from dicom_xai.autodiff.check import check_untouched
from dicom_xai.autodiff.prepare import Facts
from dicom_xai.errors import ConfigError, InvariantError, UnsupportedOperatorError
from tests.make.networks import DenseNet, ResNet, ViT, exported, image, seeded

CLOSE = 1e-5
"""Relative to the largest value: float32 sums over a few hundred products, in another order."""

FAMILIES = {"resnet": ResNet, "densenet": DenseNet}
EXPORTS = [("dynamo", 18), ("torchscript", 17)]


def run(model: onnx.ModelProto, **feeds: object) -> dict[str, np.ndarray]:
    """All outputs of a model by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    given = {name: np.asarray(value) for name, value in feeds.items()}
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(None, given), strict=True))


def torch_grad_cam(network: ResNet | DenseNet, x: torch.Tensor, classes: list[int]) -> np.ndarray:
    """Grad-CAM by autograd on the features before pooling, ``(batch, 1, *spatial)``."""
    a = network.features(x).detach().requires_grad_()
    scores = network.head(torch.flatten(network.pool(a), 1))
    scores[range(len(classes)), classes].sum().backward()
    weights = a.grad.mean(tuple(range(2, a.ndim)), keepdim=True)
    return torch.relu((weights * a).sum(1, keepdim=True)).detach().numpy()


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()


@pytest.fixture(scope="module")
def resnet() -> ResNet:
    return seeded(ResNet())


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return image(2, 1, 33, 33)


@pytest.fixture(scope="module")
def model(resnet: ResNet, x: torch.Tensor) -> onnx.ModelProto:
    return exported(resnet, x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("exporter", "opset"), EXPORTS)
def test_grad_cam_is_that_of_autograd_and_the_prediction_is_bit_identical(
    family: str, dims: int, exporter: str, opset: int
) -> None:
    network = seeded(FAMILIES[family](dims))
    picture = image(3, 1, *[33] * dims)
    plain = exported(network, picture, exporter, opset)
    compiled = compile(plain, "grad-cam")
    found = run(compiled.model, image=picture, target=[0, 2, 1])
    assert_close(found["attribution"], torch_grad_cam(network, picture, [0, 2, 1]))
    assert np.array_equal(found["scores"], run(plain, image=picture)["scores"])


def test_a_target_of_minus_one_is_the_top_class(
    resnet: ResNet, x: torch.Tensor, model: onnx.ModelProto
) -> None:
    top = resnet(x).argmax(1).tolist()
    found = run(compile(model).model, image=x, target=[-1, -1])
    assert_close(found["attribution"], torch_grad_cam(resnet, x, top))


@pytest.mark.parametrize("target", [3, -2])
def test_a_target_outside_the_classes_fails_the_run(
    target: int, x: torch.Tensor, model: onnx.ModelProto
) -> None:
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(compile(model).model, image=x, target=[0, target])


class Gather(OpRun):
    """As CUDA's: 0 where the index is of no element."""

    op_domain = ""

    def _run(self, x: np.ndarray, index: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        is_there = (index >= -len(x)) & (index < len(x))
        return (np.where(is_there, np.take(x, np.where(is_there, index, 0), axis), 0),)


@pytest.mark.parametrize("target", [2, 7, -2])
def test_a_target_outside_the_classes_explains_none_where_the_runtime_checks_no_index(
    target: int,
) -> None:
    compiled = compile(one_operator("Relu"), "saliency").model
    feeds = {"image": np.ones((2, 2, 4, 4), np.float32), "target": np.array([1, target])}
    _, maps = ReferenceEvaluator(compiled, new_ops=[Gather]).run(None, feeds)
    assert maps[0].min() > 0
    assert not maps[1].any()


def test_a_seed_explains_any_combination_of_scores(
    resnet: ResNet, x: torch.Tensor, model: onnx.ModelProto
) -> None:
    seed = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.0, 2.0]])
    a = resnet.features(x).detach().requires_grad_()
    (resnet.head(torch.flatten(resnet.pool(a), 1)) * seed).sum().backward()
    wanted = torch.relu((a.grad.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True))
    found = run(compile(model, select=BySeed()).model, image=x, seed=seed)
    assert_close(found["attribution"], wanted.detach().numpy())


def test_two_seeds_in_one_run_are_two_maps(x: torch.Tensor, model: onnx.ModelProto) -> None:
    seeds = torch.tensor([[[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]], [[0.5, 0.0, 2.0], [0.0, 1.0, 0.0]]])
    both = run(compile(model, select=BySeed(2)).model, image=x, seed=seeds)["attribution"]
    for index in range(2):
        one = run(compile(model, select=BySeed()).model, image=x, seed=seeds[:, index])
        assert_close(both[:, index : index + 1], one["attribution"])


def test_eight_threads_on_one_session_get_the_same_numbers(
    x: torch.Tensor, model: onnx.ModelProto
) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    compiled = compile(model, "saliency", select=TopClasses(2)).model
    session = onnxruntime.InferenceSession(compiled.SerializeToString(), options)
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: session.run(None, {"image": x.numpy()}), range(32)))
    for outputs in runs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(outputs, runs[0], strict=True))


def test_the_best_classes_are_ranked_and_explained_in_the_same_run(
    resnet: ResNet, x: torch.Tensor, model: onnx.ModelProto
) -> None:
    compiled = compile(model, select=TopClasses(2))
    assert [item.name for item in compiled.model.graph.input] == ["image"]
    found = run(compiled.model, image=x)
    best = resnet(x).topk(2).indices.numpy()
    assert found["attribution_class"].tolist() == best.tolist()
    for rank in range(2):
        wanted = torch_grad_cam(resnet, x, best[:, rank].tolist())
        assert_close(found["attribution"][:, rank : rank + 1], wanted)


def test_classes_are_ranked_by_their_distance_to_the_threshold(
    resnet: ResNet, x: torch.Tensor, model: onnx.ModelProto
) -> None:
    offsets = [5.0, -5.0, 0.0]
    found = run(compile(model, select=TopClasses(3, offsets)).model, image=x)
    wanted = (resnet(x) - torch.tensor(offsets)).argsort(descending=True)
    assert found["attribution_class"].tolist() == wanted.tolist()


def test_more_maps_than_classes_gives_one_per_class(model: onnx.ModelProto) -> None:
    output = compile(model, select=TopClasses(9)).model.graph.output[1]
    assert output.name == "attribution"
    assert output.type.tensor_type.shape.dim[1].dim_value == 3


@pytest.mark.parametrize("activation", [torch.nn.Sigmoid(), torch.nn.Softmax(1)])
@pytest.mark.parametrize(("exporter", "opset"), EXPORTS)
def test_the_score_before_the_final_activation_is_explained(
    activation: torch.nn.Module, exporter: str, opset: int, resnet: ResNet, x: torch.Tensor
) -> None:
    network = torch.nn.Sequential(resnet, activation).eval()
    compiled = compile(exported(network, x, exporter, opset))
    assert compiled.report.output != "scores"
    found = run(compiled.model, image=x, target=[1, 1])
    assert_close(found["attribution"], torch_grad_cam(resnet, x, [1, 1]))


def test_a_model_with_a_fixed_batch_of_one_is_explained(resnet: ResNet, x: torch.Tensor) -> None:
    plain = exported(resnet, x[:1], dynamic_batch=False)
    found = run(compile(plain).model, image=x[:1], target=[0])
    assert_close(found["attribution"], torch_grad_cam(resnet, x[:1], [0]))


class ChannelsLast(torch.nn.Module):
    """A network whose image has its channels last."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.permute(0, 3, 1, 2))


class ScoresLast(torch.nn.Module):
    """A segmentation whose classes lie on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.body(x).permute(0, 2, 3, 1), -1)


@pytest.mark.parametrize("method", ["grad-cam", "saliency", "integrated-gradients", "lrp"])
def test_an_image_with_channels_last_gives_the_same_map(method: str) -> None:
    inner, x = seeded(ResNet(channels=3)), image(2, 3, 33, 33)
    turned = x.permute(0, 2, 3, 1).contiguous()
    outer = exported(ChannelsLast(inner).eval(), turned, "torchscript", 17)
    found = run(compile(outer, method).model, image=turned, target=[0, 1])
    wanted = run(
        compile(exported(inner, x, "torchscript", 17), method).model, image=x, target=[0, 1]
    )
    assert_close(found["attribution"], wanted["attribution"])


def test_classes_on_the_last_axis_are_refused_but_for_a_seed() -> None:
    plain = exported(seeded(ScoresLast()), image(2, 1, 8, 8), "torchscript", 17)
    with pytest.raises(ConfigError, match="axis 1"):
        compile(plain, "saliency")
    assert compile(plain, "saliency", select=BySeed()).report.layer == "image"


@pytest.mark.parametrize("family", FAMILIES)
def test_grad_cam_needs_no_fixed_size_of_the_image(family: str) -> None:
    network = seeded(FAMILIES[family]())
    picture = image(2, 1, 64, 96)
    plain = exported(network, picture, "torchscript", 17, free=(2, 3))
    compiled = compile(plain)
    for x in (picture, image(2, 1, 96, 32)):
        found = run(compiled.model, image=x, target=[0, 2])
        assert_close(found["attribution"], torch_grad_cam(network, x, [0, 2]))


class PaddedToEight(torch.nn.Module):
    """Pads its image on all sides to the next multiple of 8, as windowed networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Conv2d(1, 6, 3, padding=1)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = ((8 - size % 8) % 8 for size in x.shape[-2:])
        x = torch.nn.functional.pad(
            x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        )
        return self.head(torch.relu(self.features(x)).tanh().mean((2, 3)))


class Axial(torch.nn.Module):
    """Attention of rows to rows; then rows and columns swap sizes, and no element moves."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.features(x))
        seen = torch.softmax(x @ x.transpose(2, 3), -1) @ x
        both = seen * x.mean(3, keepdim=True) + seen * x.mean(2, keepdim=True)
        turned = both.transpose(2, 3).reshape(x.shape)
        return self.head((turned * x).mean((2, 3)))


@pytest.mark.parametrize("size", [(20, 28), (32, 32), (8, 24)])
def test_rows_and_columns_of_a_free_size_are_not_taken_for_each_other(
    size: tuple[int, int],
) -> None:
    network, x = seeded(Axial()), image(2, 1, *size)
    plain = exported(network, image(2, 1, 16, 24), "torchscript", 17, free=(2, 3))
    found = run(compile(plain, "saliency").model, image=x, target=[0, 2])["attribution"]
    leaf = x.clone().requires_grad_()
    network(leaf)[[0, 1], [0, 2]].sum().backward()
    assert leaf.grad is not None
    assert_close(found, leaf.grad.abs().amax(1, keepdim=True).numpy())


def test_padding_that_follows_a_free_size_is_refused_where_it_would_be_taken_back() -> None:
    plain = exported(seeded(PaddedToEight()), image(2, 1, 20, 28), "torchscript", 17, free=(2, 3))
    with pytest.raises(UnsupportedOperatorError, match="'pads' must be a constant"):
        compile(plain, "saliency")


@pytest.mark.parametrize("method", ["grad-cam", "saliency"])
def test_a_model_in_half_precision_is_explained_in_float32(
    method: str, x: torch.Tensor, model: onnx.ModelProto
) -> None:
    half = exported(seeded(ResNet()).half(), x.half(), "torchscript", 17)
    found = run(compile(half, method).model, image=x.half(), target=[0, 1])["attribution"]
    wanted = run(compile(model, method).model, image=x, target=[0, 1])["attribution"]
    assert found.dtype == np.float32
    # Half precision rounds some activations across their kink, which moves single pixels: 11 bits
    # and nine layers leave a few percent of the map's length.
    assert np.linalg.norm(found - wanted) <= 0.05 * np.linalg.norm(wanted)


def test_a_named_layer_is_explained_at_its_own_grid(resnet: ResNet, x: torch.Tensor) -> None:
    plain = exported(resnet, x, "torchscript", 17)
    layer = next(node.output[0] for node in plain.graph.node if node.op_type == "MaxPool")
    compiled = compile(plain, layer=layer)
    assert compiled.report.layer_shape == (None, 8, 9, 9)
    a = resnet.stem(x).detach().requires_grad_()
    resnet.head(torch.flatten(resnet.pool(resnet.blocks(a)), 1))[:, 1].sum().backward()
    wanted = torch.relu((a.grad.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True))
    found = run(compiled.model, image=x, target=[1, 1])
    assert_close(found["attribution"], wanted.detach().numpy())


def test_grad_cam_never_differentiates_the_trunk(model: onnx.ModelProto) -> None:
    compiled = compile(model)
    assert new_operators(compiled).isdisjoint({"Conv", "ConvTranspose", "MaxPool"})


def test_a_batch_norm_before_an_activation_costs_the_backward_no_pass_of_its_own() -> None:
    plain = exported(seeded(DenseNet()), image(2, 1, 32, 32), "torchscript", 17)
    compiled = compile(plain, "saliency")
    made = [node for node in compiled.model.graph.node if node.name in compiled.report.backward]
    relus = [node for node in plain.graph.node if node.op_type == "Relu"]
    masks = {node.output[0] for node in made if node.op_type == "HardSigmoid"}
    products = [node for node in made if node.op_type == "Mul"]
    assert len(masks) == len(relus)
    # One product per mask; besides them the mean and the last norm, before no convolution.
    assert [masks.isdisjoint(node.input) for node in products].count(True) == 2


def added_kinds(plain: onnx.ModelProto) -> list[str]:
    """The operators of all nodes that saliency adds."""
    compiled = compile(plain, "saliency")
    made = compiled.report.backward
    return [node.op_type for node in compiled.model.graph.node if node.name in made]


class Wide(torch.nn.Module):
    """A transformer's two layers, wide enough that Gemm rounds otherwise than MatMul and Add."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = torch.nn.Linear(8, 2048), torch.nn.Linear(2048, 8)
        self.gelu, self.norm = torch.nn.GELU(), torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1, 2)
        return self.head(self.norm(x + self.out(self.gelu(self.into(x)))).mean(1))


@pytest.mark.parametrize("is_free", [True, False])
@pytest.mark.parametrize("export", [("torchscript", 13), ("dynamo", 18), ("dynamo", 20)])
def test_the_prediction_keeps_its_bits_where_the_runtime_fuses_product_and_sum(
    export: tuple[str, int], is_free: bool
) -> None:
    x = image(2, 1, 6, 8)
    plain = exported(seeded(Wide()), x, *export, dynamic_batch=is_free)
    compiled = compile(plain, "saliency").model
    found = run(compiled, image=x, target=[0, 1])["scores"]
    assert np.array_equal(found, run(plain, image=x)["scores"])


class Attending(torch.nn.Module):
    """Attention as MONAI writes it, over the rows of an image; its Gelu in small nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = torch.nn.Linear(12, 36)
        self.back = torch.nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joint = self.joint(x.flatten(1, 2)).unflatten(2, (3, 2, 6))
        q, k, v = joint.permute(2, 0, 3, 1, 4)
        scores = torch.softmax(torch.einsum("blxd,blyd->blxy", q, k) * 6**-0.5, -1)
        read = torch.einsum("bhxy,bhyd->bhxd", scores, v).transpose(1, 2).flatten(2)
        return self.back(read * (0.5 * (1 + torch.erf(read / 2**0.5)))).mean(1)


def test_attention_by_einsum_is_differentiated_in_few_and_light_nodes() -> None:
    network, x = seeded(Attending()), image(2, 1, 8, 12)
    plain = exported(network, x, "dynamo", 18)
    kinds = added_kinds(plain)
    # Products of matrices are MatMul, and query, key and value come back side by side at once.
    assert "Einsum" not in kinds
    assert kinds.count("Concat") == 1
    # The numbers of attention's scale, of Gelu (which reads nothing between its ends) and of the
    # mean: one product for each.
    compiled = compile(plain, "saliency", select=BySeed()).model
    facts = Facts(compiled)
    by_numbers = [
        node
        for node in compiled.graph.node[len(plain.graph.node) :]
        if node.op_type in ("Mul", "Div") and facts.shape(node.input[1]) == ()
    ]
    assert len(by_numbers) == 6
    leaf = x.requires_grad_()
    network(leaf)[:, 1].sum().backward()
    seed = np.eye(3, dtype=np.float32)[[1, 1]]
    found = run(compiled, image=x.detach(), seed=seed)["attribution"]
    assert_close(found, leaf.grad.abs().numpy())


def test_a_convolution_of_one_place_behind_a_mean_is_differentiated_on_the_coarse_grid() -> None:
    network = seeded(torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.BatchNorm2d(16),
        torch.nn.Conv2d(16, 8, 1), torch.nn.AvgPool2d(2), torch.nn.Tanh(),
        torch.nn.Conv2d(8, 3, 4), torch.nn.Flatten(),
    ))  # fmt: skip
    x = image(2, 1, 10, 10)
    compiled = compile(exported(network, x), "saliency", select=BySeed())
    facts = Facts(compiled.model)
    grids = [
        facts.shape(node.output[0])
        for node in compiled.model.graph.node
        if node.name in compiled.report.backward and node.op_type == "Conv"
    ]
    assert grids == [(None, 16, 4, 4)]
    leaf = x.requires_grad_()
    network(leaf)[:, 1].sum().backward()
    seed = np.eye(3, dtype=np.float32)[[1, 1]]
    found = run(compiled.model, image=x.detach(), seed=seed)["attribution"]
    assert_close(found, leaf.grad.abs().numpy())


def test_an_image_of_few_channels_is_reached_without_working_out_a_block_of_them() -> None:
    kinds = added_kinds(exported(seeded(torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(16, 3, 8),
        torch.nn.Flatten(),
    )), image(2, 1, 8, 8)))  # fmt: skip
    assert kinds.count("ConvTranspose") == 1
    assert kinds.count("Conv") == 1


@pytest.mark.parametrize("make", [ResNet, ViT])
@pytest.mark.parametrize("method", ["grad-cam", "saliency"])
def test_no_new_node_reads_a_shape_that_would_be_worked_out_on_the_cpu(
    method: str, make: type[torch.nn.Module]
) -> None:
    compiled = compile(exported(seeded(make()), image(2, 1, 32, 32), "torchscript", 17), method)
    assert new_operators(compiled).isdisjoint({"Shape", "Size"})


def test_an_empty_slice_of_a_free_batch_gets_zeros() -> None:
    def whole_and_nothing(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :, :0], x * x, x[:, :, :0]], 2).mean((2, 3))

    class Rolled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return whole_and_nothing(x).repeat(1, 3)

    x = image(2, 1, 4, 4)
    plain = exported(Rolled().eval(), x, "torchscript", 17)
    found = run(compile(plain, "saliency").model, image=x, target=[0, 1])
    assert_close(found["attribution"], (2 * x / 16).abs().numpy())


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 13), ("dynamo", 20)])
def test_behind_the_last_attention_only_the_class_token_is_differentiated(
    exporter: str, opset: int
) -> None:
    plain = exported(seeded(ViT()), image(2, 1, 32, 32), exporter, opset)
    compiled = compile(plain)
    facts = Facts(compiled.model)
    made = [node for node in compiled.model.graph.node if node.name in compiled.report.backward]
    bent = [facts.shape(node.output[0]) for node in made if node.op_type in ("Erf", "Exp")]
    assert bent
    assert {shape[1] for shape in bent if shape} == {1}


def test_no_new_node_is_of_a_kind_that_providers_lag_behind(model: onnx.ModelProto) -> None:
    lagging = {"Pad", "ConstantOfShape", "Size"}
    for method in ("grad-cam", "saliency", "integrated-gradients"):
        assert new_operators(compile(model, method)).isdisjoint(lagging)


def test_the_report_names_the_methods_that_are_the_same_here(model: onnx.ModelProto) -> None:
    report = compile(model).report
    assert report.equals == ("cam", "xgrad-cam", "hires-cam")
    assert (report.method, report.layer_shape) == ("grad-cam", (None, 16, 5, 5))


def test_the_model_keeps_its_nodes_inputs_and_outputs(model: onnx.ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    compiled = compile(model).model
    assert model.SerializeToString(deterministic=True) == before
    assert list(compiled.graph.node)[: len(model.graph.node)] == list(model.graph.node)
    assert [item.name for item in compiled.graph.input] == ["image", "target"]
    assert [item.name for item in compiled.graph.output] == ["scores", "attribution"]


def test_compiling_twice_gives_the_same_bytes(model: onnx.ModelProto) -> None:
    first, second = (compile(model, select=TopClasses(2)).model for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )


def test_a_changed_node_is_noticed(model: onnx.ModelProto) -> None:
    broken = compile(model).model
    broken.graph.node[3].name = "another"
    with pytest.raises(InvariantError, match="compiling changed node"):
        check_untouched(model, broken)


def test_a_changed_weight_is_noticed(model: onnx.ModelProto) -> None:
    broken = compile(model).model
    del broken.graph.initializer[0]
    with pytest.raises(InvariantError, match="initializer"):
        check_untouched(model, broken)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "magic"}, "magic"),
        ({"layer": "no such layer"}, "no such layer"),
        ({"output": "no such output"}, "no such output"),
        ({"image": "no such input"}, "no such input"),
        ({"select": TopClasses(1, [0.0])}, "offsets"),
        ({"select": TopClasses(0)}, "TopClasses.k"),
    ],
)
def test_an_unfit_request_is_refused_by_name(
    options: dict[str, object], named: str, model: onnx.ModelProto
) -> None:
    with pytest.raises(ConfigError, match=named):
        compile(model, **options)  # type: ignore[arg-type]


def one_operator(op_type: str, opset: int = 17, domain: str = "") -> onnx.ModelProto:
    """An image, one operator in question, global pooling."""
    nodes = [
        helper.make_node("Relu", ["image"], ["features"]),
        helper.make_node(op_type, ["features"], ["odd"], name="the odd one", domain=domain),
        helper.make_node("GlobalAveragePool", ["odd"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["scores"]),
    ]
    value = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            nodes,
            "one",
            [value("image", TensorProto.FLOAT, ["batch", 2, 4, 4])],
            [value("scores", TensorProto.FLOAT, ["batch", 2])],
        ),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("vendor", 1)],
        ir_version=8,
    )


def test_an_operator_without_a_rule_is_refused_with_everything_that_helps() -> None:
    with pytest.raises(UnsupportedOperatorError) as caught:
        compile(one_operator("Hardmax"), layer="features")
    assert (caught.value.op_type, caught.value.opset) == ("Hardmax", 17)
    assert caught.value.node == "the odd one"


def test_an_operator_of_an_unknown_domain_is_refused() -> None:
    with pytest.raises(ConfigError, match="scores"):
        compile(one_operator("Magic", domain="vendor"), layer="features")


def test_a_model_that_is_not_valid_is_refused_as_such() -> None:
    broken = one_operator("Relu")
    broken.graph.name = ""
    with pytest.raises(ConfigError, match="not valid ONNX"):
        compile(broken)


def test_a_node_that_contradicts_its_schema_is_named() -> None:
    broken = one_operator("Relu")
    broken.graph.node[1].attribute.append(helper.make_attribute("nonsense", 1))
    with pytest.raises(ConfigError, match="nonsense") as caught:
        compile(broken)
    assert "the odd one" in str(caught.value)


def test_an_opset_that_is_too_old_is_refused() -> None:
    with pytest.raises(ConfigError, match="opset 11"):
        compile(one_operator("Relu", 11))


def test_the_compiler_loads_neither_dicom_nor_torch_nor_a_runtime() -> None:
    code = (
        "import sys, dicom_xai.autodiff.file\n"
        "sys.exit(bool({'pynetdicom', 'pydicom', 'torch', 'onnxruntime'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_by_target_is_the_default() -> None:
    assert (
        compile(one_operator("Relu")).model
        == compile(one_operator("Relu"), select=ByTarget()).model
    )


def new_operators(compiled: Compiled) -> set[str]:
    names = set(compiled.report.backward)
    return {node.op_type for node in compiled.model.graph.node if node.name in names}
