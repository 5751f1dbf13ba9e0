"""Which score is explained: said at run time, by a cotangent, or found inside the graph.

Every selection ends as cotangents of the explained score, one per map. Classification scores are
``(batch, classes)``; those of a segmentation ``(batch, classes, *spatial)``, where a class is
explained by the sum of its score over the region that the model gives it (Seg-Grad-CAM,
Vinogradova et al. 2020, eq. 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from ..errors import ConfigError
from .emit import Graph, Tensor

Offsets = npt.NDArray[np.float64] | None
"""What is taken off each class's score before classes are compared, ``(classes,)``."""


@dataclass(frozen=True)
class Scores:
    """The explained output before its final activation.

    Attributes
    ----------
    tensor : Tensor
        ``(batch, classes)``, ``(batch,)`` or ``(batch, classes, *spatial)``.
    is_exclusive : bool
        Whether classes compete (softmax), so that a position belongs to its largest score; else a
        position belongs to every class whose score is above 0.
    is_class_second : bool
        Whether classes lie on axis 1; else only a seed can say what is explained.
    """

    tensor: Tensor
    is_exclusive: bool
    is_class_second: bool = True

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return 1 if self.tensor.rank == 1 else self.tensor.size(1)

    def check_classes(self) -> None:
        """Refuse to look for classes where they are not.

        Raises
        ------
        ConfigError
        """
        if not self.is_class_second:
            raise ConfigError(
                f"the classes of {self.tensor.name!r} are not on axis 1; export the model with "
                "channels first, or say with BySeed what is explained"
            )

    @property
    def has_positions(self) -> bool:
        """Whether scores are per position: a segmentation."""
        return any(size != 1 for size in self.tensor.shape[2:])


@dataclass(frozen=True)
class Chosen:
    """Cotangents of the score, and what they stand for.

    Attributes
    ----------
    seeds : tuple of Tensor
        One per map, shaped as the score.
    classes : Tensor or None
        ``(batch, maps)`` int64, where the graph itself chose.
    inputs : tuple of Tensor
        Graph inputs that the selection added.
    """

    seeds: tuple[Tensor, ...]
    classes: Tensor | None = None
    inputs: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ByTarget:
    """The class is named at run time: input `target`, int64 ``(batch,)``, -1 for the top class.

    Any other value outside the classes makes the run fail where the runtime checks indices, as on
    the CPU, and gives a map of zeros where it does not, as on CUDA.
    """

    def choose(self, graph: Graph, scores: Scores) -> Chosen:
        """Write one-hot cotangents of the named classes."""
        scores.check_classes()
        shapes = [None if shape is None else shape[:1] for shape in concrete(graph, scores)]
        target = new_input(graph, "target", TensorProto.INT64, shapes)
        top = ranked(graph, scores, 1, None).reshape(-1)
        last = graph.scalar(scores.classes, TensorProto.INT64)
        named = graph.where(target.equals(-1), top, graph.where(target < -1, last, target))
        found = graph.op("Gather", graph.constant(np.arange(scores.classes)), named)
        index = graph.where(found.equals(named), named, last)
        return Chosen((one_class(graph, scores, index, None),), inputs=(target,))


@dataclass(frozen=True)
class BySeed:
    """The cotangent itself is an input: `seed`, shaped as the explained score.

    The general form: several classes, regions, contrasts (+1 for one class, -1 for another).

    Parameters
    ----------
    maps : int
        With more than one, `seed` is ``(batch, maps, classes, ...)`` and each gets its own map in
        the same run.
    """

    maps: int = 1

    def choose(self, graph: Graph, scores: Scores) -> Chosen:
        """Take the cotangent from outside."""
        shapes = concrete(graph, scores)
        if self.maps > 1:
            shapes = [shape and (shape[0], self.maps, *shape[1:]) for shape in shapes]
        seed = new_input(graph, "seed", scores.tensor.dtype, shapes)
        if self.maps == 1:
            return Chosen((seed,), inputs=(seed,))
        each = [seed.slice(1, index, index + 1) for index in range(self.maps)]
        return Chosen(tuple(one.reshape_like(scores.tensor) for one in each), inputs=(seed,))


@dataclass(frozen=True)
class TopClasses:
    """The k best classes of each image, ranked inside the graph; no input is added.

    Parameters
    ----------
    k : int
        At most so many maps; a model with fewer classes gives that many.
    offsets : sequence of float, optional
        Logit of each class's threshold: classes are ranked by ``score - offset``, so that findings
        with different operating points compare. None ranks by score.
    is_exclusive : bool, optional
        Whether classes compete; None when the graph itself says so by ending in softmax or not.
    """

    k: int
    offsets: Sequence[float] | None = None
    is_exclusive: bool | None = None

    def choose(self, graph: Graph, scores: Scores) -> Chosen:
        """Write the ranking and one cotangent per rank."""
        scores.check_classes()
        if self.is_exclusive is not None:
            scores = replace(scores, is_exclusive=self.is_exclusive)
        if self.k < 1:
            raise ConfigError(f"TopClasses.k is {self.k}; 1 or more is needed")
        if self.offsets is not None and len(self.offsets) != scores.classes:
            raise ConfigError(
                f"TopClasses.offsets has {len(self.offsets)} values; "
                f"the model has {scores.classes} classes"
            )
        offsets = None if self.offsets is None else np.array(self.offsets, np.float64)
        count = min(self.k, scores.classes)
        best = ranked(graph, scores, count, offsets)
        columns = [best.slice(1, rank, rank + 1).reshape(-1) for rank in range(count)]
        seeds = tuple(one_class(graph, scores, column, offsets) for column in columns)
        return Chosen(seeds, classes=best)


Selection = ByTarget | BySeed | TopClasses


def concrete(graph: Graph, scores: Scores) -> list[tuple[int, ...] | None]:
    """The score's shape in each of the worlds that are looked at; None where it is not known."""
    return [
        None if shape is None else tuple(size or 0 for size in shape)
        for shape in graph.facts.shapes(scores.tensor.name)
    ]


def new_input(
    graph: Graph, name: str, dtype: int, shapes: Sequence[tuple[int, ...] | None]
) -> Tensor:
    """A graph input under a name that must be free."""
    if graph.facts.has(name):
        raise ConfigError(f"the model has a tensor {name!r} of its own; rename it in the model")
    graph.facts.add_input(name, dtype, shapes)
    return graph.tensor(name)


def margins(graph: Graph, scores: Scores, offsets: Offsets) -> Tensor:
    """Scores above their thresholds, ``(batch, classes, *spatial)``."""
    tensor = scores.tensor if scores.tensor.rank > 1 else scores.tensor.unsqueeze(1)
    if offsets is None:
        return tensor
    dtype = helper.tensor_dtype_to_np_dtype(tensor.dtype)
    shape = (1, -1, *[1] * (tensor.rank - 2))
    return tensor - graph.constant(offsets.reshape(shape).astype(dtype))


def region(graph: Graph, scores: Scores, offsets: Offsets) -> Tensor:
    """1 where a position belongs to a class, else 0; ``(batch, classes, *spatial)``."""
    margin = margins(graph, scores, offsets)
    if not scores.is_exclusive or scores.classes == 1:
        return (margin > 0).cast(scores.tensor.dtype)
    best = graph.op("ArgMax", margin, axis=1, keepdims=1)
    numbers = np.arange(scores.classes).reshape(1, -1, *[1] * (margin.rank - 2))
    return best.equals(graph.constant(numbers)).cast(scores.tensor.dtype)


def ranked(
    graph: Graph,
    scores: Scores,
    count: int,
    offsets: Offsets,
) -> Tensor:
    """The best classes of each image, ``(batch, count)`` int64.

    By score; in a segmentation by the size of the region, exclusive background (class 0) last.
    """
    if scores.has_positions:
        found = region(graph, scores, offsets)
        rank = found.mean(range(2, found.rank), keep=False)
        if scores.is_exclusive and scores.classes > 1:
            last = np.zeros((1, scores.classes), helper.tensor_dtype_to_np_dtype(rank.dtype))
            last[0, 0] = 2
            rank = rank - graph.constant(last)
    else:
        rank = margins(graph, scores, offsets).reshape(-1, scores.classes)
    if count == 1:
        return graph.op("ArgMax", rank, axis=1, keepdims=1)
    return graph.ops("TopK", rank, graph.ints([count]), outputs=2, axis=1)[1]


def one_class(
    graph: Graph,
    scores: Scores,
    index: Tensor,
    offsets: Offsets,
) -> Tensor:
    """The cotangent that picks class `index` ``(batch,)`` of each image; 0 where there is none."""
    numbers = graph.constant(np.arange(scores.classes))
    picked = index.unsqueeze(1).equals(numbers).cast(scores.tensor.dtype)
    if scores.has_positions:
        return picked.reshape(0, scores.classes, *[1] * (scores.tensor.rank - 2)) * region(
            graph, scores, offsets
        )
    return picked.reshape_like(scores.tensor)
