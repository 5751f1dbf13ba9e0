"""The stages in flow order, and the deadline that travels through them.

A stage's name is its package's name and its metric label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """Where a study is. The order of the members is the order of the flow."""

    RECEIVE = "receive"  #: last byte of an instance read until its row is durable
    ROUTE = "route"  #: matching one instance's header against all routes
    QUEUE = "queue"  #: job ready until a worker claims it
    DECODE = "decode"
    INFER = "infer"  #: the one ONNX Runtime run: prediction and raw map
    EXPLAIN = "explain"  #: raw map to the absolute scale
    ENCODE = "encode"
    OUTBOX = "outbox"  #: results durable until the sender claims the first
    DELIVER = "deliver"  #: one object, C-STORE request to response


@dataclass(frozen=True, slots=True)
class Deadline:
    """The moment by which a unit should be triaged, on a monotonic clock.

    Parameters
    ----------
    at_s : float
        Seconds of `clock`.
    clock : callable
        Gives seconds, monotonic; an argument so that tests can move it.
    """

    at_s: float
    clock: Callable[[], float]

    @property
    def remaining_s(self) -> float:
        """Seconds left; negative once the deadline has passed."""
        return self.at_s - self.clock()
