"""What a model must show before it serves: same prediction, right gradient, nodes in place.

The gradient is judged by finite differences of the plain model: for a random mask m of an image x,
the derivative of the top class's score along ``m * x`` is the sum of ``m`` times
input-times-gradient. The masks have both signs and no mean, or only the map's sum would be judged,
which a shifted map has too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dicom_xai import autodiff
from dicom_xai.autodiff.methods import METHODS
from dicom_xai.config import ModelCard
from dicom_xai.errors import ConfigError, ModelCardError, UnsupportedOperatorError
from dicom_xai.explain.gradient import MAP_OUTPUTS, ExplainedGraph
from dicom_xai.infer.model import Model, exposing
from dicom_xai.infer.session import CPU_PROVIDER, Device, Session

#: On other devices than the CPU the compiled graph may fuse differently.
RELATIVE_TOLERANCE = 1e-4
#: Directions in which the gradient is compared.
DIRECTIONS = 16
#: Steps of the finite differences, as parts of the image. Kinks of ReLU lie within a long one; in a
#: short one a large image's derivative is below the rounding of its score. A wrong map fails all.
_STEPS = (1e-3, 1e-2, 1e-4)
#: Of the derivatives' root mean square. Right maps of untrained networks, which have most kinks,
#: leave up to 0.1 at their best step; a fifth too much is 0.2, a shift by one pixel 0.4 and more.
GRADIENT_TOLERANCE = 0.15
_IMAGES = 3


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What was seen when the compiled graph ran beside the plain one.

    Attributes
    ----------
    largest_difference : float
        Of the raw outputs of both graphs, absolute.
    is_bit_identical : bool
    backward_nodes : mapping
        Provider to how many of the appended nodes it took.
    """

    largest_difference: float
    is_bit_identical: bool
    backward_nodes: Mapping[str, int]


def compare(plain: Model, explained: Session, graph: ExplainedGraph) -> SelfTest:
    """Run both graphs on the same noise; refuse when the prediction changed or a map is not finite.

    Raises
    ------
    ModelCardError
        On the CPU any differing bit; elsewhere more than `RELATIVE_TOLERANCE` of the largest value.
    ConfigError
        Appended nodes fell back from the device to the CPU.
    """
    count = min(_IMAGES, plain.largest_batch)
    images = {plain.input_name: noise(plain.card, count, plain.device)}
    before = plain.session.run(images, [plain.output_name])[plain.output_name]
    outputs = explained.run(images, [plain.output_name, *MAP_OUTPUTS])
    after = outputs[plain.output_name]
    difference = float((before - after).abs().max())
    is_identical = bool(torch.equal(before, after))
    allowed = 0.0
    if plain.device.kind != "cpu":
        allowed = RELATIVE_TOLERANCE * float(before.abs().max())
    name = f"model {plain.card.name} with {graph.method}"
    if not (is_identical or difference <= allowed):
        raise ModelCardError(
            f"{name}: the prediction changed by {difference:g} on {plain.device.name}, "
            f"{allowed:g} is allowed"
        )
    if not bool(torch.isfinite(outputs["attribution"]).all()):
        raise ModelCardError(f"{name}: the map of the self-test is not finite")
    taken = explained.nodes_by_provider(graph.added_nodes)
    if plain.device.kind != "cpu" and taken.get(CPU_PROVIDER):
        raise ConfigError(
            f"{name}: {taken[CPU_PROVIDER]} of the appended nodes fell back to the CPU on "
            f"{plain.device.name}"
        )
    return SelfTest(difference, is_identical, taken)


def gradient_error(plain: Model, threads: int = 0) -> float:
    """How far the compiled input gradient is from finite differences of the plain model.

    Returns
    -------
    float
        See `map_error`.

    Raises
    ------
    ModelCardError
        More than `GRADIENT_TOLERANCE`: maps of this model would be wrong.
    ConfigError
        The whole model cannot be differentiated, or is one in 8 bits, whose differences are steps;
        the message names the operator.
    """
    compiled = autodiff.compile(
        plain.proto,
        "input-x-gradient",
        select=autodiff.BySeed(),
        output=plain.output_name,
        image=plain.input_name,
    )
    if autodiff.STRAIGHT_THROUGH in compiled.report.warnings:
        steps = next(node for node in plain.proto.graph.node if node.op_type == "QuantizeLinear")
        opset = next(item.version for item in plain.proto.opset_import if not item.domain)
        remedy = "its steps have no derivative, so no difference of scores can judge the gradient"
        raise UnsupportedOperatorError(steps.op_type, "", opset, steps.name, remedy)
    score = compiled.report.output  # before a final activation
    # Differences of scores do not bear TF32's 10 bits: on a GPU both graphs run without it here.
    # Of the map that is served with it only `compare` sees something: that it is finite.
    session = Session(compiled.model.SerializeToString(), plain.device, threads, tf32=False)
    forward = plain.session
    if score != plain.output_name or plain.device.kind != "cpu":
        forward = Session(exposing(plain.proto, score), plain.device, threads, tf32=False)
    image = noise(plain.card, 1, plain.device)
    seed = _seed_of_top(forward.run({plain.input_name: image}, [score])[score])
    feeds = {plain.input_name: image, "seed": seed}
    product = session.run(feeds, ["attribution"])["attribution"][0]

    def scored(moved: torch.Tensor) -> float:
        return float((forward.run({plain.input_name: moved}, [score])[score].double() * seed).sum())

    error = map_error(product, image, scored)
    if not error <= GRADIENT_TOLERANCE:
        raise ModelCardError(
            f"model {plain.card.name}: the compiled gradient differs from finite differences by "
            f"{error:.1%} of the derivatives, {GRADIENT_TOLERANCE:.0%} is allowed"
        )
    return error


def map_error(
    product: torch.Tensor, image: torch.Tensor, scored: Callable[[torch.Tensor], float]
) -> float:
    """How far a map of input times gradient is from differences of the score.

    Parameters
    ----------
    product : Tensor, (1, *size)
        Summed over the image's channels.
    image : Tensor, (1, channels, *size)
    scored : callable
        The score of such an image.

    Returns
    -------
    float
        Root mean square of the differences over `DIRECTIONS` random directions, as a part of that
        of the derivatives; at the step where it is least.
    """
    masks = torch.randn(
        (DIRECTIONS, 1, *image.shape[2:]), generator=torch.Generator().manual_seed(20262)
    ).to(image)
    expected = (masks.double() * product.double()).flatten(1).sum(dim=1).cpu()
    least, rounding = float("inf"), abs(scored(image)) * torch.finfo(torch.float32).eps
    for step in _STEPS:
        ends = [[scored(image + sign * step * mask * image) for sign in (1, -1)] for mask in masks]
        measured = torch.tensor([up - down for up, down in ends], dtype=torch.float64) / (2 * step)
        # what the score's rounding alone may make of the differences is no error of the map
        unseen = math.sqrt(DIRECTIONS) * rounding / (2 * step) / GRADIENT_TOLERANCE
        size = max(float(measured.norm()), unseen, 1e-12)
        least = min(least, float((measured - expected).norm()) / size)
        if least <= GRADIENT_TOLERANCE / 2:
            break
    return least


def _seed_of_top(score: torch.Tensor) -> torch.Tensor:
    """A cotangent that picks the best class, of a segmentation everywhere."""
    means = score.flatten(2).mean(dim=2) if score.dim() > 2 else score
    seed = torch.zeros_like(score)
    seed[:, int(means[0].argmax())] = 1.0
    return seed


def applicability(plain: Model) -> dict[str, str]:
    """Every method that autodiff knows, and why it does not apply here; empty where it does."""
    reasons: dict[str, str] = {}
    for name in METHODS:
        try:
            autodiff.compile(
                plain.proto,
                name,
                layer=plain.card.heatmap.layer,
                output=plain.output_name,
                image=plain.input_name,
                box=plain.card.inputs[0].scaling,
            )
        except ConfigError as error:
            reasons[name] = str(error)
        else:
            reasons[name] = ""
    return reasons


def noise(card: ModelCard, batch: int, device: Device) -> torch.Tensor:
    """Noise over the input's range, the same at every load: ``(batch, channels, *size)``."""
    spec = card.inputs[0]
    low, high = spec.scaling
    generator = torch.Generator().manual_seed(20261)
    made = torch.rand((batch, spec.channels, *spec.size), generator=generator)
    return (made * (high - low) + low).to(device.torch)
