"""What a method is asked: one cotangent of the score, and where to look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError
from ..backward import pull_back
from ..call import Rules
from ..emit import Graph, Tensor
from ..layers import Layer
from ..positions import image_layout
from ..rules import GRADIENT
from ..select import Scores

Box = tuple[float, float]
"""Lowest and highest value that an image can hold."""


@dataclass(frozen=True)
class Question:
    """One map to make.

    Attributes
    ----------
    graph : Graph
    scores : Scores
    seed : Tensor
        Cotangent of the score, shaped as it.
    image : Tensor
        ``(batch, channels, *spatial)``, or with the channels last.
    layer : Layer or None
        Where a CAM method looks; None for methods that look at the image.
    box : tuple of float, float or None
        Bounds of the image's values, in their own unit, where they are known.
    """

    graph: Graph
    scores: Scores
    seed: Tensor
    image: Tensor
    layer: Layer | None
    box: Box | None = None

    def gradient(self, at: Tensor, rules: Rules = GRADIENT) -> Tensor:
        """The seeded score's derivative at a tensor, shaped as it.

        Raises
        ------
        UnsupportedOperatorError
            A node between has no right derivative under these rules.
        ConfigError
            No derivative arrives.
        """
        score = self.scores.tensor.name
        found = pull_back(self.graph, self.graph.forward, {score: self.seed}, [at.name], rules)
        if at.name not in found:
            raise ConfigError(
                f"no derivative of {score!r} reaches {at.name!r}: the model rounds or compares in "
                "between; name another layer or output"
            )
        return found[at.name]

    def opened(self, t: Tensor) -> Tensor:
        """Something shaped as the image, as ``(batch, channels, *spatial)``."""
        return image_layout(self.graph, self.image.name).opened(t)

    def features(self) -> Tensor:
        """The layer as ``(batch, channels, *grid)``."""
        assert self.layer is not None
        return self.layer.layout.opened(self.layer.tensor)

    def feature_gradient(self) -> Tensor:
        """The derivative at the layer, ``(batch, channels, *grid)``."""
        assert self.layer is not None
        return self.layer.layout.opened(self.gradient(self.layer.tensor))


@dataclass(frozen=True)
class Answer:
    """A map and how far it can be trusted.

    Attributes
    ----------
    attribution : Tensor
        ``(batch, 1, *spatial)``.
    quality : mapping of str to Tensor
        By output name, each ``(batch, 1)``.
    """

    attribution: Tensor
    quality: Mapping[str, Tensor]


@dataclass(frozen=True)
class Method:
    """A way to make a map.

    Attributes
    ----------
    name : str
        As cards and commands call it.
    looks_at : str
        ``layer`` or ``image``: whose grid the map has; ``both`` has the image's and needs a layer.
    explain : callable
        From a question to the answer.
    equals : tuple of str
        Methods with the same map, up to a positive factor, where the score sees the layer's mean
        alone; CAM among them where it is an affine map of that mean.
    equals_when_homogeneous : tuple of str
        The same, where every activation between image and score is linear on either side of 0.
    needs_pooled_linear : bool
        Whether the method is defined for such models only.
    sums_over_channels : bool
        Whether the map is, or takes its sign from, the sum over channels of activation times
        gradient.
    warnings : tuple of str
        What a reader of the map has to know.
    warnings_when_signed : tuple of str
        The same, where the layer holds negative numbers.
    takes_box : bool
        Whether the map depends on the bounds of the image's values, where they are given.
    """

    name: str
    looks_at: Literal["layer", "image", "both"]
    explain: Callable[[Question], Answer]
    equals: tuple[str, ...] = ()
    equals_when_homogeneous: tuple[str, ...] = ()
    needs_pooled_linear: bool = False
    sums_over_channels: bool = False
    warnings: tuple[str, ...] = ()
    warnings_when_signed: tuple[str, ...] = ()
    takes_box: bool = False
