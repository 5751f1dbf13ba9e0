"""Recurrent layers: refused by name, with what to do."""

from __future__ import annotations

from ..call import Call, Cotangents, Rules
from ..emit import Tensor


def recurrent(n: Call, *gs: Tensor | None) -> Cotangents:
    """A state goes from step to step inside of one node, where nothing can be read."""
    raise n.refuse(
        "a recurrent layer has no derivative here; name a layer behind it, use eigen-cam, which "
        "needs none, or export the layer unrolled step by step"
    )


RULES: Rules = {
    "LSTM": recurrent,
    "GRU": recurrent,
    "RNN": recurrent,
}
