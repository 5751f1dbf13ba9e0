"""Libraries that zennit and grad-cam name when they are imported and that no comparison needs.

Both judge maps of the compiler. Their own dependencies are large, and torchvision must fit torch's
build, so the two are installed alone and shown empty modules while they are imported; afterwards
nobody else sees them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

NAMES = (
    "cv2",
    "scipy", "scipy.ndimage", "scipy.sparse", "scipy.sparse.linalg",
    "sklearn", "sklearn.decomposition",
    "torchvision", "torchvision.models", "torchvision.models.resnet", "torchvision.transforms",
    "torchvision.transforms.functional",
    "ttach",
)  # fmt: skip


class Nothing:
    """Whatever a stand-in is asked for: can be named, subclassed and made, and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass


class StandIn(ModuleType):
    """A module that has every public name."""

    __path__: list[str] = []  # noqa: RUF012  (what makes it a package)

    def __getattr__(self, name: str) -> type[Nothing]:
        if name.startswith("_"):
            raise AttributeError(name)
        return type(name, (Nothing,), {})


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let the judges be imported inside; what was imported before is there again afterwards."""
    before = {name: sys.modules[name] for name in NAMES if name in sys.modules}
    sys.modules.update((name, StandIn(name)) for name in NAMES)
    try:
        yield
    finally:
        for name in NAMES:
            del sys.modules[name]
        sys.modules.update(before)
