"""A loaded model that predicts and explains in one run, and that proved it when it was loaded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import torch

from dicom_xai.config import InputKind, ModelCard
from dicom_xai.errors import ModelInputError, StudyError, UnsupportedOperatorError
from dicom_xai.explain.cache import CompiledCache
from dicom_xai.explain.costs import Costs, measure
from dicom_xai.explain.gradient import MAP_OUTPUTS, CompiledExplainer, ExplainedGraph
from dicom_xai.explain.selftest import (
    SelfTest,
    applicability,
    compare,
    gradient_error,
    noise,
)
from dicom_xai.infer.model import Model
from dicom_xai.infer.session import Device, Session
from dicom_xai.study import Inputs, Prediction


class ServedModel:
    """A model with its explainers, warm and self-tested.

    Parameters
    ----------
    card : ModelCard
    device : Device
    explainers : sequence of CompiledExplainer
        Which explanations to compile.
    targets : int
        At most so many classes of an image get a map.
    threads : int
        See `Session`.
    cache : CompiledCache, optional
        Where compiled graphs are kept between starts.
    clock : callable
        Seconds, monotonic; measures the costs.

    Raises
    ------
    ConfigError
        The card, the graph, the device, or the self-test; the message says which and what to do.
    """

    def __init__(
        self,
        card: ModelCard,
        device: Device,
        explainers: Sequence[CompiledExplainer],
        targets: int,
        threads: int = 0,
        cache: CompiledCache | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.card = card
        self.device = device
        self._plain = Model(card, device, threads)
        self._cache = cache
        self._graphs: dict[str, ExplainedGraph] = {}
        self._sessions: dict[str, Session] = {}
        self.self_tests: dict[str, SelfTest] = {}
        for explainer in explainers:
            graph = _compiled(self._plain, explainer, min(targets, len(card.classes)), cache)
            session = Session(graph.data, device, threads)
            self.self_tests[explainer.name] = compare(self._plain, session, graph)
            self._graphs[explainer.name] = graph
            self._sessions[explainer.name] = session
        #: See `selftest.gradient_error`; None where the whole model cannot be differentiated.
        self.gradient_error: float | None = None
        #: Why it cannot; a CAM needs the head's derivative alone, and that one was compiled.
        self.no_gradient = ""
        try:
            self.gradient_error = gradient_error(self._plain, threads)
        except UnsupportedOperatorError as error:
            self.no_gradient = str(error)
        self.costs = self._measure(clock)

    def graph(self, explainer: str) -> ExplainedGraph:
        """What was compiled for an explainer."""
        return self._graphs[explainer]

    @property
    def provider(self) -> str:
        """The execution provider that took most of the plain graph."""
        counts = self._plain.session.nodes_by_provider()
        return max(counts, key=lambda name: counts[name])

    def predict(self, inputs: Inputs, explainer: str) -> Prediction:
        """`batches` of one unit, without a pause."""
        run = self.batches([inputs], explainer)
        while True:
            try:
                next(run)
            except StopIteration as end:
                predictions: list[Prediction] = end.value
                return predictions[0]

    def batches(
        self, units: Sequence[Inputs], explainer: str
    ) -> Generator[int, None, list[Prediction]]:
        """Scores of all images and, with an explainer, their raw maps from the same run.

        Gives way after each run on the device, so that something more urgent can use it. Images of
        several units share runs.

        A classifier's unit scores its best image. A segmentation's class scores the highest value
        that the card's `minimum_region` reaches: the n-th largest of all cells for a region of n
        cells, over the whole stack or volume, or in the best image of an image2d model.

        Parameters
        ----------
        units : sequence of Inputs
            On the model's device.
        explainer : str
            One of those given at load, or empty for scores alone.

        Yields
        ------
        int
            How many images are done.

        Returns
        -------
        list of Prediction
            One for each unit.

        Raises
        ------
        StudyError
            Scores or maps of some unit are not finite.
        ModelInputError
            The card's minimum region is in ml, and a unit has no spacings.
        DeviceBusyError
            The device has no memory now.
        """
        session = self._sessions[explainer] if explainer else self._plain.session
        gathered = [_Gathered(self._plain, inputs) for inputs in units]
        wanted = [self._plain.output_name, *(MAP_OUTPUTS if explainer else ())]
        done = 0
        for parts in _runs(units, self.costs.batch_size(explainer)):
            images = [units[unit].images[start:stop] for unit, start, stop in parts]
            together = images[0] if len(images) == 1 else torch.cat(images)
            outputs = session.run({self._plain.input_name: together}, wanted)
            at = 0
            for unit, start, stop in parts:
                mine = slice(at, at + stop - start)
                gathered[unit].add(start, {name: made[mine] for name, made in outputs.items()})
                at = mine.stop
            done += at
            yield done
        return [each.prediction() for each in gathered]

    def inapplicable_methods(self) -> dict[str, str]:
        """The known methods that do not apply to this model, and why."""

        def tried() -> dict[str, str]:
            return {name: why for name, why in applicability(self._plain).items() if why}

        return tried() if self._cache is None else self._cache.reasons(self._plain, tried)

    def _measure(self, clock: Callable[[], float]) -> Costs:
        """Run every session on several sizes of batch."""

        def runs_of(session: Session) -> dict[int, float]:
            def run(images: int) -> None:
                session.run({self._plain.input_name: noise(self.card, images, self.device)})

            return measure(run, self._plain.largest_batch, clock)

        sessions = {"": self._plain.session, **self._sessions}
        return Costs({name: runs_of(session) for name, session in sessions.items()})


def _runs(units: Sequence[Inputs], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Runs of at most `size` images: (unit, first image, behind its last) of each part."""
    parts: list[tuple[int, int, int]] = []
    room = size
    for unit, inputs in enumerate(units):
        start, total = 0, inputs.images.shape[0]
        while start < total:
            stop = min(start + room, total)
            parts.append((unit, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield parts
                parts, room = [], size
    if parts:
        yield parts


class _Gathered:
    """What the batches of one unit gave, made into one Prediction."""

    def __init__(self, model: Model, inputs: Inputs) -> None:
        self._model = model
        self._inputs = inputs
        self._scores: list[torch.Tensor] = []
        self._maps: list[torch.Tensor] = []
        self._classes: list[torch.Tensor] = []
        self._probabilities: list[torch.Tensor] = []
        #: Of each class the largest values so far, the largest first.
        self._best = [torch.empty(0) for _ in model.card.classes]
        self._cells = _minimum_cells(model.card, inputs) if model.is_segmentation else 0

    def add(self, start: int, outputs: Mapping[str, torch.Tensor]) -> None:
        raw, maps = outputs[self._model.output_name], outputs.get("attribution")
        if not bool(torch.isfinite(raw).all()) or (
            maps is not None and not bool(torch.isfinite(maps).all())
        ):
            raise StudyError(f"model {self._model.card.name} gave values that are not finite")
        scores = self._model.scores(raw)
        if self._model.is_segmentation:
            scores = scores * self._inputs.inside[start : start + len(scores), None]
            self._probabilities.append(scores)
            scores = self._scored(scores.flatten(2))
        self._scores.append(scores)
        if maps is not None:
            self._maps.append(maps)
            # the graph counts channels, of which the first may be background
            background = int(self._model.card.outputs[0].background)
            self._classes.append(outputs["attribution_class"] - background)

    def _scored(self, values: torch.Tensor) -> torch.Tensor:
        """Of each image, from ``(images, classes, cells)``; the largest of all are kept."""
        if self._model.card.inputs[0].kind is InputKind.IMAGE2D:
            return _nth_largest(values, self._cells)
        for index, pooled in enumerate(values.transpose(0, 1).flatten(1)):
            best = self._best[index]
            if len(best) == self._cells:
                pooled = pooled[pooled > best[-1]]  # few are left after the first images
            pooled = torch.cat([best.to(pooled), pooled])
            self._best[index] = pooled.topk(min(self._cells, len(pooled))).values
        return values.amax(dim=2)

    def prediction(self) -> Prediction:
        scores = torch.cat(self._scores)
        unit = scores.amax(dim=0)
        if self._cells and self._model.card.inputs[0].kind is not InputKind.IMAGE2D:
            unit = torch.stack([_nth_largest(best, self._cells) for best in self._best])
        images = scores.shape[0]
        classes = torch.cat(self._classes) if self._classes else torch.empty((images, 0)).long()
        return Prediction(
            scores=scores.cpu().numpy(),
            unit_scores=unit.cpu().numpy(),
            target_classes=classes.cpu().numpy(),
            raw_maps=torch.cat(self._maps) if self._maps else None,
            placements=self._inputs.placements,
            probabilities=torch.cat(self._probabilities) if self._probabilities else None,
            cell_ml=self._inputs.cell_ml,
        )


def _nth_largest(values: torch.Tensor, n: int) -> torch.Tensor:
    """Along the last axis; 0 where there are fewer values: no region is so large."""
    if values.shape[-1] < n:
        return values.new_zeros(values.shape[:-1])
    return values.topk(n, dim=-1).values[..., -1]


def _minimum_cells(card: ModelCard, inputs: Inputs) -> int:
    region = card.outputs[0].minimum_region
    if region.cells is not None:
        return region.cells
    assert region.ml is not None
    if inputs.cell_ml is None:
        raise ModelInputError(
            f"model {card.name}: minimum_region is in ml, and the images have no spacing in the "
            "patient; give cells in the card, or send images with PixelSpacing and positions"
        )
    return max(1, math.ceil(region.ml / inputs.cell_ml))


def _compiled(
    plain: Model, explainer: CompiledExplainer, targets: int, cache: CompiledCache | None
) -> ExplainedGraph:
    def make() -> ExplainedGraph:
        return explainer.explain(plain, targets)

    return make() if cache is None else cache.get(plain, explainer.name, targets, make)
