"""What a prediction says about a unit: findings, their maps and regions, on absolute scales.

Nothing is ever scaled to an image's own maximum: a negative study shows no red.
"""

from __future__ import annotations

import torch

from dicom_xai.config import InputKind, ModelCard
from dicom_xai.explain.mapping import frame_amounts, frame_peaks
from dicom_xai.study import Attribution, Explanation, Finding, Prediction, Region


def explain(
    prediction: Prediction, card: ModelCard, findings: int, method: str, layer: str, note: str = ""
) -> Explanation:
    """The unit's findings, positives first and then by score, the first few with their maps.

    Parameters
    ----------
    prediction : Prediction
        Of the whole unit.
    card : ModelCard
    findings : int
        At most so many classes get a map.
    method, layer : str
        How the maps were made; empty when there are none.
    note : str
        Why there are none.
    """
    scores = prediction.unit_scores
    order = sorted(
        range(len(card.classes)),
        key=lambda i: (scores[i] < card.classes[i].threshold, -scores[i]),
    )
    return Explanation(
        findings=tuple(
            _finding(prediction, card, i, has_map=rank < findings) for rank, i in enumerate(order)
        ),
        method=method,
        layer=layer,
        note=note,
    )


def _finding(prediction: Prediction, card: ModelCard, i: int, *, has_map: bool) -> Finding:
    score = float(prediction.unit_scores[i])
    is_positive = bool(score >= card.classes[i].threshold)
    attribution = _attribution(prediction, card, i) if has_map else None
    region = _region(prediction, card, i)
    if card.inputs[0].kind is not InputKind.VOLUME3D:
        frame_scores = tuple(float(each) for each in prediction.scores[:, i])
    elif region is not None:
        frame_scores = region.frame_peaks
    else:
        frame_scores = ()
    weights = frame_scores or (score,) * len(prediction.placements)
    if region is not None:
        weights = frame_amounts(region.probability, region.placements)
    elif attribution is not None and card.inputs[0].kind is InputKind.VOLUME3D:
        weights = frame_amounts(attribution.heat, attribution.placements)
    return Finding(
        class_index=i,
        name=card.classes[i].name,
        score=score,
        frame_scores=frame_scores,
        frame_weights=weights,
        is_positive=is_positive,
        attribution=attribution,
        region=region,
    )


def _attribution(prediction: Prediction, card: ModelCard, class_index: int) -> Attribution | None:
    if prediction.raw_maps is None:
        return None
    is_target = torch.from_numpy(prediction.target_classes == class_index).to(prediction.raw_maps)
    chosen = is_target.reshape(*is_target.shape, *[1] * (prediction.raw_maps.dim() - 2))
    heat = (prediction.raw_maps * chosen).sum(dim=1) / card.heatmap.full_scale
    if card.inputs[0].kind is InputKind.VOLUME3D:
        heat = heat[0]
    return Attribution(
        heat=heat,
        threshold=card.heatmap.threshold / card.heatmap.full_scale,
        placements=prediction.placements,
        frame_peaks=frame_peaks(heat, prediction.placements),
    )


def _region(prediction: Prediction, card: ModelCard, class_index: int) -> Region | None:
    if prediction.probabilities is None:
        return None
    probability = prediction.probabilities[:, class_index]
    threshold = card.classes[class_index].threshold
    cells = int((probability >= threshold).sum())
    if card.inputs[0].kind is InputKind.VOLUME3D:
        probability = probability[0]
    return Region(
        probability=probability,
        threshold=threshold,
        placements=prediction.placements,
        frame_peaks=frame_peaks(probability, prediction.placements),
        volume_ml=None if prediction.cell_ml is None else cells * prediction.cell_ml,
    )
