"""Files that a person sends: one association, an answer for each file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dicom_xai.deliver.requestor import Timeouts
from dicom_xai.deliver.storage_scu import MAX_CONTEXTS, Context, StorageSCU, parse
from dicom_xai.errors import CannotUnderstandError
from dicom_xai.study import Receipt

if TYPE_CHECKING:
    from dicom_xai.config import Destination


@dataclass(frozen=True, slots=True)
class SentFile:
    """What became of one file: a receipt, or why there is none."""

    path: Path
    size_bytes: int
    elapsed_s: float
    receipt: Receipt | None
    problem: str = ""


def send_files(
    paths: Sequence[Path], name: str, destination: Destination, timeouts: Timeouts | None = None
) -> Iterator[SentFile]:
    """Send DICOM files over one association, in order; one answer for each as it comes.

    A file that is no DICOM file, or that the destination refuses, does not stop the others.

    Raises
    ------
    DestinationUnavailableError
        The destination cannot be reached or stopped answering; the rest is not sent.
    """
    contexts: dict[Context, None] = {}
    for path in paths:
        with suppress(OSError, CannotUnderstandError):
            contexts[_context_of(path)] = None
    scu = StorageSCU(name, destination, list(contexts)[:MAX_CONTEXTS], timeouts)
    try:
        for path in paths:
            start = time.monotonic()
            try:
                file = path.read_bytes()
                receipt = scu.send(file)
            except OSError as error:
                yield SentFile(path, 0, 0.0, None, error.strerror or str(error))
            except CannotUnderstandError as error:
                yield SentFile(path, len(file), 0.0, None, str(error))
            else:
                yield SentFile(path, len(file), time.monotonic() - start, receipt)
    finally:
        scu.close()


def _context_of(path: Path) -> Context:
    with path.open("rb") as stream:
        return parse(stream.read(16_384)).context
