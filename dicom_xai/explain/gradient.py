"""Explainers that are compiled into the model's graph: one run gives prediction and maps."""

from __future__ import annotations

from dataclasses import dataclass

from dicom_xai import autodiff
from dicom_xai.infer.model import Model

#: What a compiled graph gives besides the model's own output.
MAP_OUTPUTS = ("attribution", "attribution_class")


@dataclass(frozen=True, slots=True)
class ExplainedGraph:
    """A graph whose run gives the model's outputs and, besides, maps.

    Outputs added: `attribution`, ``(batch, targets, *map grid)`` float32 in the method's own
    unit, and `attribution_class`, ``(batch, targets)`` int64.
    """

    data: bytes  #: a serialised ONNX model
    method: str
    layer: str
    added_nodes: tuple[str, ...]  #: those that hold real numbers: a device has to take them
    equals: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CompiledExplainer:
    """A method of `autodiff` under the name that routes use.

    Parameters
    ----------
    name : str
    """

    name: str

    def explain(self, model: Model, targets: int) -> ExplainedGraph:
        """The model's graph with this explanation appended.

        Parameters
        ----------
        model : Model
        targets : int
            The best `targets` classes of each image are explained.

        Raises
        ------
        UnsupportedOperatorError
            An operator on the way has no gradient rule.
        ConfigError
            The method does not apply to this model; the message says why.
        """
        compiled = autodiff.compile(
            model.proto,
            self.name,
            select=autodiff.TopClasses(targets, model.threshold_logits(), model.is_exclusive),
            layer=model.card.heatmap.layer,
            output=model.output_name,
            image=model.input_name,
        )
        report = compiled.report
        return ExplainedGraph(
            data=compiled.model.SerializeToString(),
            method=report.method,
            layer=report.layer,
            added_nodes=report.on_device,
            equals=report.equals,
            warnings=report.warnings,
        )
