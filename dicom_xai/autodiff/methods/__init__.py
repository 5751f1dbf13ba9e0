"""What is made of the gradients: one function per method, grouped by what it looks at."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from ..emit import Tensor
from . import cam, gradient
from .attention import AttentionRollout
from .path import ExpectedGradients, IntegratedGradients, SmoothGrad
from .question import Answer, Method, Question
from .relevance import LayerwiseRelevance, attn_lrp

__all__ = [
    "METHODS",
    "AttentionRollout",
    "ExpectedGradients",
    "IntegratedGradients",
    "LayerwiseRelevance",
    "Method",
    "Parametrised",
    "SmoothGrad",
    "method_of",
]

PERSUASIVE = (
    "guided maps hardly change when the model's weights are randomised (Adebayo et al. 2018): they "
    "show edges of the image as much as reasons of the model"
)
ONE_COMPONENT = (
    "a first principal component may hold little of the variance: see explained_variance"
)
CLASSLESS = "the map is the same for every class"
SIGNED_SUM = (
    "this layer holds negative numbers: channels whose sum is negative turn their weight's sign "
    "round; a layer after Relu is safe"
)

FromLayer = Callable[[Tensor, Tensor], Tensor]


def at_layer(make: FromLayer, share: FromLayer | None = None) -> Callable[[Question], Answer]:
    """A method of the layer and its gradient; `share` is the variance that it explains."""

    def explain(q: Question) -> Answer:
        a, g = q.features(), q.feature_gradient()
        return Answer(make(a, g), {} if share is None else {"explained_variance": share(a, g)})

    return explain


def eigen_cam(q: Question) -> Answer:
    """Needs no gradient, so it works where a rule is missing."""
    a = q.features()
    return Answer(cam.eigen_cam(a, a), {"explained_variance": cam.eigen_share(a, a)})


POOLED = ("cam", "grad-cam", "xgrad-cam", "hires-cam")
"""One map, up to a positive factor (and Relu), where the score is the pooled layer's affine map.

All but the first where it is any function of the pooled layer.
"""


def others(name: str) -> tuple[str, ...]:
    """The rest of a family of equal methods."""
    return tuple(item for item in POOLED if item != name)


METHODS = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("cam", "layer", at_layer(cam.cam), others("cam"), needs_pooled_linear=True),
            Method("grad-cam", "layer", at_layer(cam.grad_cam), others("grad-cam")),
            Method("grad-cam++", "layer", at_layer(cam.grad_cam_plus_plus)),
            Method(
                "xgrad-cam", "layer", at_layer(cam.xgrad_cam), others("xgrad-cam"),
                warnings_when_signed=(SIGNED_SUM,),
            ),
            Method(
                "hires-cam", "layer", at_layer(cam.hires_cam), others("hires-cam"),
                sums_over_channels=True,
            ),
            Method("layer-cam", "layer", at_layer(cam.layer_cam)),
            Method("eigen-cam", "layer", eigen_cam, warnings=(CLASSLESS, ONE_COMPONENT)),
            Method(
                "eigengrad-cam", "layer", at_layer(cam.eigen_grad_cam, cam.eigen_grad_share),
                sums_over_channels=True, warnings=(ONE_COMPONENT,),
            ),
            Method("saliency", "image", gradient.saliency),
            Method(
                "input-x-gradient", "image", gradient.input_x_gradient,
                equals_when_homogeneous=("lrp-epsilon", "attn-lrp"),
            ),
            Method(
                "guided-backpropagation", "image", gradient.guided_backpropagation,
                warnings=(PERSUASIVE,),
            ),
            Method("deconvnet", "image", gradient.deconvnet, warnings=(PERSUASIVE,)),
            Method("guided-grad-cam", "both", gradient.guided_grad_cam, warnings=(PERSUASIVE,)),
            Method("integrated-gradients", "image", IntegratedGradients()),
            Method("smoothgrad", "image", SmoothGrad()),
            Method("gradient-attention-rollout", "image", AttentionRollout()),
            Method("lrp", "image", LayerwiseRelevance()),
            Method(
                "lrp-epsilon", "image", LayerwiseRelevance("epsilon"),
                equals_when_homogeneous=("input-x-gradient", "attn-lrp"),
            ),
            Method("lrp-epsilon-plus", "image", LayerwiseRelevance("epsilon-plus")),
            Method("lrp-alpha-beta", "image", LayerwiseRelevance("alpha-beta")),
            Method(
                "lrp-epsilon-gamma-box", "image", LayerwiseRelevance("epsilon-gamma-box"),
                takes_box=True,
            ),
            Method("deep-taylor", "image", LayerwiseRelevance("deep-taylor"), takes_box=True),
            Method(
                "attn-lrp", "image", attn_lrp,
                equals_when_homogeneous=("input-x-gradient", "lrp-epsilon"),
            ),
        )
    }
)  # fmt: skip
"""Methods by the name under which a card or a command asks for them."""


Parametrised = (
    IntegratedGradients | SmoothGrad | ExpectedGradients | LayerwiseRelevance | AttentionRollout
)
"""Methods that can be given parameters of their own."""

NAMES = {
    IntegratedGradients: "integrated-gradients",
    SmoothGrad: "smoothgrad",
    ExpectedGradients: "expected-gradients",
    AttentionRollout: "gradient-attention-rollout",
}


def method_of(given: str | Parametrised) -> Method | None:
    """A method by name, or one with parameters of its own; None for a name that is unknown."""
    if isinstance(given, str):
        return METHODS.get(given)
    if isinstance(given, LayerwiseRelevance):
        return Method(f"lrp-{given.composite}", "image", given)
    return Method(NAMES[type(given)], "image", given)
