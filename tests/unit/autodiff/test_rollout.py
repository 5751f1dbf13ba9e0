"""Attention rollout against its definition, and where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

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
    with pytest.raises(ConfigError, match="is needed"):
        AttentionRollout(stages="first")  # type: ignore[arg-type]


class LastStage(Swin):
    """Two blocks of four windows each, the second one's shifted: the first stage is the last."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.LayerNorm(12)
        self.scores = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.patches(x).permute(0, 2, 3, 1))
        return self.scores(self.last(x).mean((1, 2)))


class FlatStage(LastStage):
    """The same with tokens on one axis between the layers, as the published code has them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.first:
            y = block.norm1(x).reshape(-1, 8, 8, 12).roll((-block.shift, -block.shift), (1, 2))
            bias = block.table[block.index.reshape(-1)].reshape(16, 16, 2).permute(2, 0, 1)
            bias = (bias[None] + block.mask[:, None]).repeat(x.shape[0], 1, 1, 1)
            y = block.attention(block.windows(y), bias).reshape(-1, 2, 2, 4, 4, 12)
            y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 12)
            x = x + y.roll((block.shift, block.shift), (1, 2)).reshape(-1, 64, 12)
            x = x + block.mlp(block.norm2(x))
        return self.scores(self.last(x).mean(1))


ROLLOUT = "gradient-attention-rollout"


def abars(
    attention: list[tuple[torch.Tensor, torch.Tensor]], shifts: list[int], size: int
) -> list[torch.Tensor]:
    """One matrix over all of the grid's positions per layer."""
    made = []
    for (a, g), shift in zip(attention, shifts, strict=True):
        per_window = (a * g).relu().mean(1).reshape(2, -1, 16, 16)
        abar = torch.zeros(2, size * size, size * size)
        for window in range(per_window.shape[1]):
            top, left = (4 * i for i in divmod(window, size // 4))
            held = [
                (top + i + shift) % size * size + (left + j + shift) % size
                for i in range(4)
                for j in range(4)
            ]
            for image_index in range(2):
                abar[image_index][torch.tensor(held)[:, None], torch.tensor(held)] = per_window[
                    image_index, window
                ]
        made.append(abar)
    return made


def by_windows(
    attention: list[tuple[torch.Tensor, torch.Tensor]], shifts: list[int], size: int
) -> torch.Tensor:
    """Mean relevance of the grid's positions."""
    r = torch.eye(size * size).repeat(2, 1, 1)
    for abar in abars(attention, shifts, size):
        r = r + abar @ r
    return (r - torch.eye(size * size)).mean(1).reshape(2, 1, size, size)


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 17), ("dynamo", 20)])
@pytest.mark.parametrize(
    ("make", "layers", "shifts", "size"),
    [
        (Swin, slice(2, 3), [0], 4),
        (LastStage, slice(2), [0, 2], 8),
        (FlatStage, slice(2), [0, 2], 8),
    ],
    ids=["one window", "shifted windows", "shifted windows of flat tokens"],
)
def test_windows_of_the_last_stage_are_put_back_where_they_lie_on_the_image(
    exporter: str,
    opset: int,
    make: type[Swin],
    layers: slice,
    shifts: list[int],
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, x = seeded(make()), image(2, 1, 32, 32)
    plain = exported(network, x, exporter, opset)
    found = run(compile(plain, "gradient-attention-rollout").model, x, target=TARGET)
    attention = attended(network, x, monkeypatch)[layers]
    assert_close(found["attribution"], by_windows(attention, shifts, size))
    assert (found["scores"] == run(plain, x)["scores"]).all()


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 17), ("dynamo", 20)])
def test_all_stages_are_followed_down_to_the_first_ones_grid(
    exporter: str, opset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = seeded(Swin()), image(2, 1, 32, 32)
    plain = exported(network, x, exporter, opset)
    compiled = compile(plain, AttentionRollout(stages="all"))
    attention = attended(network, x, monkeypatch)
    fine, coarse = abars(attention[:2], [0, 2], 8), abars(attention[2:], [0], 4)
    row = torch.full((2, 1, 16), 1 / 16) @ coarse[0]
    row = row.reshape(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    row = row.reshape(2, 1, 64)
    for abar in reversed(fine):
        row = row + (torch.full((2, 1, 64), 1 / 64) + row) @ abar
    found = run(compiled.model, x, target=TARGET)
    assert_close(found["attribution"], row.reshape(2, 1, 8, 8))
    assert not compiled.report.warnings
    assert (found["scores"] == run(plain, x)["scores"]).all()


def test_stages_that_are_left_out_are_named_in_the_report() -> None:
    several, one = (
        compile(exported(seeded(make()), image(2, 1, 32, 32), "torchscript", 17), ROLLOUT)
        for make in (Swin, LastStage)
    )
    assert "stages='all'" in several.report.warnings[0]
    assert not one.report.warnings


class PaddedStage(LastStage):
    """A grid of 6 x 6, filled up to whole windows before the attention and cut off after it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, block = self.patches(x).permute(0, 2, 3, 1), self.first[0]
        y = block.windows(functional.pad(block.norm1(x), (0, 0, 0, 2, 0, 2)))
        y = block.attention(y).reshape(-1, 2, 2, 4, 4, 12).permute(0, 1, 3, 2, 4, 5)
        x = x + y.reshape(-1, 8, 8, 12)[:, :6, :6]
        return self.scores(self.last(x + block.mlp(block.norm2(x))).mean((1, 2)))


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 17), ("dynamo", 20)])
def test_what_fills_up_windows_is_no_place_of_the_image(
    exporter: str, opset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = seeded(PaddedStage()), image(2, 1, 24, 24)
    plain = exported(network, x, exporter, opset)
    found = run(compile(plain, "gradient-attention-rollout").model, x, target=TARGET)
    ((a, g),) = attended(network, x, monkeypatch)
    abar = (a * g).relu().mean(1).reshape(2, 2, 2, 4, 4, 4, 4)
    # Rows of the attention outside the 6 x 6 places have no gradient, columns outside are cut off.
    received = abar.sum((3, 4)).permute(0, 1, 3, 2, 4).reshape(2, 1, 8, 8)[..., :6, :6] / 36
    assert_close(found["attribution"], received)


def test_corrected_rollout_is_refused_within_windows() -> None:
    plain = exported(seeded(Swin()), image(2, 1, 32, 32), "torchscript", 17)
    with pytest.raises(ConfigError, match="use the form 'chefer'"):
        compile(plain, AttentionRollout("corrected"))


def test_rollout_is_refused_without_attention() -> None:
    plain = exported(seeded(ResNet()), image(2, 1, 32, 32), "torchscript", 17)
    with pytest.raises(ConfigError, match="no attention over the whole image"):
        compile(plain, "gradient-attention-rollout")
