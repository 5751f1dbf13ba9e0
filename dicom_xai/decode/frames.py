"""Stored values become frames in modality units, on the device."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from dicom_xai.decode.pixels import Decoded, Rescale
from dicom_xai.study import Frame, Instance


def to_frames(instance: Instance, decoded: Decoded, device: torch.device) -> tuple[Frame, ...]:
    """Every frame of an object, in modality units.

    The stored values travel to the device as they are, when a frame is looked at; what they mean is
    worked out there.

    Parameters
    ----------
    instance : Instance
        Whose frames these are.
    decoded : Decoded
        From `pixels.decode`.
    device : torch.device
        Where the values shall lie.

    Returns
    -------
    tuple of Frame
        In frame order. Values are ``(rows, columns)`` float32; the header is shared by all frames
        of the object.
    """
    rows, columns = decoded.stored.shape[1:]
    return tuple(
        Frame(
            instance,
            decoded.header,
            index + 1,
            (rows, columns),
            partial(_values, decoded, index, device),
            partial(_valid, decoded, index, device),
        )
        for index in range(len(decoded.modality))
    )


def _values(decoded: Decoded, index: int, device: torch.device) -> torch.Tensor:
    stored = _on(decoded.stored[index], device).to(torch.float32)
    modality = decoded.modality[index]
    if not isinstance(modality, Rescale):
        return modality.apply(stored)
    # in place: the conversion made a copy already, unless the values are luminance
    plane = stored.clone() if decoded.stored.dtype == np.float32 else stored
    return plane if modality == Rescale() else plane.mul_(modality.slope).add_(modality.intercept)


def _valid(decoded: Decoded, index: int, device: torch.device) -> torch.Tensor | None:
    if decoded.valid is None or decoded.valid[index].all():
        return None
    return _on(decoded.valid[index], device)


def _on(array: np.ndarray, device: torch.device) -> torch.Tensor:
    # an array over received bytes is read-only, about which torch warns: a tensor cannot be
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if device.type == "cuda":
        # from pinned memory the copy runs beside the host's next step
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
