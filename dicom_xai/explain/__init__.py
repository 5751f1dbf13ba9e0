"""Why the model said so: a model with its explanation compiled in, and what comes of its maps.

`gradient` (methods compiled into the graph; `cache` keeps the graphs), `served` (a loaded model
that predicts and explains in one run, proved by `selftest`), `heatmap` (raw maps to the card's
absolute scale), `mapping` (those onto the source's pixels), `choose` (which explainer the deadline
allows, by `costs`).
"""

from __future__ import annotations

from collections.abc import Mapping

from dicom_xai.explain.gradient import CompiledExplainer

#: Every explainer a route may name.
EXPLAINERS: Mapping[str, CompiledExplainer] = {
    name: CompiledExplainer(name) for name in ("grad-cam",)
}
