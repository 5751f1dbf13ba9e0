"""Relevance and guided maps against zennit's, 2D and 3D.

zennit's composites as they are, with three things said: relevance starts from the score, a sum of
two branches shares relevance out by zennit's own rule for sums, and a BatchNormalization that
follows no linear layer is an affine layer of its own under the epsilon rule, where zennit passes
relevance through it as if it did nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from dicom_xai.autodiff import LayerwiseRelevance
from tests.contract.judged import (
    NAMES,
    TARGET,
    Joined,
    Judged,
    assert_close,
    judge,
    judged,
    over_channels,
)
from tests.make.networks import AVERAGE, CONV, UP, exported, seeded
from tests.make.standins import stand_ins

with stand_ins():
    from zennit import composites, rules, types
    from zennit.attribution import Gradient
    from zennit.canonizers import AttributeCanonizer, SequentialMergeBatchNorm
    from zennit.core import Composite
    from zennit.layer import Sum

CLOSE = 1e-4
"""Relative to the largest value: a denominator near 0 takes over what rounding leaves of it."""

LOW, HIGH = -6.0, 5.0
"""A box that holds the images."""


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Judged:
    return judged(request.param)


def added_by_a_module(name: str, module: nn.Module) -> dict[str, object] | None:
    """`Joined` with its shortcut summed where zennit sees it."""
    if not isinstance(module, Joined):
        return None

    def forward(self: Joined, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.shrink(self.sum(torch.stack([x, self.added(x)], -1)))
        x = self.features(torch.cat([x, self.beside(x)], 1))
        return self.head(torch.flatten(self.pool(x), 1))

    return {"sum": Sum(), "forward": forward.__get__(module)}


def canonizers() -> list[object]:
    return [SequentialMergeBatchNorm(), AttributeCanonizer(added_by_a_module)]


ALONE = [(types.BatchNorm, rules.Epsilon())]
"""What a normalisation is that no linear layer takes in."""


def of_layers(*layers: tuple[type, object]) -> Composite:
    """A composite that zennit does not have."""
    return composites.LayerMapComposite(
        [*ALONE, *layers, *composites.layer_map_base()], canonizers=canonizers()
    )


def first_then(first: object, rest: object) -> Composite:
    """One rule for the layer that sees the image, one for all others."""
    return composites.SpecialFirstLayerMapComposite(
        [*ALONE, (types.Linear, rest), *composites.layer_map_base()],
        [(types.Linear, first)],
        canonizers=canonizers(),
    )


def zennits(case: Judged, composite: Composite, *, is_clipped: bool = False) -> torch.Tensor:
    """The map, of a copy of the network in float64."""
    network, x = copy.deepcopy(case.network).double(), case.x.double()
    start = torch.eye(3, dtype=x.dtype)[TARGET]
    with torch.no_grad():
        start = start * network(x)
    if is_clipped:
        start = start.relu()
    with Gradient(network, composite, create_graph=False) as attributor:
        _, relevance = attributor(x, start)
    return over_channels(relevance).float()


SHIPPED: dict[str, tuple[LayerwiseRelevance, Callable[[], Composite]]] = {
    "epsilon": (
        LayerwiseRelevance("epsilon", epsilon=1e-3),
        lambda: of_layers((types.Linear, rules.Epsilon(1e-3))),
    ),
    "epsilon-plus": (
        LayerwiseRelevance("epsilon-plus"),
        lambda: composites.EpsilonPlus(layer_map=ALONE, canonizers=canonizers()),
    ),
    "alpha-beta": (
        LayerwiseRelevance("alpha-beta"),
        lambda: composites.EpsilonAlpha2Beta1(layer_map=ALONE, canonizers=canonizers()),
    ),
    "epsilon-plus-flat": (
        LayerwiseRelevance("epsilon-plus-flat"),
        lambda: composites.EpsilonPlusFlat(layer_map=ALONE, canonizers=canonizers()),
    ),
    "epsilon-gamma-box": (
        LayerwiseRelevance("epsilon-gamma-box", low=LOW, high=HIGH),
        lambda: composites.EpsilonGammaBox(LOW, HIGH, layer_map=ALONE, canonizers=canonizers()),
    ),
    "a larger gamma": (
        LayerwiseRelevance("epsilon-gamma-box", gamma=0.7, low=LOW, high=HIGH),
        lambda: composites.EpsilonGammaBox(
            LOW, HIGH, gamma=0.7, layer_map=ALONE, canonizers=canonizers()
        ),
    ),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_composite_is_zennits(case: Judged, name: str) -> None:
    method, composite = SHIPPED[name]
    assert_close(case.map(method), zennits(case, composite()), CLOSE)


class Stretched(nn.Module):
    """Down by a strided convolution, up by a transposed one, as a segmentation's decoder."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            CONV[dims](2, 4, 3, 2, 1), nn.ReLU(),
            UP[dims](4, 6, 3, 2, 1), nn.ReLU(),
            CONV[dims](6, 5, 3, padding=1), nn.LeakyReLU(0.1),
        )  # fmt: skip
        self.pool = AVERAGE[dims](1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_transposed_convolution_is_a_convolution_to_zennit_too(name: str, dims: int) -> None:
    case = judge(seeded(Stretched(dims)), dims)
    method, composite = SHIPPED[name]
    assert_close(case.map(method), zennits(case, composite()), CLOSE)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_normalisation_that_the_export_left_alone_is_merged_as_zennit_does(
    name: str, dims: int
) -> None:
    case = judged(f"pooled-{dims}d")
    plain = exported(case.network, case.x, "torchscript", 17, folds=False)
    assert any(node.op_type == "BatchNormalization" for node in plain.graph.node)
    method, composite = SHIPPED[name]
    assert_close(replace(case, plain=plain).map(method), zennits(case, composite()), CLOSE)


@cache
def hopeful(name: str) -> Judged:
    """A network whose scores are raised above 0: nothing less has anything to share out."""
    case = judged(name)
    network = copy.deepcopy(case.network)
    head = network.head if isinstance(network.head, nn.Linear) else network.head.out
    with torch.no_grad():
        head.bias += 2
    return judge(network, case.x.ndim - 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bounds", [None, (LOW, HIGH)], ids=["w-square", "z-box"])
def test_deep_taylor_is_zennits_rules_from_a_clipped_score(
    name: str, bounds: tuple[float, float] | None
) -> None:
    case = hopeful(name)
    assert case.scores().min() > 0
    first = rules.WSquare() if bounds is None else rules.ZBox(*bounds)
    low, high = bounds or (None, None)
    method = LayerwiseRelevance("deep-taylor", low=low, high=high)
    wanted = zennits(case, first_then(first, rules.ZPlus()), is_clipped=True)
    assert_close(case.map(method), wanted, CLOSE)


@pytest.mark.parametrize(
    ("name", "composite"),
    [
        ("guided-backpropagation", composites.GuidedBackprop),
        ("deconvnet", composites.DeconvNet),
    ],
)
def test_another_rule_for_relu_is_zennits(
    case: Judged, name: str, composite: type[Composite]
) -> None:
    start = torch.eye(3)[TARGET]
    with Gradient(copy.deepcopy(case.network), composite()) as attributor:
        _, wanted = attributor(case.x, start)
    assert_close(case.map(name), over_channels(wanted))
