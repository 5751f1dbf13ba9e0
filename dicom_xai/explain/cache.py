"""Compiled graphs, and why others do not compile, kept on disk: by what they were made of, whole.

Several workers may start at once: each writes under a name of its own and renames; the last one
wins with the same bytes. A file that does not read as what it should be is compiled anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from dicom_xai import __version__
from dicom_xai.autodiff import COMPILER_VERSION, METHODS
from dicom_xai.explain.gradient import ExplainedGraph
from dicom_xai.infer.model import Model


class CompiledCache:
    """A folder of compiled graphs.

    Parameters
    ----------
    folder : Path
        Made when absent. Files of other compiler versions are left alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(
        self, model: Model, explainer: str, targets: int, make: Callable[[], ExplainedGraph]
    ) -> ExplainedGraph:
        """The graph made of these inputs: kept, or made now and kept.

        Parameters
        ----------
        model : Model
        explainer : str
        targets : int
        make : callable
            Compiles; its errors pass through and nothing is kept.
        """
        path = self._folder / f"{_key(model, explainer, targets)}.onnx"
        kept = _read(path)
        if kept is not None:
            with suppress(KeyError, TypeError):
                return _graph(*kept)
        made = make()
        _write(
            path, {name: each for name, each in asdict(made).items() if name != "data"}, made.data
        )
        return made

    def reasons(self, model: Model, make: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Why methods do not apply to a model, kept as graphs are, for this version of the program.

        Parameters
        ----------
        model : Model
        make : callable
            Gives a reason by method.
        """
        parts = (model.card.digest, COMPILER_VERSION, __version__, *METHODS)
        path = self._folder / f"{_hashed(*parts)}.reasons"
        kept = _read(path)
        if kept is not None:
            return kept[0]
        made = make()
        _write(path, made, b"")
        return made


def _key(model: Model, explainer: str, targets: int) -> str:
    """Everything that decides the compiled bytes."""
    card = model.card
    parts = (
        *(card.sha256, COMPILER_VERSION, explainer, targets, model.threshold_logits()),
        *(card.heatmap.layer, model.output_name, model.input_name, model.is_exclusive),
    )
    return _hashed(*parts)


def _hashed(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _graph(about: dict[str, Any], data: bytes) -> ExplainedGraph:
    return ExplainedGraph(
        data=data,
        method=about["method"],
        layer=about["layer"],
        added_nodes=tuple(about["added_nodes"]),
        equals=tuple(about["equals"]),
        warnings=tuple(about["warnings"]),
    )


def _write(path: Path, about: dict[str, Any], data: bytes) -> None:
    """A digest, what is to be known of the data, and the data."""
    report = json.dumps(about).encode()
    digest = hashlib.sha256(report + b"\n" + data).hexdigest().encode()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(b"\n".join((digest, report, data)))
        os.replace(temporary, path)
    except OSError:  # a cache that cannot be written costs time, not the service
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """What `_write` wrote; None where there is nothing, or anything else."""
    with suppress(OSError, ValueError):
        digest, report, data = path.read_bytes().split(b"\n", 2)
        if hashlib.sha256(report + b"\n" + data).hexdigest().encode() == digest:
            return cast(dict[str, Any], json.loads(report)), data
    return None
