"""The derivative of every operator: one short function each, grouped by kind.

``GRADIENT`` is the table. A rule is called as ``rule(call, *cotangents of the outputs)`` and gives
the cotangents of the inputs; see `dicom_xai.autodiff.call.Call` for what it sees. A new
operator is one function, one line in its module's ``RULES`` and one line in the test table.
"""

from __future__ import annotations

from ..call import Rules
from . import (
    activation,
    attention,
    elementwise,
    guided,
    index,
    layout,
    linear,
    norm,
    pooling,
    quantised,
    recurrent,
    reduce,
    resample,
)

GRADIENT: Rules = {
    **elementwise.RULES,
    **activation.RULES,
    **linear.RULES,
    **pooling.RULES,
    **reduce.RULES,
    **layout.RULES,
    **norm.RULES,
    **index.RULES,
    **resample.RULES,
    **quantised.RULES,
    **recurrent.RULES,
}
"""The plain gradient: vector-Jacobian products, checked against finite differences."""

GUIDED = guided.replaced(GRADIENT, guided.guided)
"""Guided backpropagation."""

DECONVNET = guided.replaced(GRADIENT, guided.deconvnet)
"""Deconvnet."""

ATTNLRP = attention.replaced(GRADIENT)
"""AttnLRP; LRP's own tables are built per graph, see `relevance`."""
