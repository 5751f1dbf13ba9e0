"""Where the windows of convolutions and poolings lie, whatever way the node says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..call import Call
from ..emit import Tensor


@dataclass(frozen=True)
class Window:
    """Placement of windows, one entry per spatial axis.

    Attributes
    ----------
    kernel, strides, dilations : list of int
    starts : list of int
        Padding before the first element.
    ends : list of int
        How far the last window reaches past the last element, ceil mode and auto_pad included;
        negative where a remainder is covered by no window.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    starts: list[int]
    ends: list[int]

    @property
    def reach(self) -> list[int]:
        """Elements from the first to the last tap of a window."""
        return [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]


def window_of(n: Call, kernel: Sequence[int]) -> Window:
    """The windows that a Conv or pooling node lays over its input."""
    count = len(kernel)
    strides = list(n.attribute("strides", [1] * count))
    dilations = list(n.attribute("dilations", [1] * count))
    pads = list(n.attribute("pads", [0] * 2 * count))
    mode = n.attribute("auto_pad", "NOTSET")
    plain = Window(list(kernel), strides, dilations, pads[:count], pads[count:])
    if mode == "NOTSET" and max(strides) == 1:
        return plain
    starts, ends = [], []
    for axis, reach in enumerate(plain.reach):
        size, positions = n.input().size(axis + 2), n.output().size(axis + 2)
        over = (positions - 1) * strides[axis] + reach - size
        if over < 0 and mode.startswith("SAME"):
            raise n.refuse(
                "its windows end before the data under SAME padding, where runtimes disagree; say "
                "pads instead"
            )
        starts.append(start_of(mode, pads[axis], over))
        ends.append(over - starts[-1])
    return Window(list(kernel), strides, dilations, starts, ends)


def transposed_window_of(n: Call, kernel: Sequence[int]) -> Window:
    """The windows that a ConvTranspose node's own transpose lays over the node's output."""
    count = len(kernel)
    strides = list(n.attribute("strides", [1] * count))
    dilations = list(n.attribute("dilations", [1] * count))
    pads = list(n.attribute("pads", [0] * 2 * count))
    mode, wanted = n.attribute("auto_pad", "NOTSET"), n.attribute("output_shape")
    if any(n.attribute("output_padding", ())) and (wanted or mode.startswith("SAME")):
        raise n.refuse(
            "runtimes disagree on output_padding beside output_shape or auto_pad; say pads instead"
        )
    if mode == "NOTSET" and wanted:
        mode = "SAME_LOWER"
    starts, ends = [], []
    for axis in range(count):
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        full = (n.input().size(axis + 2) - 1) * strides[axis] + reach
        over = full - n.output().size(axis + 2)
        starts.append(start_of(mode, pads[axis], over))
        ends.append(over - starts[-1])
    return Window(list(kernel), strides, dilations, starts, ends)


def start_of(mode: str, pad: int, over: int) -> int:
    """Padding at the near side, where the windows reach `over` elements past the data in all."""
    if mode == "SAME_UPPER":
        return max(over, 0) // 2
    if mode == "SAME_LOWER":
        return max(over, 0) - max(over, 0) // 2
    return 0 if mode == "VALID" else pad


def crop(x: Tensor, starts: Sequence[int], ends: Sequence[int]) -> Tensor:
    """Cut elements off both ends of every spatial axis."""
    ints = x.graph.ints
    axes = [axis for axis, pair in enumerate(zip(starts, ends, strict=True)) if any(pair)]
    if not axes:
        return x
    stops = [x.size(axis + 2) - ends[axis] for axis in axes]
    first = ints([starts[axis] for axis in axes])
    return x.graph.op("Slice", x, first, ints(stops), ints([axis + 2 for axis in axes]))
