"""What is explained, on exports: a region, a contrast of two classes, one output of several."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from dicom_xai.autodiff import BySeed, compile
from tests.contract.judged import answers, assert_close, session
from tests.make.monai_networks import MONAI
from tests.make.networks import exported, image, seeded

EXPORTS = [("torchscript", 17), ("dynamo", 21)]
CLOSE = 1e-4
"""Relative to the largest value: float32, and a forward that rounds otherwise than torch's."""

SEGMENTATIONS = ["monai-unet-3d", "monai-dynunet-3d", "monai-segresnet-3d", "monai-attention-unet"]


@cache
def segmentation(
    name: str, export: tuple[str, int]
) -> tuple[nn.Module, torch.Tensor, onnx.ModelProto]:
    """A network, two images and an export."""
    make, size = MONAI[name]
    network, x = seeded(make()), image(2, 1, *size, seed=2)
    return network, x, exported(network, x, *export)


def pulled(network: nn.Module, x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Torch's gradient at the image for a cotangent of the scores."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((network(x) * seed).sum(), x)
    return g


def regions(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """1 where a class has the largest score, shaped as the scores."""
    with torch.no_grad():
        y = network(x)
    return torch.nn.functional.one_hot(y.argmax(1), y.shape[1]).movedim(-1, 1).to(y.dtype)


def strongest(g: torch.Tensor) -> torch.Tensor:
    return g.abs().amax(1, keepdim=True)


@pytest.mark.parametrize("export", EXPORTS, ids=str)
@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_a_class_of_a_segmentation_is_explained_by_its_scores_summed_over_its_region(
    name: str, export: tuple[str, int]
) -> None:
    network, x, plain = segmentation(name, export)
    region = regions(network, x)
    assert region.sum(tuple(range(2, x.ndim))).min() > 0
    compiled = session(compile(plain, "saliency").model)
    for target in range(region.shape[1]):
        picked = torch.zeros_like(region)
        picked[:, target] = region[:, target]
        found = answers(compiled, {"image": x.numpy(), "target": np.array([target] * 2)})
        assert_close(found["attribution"], strongest(pulled(network, x, picked)), CLOSE)


@pytest.mark.parametrize("export", EXPORTS, ids=str)
def test_two_regions_and_their_contrast_are_explained_in_one_run(export: tuple[str, int]) -> None:
    network, x, plain = segmentation("monai-unet-3d", export)
    one = torch.zeros(2, 2, *x.shape[2:])
    one[:, 1, 2:5, 3:6] = 1
    both = torch.stack([one, one - one.flip(1)], 1)
    compiled = session(compile(plain, "input-x-gradient", select=BySeed(2)).model)
    found = answers(compiled, {"image": x.numpy(), "seed": both.numpy()})["attribution"]
    for index in range(2):
        wanted = (x * pulled(network, x, both[:, index])).sum(1, keepdim=True)
        assert_close(found[:, index : index + 1], wanted, CLOSE)


class Consultation(nn.Module):
    """Two views and an age in; risk and findings out."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1))
        self.side = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.GELU(), nn.Conv2d(4, 5, 3, 2, 1))
        self.shared = nn.Linear(12, 8)
        self.risk, self.findings = nn.Linear(8, 2), nn.Linear(8, 4)

    def parts(self, front: torch.Tensor, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(self.front(front)), torch.relu(self.side(side))

    def scores(
        self, front: torch.Tensor, side: torch.Tensor, age: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.cat([front.mean((2, 3)), side.mean((2, 3)), age], 1)
        seen = torch.tanh(self.shared(seen))
        return self.risk(seen), self.findings(seen)

    def forward(
        self, front: torch.Tensor, side: torch.Tensor, age: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        risk, findings = self.scores(*self.parts(front, side), age)
        return torch.softmax(risk, 1), torch.sigmoid(findings)


@cache
def consultation(
    export: tuple[str, int],
) -> tuple[Consultation, dict[str, torch.Tensor], onnx.ModelProto]:
    """The network, its inputs and an export; the batch is two."""
    network = seeded(Consultation())
    beside = {"side": image(2, 1, 12, 20, seed=1), "age": image(2, 1, seed=2)}
    front = image(2, 1, 16, 16)
    plain = exported(network, front, *export, names=("risk", "findings"), beside=beside)
    return network, {"image": front, **beside}, plain


@pytest.mark.parametrize("export", EXPORTS, ids=str)
@pytest.mark.parametrize("view", ["image", "side"])
@pytest.mark.parametrize(("output", "target"), [("risk", [1, 0]), ("findings", [3, 1])])
@pytest.mark.parametrize("method", ["input-x-gradient", "grad-cam"])
def test_any_output_is_explained_at_any_image_before_its_activation(
    method: str, output: str, target: list[int], view: str, export: tuple[str, int]
) -> None:
    network, inputs, plain = consultation(export)
    fed = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    front, side = network.parts(fed["image"], fed["side"])
    risk, findings = network.scores(front, side, fed["age"])
    scores = {"risk": risk, "findings": findings}[output]
    at = fed[view] if method == "input-x-gradient" else {"image": front, "side": side}[view]
    (g,) = torch.autograd.grad(scores[range(2), target].sum(), at)
    wanted = (at * g).sum(1, keepdim=True)
    if method == "grad-cam":
        wanted = torch.relu((at * g.mean((2, 3), keepdim=True)).sum(1, keepdim=True))
    compiled = compile(plain, method, output=output, image=view)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    found = answers(session(compiled.model), {**feeds, "target": np.array(target)})
    assert_close(found["attribution"], wanted, CLOSE)
    before = answers(session(plain), feeds)
    assert all(np.array_equal(found[name], before[name]) for name in before)
