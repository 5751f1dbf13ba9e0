"""Where a transformer's attention, weighed by the class, comes from."""

from __future__ import annotations

from ...errors import ConfigError
from ..emit import Tensor
from ..layers import path
from ..positions import Layout, layouts
from .question import Answer, Question


def gradient_attention_rollout(q: Question) -> Answer:
    """R <- R + Abar R over the layers, Abar = mean over heads of (A dA)^+; R starts as identity.

    Chefer et al. 2021, "Generic Attention-model Explainability", equations 5 and 6. The row of the
    class token is read; without one, the mean of all rows.
    """
    names, layout = attentions(q)
    assert layout.grid is not None
    rollout: Tensor | None = None
    for name in names:
        a = q.graph.tensor(name)
        weighed = q.graph.op("Relu", a * q.gradient(a)).mean([1], keep=False)
        # The identity that R starts as is added by hand: R = I + S, so S <- S + Abar + Abar S.
        rollout = weighed if rollout is None else rollout + weighed + weighed @ rollout
    assert rollout is not None
    row = rollout.slice(1, 0, 1) if layout.prefix else rollout.mean([1])
    return Answer(row.slice(2, layout.prefix).reshape(0, 1, *layout.grid), {})


def attentions(q: Question) -> tuple[list[str], Layout]:
    """Attention probabilities over all tokens, first layer first, and where the tokens lie.

    Raises
    ------
    ConfigError
        There are none: no transformer, attention within windows, or fused attention, which does
        not show its probabilities.
    """
    flat = [item for item in layouts(q.graph, q.image.name).values() if item.grid is not None]
    nodes = path(q.graph, q.image.name, q.scores.tensor.name)
    for layout in flat[-1:]:
        tokens = (layout.count(()) or 0) + layout.prefix
        found = [
            node.output[0]
            for node in nodes
            if node.op_type == "Softmax"
            and len(shape := q.graph.tensor(node.output[0]).shape) == 4
            and shape[-2:] == (tokens, tokens)
        ]
        if found:
            return found, layout
    raise ConfigError(
        "the model shows no attention over the whole image: a rollout needs a transformer without "
        "windows, exported without the fused Attention operator (opset 22 or older); use grad-cam"
    )
