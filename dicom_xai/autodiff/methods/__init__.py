"""What is made of the gradients: one function per method, grouped by what it looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from ..call import Rules
from ..emit import Tensor
from ..rules import GRADIENT
from . import cam


@dataclass(frozen=True)
class Method:
    """A way to make a map.

    Attributes
    ----------
    make : callable
        ``make(x, g)``: from the tensor that is looked at and the score's cotangent there, the map
        ``(batch, 1, *spatial)``.
    rules : mapping
        How derivatives are taken on the way back.
    """

    make: Callable[[Tensor, Tensor], Tensor]
    rules: Rules


METHODS = MappingProxyType(
    {
        "grad-cam": Method(cam.grad_cam, GRADIENT),
    }
)
"""Methods by the name under which a card or a command asks for them."""
