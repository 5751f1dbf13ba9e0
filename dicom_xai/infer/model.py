"""A model file that is what its card says: hash, shapes, and a plain session."""

from __future__ import annotations

import hashlib

import onnx
import torch

from dicom_xai.config import InputKind, ModelCard
from dicom_xai.errors import ModelCardError
from dicom_xai.infer.session import Device, Session

#: Images in one run.
LARGEST_BATCH = 64


def read_model(card: ModelCard) -> onnx.ModelProto:
    """The card's model, once its bytes and its form are what the card says.

    Raises
    ------
    ModelCardError
        The file is unreadable, hashes to something else, is no ONNX model, or its inputs and
        outputs do not fit the card.
    """
    try:
        data = card.file.read_bytes()
    except OSError as error:
        raise ModelCardError(f"model {card.name}: {card.file.name}: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != card.sha256:
        raise ModelCardError(
            f"model {card.name}: {card.file.name} hashes to {found}, the card says {card.sha256}; "
            "put back the file, or make a new card for the new model"
        )
    try:
        model = onnx.load_model_from_string(data)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and the checker's have no common base
        raise ModelCardError(
            f"model {card.name}: {card.file.name} is no valid ONNX model"
        ) from error
    _check_input(card, model)
    _check_output(card, model)
    return model


class Model:
    """A plain session and the card it fits.

    Parameters
    ----------
    card : ModelCard
    device : Device
    threads : int
        See `Session`.

    Raises
    ------
    ModelCardError
        See `read_model`.
    ConfigError
        The device does not take it.
    """

    def __init__(self, card: ModelCard, device: Device, threads: int = 0) -> None:
        self.card = card
        self.device = device
        self.proto = read_model(card)
        self.session = Session(self.proto.SerializeToString(), device, threads)

    @property
    def input_name(self) -> str:
        """The ONNX input that takes the image."""
        return self.card.inputs[0].name

    @property
    def output_name(self) -> str:
        """The ONNX output that holds the scores."""
        return self.card.outputs[0].name

    @property
    def is_segmentation(self) -> bool:
        """Whether scores are per position."""
        return self.card.outputs[0].kind == "segmentation"

    @property
    def is_exclusive(self) -> bool | None:
        """Whether classes compete by the card's activation; None when the graph itself decides."""
        return {"softmax": True, "sigmoid": False}.get(self.card.outputs[0].activation)

    @property
    def largest_batch(self) -> int:
        """Images in one run at most: a volume goes alone."""
        return 1 if self.card.inputs[0].kind is InputKind.VOLUME3D else LARGEST_BATCH

    def scores(self, raw: torch.Tensor) -> torch.Tensor:
        """The card's activation over the raw output.

        Parameters
        ----------
        raw : Tensor, (batch, channels) or (batch, channels, *grid) float32

        Returns
        -------
        Tensor, (batch, classes) or (batch, classes, *grid) float32
            0..1; the background's channel is left out.
        """
        activation = self.card.outputs[0].activation
        if activation == "sigmoid":
            return torch.sigmoid(raw)
        if activation == "softmax":
            return torch.softmax(raw, dim=1)[:, int(self.card.outputs[0].background) :]
        return raw

    def threshold_logits(self) -> list[float] | None:
        """Each class's threshold in the unit of the explained score, or None without a common one.

        Classes are ranked by how far they are above their own threshold.
        """
        if self.card.outputs[0].activation != "sigmoid":
            return None
        thresholds = torch.tensor([item.threshold for item in self.card.classes])
        return [float(value) for value in torch.logit(thresholds)]


def exposing(model: onnx.ModelProto, tensor: str) -> bytes:
    """The model, serialised, with one of its tensors as an output if it is none yet."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    if tensor not in {item.name for item in shown.graph.output}:
        known = onnx.shape_inference.infer_shapes(model).graph.value_info
        shown.graph.output.append(next(item for item in known if item.name == tensor))
    data: bytes = shown.SerializeToString()
    return data


def _check_input(card: ModelCard, model: onnx.ModelProto) -> None:
    initialised = {item.name for item in model.graph.initializer}
    found = {item.name: item for item in model.graph.input if item.name not in initialised}
    wanted = {item.name for item in card.inputs}
    if set(found) != wanted:
        raise ModelCardError(
            f"model {card.name}: inputs {sorted(found)} in the file, {sorted(wanted)} on the card"
        )
    if len(card.inputs) > 1:
        raise ModelCardError(
            f"model {card.name}: inputs {sorted(wanted)}; a model with one input, the image, is "
            "served: make the others constants of the file"
        )
    spec = card.inputs[0]
    shape = _shape(found[spec.name])
    if shape[1:] != [spec.channels, *spec.size]:
        raise ModelCardError(
            f"model {card.name}: input {spec.name!r} is {shape} in the file; the card's size "
            f"{list(spec.size)} needs [batch, {spec.channels}, {', '.join(map(str, spec.size))}]"
        )
    if isinstance(shape[0], int) and spec.kind is not InputKind.VOLUME3D:
        raise ModelCardError(
            f"model {card.name}: input {spec.name!r} has a fixed batch of {shape[0]}; export it "
            "with a free one"
        )
    if isinstance(shape[0], int) and shape[0] != 1:
        raise ModelCardError(
            f"model {card.name}: input {spec.name!r} has a fixed batch of {shape[0]}; a volume is "
            "run alone: export it with a free batch, or with 1"
        )


def _check_output(card: ModelCard, model: onnx.ModelProto) -> None:
    found = {item.name: item for item in model.graph.output}
    spec = card.outputs[0]
    if len(card.outputs) > 1:
        names = [item.name for item in card.outputs]
        raise ModelCardError(
            f"model {card.name}: outputs {names} on the card; one is served: leave out the others, "
            "or make a card for each"
        )
    if spec.name not in found:
        raise ModelCardError(
            f"model {card.name}: outputs {sorted(found)} in the file, {spec.name!r} on the card"
        )
    shape = _shape(found[spec.name])
    grid = card.inputs[0].size if spec.kind == "segmentation" else ()
    if shape[1:] != [spec.channels, *grid]:
        wanted = ", ".join(map(str, ("batch", spec.channels, *grid)))
        raise ModelCardError(
            f"model {card.name}: output {spec.name!r} is {shape} in the file; the card's "
            f"{len(spec.classes)} classes need [{wanted}]"
        )


def _shape(item: onnx.ValueInfoProto) -> list[int | str]:
    if not item.type.HasField("tensor_type"):
        raise ModelCardError(f"{item.name} is no tensor; only tensors are served")
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in item.type.tensor_type.shape.dim
    ]
