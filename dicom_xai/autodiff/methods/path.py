"""Gradients at many images around the image, averaged.

All points go through the model as one larger batch within the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from onnx import helper

from ...errors import ConfigError
from ..emit import Tensor
from ..prepare import Array
from ..rerun import gradients_at
from .gradient import strongest
from .question import Answer, Question

COMPLETENESS_RESIDUAL = "completeness_residual"
Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class IntegratedGradients:
    """(x - b) times the mean gradient between b and x; Sundararajan et al. 2017, equation 1.

    Parameters
    ----------
    steps : int
        Points between; the cost is about twice as many forward runs.
    baseline : float
        What stands for "nothing there", in the model input's unit: air, not the mean.
    quadrature : str
        ``midpoint`` or ``gauss-legendre``.
    """

    steps: int = 16
    baseline: float = 0.0
    quadrature: Literal["midpoint", "gauss-legendre"] = "midpoint"

    def __call__(self, q: Question) -> Answer:
        """The map, and how far its sum is from the score's difference, relative to that."""
        at, weights = nodes_of(self.quadrature, self.steps)
        x, rank = q.image, q.image.rank + 1
        # The first point is the baseline itself: its score is needed, its gradient has weight 0.
        along = placed(q, np.array([0.0, *at]), rank)
        points = (x - self.baseline).unsqueeze(1) * along + self.baseline
        g, scores = gradients_at(q.graph, x, points, q.scores.tensor, q.seed)
        mean = (g * placed(q, np.array([0.0, *weights]), rank)).sum([1], keep=False)
        attribution = (x - self.baseline) * mean
        here = q.scores.tensor * q.seed
        rise = here.sum(range(1, here.rank), keep=False).reshape(-1, 1) - scores.slice(1, 0, 1)
        total = attribution.sum(range(1, attribution.rank), keep=False).reshape(-1, 1)
        gap = q.graph.op("Abs", total - rise)
        size = q.graph.op("Abs", rise)
        residual = gap / q.graph.where(size.equals(0), 1, size)
        return Answer(q.opened(attribution).sum([1]), {COMPLETENESS_RESIDUAL: residual})


@dataclass(frozen=True)
class SmoothGrad:
    """Saliency of the mean gradient at noisy copies; Smilkov et al. 2017, section 3.1.

    Parameters
    ----------
    samples : int
    noise : float
        Standard deviation as a share of the image's range.
    seed : int
        The noise is drawn when the model is compiled, so that every run gives the same map.
    """

    samples: int = 8
    noise: float = 0.15
    seed: int = 0

    def __call__(self, q: Question) -> Answer:
        """The map."""
        x = q.image
        axes = list(range(1, x.rank))
        low = -(-x).max(axes)
        sizes = [1, self.samples, *(x.size(axis) for axis in axes)]
        draws = np.random.default_rng(self.seed).standard_normal(sizes, np.float32)
        spread = (x.max(axes) - low).unsqueeze(1) * self.noise
        points = x.unsqueeze(1) + spread * constant(q, draws)
        g, _ = gradients_at(q.graph, x, points, q.scores.tensor, q.seed)
        return Answer(strongest(q.opened(g.mean([1], keep=False))), {})


@dataclass(frozen=True, eq=False)
class ExpectedGradients:
    """Integrated gradients averaged over backgrounds; Erion et al. 2021, equation 3.

    Parameters
    ----------
    backgrounds : numpy.ndarray
        Typical images, float32 in the model input's unit: one or more, each shaped as one image of
        that input, ``(samples, channels, *spatial)``.
    seed : int
        Places on the way from each background are drawn when the model is compiled, one per
        background, stratified over the way.
    """

    backgrounds: Images
    seed: int = 0

    def __call__(self, q: Question) -> Answer:
        """The map.

        Raises
        ------
        ConfigError
            The backgrounds are no images of this model.
        """
        found, wanted = self.backgrounds.shape, q.image.shape[1:]
        fits = len(found) == q.image.rank and found[0] > 0
        if not fits or any(
            n not in (size, None) for size, n in zip(found[1:], wanted, strict=True)
        ):
            each = ", ".join("any" if size is None else str(size) for size in wanted)
            raise ConfigError(
                f"expected-gradients: found backgrounds shaped {found}, wanted (samples, {each}) "
                "with one sample or more; give typical images as the model takes them"
            )
        count, rank = len(self.backgrounds), q.image.rank + 1
        rng = np.random.default_rng(self.seed)
        at = (rng.permutation(count) + rng.random(count)) / count
        away = q.image.unsqueeze(1) - constant(q, self.backgrounds[None])
        points = away * placed(q, at, rank) + constant(q, self.backgrounds[None])
        g, _ = gradients_at(q.graph, q.image, points, q.scores.tensor, q.seed)
        return Answer(q.opened((away * g).mean([1], keep=False)).sum([1]), {})


def nodes_of(quadrature: str, steps: int) -> tuple[npt.NDArray[np.float64], ...]:
    """Places and weights on [0, 1]."""
    if quadrature == "midpoint":
        return (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)
    places, weights = np.polynomial.legendre.leggauss(steps)
    return (places + 1) / 2, weights / 2


def placed(q: Question, values: npt.NDArray[np.float64], rank: int) -> Tensor:
    """One number per point, ready to multiply ``(batch, points, channels, *spatial)``."""
    return constant(q, values.reshape(1, -1, *[1] * (rank - 2)))


def constant(q: Question, values: Array) -> Tensor:
    """An array in the image's element type."""
    return q.graph.constant(values.astype(helper.tensor_dtype_to_np_dtype(q.image.dtype)))
