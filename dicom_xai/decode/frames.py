"""Stored values become frames in modality units, on the device."""

from __future__ import annotations

import numpy as np
import torch

from dicom_xai.decode.pixels import Decoded, Rescale
from dicom_xai.study import Frame, Instance


def to_frames(instance: Instance, decoded: Decoded, device: torch.device) -> tuple[Frame, ...]:
    """Every frame of an object, in modality units.

    The stored values travel to the device as they are, once; what they mean is worked out there.

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
    values = _on(decoded.stored, device).to(torch.float32)
    valid = None if decoded.valid is None else _on(decoded.valid, device)
    made = []
    for index, modality in enumerate(decoded.modality):
        plane = values[index]
        if not isinstance(modality, Rescale):
            plane = modality.apply(plane)
        elif modality != Rescale():
            plane = plane * modality.slope + modality.intercept
        here = None if valid is None or bool(valid[index].all()) else valid[index]
        made.append(Frame(instance, decoded.header, index + 1, plane, here))
    return tuple(made)


def _on(array: np.ndarray, device: torch.device) -> torch.Tensor:
    # what another process handed over may be read-only, about which torch warns: tensors cannot be
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)
