"""Attention rollout against its definition, and where there is none."""

from __future__ import annotations

import pytest
import torch

from dicom_xai.autodiff import AttentionRollout, compile
from dicom_xai.errors import ConfigError
from tests.make.networks import ResNet, Swin, ViT, exported, image, seeded
from tests.unit.autodiff.test_methods import TARGET, assert_close, run


def attended(
    network: ViT, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attention probabilities and their gradients, first layer first."""
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
    return [(a.detach(), a.grad) for a in seen]


def by_chefer(attention: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Relevance of the patches for the class token, ``(batch, 1, 4, 4)``."""
    r = torch.eye(17).repeat(2, 1, 1)
    for a, g in attention:
        r = r + (a * g).relu().mean(1) @ r
    return r[:, 0, 1:].reshape(2, 1, 4, 4)


def by_corrected(
    attention: list[tuple[torch.Tensor, torch.Tensor]], discard: float
) -> torch.Tensor:
    """The rows of the product of the layers' matrices, ``(batch, tokens, tokens)``."""
    r = torch.eye(17).repeat(2, 1, 1)
    for a, g in attention:
        fused = (a * g).mean(1).clamp(min=0)
        for one in fused.flatten(1):
            one[one.topk(int(one.numel() * discard), largest=False).indices] = 0
        mixed = (fused + torch.eye(17)) / 2
        r = mixed / mixed.sum(-1, keepdim=True) @ r
    assert torch.allclose(r.sum(-1), torch.ones(2, 17))
    return r


EXPORTS = pytest.mark.parametrize(
    ("exporter", "opset", "fused"),
    [("torchscript", 17, False), ("dynamo", 20, False), ("dynamo", 23, True)],
    ids=["torchscript", "dynamo", "fused"],
)


@EXPORTS
def test_rollout_is_that_of_the_definition(
    exporter: str, opset: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = image(2, 1, 32, 32)
    plain = exported(seeded(ViT(fused=fused)), x, exporter, opset)
    assert fused == any(node.op_type == "Attention" for node in plain.graph.node)
    found = run(compile(plain, "gradient-attention-rollout").model, x, target=TARGET)
    assert_close(found["attribution"], by_chefer(attended(seeded(ViT()), x, monkeypatch)))
    assert (found["scores"] == run(plain, x)["scores"]).all()


@EXPORTS
@pytest.mark.parametrize("discard", [0.0, 0.9])
def test_corrected_rollout_is_that_of_the_definition(
    exporter: str, opset: int, fused: bool, discard: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = image(2, 1, 32, 32)
    plain = exported(seeded(ViT(fused=fused)), x, exporter, opset)
    found = run(
        compile(plain, AttentionRollout("corrected", discard=discard)).model, x, target=TARGET
    )
    expected = by_corrected(attended(seeded(ViT()), x, monkeypatch), discard)
    assert_close(found["attribution"], expected[:, 0, 1:].reshape(2, 1, 4, 4))
    assert (found["scores"] == run(plain, x)["scores"]).all()


class Pooled(ViT):
    """Without a class token: the mean over the patches is classified."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        return self.head(self.norm(self.blocks(x)).mean(1))


def test_corrected_rollout_without_a_class_token_shares_out_one() -> None:
    x = image(2, 1, 32, 32)
    plain = exported(seeded(Pooled()), x, "torchscript", 17)
    found = run(compile(plain, AttentionRollout("corrected")).model, x, target=TARGET)
    # Sums of 16 float32 numbers that are rounded to 1e-7 each.
    assert found["attribution"].sum((1, 2, 3)) == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("form", "discard"), [("corrected", 1.0), ("corrected", -0.1), ("paper", 0.9)]
)
def test_rollout_with_impossible_parameters_is_refused(form: str, discard: float) -> None:
    with pytest.raises(ConfigError, match="is needed"):
        AttentionRollout(form, discard)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [ResNet, Swin], ids=["no attention", "windows"])
def test_rollout_is_refused_without_attention_over_the_image(make: type) -> None:
    network, x = seeded(make()), image(2, 1, 32, 32)
    plain = exported(network, x, "torchscript", 17)
    with pytest.raises(ConfigError, match="no attention over the whole image"):
        compile(plain, "gradient-attention-rollout")
