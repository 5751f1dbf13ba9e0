"""All Secondary Captures of a unit: which frames get a picture, and which object it goes into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dicom_xai.config import Compression, InputKind, Layout
from dicom_xai.encode import picture, sc
from dicom_xai.encode.color import Layer
from dicom_xai.encode.legend import StackBand
from dicom_xai.encode.maps import ClassMap, MapValues
from dicom_xai.encode.objects import DisplayOf, Encoded, Planned, encoded
from dicom_xai.encode.pixeldata import Buffer, compressed
from dicom_xai.encode.unit import EncodedUnit
from dicom_xai.errors import EncodeError
from dicom_xai.study import ObjectKind

#: At most so many pictures of a unit of images; a series says how many slices it wants.
MAX_PICTURES = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Stack:
    """One stack of pictures in the making: its frames of one series and size, in order."""

    frames: tuple[int, ...]
    band: StackBand
    streams: dict[Compression, list[Buffer]]  #: of the frames so far


class Captures:
    """The Secondary Captures of a unit, as batches of its frames come.

    Parameters
    ----------
    maps : sequence of ClassMap
        That are drawn.
    plan : sequence of Planned
        SC entries.
    """

    def __init__(
        self, unit: EncodedUnit, maps: Sequence[ClassMap], plan: Sequence[Planned]
    ) -> None:
        self._unit, self._maps, self._plan = unit, maps, plan
        self._chosen = {p: _chosen(unit, p.slices) for p in plan if p.layout is Layout.SINGLE}
        compressions = dict.fromkeys(p.compression for p in plan if p.layout is Layout.STACK)
        self._stacks = _stacks(unit, maps, tuple(compressions)) if compressions else []
        self._ordinals: dict[Planned, int] = {}  # of each entry's first object
        ordinal = 0
        for p in plan:
            self._ordinals[p] = ordinal
            ordinal += len(self._chosen.get(p, self._stacks))
        self._single: list[Encoded] = []

    @property
    def frames(self) -> set[int]:
        """The frames that get a picture."""
        chosen = {i for frames in self._chosen.values() for i in frames}
        return chosen.union(*(stack.frames for stack in self._stacks))

    def add(
        self, batch: Sequence[int], display_of: DisplayOf, maps: Sequence[MapValues | None]
    ) -> None:
        """Take a batch of frames, all of one size, in the order of the volume."""
        alone = {i for frames in self._chosen.values() for i in frames}
        self._add_single([i for i in batch if i in alone], batch, display_of, maps)
        for stack in self._stacks:
            mine = [i for i in batch if i in stack.frames]
            if not mine:
                continue
            layers = _layers(maps, [batch.index(i) for i in mine])
            first = stack.frames.index(mine[0])
            pictures = picture.compose_stack(display_of(mine), layers, stack.band, first)
            for compression, streams in stack.streams.items():
                streams += compressed(pictures, compression)

    def finished(self) -> tuple[list[Encoded], list[tuple[ObjectKind, str]]]:
        """All objects by ordinal, and why others are missing."""
        objects, skipped = list(self._single), []
        for p in self._plan:
            for n, stack in enumerate(self._stacks if p.layout is Layout.STACK else ()):
                try:
                    objects.append(self._stacked(p, stack, self._ordinals[p] + n))
                except EncodeError as error:
                    skipped.append((ObjectKind.SC, str(error)))
        total = len(self._unit.volume.frames)
        if self._plan and _is_of_images(self._unit) and total > MAX_PICTURES:
            reason = f"{total} images in the unit, the first {MAX_PICTURES} pictured"
            skipped.append((ObjectKind.SC, reason))
        return sorted(objects, key=lambda each: each.ordinal), skipped

    def _add_single(
        self,
        frames: Sequence[int],
        batch: Sequence[int],
        display_of: DisplayOf,
        maps: Sequence[MapValues | None],
    ) -> None:
        if not frames:
            return
        unit = self._unit
        layers = _layers(maps, [batch.index(i) for i in frames])
        bands = []
        for n, i in enumerate(frames):
            drawn = {layer.class_index for layer in layers if n in layer.frames}
            bands.append(picture.band(unit, i, self._maps, drawn))
        pictures = picture.compose(display_of(frames), layers, bands)
        for i, shown in zip(frames, pictures, strict=True):
            for p, chosen in self._chosen.items():
                if i in chosen:
                    self._single.append(self._captured(p, i, shown, chosen.index(i)))

    def _captured(self, planned: Planned, i: int, shown: sc.Picture, nth: int) -> Encoded:
        unit, ordinal = self._unit, self._ordinals[planned] + nth
        frame, source = unit.volume.frames[i], unit.source(i)
        captured = sc.capture(
            unit.run,
            ObjectKind.SC,
            shown,
            planned.compression,
            ordinal,
            nth + 1,
            source,
            (frame.instance, (frame.number,) if source.is_multi_frame else ()),
            unit.block(i),
            _caption(unit),
        )
        return encoded(
            unit.run, ObjectKind.SC, ordinal, captured, frame.instance, planned.destinations
        )

    def _stacked(self, planned: Planned, stack: _Stack, ordinal: int) -> Encoded:
        unit, layout = self._unit, stack.band.layout
        streams = stack.streams[planned.compression]
        captured = sc.capture_stack(
            unit.run,
            [
                sc.StackFrame(unit.volume.frames[i], unit.source(i), stream)
                for i, stream in zip(stack.frames, streams, strict=True)
            ],
            (layout.height, layout.width),
            planned.compression,
            ordinal,
            unit.block(stack.frames[0]),
            _caption(unit),
        )
        source = unit.volume.frames[stack.frames[0]].instance
        return encoded(unit.run, ObjectKind.SC, ordinal, captured, source, planned.destinations)


def _is_of_images(unit: EncodedUnit) -> bool:
    return unit.card.inputs[0].kind is InputKind.IMAGE2D


def _chosen(unit: EncodedUnit, slices: int) -> tuple[int, ...]:
    """The frames that get a picture of their own, in the volume's order."""
    total, findings = len(unit.volume.frames), unit.explanation.findings
    if _is_of_images(unit):
        return tuple(range(min(total, MAX_PICTURES)))
    scores = findings[0].frame_weights if findings else (0.0,) * total
    ranked = sorted(range(total), key=lambda i: (-scores[i], i))
    return tuple(sorted(ranked[:slices]))


def _stacks(
    unit: EncodedUnit, maps: Sequence[ClassMap], compressions: Sequence[Compression]
) -> list[_Stack]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, frame in enumerate(unit.volume.frames):
        groups.setdefault((frame.instance.series_instance_uid, unit.size(i)), []).append(i)
    return [
        _Stack(
            tuple(frames),
            picture.band_of_stack(unit, frames, maps),
            {compression: [] for compression in compressions},
        )
        for frames in groups.values()
    ]


def _layers(maps: Sequence[MapValues | None], places: Sequence[int]) -> list[Layer]:
    """What is drawn on these frames of a batch."""
    return [found.layer.on(places) for found in maps if found is not None]


def _caption(unit: EncodedUnit) -> sc.Caption:
    method = unit.run.method
    return sc.Caption(
        f"heat map {method}" if method else "prediction",
        f"Windowed to 8 bits; {method or 'prediction'} of model {unit.card.name} "
        f"{unit.card.version} drawn over it; legend added beside it",
    )
