"""Raw maps to the card's absolute scale, and from the model's grid onto the source's pixels.

Nothing is ever scaled to an image's own maximum: a negative study shows no red.
"""

from __future__ import annotations

import numpy as np
import torch

from dicom_xai.config import ModelCard
from dicom_xai.study import Attribution, Explanation, Finding, Placement, Prediction


def explain(
    prediction: Prediction, card: ModelCard, findings: int, method: str, layer: str, note: str = ""
) -> Explanation:
    """The unit's findings, positives first and then by score, the first few with their maps.

    Parameters
    ----------
    prediction : Prediction
        Of all frames of the unit.
    card : ModelCard
    findings : int
        At most so many classes get a map.
    method, layer : str
        How the maps were made; empty when there are none.
    note : str
        Why there are none.
    """
    scores = np.asarray(prediction.scores)
    unit_scores = scores.max(axis=0)
    order = sorted(
        range(len(card.classes)),
        key=lambda i: (unit_scores[i] < card.classes[i].threshold, -unit_scores[i]),
    )
    return Explanation(
        findings=tuple(
            Finding(
                class_index=i,
                name=card.classes[i].name,
                score=float(unit_scores[i]),
                frame_scores=tuple(float(score) for score in scores[:, i]),
                is_positive=bool(unit_scores[i] >= card.classes[i].threshold),
                attribution=_attribution(prediction, card, i) if rank < findings else None,
            )
            for rank, i in enumerate(order)
        ),
        method=method,
        layer=layer,
        note=note,
    )


def _attribution(prediction: Prediction, card: ModelCard, class_index: int) -> Attribution | None:
    if prediction.raw_maps is None:
        return None
    is_target = torch.from_numpy(np.asarray(prediction.target_classes) == class_index)
    chosen = is_target.to(prediction.raw_maps)[:, :, None, None]
    heat = (prediction.raw_maps * chosen).sum(dim=1) / card.heatmap.full_scale
    return Attribution(
        heat=heat,
        threshold=card.heatmap.threshold / card.heatmap.full_scale,
        placements=prediction.placements,
    )


def to_source(heat: torch.Tensor, placement: Placement) -> torch.Tensor:
    """A map at the source's resolution, by bilinear interpolation.

    Parameters
    ----------
    heat : Tensor, (map rows, map columns) float32
        Covers the whole input grid.
    placement : Placement
        Where the source lies on the input grid.

    Returns
    -------
    Tensor, (source rows, source columns) float32
        Zero where the source lies outside the input grid.
    """
    rows, columns = (
        _weights(
            placement.source_size[axis],
            placement.scale[axis],
            placement.offset[axis],
            placement.input_size[axis],
            heat.shape[axis],
            heat,
        )
        for axis in (0, 1)
    )
    return rows @ heat @ columns.T


def _weights(
    source: int, scale: float, offset: float, grid: int, cells: int, like: torch.Tensor
) -> torch.Tensor:
    """Interpolation along one axis, as a matrix ``(source, cells)``: the operation is separable."""
    centres = (torch.arange(source, device=like.device, dtype=torch.float64) + 0.5) * scale + offset
    is_inside = (centres >= 0) & (centres <= grid)
    at = (centres * (cells / grid) - 0.5).clamp(0, cells - 1)
    nearness = 1 - (at[:, None] - torch.arange(cells, device=like.device)).abs()
    return (nearness.clamp(min=0) * is_inside[:, None]).to(like.dtype)
