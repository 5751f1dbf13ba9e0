"""Model files are what they were: a file that changed under a running service is seen and told.

A session keeps what it read, so results stay those of the hash they carry. But the next start or
reload will refuse the file, and somebody should know before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from dicom_xai.config import ModelCard

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
