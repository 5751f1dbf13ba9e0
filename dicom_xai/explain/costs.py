"""What runs of a model cost on this host, measured: it decides batches and explainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dicom_xai.errors import DeviceBusyError

#: Batches that are tried.
_SIZES = (1, 4, 16, 64)
#: No batch takes longer, unless one image does: something urgent waits for its end.
LONGEST_BATCH_S = 0.25
#: A larger batch must gain so much for each image.
_WORTH = 0.95
#: Units share a batch only where that makes an image cheaper by so much: the first waits for all.
_WORTH_SHARING = 0.8
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured seconds of one run, after warm-up.

    Attributes
    ----------
    runs_s : mapping of str to mapping of int to float
        By explainer, empty for the prediction alone, and by the number of images in the run.
    """

    runs_s: Mapping[str, Mapping[int, float]]

    def batch_size(self, explainer: str) -> int:
        """Images in one run: the cheapest for each image that does not take too long."""
        runs_s = self.runs_s[explainer]
        best = 1
        for size, seconds in sorted(runs_s.items()):
            gains = seconds / size < _WORTH * runs_s[best] / best
            if gains and seconds <= LONGEST_BATCH_S:
                best = size
        return best

    def seconds(self, explainer: str, images: int) -> float:
        """What so many images are expected to take."""
        size = self.batch_size(explainer)
        whole, rest = divmod(images, size)
        runs_s = self.runs_s[explainer]
        part = min((at for at in runs_s if at >= rest), default=size) if rest else 0
        # a part of a batch takes at most as long as the next size that was measured
        rest_s = min(rest * runs_s[1], runs_s[part]) if rest else 0.0
        return whole * runs_s[size] + rest_s

    def gains_from_sharing(self, explainer: str) -> bool:
        """Whether images of several units should go into one run."""
        size = self.batch_size(explainer)
        runs_s = self.runs_s[explainer]
        return size > 1 and runs_s[size] / size <= _WORTH_SHARING * runs_s[1]


def measure(
    run: Callable[[int], object], largest: int, clock: Callable[[], float]
) -> dict[int, float]:
    """Seconds of runs of several sizes; sizes that take too long or find no memory are left out.

    Parameters
    ----------
    run : callable
        Runs so many images, to the end.
    largest : int
        No more images in one run.
    clock : callable
        Seconds, monotonic.

    Raises
    ------
    DeviceBusyError
        There is no memory for a single image.
    """
    runs_s: dict[int, float] = {}
    for size in (size for size in _SIZES if size <= largest):
        try:
            run(size)  # the first one pays for kernels and memory
            times = []
            for _ in range(_REPEATS):
                started = clock()
                run(size)
                times.append(clock() - started)
        except DeviceBusyError:
            if not runs_s:
                raise
            break
        runs_s[size] = min(times)
        if min(times) > LONGEST_BATCH_S:
            break
    return runs_s
