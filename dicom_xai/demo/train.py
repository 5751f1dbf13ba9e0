"""Trains, measures, exports and describes the bundled models.

``python -m dicom_xai.demo.train cxr --out config/models`` writes ``phantom-cxr.onnx`` and its card;
``ct-head`` does the same for ``phantom-ct-head``, ``ct-3d`` for ``phantom-ct-3d``. Seeds are
fixed; each takes some minutes on two cores. What a card says is measured on phantoms that training
never saw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from dicom_xai.demo.card import card_text, export
from dicom_xai.demo.measure import measure
from dicom_xai.demo.networks import SmallResNet
from dicom_xai.demo.samples import Sample, samples_of
from dicom_xai.demo.tasks import TASKS, Task

_SEED = 20261123
_LEARNING_RATE = 6e-3
#: What the raw map shall be in a lesion, in logit per cell: the same for every class, so that one
#: absolute scale fits them all.
_LESION_LEVEL = 1.5
#: How sharply a cell is lesion or not, around half that level.
_STEEPNESS = 8.0
#: False area weighs this much more than missed area.
_OUTSIDE_WEIGHT = 10.0
#: Of the networks that look at images.
_CELLS_OF_AN_IMAGE = 1024


def main() -> None:
    """Command line: which model, and the folder for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--out", type=Path, default=Path("config/models"))
    parser.add_argument("--workers", type=int, default=2, help="processes that make phantoms")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    train_set = list(samples_of(task, task.train, _SEED, arguments.workers, keep_truth=False))
    model = _fit(task, train_set)
    del train_set
    held_out = samples_of(task, task.held_out, _SEED + 1, arguments.workers, keep_truth=True)
    measured = measure(model, task, held_out)
    digest = export(model, task, arguments.out / f"{task.name}.onnx")
    card = card_text(model, arguments.task, task, measured, digest)
    (arguments.out / f"{task.name}.yaml").write_text(card, encoding="utf-8")
    print(card)


def _fit(task: Task, samples: list[Sample]) -> SmallResNet:
    """Where first, whether after: maps find the lesions, then quiet maps make clean sums."""
    torch.manual_seed(_SEED)
    model = task.network(len(task.classes))
    images = torch.from_numpy(np.stack([sample.image for sample in samples]))
    covers = torch.from_numpy(np.stack([sample.cover for sample in samples]))
    steps = -(-len(samples) // task.batch) * task.epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.15
    )
    order = torch.Generator().manual_seed(_SEED)
    step = 0
    for epoch in range(task.epochs):
        model.train()
        total = 0.0
        shuffled = torch.randperm(len(samples), generator=order)
        for start in range(0, len(samples), task.batch):
            batch = shuffled[start : start + task.batch]
            image, cover = images[batch].float(), covers[batch]
            if torch.rand((), generator=order) < 0.5:
                image, cover = image.flip(-1), cover.flip(-1)
            loss = _loss(model, image, cover, min(1.0, max(0.0, 2 * step / steps - 0.24)))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            step += 1
            total += float(loss.detach()) * len(batch)
        print(f"epoch {epoch + 1} of {task.epochs}: loss {total / len(samples):.4f}", flush=True)
    model.eval()
    model.fold_gain()
    return model


def _loss(
    model: SmallResNet, image: torch.Tensor, cover: torch.Tensor, share: float
) -> torch.Tensor:
    """Maps that tell lesion from background cell by cell, and their sums, the logits.

    A logit sums a thousand cells or more, of which a nodule has three: what the background adds by
    chance would drown it. So the maps learn first; then, as `share` goes from 0 to 1, every bit of
    background costs and the logits count, the less the more cells they sum.
    """
    maps = model.maps(model.features(image)).flatten(2)
    cover = cover.flatten(2)
    logits = maps.sum(dim=2) + model.head.bias
    label = (cover.amax(dim=2) > 0).float()
    classified = functional.binary_cross_entropy_with_logits(logits, label)
    peak = cover.amax(dim=2, keepdim=True)
    inside = (((cover > 0.5) | (cover == peak)) & (peak > 0)).float()
    outside = (cover == 0).float()
    level = maps / _LESION_LEVEL
    margin = _STEEPNESS * (level - 0.5)
    missed = functional.softplus(-margin) * inside
    # each lesion counts the same, however small
    missed = missed.sum(dim=2) / inside.sum(dim=2).clamp(min=1)
    missed = missed.sum(dim=0) / label.sum(dim=0).clamp(min=1)
    false = (functional.softplus(margin) * outside).mean()
    noise = (level.abs() * outside).mean()
    found = (missed.mean() + _OUTSIDE_WEIGHT * false) / (_STEEPNESS / 2)
    crowd = maps.shape[2] / _CELLS_OF_AN_IMAGE
    return found + share * (classified / crowd + 2 * _OUTSIDE_WEIGHT * noise)


if __name__ == "__main__":
    main()
