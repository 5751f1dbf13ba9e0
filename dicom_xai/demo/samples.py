"""Phantoms as the model sees them, with their truth.

They go through the product's own `decode`, so that training equals serving.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from dicom_xai.config import InputKind, ModelInput, StackRule, Windowing, WindowSource
from dicom_xai.decode.frames import to_frames
from dicom_xai.decode.geometry import attach, stack
from dicom_xai.decode.normalize import model_inputs
from dicom_xai.decode.pixels import decode
from dicom_xai.decode.planes import planes_of
from dicom_xai.demo.phantom import Phantom, chest, head_ct, to_bytes
from dicom_xai.demo.tasks import Task
from dicom_xai.study import Geometry, Instance, Placements, Sender, Volume


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


def samples_of(
    task: Task, count: int, seed: int, workers: int, *, keep_truth: bool
) -> Iterator[Sample]:
    """Samples of `count` phantoms; the same for a seed, however many processes make them."""
    make = partial(_samples_of_one, task, seed, keep_truth)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for samples in pool.map(make, range(count), chunksize=4):
            yield from samples


def _samples_of_one(task: Task, seed: int, keep_truth: bool, index: int) -> list[Sample]:
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
