"""Attention rollout against its definition, and where there is none."""

from __future__ import annotations

import pytest
import torch

from dicom_xai.autodiff import compile
from dicom_xai.errors import ConfigError
from tests.make.networks import ResNet, Swin, ViT, exported, image, seeded
from tests.unit.autodiff.test_methods import TARGET, assert_close, run


def by_definition(network: ViT, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Relevance of the patches for the class token, ``(batch, 1, 4, 4)``."""
    seen: list[torch.Tensor] = []

    def remembered(y: torch.Tensor, axis: int) -> torch.Tensor:
        probabilities = (y - y.amax(axis, keepdim=True)).exp()
        probabilities = probabilities / probabilities.sum(axis, keepdim=True)
        probabilities.retain_grad()
        seen.append(probabilities)
        return probabilities

    with monkeypatch.context() as patch:
        patch.setattr(torch, "softmax", remembered)
        network(x)[range(2), TARGET].sum().backward()
    r = torch.eye(17).repeat(2, 1, 1)
    for a in seen:
        r = r + (a * a.grad).relu().mean(1) @ r
    return r[:, 0, 1:].reshape(2, 1, 4, 4).detach()


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 17), ("dynamo", 20)])
def test_rollout_is_that_of_the_definition(
    exporter: str, opset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = seeded(ViT()), image(2, 1, 32, 32)
    plain = exported(network, x, exporter, opset)
    found = run(compile(plain, "gradient-attention-rollout").model, x, target=TARGET)
    assert_close(found["attribution"], by_definition(network, x, monkeypatch))
    assert (found["scores"] == run(plain, x)["scores"]).all()


@pytest.mark.parametrize("make", [ResNet, Swin], ids=["no attention", "windows"])
def test_rollout_is_refused_without_attention_over_the_image(make: type) -> None:
    network, x = seeded(make()), image(2, 1, 32, 32)
    plain = exported(network, x, "torchscript", 17)
    with pytest.raises(ConfigError, match="no attention over the whole image"):
        compile(plain, "gradient-attention-rollout")
