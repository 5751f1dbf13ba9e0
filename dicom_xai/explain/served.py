"""A loaded model that predicts and explains in one run, and that proved it when it was loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dicom_xai.config import ModelCard
from dicom_xai.errors import StudyError, UnsupportedOperatorError
from dicom_xai.explain.cache import CompiledCache
from dicom_xai.explain.gradient import CompiledExplainer, ExplainedGraph
from dicom_xai.explain.selftest import (
    SelfTest,
    applicability,
    compare,
    gradient_error,
    noise,
)
from dicom_xai.infer.model import Model
from dicom_xai.infer.session import Device, Session
from dicom_xai.study import Placement, Prediction

#: Images in one run. Larger batches gain nothing on a CPU and cost memory.
BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds for one image, after warm-up; with and without explanation."""

    explained_s: Mapping[str, float]
    plain_s: float


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
        self.gradient_error = self._check_gradient(threads)
        self.costs = self._warm_up(clock)

    def graph(self, explainer: str) -> ExplainedGraph:
        """What was compiled for an explainer."""
        return self._graphs[explainer]

    @property
    def provider(self) -> str:
        """The execution provider that took most of the plain graph."""
        counts = self._plain.session.nodes_by_provider()
        return max(counts, key=lambda name: counts[name])

    def predict(
        self, images: torch.Tensor, placements: tuple[Placement, ...], explainer: str
    ) -> Prediction:
        """Scores of all images and, with an explainer, their raw maps from the same run.

        Parameters
        ----------
        images : Tensor, (frames, 1, rows, columns) float32
            On the model's device.
        placements : tuple of Placement
            One for each image; they go into the Prediction.
        explainer : str
            One of those given at load, or empty for scores alone.

        Raises
        ------
        StudyError
            Scores or maps are not finite.
        DeviceBusyError
            The device has no memory now.
        """
        session = self._sessions[explainer] if explainer else self._plain.session
        parts = [
            session.run({self._plain.input_name: images[i : i + BATCH_SIZE]})
            for i in range(0, images.shape[0], BATCH_SIZE)
        ]
        raw = torch.cat([part[self._plain.output_name] for part in parts])
        maps = torch.cat([part["attribution"] for part in parts]) if explainer else None
        if not bool(torch.isfinite(raw).all()) or (
            maps is not None and not bool(torch.isfinite(maps).all())
        ):
            raise StudyError(f"model {self.card.name} gave values that are not finite")
        classes = (
            torch.cat([part["attribution_class"] for part in parts]).cpu().numpy()
            if explainer
            else np.empty((images.shape[0], 0), np.int64)
        )
        return Prediction(
            scores=self._plain.scores(raw).cpu().numpy(),
            target_classes=classes,
            raw_maps=maps,
            placements=placements,
        )

    def applicability(self) -> dict[str, str]:
        """Every known method, and why it does not apply to this model; empty where it does."""
        return applicability(self._plain)

    def _check_gradient(self, threads: int) -> float | None:
        try:
            return gradient_error(self._plain, threads)
        except UnsupportedOperatorError:
            # a CAM needs the head's derivative alone, and that one was compiled
            return None

    def _warm_up(self, clock: Callable[[], float]) -> Costs:
        """Run every session on the sizes that will be served; time one image."""

        def cost(session: Session) -> float:
            for batch in (BATCH_SIZE, 1):
                session.run({self._plain.input_name: noise(self.card, batch, self.device)})
            times = []
            for _ in range(3):
                start = clock()
                session.run({self._plain.input_name: noise(self.card, 1, self.device)})
                times.append(clock() - start)
            return min(times)

        return Costs(
            {name: cost(session) for name, session in self._sessions.items()},
            cost(self._plain.session),
        )


def _compiled(
    plain: Model, explainer: CompiledExplainer, targets: int, cache: CompiledCache | None
) -> ExplainedGraph:
    def make() -> ExplainedGraph:
        return explainer.explain(plain, targets)

    return make() if cache is None else cache.get(plain, explainer.name, targets, make)
