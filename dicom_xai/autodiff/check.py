"""Proves that a compiled model is the vendor's model and something after it.

Structure only: what the numbers are worth is tested where a runtime is, in `infer` and `explain`.
"""

from __future__ import annotations

import onnx

from ..errors import ConfigError, InvariantError


def check_untouched(original: onnx.ModelProto, compiled: onnx.ModelProto) -> None:
    """Compare a compiled model with the one that it was made of.

    Every node, initializer, input and output of the original must be there byte for byte, in the
    original order and before anything new, and the whole must satisfy the ONNX checker.

    Raises
    ------
    InvariantError
        Something of the original changed; the model must not be served.
    ConfigError
        The original itself is not valid ONNX.
    """
    before, after = original.graph, compiled.graph
    for kind in ("node", "initializer", "sparse_initializer", "input", "output"):
        ours, theirs = getattr(after, kind), getattr(before, kind)
        if len(ours) < len(theirs):
            raise InvariantError(f"the compiled graph lost {len(theirs) - len(ours)} of {kind}")
        for one, other in zip(theirs, ours, strict=False):
            if same_bytes(one) != same_bytes(other):
                raise InvariantError(f"compiling changed {kind} {one.name!r}")
    for field in ("opset_import", "functions", "metadata_props"):
        if (
            list(getattr(original, field))
            != list(getattr(compiled, field))[: len(getattr(original, field))]
        ):
            raise InvariantError(f"compiling changed the model's {field}")
    check_valid(original, compiled)


def check_valid(original: onnx.ModelProto, compiled: onnx.ModelProto) -> None:
    """Ask the ONNX checker, and tell the vendor's defects from ours."""
    try:
        onnx.checker.check_model(compiled)
    except onnx.checker.ValidationError as error:
        try:
            onnx.checker.check_model(original)
        except onnx.checker.ValidationError as theirs:
            raise ConfigError(f"the model is not valid ONNX: {theirs}") from theirs
        raise InvariantError(f"the compiled model is not valid ONNX: {error}") from error


def same_bytes(message: onnx.NodeProto) -> bytes:
    """A serialisation that is equal exactly where the messages are."""
    return bytes(message.SerializeToString(deterministic=True))
