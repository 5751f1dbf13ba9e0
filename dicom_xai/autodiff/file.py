"""A model file in, a model file that explains itself out."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ..errors import ConfigError
from .compiler import Report, compile


def explain_file(
    source: Path,
    destination: Path,
    method: str = "grad-cam",
    *,
    layer: str = "auto",
    output: str | None = None,
) -> Report:
    """Compile a file; the new one appears whole or not at all.

    Parameters
    ----------
    source : Path
        An ONNX model; weights beside it are read too and go into the new file.
    destination : Path
        Is overwritten.
    method, layer, output : str
        See `compile`. The class to explain is the new file's input `target`.

    Raises
    ------
    ConfigError
        No ONNX model, or see `compile`.
    """
    try:
        model = onnx.load(source)
        onnx.checker.check_model(model)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from error
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ConfigError(f"{source} is no valid ONNX model") from error
    compiled = compile(model, method, layer=layer, output=output)
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}")
    try:
        onnx.save(compiled.model, temporary)
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)
    return compiled.report
