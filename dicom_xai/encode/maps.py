"""Which maps are drawn and which become segments: heat of a classifier, or a model's probabilities.

A classifier says nothing about pixels, so both its picture and its region come from heat. The
region of a segmentation model comes from its own probabilities; its picture shows heat where an
explanation was asked for, else the same probabilities.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from dicom_xai.encode import color
from dicom_xai.encode.color import Layer, Rgb
from dicom_xai.encode.objects import HeatOf, ProbabilityOf
from dicom_xai.study import Explanation, Finding


@dataclass(frozen=True, slots=True, eq=False)
class ClassMap:
    """One positive finding's map over the frames of the unit.

    `frames` are those where it may reach `threshold`, or the lowest probability that matters.
    """

    finding: Finding
    outline: Rgb
    threshold: float  #: of heat, 1.0 = the card's full scale; or of the probability
    is_probability: bool
    frames: frozenset[int]
    source: HeatOf | ProbabilityOf

    def on(self, batch: Sequence[int], wanted: Collection[int]) -> MapValues | None:
        """Its values on the wanted frames of a batch, all of one size; None if it is on none."""
        at = [n for n, i in enumerate(batch) if i in self.frames and i in wanted]
        if not at:
            return None
        return MapValues(self, tuple(at), self.source(self.finding, [batch[n] for n in at]))


@dataclass(frozen=True, eq=False)
class MapValues:
    """A map on some frames of a batch, ``(len(frames), rows, columns)`` float32."""

    of: ClassMap
    frames: tuple[int, ...]  #: indices into the batch
    values: torch.Tensor

    @functools.cached_property
    def layer(self) -> Layer:
        """The part at or above the threshold."""
        map_ = self.of
        class_index = map_.finding.class_index
        return color.layer(self.values, self.frames, map_.threshold, map_.outline, class_index)


@dataclass(frozen=True, slots=True, eq=False)
class Maps:
    """The maps of all positive findings that have one, in the order of the findings."""

    drawn: tuple[ClassMap, ...]
    segmented: tuple[ClassMap, ...]

    def wanted(
        self, pictured: Collection[int], segmented: Collection[int]
    ) -> dict[ClassMap, set[int]]:
        """Each map once, with the frames on which it is needed: drawn or segmented."""
        needed: dict[ClassMap, set[int]] = {map_: {*pictured} for map_ in self.drawn}
        for map_ in self.segmented:
            needed[map_] = needed.get(map_, set()).union(segmented)
        return needed


def maps_of(
    explanation: Explanation,
    heat_of: HeatOf,
    probability_of: ProbabilityOf,
    lowest: float | None,
) -> Maps:
    """The maps of a unit.

    Parameters
    ----------
    lowest : float or None
        Probabilities matter from here on, not only from the classes' thresholds on.
    """
    heats, regions = [], []
    positives = [finding for finding in explanation.findings if finding.is_positive]
    for n, finding in enumerate(positives):
        outline = color.OUTLINES[n % len(color.OUTLINES)]
        heat, region = finding.attribution, finding.region
        if heat is not None:
            frames = _reaching(heat.frame_peaks, heat.threshold)
            heats.append(ClassMap(finding, outline, heat.threshold, False, frames, heat_of))
        if region is not None:
            from_ = region.threshold if lowest is None else min(lowest, region.threshold)
            frames = _reaching(region.frame_peaks, from_)
            made = ClassMap(finding, outline, region.threshold, True, frames, probability_of)
            regions.append(made)
    return Maps(drawn=tuple(heats or regions), segmented=tuple(regions or heats))


def _reaching(peaks: Sequence[float], threshold: float) -> frozenset[int]:
    return frozenset(i for i, peak in enumerate(peaks) if peak >= threshold)
