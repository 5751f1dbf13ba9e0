"""Why the model said so: a model with its explanation compiled in, and what comes of its maps.

`gradient` (methods compiled into the graph), `served` (a loaded model that predicts and explains in
one run, self-tested), `heatmap` (raw maps to the card's absolute scale, and onto the source),
`choose` (which explainer the deadline allows).
"""

from __future__ import annotations

from collections.abc import Mapping

from dicom_xai.explain.gradient import CompiledExplainer

#: Every explainer a route may name.
EXPLAINERS: Mapping[str, CompiledExplainer] = {
    name: CompiledExplainer(name) for name in ("grad-cam",)
}
