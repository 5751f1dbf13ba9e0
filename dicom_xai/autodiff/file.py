"""A model file in, a model file that explains itself out."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from tokenize import TokenError

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError

from ..errors import ConfigError
from .compiler import Report, compile
from .methods import ExpectedGradients, Parametrised


def explain_file(
    source: Path,
    destination: Path,
    method: str | Parametrised = "grad-cam",
    *,
    layer: str = "auto",
    output: str | None = None,
    image: str | None = None,
    box: tuple[float, float] | None = None,
) -> Report:
    """Compile a file; the new one appears whole or not at all.

    Parameters
    ----------
    source : Path
        An ONNX model; weights beside it are read too and go into the new file.
    destination : Path
        Is overwritten.
    method, layer, output, image, box
        See `compile`. The class to explain is the new file's input `target`.

    Raises
    ------
    ConfigError
        No ONNX model, its weights are not beside it, the new file cannot be written, or see
        `compile`.
    """
    try:
        compiled = compile(loaded(source), method, layer=layer, output=output, image=image, box=box)
    except EncodeError as error:
        raise ConfigError(
            f"{source} is with its weights and what is added larger than the 2 GiB of one protobuf "
            "message; export it in half precision"
        ) from error
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}")
    try:
        onnx.save(compiled.model, temporary)
        os.replace(temporary, destination)
    except OSError as error:
        raise ConfigError(f"{destination} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return compiled.report


def expected_gradients(backgrounds: Path) -> ExpectedGradients:
    """The method with the images of a NumPy file (.npy), as the model takes them.

    Raises
    ------
    ConfigError
        The file holds no array of numbers.
    """
    try:
        with backgrounds.open("rb") as file:
            stored = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise ConfigError(f"{backgrounds}: {error.strerror}") from error
    except (ValueError, EOFError, TokenError, MemoryError) as error:
        raise ConfigError(f"{backgrounds} is no NumPy file of numbers (.npy): {error}") from error
    if stored.dtype.kind not in "fiu":
        raise ConfigError(f"{backgrounds}: found {stored.dtype}, wanted an array of real numbers")
    with np.errstate(over="ignore"):
        images = stored.astype(np.float32)
    if not np.isfinite(images).all():
        raise ConfigError(
            f"{backgrounds}: found values that no float32 holds, or that are no number"
        )
    return ExpectedGradients(images)


def loaded(source: Path) -> onnx.ModelProto:
    """A valid model with the weights that lie beside it.

    Raises
    ------
    ConfigError
    """
    try:
        model = onnx.load(source, load_external_data=False)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from error
    except DecodeError as error:
        raise ConfigError(f"{source} is no valid ONNX model") from error
    try:
        onnx.load_external_data_for_model(model, str(source.parent))
    except (OSError, onnx.checker.ValidationError) as error:
        raise ConfigError(
            f"{source} keeps weights in another file that cannot be read ({error}): put it there"
        ) from error
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ConfigError(f"{source} is no valid ONNX model: {error}") from error
    return model
