"""Relevance maps: the score taken apart layer by layer until it lies on the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx

from ...errors import ConfigError
from ..backward import pull_back
from ..call import Rules
from ..emit import Tensor
from ..rerun import copied, rerun
from ..rules import ATTNLRP, GRADIENT
from ..rules import relevance as rules
from .question import Answer, Box, Question

Composite = Literal[
    "epsilon", "epsilon-plus", "alpha-beta", "epsilon-plus-flat", "epsilon-gamma-box", "deep-taylor"
]


@dataclass(frozen=True)
class LayerwiseRelevance:
    """Layer-wise relevance propagation under a composite of rules.

    Parameters
    ----------
    composite : str
        ``epsilon`` everywhere; ``epsilon-plus`` (z+ for convolutions, epsilon for dense layers);
        ``alpha-beta`` (2, 1 for convolutions); ``epsilon-plus-flat`` (first layer flat);
        ``epsilon-gamma-box`` (gamma for convolutions, z^B first); ``deep-taylor`` (z+ everywhere,
        first layer z^B within the bounds, w^2 without bounds; for Relu and its kin only).
    epsilon, gamma : float
        Parameters of the rules of those names.
    low, high : float, optional
        Bounds of the image in the model input's unit, for z^B: what the window or the stored bits
        allow, not what this image holds. Without them, those that `compile` is given.

    Notes
    -----
    A BatchNormalization behind a convolution or Gemm is folded into it, for the rules alone: the
    model's nodes stay. Elsewhere (before the activation of a DenseNet's layer) it is an affine
    layer of its own under the epsilon rule.
    """

    composite: Composite = "epsilon-plus-flat"
    epsilon: float = 1e-6
    gamma: float = 0.25
    low: float | None = None
    high: float | None = None

    def __call__(self, q: Question) -> Answer:
        """The map; relevance of all channels of a pixel is summed."""
        graph, image = q.graph, q.image
        # Relevance needs what comes out of every layer, which the prediction's own run fuses away:
        # it is read from a second run, at an equal image that no optimiser knows to be equal.
        again = graph.where(image.equals(image), image, 0)
        nodes = rules.with_norms_folded(graph, rerun(graph, image, again, q.scores.tensor))
        score = copied(graph, again, q.scores.tensor)
        start = score * q.seed
        if self.composite == "deep-taylor":
            start = graph.op("Relu", start)
        table = self.rules(nodes, again, self.bounds(q.box))
        found = pull_back(graph, nodes, {score.name: start}, [again.name], table)
        if again.name not in found:
            raise ConfigError(f"no relevance of {q.scores.tensor.name!r} reaches the image")
        return Answer(q.opened(found[again.name]).sum([1]), {})

    def rules(self, nodes: Sequence[onnx.NodeProto], image: Tensor, box: Box | None) -> Rules:
        """The table of this composite on these nodes, fed with this image."""
        epsilon = rules.linear_rule(GRADIENT, rules.EPSILON, self.epsilon)
        plus = rules.linear_rule(GRADIENT, rules.POSITIVE)
        match self.composite:
            case "epsilon":
                return rules.table(GRADIENT, epsilon, epsilon)
            case "epsilon-plus":
                return rules.table(GRADIENT, plus, epsilon)
            case "alpha-beta":
                return rules.table(GRADIENT, rules.alpha_beta_rule(GRADIENT, 2, 1), epsilon)
            case "epsilon-plus-flat":
                table, terms = rules.table(GRADIENT, plus, epsilon), rules.FLAT
            case "epsilon-gamma-box":
                gamma = rules.gamma_rule(GRADIENT, self.gamma)
                table, terms = rules.table(GRADIENT, gamma, epsilon), within(box)
            case "deep-taylor":
                table, terms = rules.table(GRADIENT, plus, plus, rules.only_kinked), within(box)
        return rules.with_first(table, rules.linear_rule(GRADIENT, terms), nodes, image.name)

    def bounds(self, given: Box | None) -> Box | None:
        """The box, its own or the given one; None where z^B is not taken.

        Raises
        ------
        ConfigError
            It is missing and needed, or empty.
        """
        low, high = given or (None, None)
        if self.low is not None or self.high is not None:
            low, high = self.low, self.high
        can_do_without = self.composite == "deep-taylor" and low is None and high is None
        if can_do_without or self.composite not in ("deep-taylor", "epsilon-gamma-box"):
            return None
        if low is None or high is None or not low < high:
            raise ConfigError(
                f"{self.composite} needs the bounds of the image, low and high, and got {low} and "
                f"{high}; give the range of the model's input (explain-model: --low, --high), or "
                "use lrp, which needs none"
            )
        return low, high


def within(box: Box | None) -> tuple[rules.Term, ...]:
    """z^B, or w^2 where there are no bounds."""
    return rules.SQUARED if box is None else rules.box(*box)


def attn_lrp(q: Question) -> Answer:
    """AttnLRP: the image times the gradient under its rules, summed over channels."""
    arrived: Tensor = q.gradient(q.image, ATTNLRP)
    return Answer(q.opened(q.image * arrived).sum([1]), {})
