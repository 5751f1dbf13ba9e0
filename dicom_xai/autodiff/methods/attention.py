"""Where a transformer's attention, weighed by the class, comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import helper

from ...errors import ConfigError
from ..backward import pull_back, spelled_out
from ..emit import Tensor
from ..layers import FUSED_ATTENTION, path
from ..positions import Layout, layouts
from ..prepare import node_label
from ..rules import GRADIENT
from ..rules.layout import repeat
from .question import Answer, Question
from .windows import Windows, windows_of


@dataclass(frozen=True)
class AttentionRollout:
    """Attention times its gradient, followed through all layers down to the patches.

    The row of the class token is read; without one, the mean of all rows. It is carried from the
    last layer to the first, which gives the same as the product of the layers' matrices.

    Attention within windows (Liu et al. 2021, "Swin Transformer", section 3.2): a layer's Abar is 0
    between windows, and within them that of the window, wherever a shift put it.

    Parameters
    ----------
    form : str
        ``chefer``: R <- R + Abar R, Abar the mean over heads of (A dA)^+, R starting as identity,
        which is left out of what is read; Chefer et al. 2021, "Generic Attention-model
        Explainability", equations 5 and 6.

        ``corrected``: R <- N(K + I) R, N dividing each row by its sum, K the mean over heads of
        A dA, clamped at 0, without its lowest entries. Attention rollout (Abnar and Zuidema 2020,
        section 3) with Gildenblat's gradient weights (vit-explain, 2020), whose published code
        divides the columns by the sums of the rows.
    discard : float
        ``corrected`` only: which part of a layer's entries, the lowest, is left out per image.
        Entries equal to the lowest kept one stay.
    stages : str
        Of attention within windows. ``last``: the layers of the last stage, on whose grid the map
        is; that others are left out is said in the report. ``all``: on to the first stage's grid,
        a merged place sharing out equally among those it was merged from.

    Raises
    ------
    ConfigError
        No such form or stages, or a discarded part outside [0, 1).
    """

    form: Literal["chefer", "corrected"] = "chefer"
    discard: float = 0.9
    stages: Literal["last", "all"] = "last"

    def __post_init__(self) -> None:
        if self.stages not in ("last", "all"):
            raise ConfigError(f"stages is {self.stages!r}; 'last' or 'all' is needed")
        if self.form not in ("chefer", "corrected"):
            raise ConfigError(f"form is {self.form!r}; 'chefer' or 'corrected' is needed")
        if not 0 <= self.discard < 1:
            raise ConfigError(f"discard is {self.discard}; a part in [0, 1) is needed")

    def __call__(self, q: Question) -> Answer:
        """The map, on the grid of patches, or of a stage of windows."""
        found = attentions(q, self.stages)
        last = found[-1].place
        if isinstance(last, Windows):
            if self.form == "corrected":
                raise ConfigError(
                    "the corrected rollout ranks a layer's entries over the whole image, of which "
                    "attention within windows has few; use the form 'chefer'"
                )
            return Answer(within_windows(found), {})
        assert last.grid is not None
        weighed = [item.weighed for item in found]
        row = (chefer if self.form == "chefer" else self.corrected)(weighed, last)
        return Answer(row.slice(2, last.prefix).reshape(0, 1, *last.grid), {})

    def corrected(self, weighed: Sequence[Tensor], layout: Layout) -> Tensor:
        """The row of the product of the layers' stochastic matrices, ``(batch, 1, tokens)``."""
        graph, tokens = weighed[0].graph, weighed[0].size(-1)
        dtype = helper.tensor_dtype_to_np_dtype(weighed[0].dtype)
        first = np.eye(1, tokens) if layout.prefix else np.full((1, tokens), 1 / tokens)
        row = graph.constant(first[None].astype(dtype))
        for item in reversed(weighed):
            k = self.strongest(graph.op("Relu", item.mean([1], keep=False)))
            # The half of (K + I) / 2 cancels when the rows are normalised.
            row = row / (k.sum([2], keep=False).unsqueeze(1) + 1)
            row = row + row @ k
        return row

    def strongest(self, k: Tensor) -> Tensor:
        """A layer's ``(batch, tokens, tokens)`` with the discarded entries at 0."""
        count = k.size(-1) ** 2
        kept = count - int(count * self.discard)
        highest, _ = k.graph.ops(
            "TopK", k.reshape(0, count), k.graph.ints([kept]), outputs=2, axis=1
        )
        lowest = highest.slice(1, kept - 1).unsqueeze(2)
        return k.graph.where(k < lowest, 0, k)


def chefer(weighed: Sequence[Tensor], layout: Layout) -> Tensor:
    """The row of R without the identity that it starts as, ``(batch, 1, tokens)``."""
    row: Tensor | None = None
    for item in reversed(weighed):
        a = item.graph.op("Relu", item).mean([1], keep=False)
        read = a.slice(1, 0, 1) if layout.prefix else a.mean([1])
        # r (I + A) with r = e + s, e what is read of the identity: s <- s + e A + s A.
        row = read if row is None else row + read + row @ a
    assert row is not None
    return row


def within_windows(found: Sequence[Attention]) -> Tensor:
    """The mean row of R without the identity, over the first layer's grid, ``(batch, 1, *grid)``.

    Raises
    ------
    ConfigError
        A stage's grid is not a whole number of times as fine as the next one's.
    """
    row: Tensor | None = None
    for item in reversed(found):
        place = item.place
        assert isinstance(place, Windows)
        a = item.weighed.graph.op("Relu", item.weighed).mean([1], keep=False)
        if row is not None:
            row = spread(row, place.grid)
        count = math.prod(place.grid)
        dtype = helper.tensor_dtype_to_np_dtype(a.dtype)
        read = a.graph.constant(np.full((1, 1, *place.grid), 1 / count, dtype))
        arriving = place.joined(place.cut(read if row is None else row + read) @ a)
        row = arriving if row is None else row + arriving
    assert row is not None
    return row


def spread(row: Tensor, grid: Sequence[int]) -> Tensor:
    """What merged places hold, in equal parts on the finer grid that they were merged from."""
    sizes = [row.size(axis + 2) for axis in range(len(grid))]
    times = [fine // coarse for fine, coarse in zip(grid, sizes, strict=True)]
    if [coarse * time for coarse, time in zip(sizes, times, strict=True)] != list(grid):
        raise ConfigError(
            f"a stage of {list(grid)} places is merged to {sizes}, which does not go into it; "
            "use stages='last'"
        )
    return row if max(times) == 1 else repeat(row, times) / math.prod(times)


@dataclass(frozen=True)
class Attention:
    """One layer's attention.

    Attributes
    ----------
    weighed : Tensor
        Probabilities times their gradient, ``(batch, heads, tokens, tokens)``; of windows, with
        each image's windows along the first axis.
    place : Layout or Windows
        Where the tokens lie.
    """

    weighed: Tensor
    place: Layout | Windows


ONE_STAGE = (
    "the rollout follows attention within the windows of the last stage alone; "
    "AttentionRollout(stages='all') follows those before too"
)


def attentions(q: Question, stages: str) -> list[Attention]:
    """Attention over all tokens, else within the windows of the stages; first layer first.

    Raises
    ------
    ConfigError
        There is none, or its windows cannot be followed to the image.
    """
    flat = [item for item in layouts(q.graph, q.image.name).values() if item.grid is not None]
    nodes = path(q.graph, q.image.name, q.scores.tensor.name)
    shown = [(node, a) for node in nodes if (a := probabilities(q, node)) is not None]
    for layout in flat[-1:]:
        tokens = (layout.count(()) or 0) + layout.prefix
        over_all = [(node, a) for node, a in shown if a.shape[-2:] == (tokens, tokens)]
        if over_all:
            return [Attention(a * gradient(q, node, a), layout) for node, a in over_all]
    placed = [(node, a, windows_of(q.graph, q.image.name, a)) for node, a in shown]
    last = placed[-1][2] if placed else None
    if last is None:
        raise ConfigError(
            "the model shows no attention over the whole image, nor within windows of it that can "
            "be followed: a rollout needs a transformer; use grad-cam"
        )
    lost = [node for node, _, windows in placed if windows is None]
    if lost and stages == "all":
        raise ConfigError(
            f"the windows of the attention at node {node_label(lost[0])!r} cannot be followed to "
            "the image; use stages='last'"
        )
    chosen = [
        (node, a, windows)
        for node, a, windows in placed
        if windows is not None and (stages == "all" or windows.grid == last.grid)
    ]
    if len(chosen) < len(placed):
        q.graph.notes.append(ONE_STAGE)
    return [Attention(a * gradient(q, node, a), windows) for node, a, windows in chosen]


def probabilities(q: Question, node: onnx.NodeProto) -> Tensor | None:
    """What a node attends with, if it does; a fused Attention is worked out once more."""
    if node.op_type == "Softmax":
        name = node.output[0]
    elif node.op_type in FUSED_ATTENTION:
        # Softmax alone would not do: rows that are masked whole are set to 0 behind it.
        products = [item for item in spelled_out(q.graph, node)[1] if item.op_type == "MatMul"]
        if not products:
            return None
        name = products[-1].input[0]
    else:
        return None
    return q.graph.tensor(name) if len(q.graph.facts.shape(name) or ()) == 4 else None


def gradient(q: Question, node: onnx.NodeProto, a: Tensor) -> Tensor:
    """The derivative at a node's attention probabilities."""
    if node.op_type == "Softmax":
        return q.gradient(a)
    mark, body = spelled_out(q.graph, node)
    arriving = {mark + node.output[0]: q.gradient(q.graph.tensor(node.output[0]))}
    return pull_back(q.graph, body, arriving, [a.name], GRADIENT)[a.name]
