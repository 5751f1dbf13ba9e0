"""What must hold of the maps whatever the network: no other library is asked.

What the unit tests show on one network with the old exporter is shown here on a residual 3D
network, a densely connected one and a transformer from the new exporter.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dicom_xai.autodiff import METHODS, IntegratedGradients, LayerwiseRelevance, compile
from dicom_xai.errors import ConfigError
from tests.contract.judged import Judged, Pooled, answers, assert_close, judge, session
from tests.make import networks
from tests.make.networks import exported, image, seeded

MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet-3d": (lambda: networks.ResNet(3), (13, 13, 13)),
    "densenet": (networks.DenseNet, (24, 24)),
    "vit": (networks.ViT, (32, 32)),
}
IMAGES = 4
TARGET = [2, 0, 1, 2]
BOX = (-6.0, 6.0)
"""No value of the images is beyond."""

ROUNDED = 1e-4
"""Relative to the largest value: another batch size may sum float32 in another order."""


@cache
def case(name: str) -> tuple[nn.Module, torch.Tensor, onnx.ModelProto]:
    """A network, four images and its export, made once."""
    make, size = MAKERS[name]
    network, x = seeded(make()), image(IMAGES, 1, *size, seed=6)
    return network, x, exported(network, x, "dynamo", 18)


@cache
def loaded(name: str, method: str) -> onnxruntime.InferenceSession | None:
    """A session of the compiled model; None where the method is refused on this network."""
    try:
        return session(compile(case(name)[2], method, box=BOX).model)
    except ConfigError:
        return None


APPLICABLE = [
    (name, method) for name in MAKERS for method in METHODS
    if (name == "vit") == (method == "gradient-attention-rollout")
    or (name == "vit" and method in {
        "grad-cam", "grad-cam++", "xgrad-cam", "hires-cam", "layer-cam", "eigen-cam",
        "eigengrad-cam", "saliency", "input-x-gradient", "integrated-gradients", "smoothgrad",
        "attn-lrp",
    })
]  # fmt: skip


def attributed(name: str, method: str, x: torch.Tensor, target: list[int]) -> np.ndarray:
    found = loaded(name, method)
    assert found is not None
    return answers(found, {"image": x.numpy(), "target": np.array(target)})["attribution"]


@pytest.mark.parametrize(("name", "method"), APPLICABLE)
def test_a_map_is_the_same_in_every_run_thread_and_compilation(name: str, method: str) -> None:
    _, x, plain = case(name)
    feeds = {"image": x.numpy(), "target": np.array(TARGET)}
    compiled = compile(plain, method, box=BOX).model
    second = compile(plain, method, box=BOX).model
    assert compiled.SerializeToString() == second.SerializeToString()
    shared = loaded(name, method)
    assert shared is not None
    first = answers(shared, feeds)
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: answers(shared, feeds), range(8)))
    for run in (*runs, answers(session(compiled), feeds)):
        assert run.keys() == first.keys()
        assert all(np.array_equal(run[key], first[key]) for key in first)


@pytest.mark.parametrize(("name", "method"), APPLICABLE)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(picked=st.lists(st.integers(0, IMAGES - 1), min_size=1, max_size=6))
def test_a_map_does_not_depend_on_what_else_is_in_the_batch(
    name: str, method: str, picked: list[int]
) -> None:
    _, x, _ = case(name)
    together = attributed(name, method, x, TARGET)
    chosen = attributed(name, method, x[picked], [TARGET[i] for i in picked])
    largest = np.abs(together).max()
    assert np.abs(chosen - together[picked]).max() <= ROUNDED * largest


@pytest.mark.parametrize(
    "method", [m for n, m in APPLICABLE if n == "vit" and not m.startswith("eigen-cam")]
)
def test_a_constant_added_to_a_transformers_scores_changes_no_map(method: str) -> None:
    _, x, plain = case("vit")
    moved = onnx.ModelProto()
    moved.CopyFrom(plain)
    bias = next(item for item in moved.graph.initializer if item.name == "head.bias")
    values = onnx.numpy_helper.to_array(bias) + np.float32(5)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    feeds = {"image": x.numpy(), "target": np.array(TARGET)}
    before = attributed("vit", method, x, TARGET)
    after = answers(session(compile(moved, method).model), feeds)
    assert np.array_equal(after["attribution"], before)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("baseline", [0.0, -2.0])
def test_integrated_gradients_sum_to_the_scores_rise(name: str, baseline: float) -> None:
    network, x, plain = case(name)
    method = IntegratedGradients(96, baseline=baseline, quadrature="gauss-legendre")
    found = answers(
        session(compile(plain, method).model), {"image": x.numpy(), "target": np.array(TARGET)}
    )
    with torch.no_grad():
        rise = network(x) - network(torch.full_like(x, baseline))
    wanted = rise[range(IMAGES), TARGET].numpy()
    total = found["attribution"].sum(tuple(range(1, x.ndim)))
    # The gradient jumps where the path crosses a ReLU's kink; a transformer's is smooth.
    close = 1e-3 if name == "vit" else 3e-2
    assert np.abs(total - wanted).max() <= close * np.abs(wanted).max()
    residual = np.abs(total - wanted) / np.abs(wanted)
    assert np.allclose(found["completeness_residual"][:, 0], residual, atol=1e-3)


@cache
def unbiased(dims: int) -> Judged:
    return judge(seeded(Pooled(dims, bias=False)), dims)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    "method",
    [
        LayerwiseRelevance("epsilon"),
        LayerwiseRelevance("epsilon-plus"),
        LayerwiseRelevance("alpha-beta"),
        LayerwiseRelevance("epsilon-plus-flat"),
        LayerwiseRelevance("epsilon-gamma-box", low=-5.0, high=5.0),
    ],
    ids=lambda method: method.composite,
)
def test_relevance_sums_to_the_score_of_a_pooled_network_without_biases(
    dims: int, method: LayerwiseRelevance
) -> None:
    made = unbiased(dims)
    total = made.map(method).sum(tuple(range(1, made.x.ndim)))
    wanted = made.scores().numpy()
    # The stabilisers take up to 1e-6 of every denominator, which small ones feel.
    assert np.abs(total - wanted).max() <= 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("dims", [2, 3])
def test_lrp_comes_to_input_times_gradient_as_its_epsilon_vanishes(dims: int) -> None:
    made = unbiased(dims)
    limit = made.map("input-x-gradient")
    gaps = [
        np.abs(made.map(LayerwiseRelevance("epsilon", epsilon=epsilon)) - limit).max()
        for epsilon in (1e-1, 1e-3, 1e-5)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] <= 1e-3 * np.abs(limit).max()


@pytest.mark.parametrize("name", ["resnet-3d", "densenet"])
def test_methods_reported_equal_are_equal_up_to_one_factor(name: str) -> None:
    _, x, plain = case(name)
    wanted = attributed(name, "cam", x, TARGET)
    positions = wanted[0].size
    equals = compile(plain, "cam").report.equals
    assert set(equals) == {"grad-cam", "xgrad-cam", "hires-cam"}
    for method in equals:
        found = attributed(name, method, x, TARGET)
        assert_close(found * positions, np.maximum(wanted, 0), ROUNDED)
