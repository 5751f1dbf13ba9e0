"""Maps on the image's own grid: the gradient itself, and what guides it."""

from __future__ import annotations

from collections.abc import Callable

from ..call import Rules
from ..emit import Tensor
from ..rules import DECONVNET, GUIDED
from .cam import grad_cam
from .question import Answer, Question


def saliency(q: Question) -> Answer:
    """max over channels of |g|; Simonyan et al. 2013, section 3.1."""
    return Answer(strongest(q.opened(q.gradient(q.image))), {})


def strongest(g: Tensor) -> Tensor:
    """The largest magnitude over channels."""
    return g.graph.op("Abs", g).max([1])


def input_x_gradient(q: Question) -> Answer:
    """sum over channels of x g; Shrikumar et al. 2016, section 2."""
    return Answer(q.opened(q.image * q.gradient(q.image)).sum([1]), {})


def modified(rules: Rules) -> Callable[[Question], Answer]:
    """sum over channels of the gradient under other rules."""
    return lambda q: Answer(q.opened(q.gradient(q.image, rules)).sum([1]), {})


guided_backpropagation = modified(GUIDED)
deconvnet = modified(DECONVNET)


def guided_grad_cam(q: Question) -> Answer:
    """Grad-CAM, grown to the image, times guided backpropagation; Selvaraju et al. 2017, 3.2."""
    cam = grown(grad_cam(q.features(), q.feature_gradient()), q.opened(q.image))
    return Answer(cam * q.opened(q.gradient(q.image, GUIDED)).sum([1]), {})


def grown(x: Tensor, like: Tensor) -> Tensor:
    """A map on the grid of an image, linearly interpolated between centres."""
    graph = x.graph
    head = graph.op("Shape", x).slice(0, 0, 2)
    grid = graph.ints([like.size(axis) for axis in range(2, like.rank)])
    return graph.op("Resize", x, None, None, graph.concat([head, grid], 0), mode="linear")
