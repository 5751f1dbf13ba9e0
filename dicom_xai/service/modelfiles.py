"""The config's models: loaded, and their files seen to be what they were.

A file may change under a running service. A session keeps what it read, so results stay those of
the hash they carry. But the next start or reload will refuse the file, and somebody should know
before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from dicom_xai.config import Config, ModelCard, nearest
from dicom_xai.errors import ModelCardError
from dicom_xai.explain import EXPLAINERS
from dicom_xai.explain.cache import CompiledCache
from dicom_xai.explain.served import ServedModel
from dicom_xai.infer.session import Device

#: Size, modification time and inode: a file for which they stay is not read again.
_Look = tuple[int, int, int]


class ModelFiles:
    """The files of some cards, as they were when last read."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[_Look, bool]] = {}

    def changed(self, cards: Iterable[ModelCard]) -> dict[str, bool]:
        """For each card's name whether its file is another one, or none, by its SHA-256 now."""
        return {card.name: not self._is_same(card) for card in cards}

    def _is_same(self, card: ModelCard) -> bool:
        try:
            state = card.file.stat()
            look = (state.st_size, state.st_mtime_ns, state.st_ino)
            known = self._known.get(card.file)
            if known is None or known[0] != look:
                with card.file.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                self._known[card.file] = (look, digest == card.sha256)
        except OSError:
            self._known.pop(card.file, None)
            return False
        return self._known[card.file][1]


def load_models(config: Config, device: Device) -> dict[str, ServedModel]:
    """Every model that a route uses, loaded, self-tested and warm, by card digest.

    Raises
    ------
    ConfigError
        A model, an explainer's name or the device; nothing is half loaded.
    """
    served: dict[str, ServedModel] = {}
    for name in dict.fromkeys(route.model for route in config.routes.routes if route.enabled):
        routes = [route for route in config.routes.routes if route.model == name and route.enabled]
        wanted = dict.fromkeys(word for route in routes for word in route.explain)
        for word in wanted:
            if word not in EXPLAINERS:
                known = list(EXPLAINERS)
                raise ModelCardError(
                    f"route {routes[0].name!r}: no explainer {word!r}{nearest(word, known)}"
                    f" (known: {', '.join(known)})"
                )
        card = config.cards[name]
        served[card.digest] = ServedModel(
            card,
            device,
            [EXPLAINERS[word] for word in wanted],
            max(route.findings for route in routes),
            cache=CompiledCache(config.service.spool.directory.with_name("compiled")),
        )
    return served
