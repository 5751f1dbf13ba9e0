"""Trains, measures, exports and describes the bundled models.

``python -m dicom_xai.demo.train cxr --out config/models`` writes ``phantom-cxr.onnx`` and its card;
``ct-head`` does the same for ``phantom-ct-head``, ``ct-3d`` for ``phantom-ct-3d``. Seeds are
fixed; each takes some minutes on two cores. Rules: phantoms go through the product's own `decode`,
so that training equals serving; what a card says is measured here, on phantoms that training never
saw.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from dicom_xai.config import Grid, InputKind, ModelInput, StackRule, Windowing, WindowSource
from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.geometry import attach, stack
from dicom_xai.decode.normalize import model_inputs
from dicom_xai.decode.pixels import decode
from dicom_xai.decode.planes import planes_of
from dicom_xai.demo.networks import SmallResNet, multiply_adds
from dicom_xai.demo.phantom import HAEMORRHAGE, Phantom, chest, head_ct, to_bytes
from dicom_xai.study import (
    Geometry,
    Instance,
    Placement,
    Placements,
    Sender,
    Volume,
    VolumePlacement,
)

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


@dataclass(frozen=True, slots=True)
class CodedClass:
    """One class as the card describes it."""

    name: str
    label: str
    code: str  #: SNOMED CT
    meaning: str


@dataclass(frozen=True, slots=True)
class Task:
    """What one model learns, and from how much."""

    name: str
    spec: ModelInput
    classes: tuple[CodedClass, ...]
    train: int  #: phantoms
    held_out: int
    epochs: int
    batch: int = 16
    network: Callable[[int], SmallResNet] = SmallResNet


TASKS = {
    "cxr": Task(
        name="phantom-cxr",
        spec=ModelInput(
            name="image",
            kind=InputKind.IMAGE2D,
            size=(256, 256),
            windowing=Windowing(
                source=WindowSource.PERCENTILE, low_percentile=1.0, high_percentile=99.0
            ),
            scaling=(-1.0, 1.0),
        ),
        classes=(
            CodedClass("nodule", "Nodule", "427359005", "Solitary nodule of lung"),
            CodedClass("consolidation", "Consolidation", "95436008", "Lung consolidation"),
            CodedClass("pneumothorax", "Pneumothorax", "36118008", "Pneumothorax"),
        ),
        train=2400,
        held_out=240,
        epochs=7,
    ),
    "ct-head": Task(
        name="phantom-ct-head",
        spec=ModelInput(
            name="image",
            kind=InputKind.SLICES,
            size=(256, 256),
            windowing=Windowing(source=WindowSource.FIXED, center=45.0, width=110.0),
            scaling=(-1.0, 1.0),
        ),
        classes=(CodedClass(HAEMORRHAGE, "Haemorrhage", "1386000", "Intracranial hemorrhage"),),
        train=200,
        held_out=60,
        epochs=6,
    ),
    "ct-3d": Task(
        name="phantom-ct-3d",
        spec=ModelInput(
            name="image",
            kind=InputKind.VOLUME3D,
            size=(32, 96, 96),
            grid=Grid(spacing_mm=(4.5, 2.25, 2.25), orientation="SPL"),
            windowing=Windowing(source=WindowSource.FIXED, center=45.0, width=110.0),
            scaling=(-1.0, 1.0),
        ),
        classes=(CodedClass(HAEMORRHAGE, "Haemorrhage", "1386000", "Intracranial hemorrhage"),),
        train=200,
        held_out=60,
        epochs=6,
        batch=4,
        network=partial(
            SmallResNet,
            channels=(6, 8, 12),
            dilations=(1,),
            strides=((2, 2, 2), (1, 2, 2), (1, 1, 1)),
            gain=576.0,
        ),
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One image or volume as the model sees it, and its truth.

    Attributes
    ----------
    image : ndarray, (1, *size) float16
    cover : ndarray, (classes, *cells) float32
        Which part of each cell is lesion.
    truth : ndarray, (classes, frames, source rows, source columns) bool
        Empty in training.
    placements : tuple of Placement or of VolumePlacement
        One for each source frame.
    """

    image: NDArray[np.float16]
    cover: NDArray[np.float32]
    truth: NDArray[np.bool_]
    placements: Placements


def main() -> None:
    """Command line: which model, and the folder for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--out", type=Path, default=Path("config/models"))
    parser.add_argument("--workers", type=int, default=2, help="processes that make phantoms")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    train_set = list(_samples(task, task.train, _SEED, arguments.workers, keep_truth=False))
    model = _fit(task, train_set)
    del train_set
    held_out = _samples(task, task.held_out, _SEED + 1, arguments.workers, keep_truth=True)
    measured = measure(model, task, held_out)
    digest = export(model, task, arguments.out / f"{task.name}.onnx")
    card = card_text(model, arguments.task, task, measured, digest)
    (arguments.out / f"{task.name}.yaml").write_text(card, encoding="utf-8")
    print(card)


# ------------------------------------------------------------------ phantoms to samples


def _samples(
    task: Task, count: int, seed: int, workers: int, *, keep_truth: bool
) -> Iterator[Sample]:
    """Samples of `count` phantoms; the same for a seed, however many processes make them."""
    make = partial(_samples_of, task, seed, keep_truth)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for samples in pool.map(make, range(count), chunksize=4):
            yield from samples


def _samples_of(task: Task, seed: int, keep_truth: bool, index: int) -> list[Sample]:
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, index])
    phantom = _phantom(task, rng, full_size=keep_truth)
    instances = [_instance(str(d.SOPInstanceUID), str(d.SOPClassUID)) for d in phantom.datasets]
    frames = [
        to_frames(instance, decode(to_bytes(ds)), torch.device("cpu"))[0]
        for instance, ds in zip(instances, phantom.datasets, strict=True)
    ]
    truth = np.stack([phantom.truth[item.name] for item in task.classes])
    if task.spec.kind is not InputKind.VOLUME3D:
        volumes = [(Volume((frame,), Geometry()), [at]) for at, frame in enumerate(frames)]
    else:
        planes = [
            plane
            for instance, ds in zip(instances, phantom.datasets, strict=True)
            for plane in planes_of(instance, ds)
        ]
        volume = attach(stack(planes, StackRule()), frames)
        order = [frames.index(frame) for frame in volume.frames]
        volumes = [(volume, order)]
    stride = task.network(1).stride
    return [
        _sample(volume, truth[:, order], task.spec, stride, keep_truth=keep_truth)
        for volume, order in volumes
    ]


def _sample(
    volume: Volume,
    truth: NDArray[np.bool_],
    spec: ModelInput,
    stride: tuple[int, ...],
    *,
    keep_truth: bool,
) -> Sample:
    inputs = model_inputs(volume, spec)
    return Sample(
        image=inputs.images[0].numpy().astype(np.float16),
        cover=np.stack([_cover(volume, mask, spec, stride) for mask in truth]),
        truth=truth if keep_truth else np.zeros((0, 0, 0, 0), dtype=bool),
        placements=inputs.placements,
    )


def _phantom(task: Task, rng: np.random.Generator, *, full_size: bool) -> Phantom:
    """Held-out phantoms are larger than those of training, as what a PACS sends is."""
    if task.spec.kind is InputKind.SLICES:
        matrix = 512 if full_size else 256
        return head_ct(rng, slices=10, haemorrhage=bool(rng.random() < 0.6), matrix=matrix)
    if task.spec.kind is InputKind.VOLUME3D:
        slices = int(rng.integers(24, 41))
        matrix = 256 if full_size else 128
        return head_ct(rng, slices=slices, haemorrhage=bool(rng.random() < 0.5), matrix=matrix)
    if full_size:
        return chest(rng, matrix=int(rng.integers(640, 1280)))
    rows = int(rng.integers(288, 416))
    return chest(rng, matrix=(rows, round(rows * rng.uniform(0.75, 1.25))))


def _instance(sop_instance_uid: str, sop_class_uid: str) -> Instance:
    """An instance that never met a spool: only its UIDs matter here."""
    sender = Sender("TRAIN", "TRAIN", "127.0.0.1")
    return Instance(sop_instance_uid, sop_class_uid, "", "", "", "", "", 0, sender)


def _cover(
    volume: Volume, mask: NDArray[np.bool_], spec: ModelInput, stride: tuple[int, ...]
) -> NDArray[np.float32]:
    """The part of each cell of the last features that is lesion.

    The mask takes the way that the image takes, as if it were one.
    """
    painted = tuple(
        replace(
            frame,
            make_values=partial(torch.tensor, part, dtype=torch.float32),
            make_valid=lambda: None,
        )
        for frame, part in zip(volume.frames, mask, strict=True)
    )
    as_it_is = Windowing(source=WindowSource.FIXED, center=0.5, width=1.0)
    changes = {"windowing": as_it_is, "scaling": (0.0, 1.0), "photometric": "MONOCHROME2"}
    inputs = model_inputs(replace(volume, frames=painted), spec.model_copy(update=changes))
    pool = functional.avg_pool2d if len(stride) == 2 else functional.avg_pool3d
    return pool(inputs.images, stride)[0, 0].numpy()


# ------------------------------------------------------------------ learning


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


# ------------------------------------------------------------------ measuring


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


# ------------------------------------------------------------------ what is committed


def export(model: nn.Module, task: Task, path: Path) -> str:
    """Write the model as one self-contained ONNX file and give its SHA-256."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, task.spec.channels, *task.spec.size),),
        dynamo=True,
        opset_version=18,
        input_names=[task.spec.name],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of whoever trained it
    program.model.graph.metadata_props.clear()
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def card_text(model: SmallResNet, key: str, task: Task, measured: Measured, digest: str) -> str:
    """The model card as YAML; `key` is the command's word for the task."""
    spec, window = task.spec, task.spec.windowing
    size = ", ".join(map(str, spec.size))
    windowing = {
        WindowSource.FIXED: f"source: fixed, center: {window.center}, width: {window.width}",
        WindowSource.PERCENTILE: f"source: percentile, low_percentile: {window.low_percentile}, "
        f"high_percentile: {window.high_percentile}",
        WindowSource.SOURCE: "source: source",
    }[window.source]
    flop = 2 * multiply_adds(model, spec.size) / 1e9
    lines = [
        f"# Written by: python -m dicom_xai.demo.train {key}",
        f"name: {task.name}",
        'version: "1.0"',
        f"file: {task.name}.onnx",
        f"sha256: {digest}",
        "intended_use: Demonstration on synthetic phantoms. Not for diagnosis.",
        "manufacturer: dicom_xai",
        "calibrated: false",
        "inputs:",
        f"  - name: {spec.name}",
        f"    kind: {spec.kind}",
        f"    size: [{size}]",
        *_grid_lines(spec),
        f"    windowing: {{{windowing}}}",
        f"    scaling: [{spec.scaling[0]}, {spec.scaling[1]}]",
        f"    photometric: {spec.photometric}",
        *([] if spec.grid else [f"    resize: {spec.resize}"]),
        *(["stack: {minimum_slices: 10, orientation: axial}"] if spec.grid else []),
        "outputs:",
        "  - name: logits",
        "    kind: classification",
        "    activation: sigmoid",
        "    classes:",
    ]
    for item in task.classes:
        category = "49755003, scheme: SCT, meaning: Morphologically abnormal structure"
        lines += [
            f"      - name: {item.name}",
            f"        label: {item.label}",
            "        threshold: 0.5",
            f"        category: {{value: {category}}}",
            f"        type: {{value: {item.code}, scheme: SCT, meaning: {item.meaning}}}",
        ]
    lines += [
        "heatmap:",
        f"  full_scale: {measured.full_scale:.4g}",
        f"  threshold: {measured.threshold:.4g}",
        "  layer: auto",
        "  measured: >-",
        f"    Raw Grad-CAM (ReLU of the weighted features, in logit per cell) on {measured.images}",
        "    held-out phantom images. full_scale is the 90th percentile of the maxima over maps of",
        "    true classes; threshold is the part of it, in steps of 5 %, with the best mean IoU",
        f"    with the truth; {measured.false_area:.3%} of the area of negative maps reaches it.",
        "performance:",
        f"  held-out images: {measured.images} of {task.held_out} phantoms never trained on",
        "  training: classification, and maps held to one level in the true lesions",
        f"  cost: {flop:.2f} GFLOP an image (two a multiply-add)",
    ]
    for index, item in enumerate(task.classes):
        lines.append(
            f"  {item.name}: AUC {measured.auc[index]:.3f}, pointing game "
            f"{measured.pointing[index]:.2f}, mean IoU {measured.iou[index]:.2f}"
        )
    return "\n".join(lines) + "\n"


def _grid_lines(spec: ModelInput) -> list[str]:
    if spec.grid is None:
        return []
    spacing = ", ".join(map(str, spec.grid.spacing_mm))
    align = ", ".join(spec.grid.align)
    orientation = spec.grid.orientation
    return [f"    grid: {{spacing_mm: [{spacing}], orientation: {orientation}, align: [{align}]}}"]


if __name__ == "__main__":
    main()
