"""What a trained model is worth, and the absolute scale of its maps, on held-out phantoms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dicom_xai.demo.networks import SmallResNet
from dicom_xai.demo.samples import Sample
from dicom_xai.demo.tasks import Task
from dicom_xai.study import Placement, VolumePlacement


@dataclass(frozen=True, slots=True)
class Measured:
    """What held-out phantoms say; one value a class where it is a tuple."""

    images: int
    auc: tuple[float, ...]
    pointing: tuple[float, ...]  #: the map's maximum lies in the lesion, over true positives
    iou: tuple[float, ...]  #: of the thresholded map with the truth, on the input's grid
    full_scale: float
    threshold: float
    false_area: float  #: part of negative images at or above the threshold


@torch.no_grad()
def measure(model: nn.Module, task: Task, samples: Iterator[Sample]) -> Measured:
    """AUC, pointing game, and the two numbers of the card's absolute scale.

    Full scale is the 90th percentile of the maxima of maps of true classes; the threshold is the
    part of it, in steps of 5 %, with the best mean IoU with the truth.
    """
    assert isinstance(model, SmallResNet)
    names = range(len(task.classes))
    scores: list[list[float]] = [[] for _ in names]
    labels: list[list[bool]] = [[] for _ in names]
    hits: list[list[bool]] = [[] for _ in names]
    peaks: list[float] = []
    positives: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in names]
    negatives: list[torch.Tensor] = []
    images = 0
    for sample in samples:
        images += 1
        image = torch.from_numpy(sample.image.astype(np.float32))[None]
        features = model.features(image)
        raw = torch.relu(model.maps(features))[0]
        logits = model(image)[0]
        cover = torch.from_numpy(sample.cover)
        for index in names:
            is_positive = bool(sample.truth[index].any())
            scores[index].append(float(logits[index]))
            labels[index].append(is_positive)
            if not is_positive:
                negatives.append(raw[index])
                continue
            hits[index].append(_points_inside(raw[index], sample, index))
            peaks.append(float(raw[index].max()))
            positives[index].append((raw[index], cover[index]))
    full_scale = float(np.percentile(peaks, 90))
    ious = {part: _ious(positives, part * full_scale) for part in np.arange(0.1, 0.75, 0.05)}
    best = max(ious, key=lambda part: float(np.mean(ious[part])))
    threshold = best * full_scale
    return Measured(
        images=images,
        auc=tuple(area_under_curve(s, t) for s, t in zip(scores, labels, strict=True)),
        pointing=tuple(float(np.mean(hit)) for hit in hits),
        iou=ious[best],
        full_scale=full_scale,
        threshold=float(threshold),
        false_area=float(np.mean([float((m >= threshold).float().mean()) for m in negatives])),
    )


def area_under_curve(scores: list[float], labels: list[bool]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative (ties count half)."""
    score, label = np.array(scores), np.array(labels)
    above = score[label][:, None] - score[~label][None, :]
    return float(np.mean((above > 0) + 0.5 * (above == 0)))


def _points_inside(raw: torch.Tensor, sample: Sample, index: int) -> bool:
    """The pointing game (Zhang et al. 2018, section 4.1), without its tolerance."""
    first, *_ = sample.placements
    cell = np.array(np.unravel_index(int(raw.argmax()), raw.shape))
    at = (cell + 0.5) * np.array(first.input_size) / np.array(raw.shape)
    solid = [each for each in sample.placements if isinstance(each, VolumePlacement)]
    if solid:
        # the frame through which the cell's centre lies, and the pixel there
        origins = np.array([each.origin for each in solid])
        between = origins[1] - origins[0]
        steps = np.stack([between, solid[0].per_row, solid[0].per_column], axis=1)
        offsets = np.linalg.solve(steps, (at - origins).T).T
        frame = int(np.abs(offsets[:, 0]).argmin())
        place = np.array([frame, *np.rint(offsets[frame, 1:])]).astype(int)
    else:
        assert isinstance(first, Placement)
        place = np.array([0, *((at - first.offset) / first.scale)]).astype(int)
    truth = sample.truth[index]
    is_inside = bool(np.all((place >= 0) & (place < truth.shape)))
    return is_inside and bool(truth[tuple(place)])


def _ious(
    positives: list[list[tuple[torch.Tensor, torch.Tensor]]], threshold: float
) -> tuple[float, ...]:
    """Mean IoU for each class, maps and truth enlarged to the input's grid."""
    means = []
    for pairs in positives:
        values = []
        for raw, cover in pairs:
            both = torch.stack([raw, cover])[None]
            mode = "bilinear" if raw.dim() == 2 else "trilinear"
            fine = functional.interpolate(both, scale_factor=4, mode=mode)[0]
            found, wanted = fine[0] >= threshold, fine[1] >= 0.5
            union = float((found | wanted).sum())
            values.append(float((found & wanted).sum()) / union if union else 0.0)
        means.append(float(np.mean(values)))
    return tuple(means)
