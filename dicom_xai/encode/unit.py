"""The unit that is encoded: its volume and explanation, and what is known of its sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from dicom_xai import identity
from dicom_xai.config import ModelCard
from dicom_xai.encode.provenance import Run
from dicom_xai.encode.source import Described, Source
from dicom_xai.study import Explanation, Volume

#: So many pixels are composed and segmented at once: 16 slices of 512 x 512. As float32 they are
#: below the 32 MiB from which the C library asks the kernel for fresh pages every time, which
#: doubles the time on a CPU.
BATCH_PIXELS = 16 * 512 * 512


@dataclass(frozen=True, slots=True, eq=False)
class EncodedUnit:
    """All that the encoders look at, but for pixels. Frames are indices into the volume's."""

    run: Run
    card: ModelCard
    volume: Volume
    explanation: Explanation
    described: Mapping[str, Described]  #: by SOP Instance UID

    def source(self, i: int) -> Source:
        """What the header says of a frame."""
        return self._instance(i).frames[self.volume.frames[i].number - 1]

    def block(self, i: int) -> identity.Block:
        """The identity block of a frame's instance."""
        return self._instance(i).block

    def size(self, i: int) -> tuple[int, int]:
        """Rows and columns of a frame."""
        return self.source(i).rows, self.source(i).columns

    def batches(self, frames: Iterable[int]) -> Iterator[list[int]]:
        """The frames in order, in batches of one size that bound the memory of the device."""
        batch: list[int] = []
        for i in sorted(frames):
            rows, columns = self.size(i)
            is_full = (len(batch) + 1) * rows * columns > BATCH_PIXELS
            if batch and (is_full or self.size(batch[0]) != (rows, columns)):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _instance(self, i: int) -> Described:
        return self.described[self.volume.frames[i].instance.sop_instance_uid]
