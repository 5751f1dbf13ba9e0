"""Any model: plain forward, with Grad-CAM, with the input gradient; the same by torch and peers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from rich.table import Table
from torch import nn

from dicom_xai import autodiff
from dicom_xai.infer.session import Device, Session
from tests.bench.memory import peak_bytes
from tests.bench.timing import interleaved

ROUNDS = 11
#: One, for all: with more, the idle threads of one contestant spin into the time of the next.
THREADS = 1


@dataclass(frozen=True)
class Network:
    """One of MONAI's, and the layer that a CAM looks at."""

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    layer: str
    is_convolutional: bool = True  #: the peers' CAMs know no other layers


def run(folder: Path) -> Table:
    """Median milliseconds and ratios, and what each contestant's first run takes of memory."""
    table = Table(title="one image, CPU, random weights, medians; x = of the plain forward in ORT")
    for heading in ("network", "contestant"):
        table.add_column(heading)
    for heading in ("ms", "x plain", "x ours", "peak MB"):
        table.add_column(heading, justify="right")
    torch.set_num_threads(THREADS)
    for network in networks():
        contestants = _contestants(network, folder)
        peaks = {name: peak_bytes(contestant)[0] for name, contestant in contestants.items()}
        times = interleaved(contestants, ROUNDS, warm_up=1)
        plain = times["ours: plain forward"]
        for contestant, seconds in times.items():
            mine = times.get(f"ours: {contestant.partition(': ')[2]}")
            against = f"{seconds / mine:.2f}" if mine else ""
            row = (f"{seconds * 1e3:.1f}", f"{seconds / plain:.2f}", against)
            table.add_row(network.name, contestant, *row, f"{peaks[contestant] / 1e6:.0f}")
    return table


def networks() -> list[Network]:
    """Classifiers of MONAI, 2D and 3D."""
    from monai.networks import nets

    return [
        Network(
            "DenseNet-121, 224 x 224",
            lambda: nets.DenseNet121(spatial_dims=2, in_channels=1, out_channels=3),
            (224, 224),
            "class_layers.relu",
        ),
        Network(
            "ResNet-50, 112 x 112",  # MONAI's stem keeps stride 1: the features of 224 x 224
            lambda: nets.resnet50(spatial_dims=2, n_input_channels=1, num_classes=3),
            (112, 112),
            "layer4",
        ),
        Network(
            "ViT-B/16, 224 x 224",
            lambda: nets.ViT(
                *(1, (224, 224), (16, 16)),
                spatial_dims=2,
                classification=True,
                num_classes=3,
                post_activation="none",
            ),
            (224, 224),
            "blocks.11.norm1",
            is_convolutional=False,
        ),
        Network(
            "DenseNet-121 3D, 64 x 64 x 64",
            lambda: nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=3),
            (64, 64, 64),
            "class_layers.relu",
        ),
    ]


def _contestants(network: Network, folder: Path) -> dict[str, Callable[[], object]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, MONAI's and captum's own
        from captum.attr import LayerGradCam, Saliency
        from monai.visualize import GradCAM, VanillaGrad

        torch.manual_seed(0)
        twin = _LogitsOnly(network.make()).eval()
        image = torch.rand(1, 1, *network.size)
        path = folder / "model.onnx"
        program = torch.onnx.export(
            twin,
            (image,),
            dynamo=True,
            opset_version=18,
            input_names=["image"],
            output_names=["logits"],
            verbose=False,
        )
        program.save(str(path))
    model = onnx.load(path)
    with torch.no_grad():
        top = int(twin(image).argmax())
    # Torch keeps what a weight's gradient would need even when none is asked for.
    frozen = copy.deepcopy(twin).requires_grad_(False)
    feeds = {"image": image}
    device = Device("cpu")

    def session(method: str) -> Session:
        compiled = autodiff.compile(model, method, select=autodiff.TopClasses(1))
        return Session(compiled.model.SerializeToString(), device, THREADS)

    plain, gradient = Session(model.SerializeToString(), device, THREADS), session("saliency")
    cam, layer = session("grad-cam"), f"net.{network.layer}"
    contestants: dict[str, Callable[[], object]] = {
        "ours: plain forward": lambda: plain.run(feeds),
        "torch: plain forward": lambda: _forward(twin, image),
        "ours: input gradient": lambda: gradient.run(feeds),
        "torch: input gradient": lambda: _gradient(frozen, image, top),
        "captum: input gradient": lambda: Saliency(twin).attribute(
            image.clone().requires_grad_(), target=top
        ),
        "MONAI: input gradient": lambda: VanillaGrad(twin)(image.clone(), index=top),
        "ours: Grad-CAM": lambda: cam.run(feeds),
        "torch: Grad-CAM": lambda: _grad_cam(frozen, layer, image, top),
    }
    if network.is_convolutional:
        captum, monai = LayerGradCam(twin, twin.get_submodule(layer)), GradCAM(twin, layer)
        contestants |= {
            "captum: Grad-CAM": lambda: captum.attribute(image, target=top, relu_attributions=True),
            "MONAI: Grad-CAM": lambda: monai(x=image, class_idx=top),
        }
    return contestants


class _LogitsOnly(nn.Module):
    """A network without the hidden states that MONAI's ViT gives besides."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.net(x)
        logits: torch.Tensor = made[0] if isinstance(made, tuple) else made
        return logits


def _forward(twin: nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = twin(image)
    return made


def _gradient(twin: nn.Module, image: torch.Tensor, top: int) -> torch.Tensor:
    x = image.clone().requires_grad_()
    (made,) = torch.autograd.grad(twin(x)[0, top], x)
    return made


def _grad_cam(twin: nn.Module, layer: str, image: torch.Tensor, top: int) -> torch.Tensor:
    """As one would write it: the head's gradient at the layer, which is made to need one."""
    kept: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, made: torch.Tensor) -> torch.Tensor:
        kept.append(made.requires_grad_())
        return made

    hook = twin.get_submodule(layer).register_forward_hook(keep)
    try:
        score = twin(image)[0, top]
    finally:
        hook.remove()
    (features,) = kept
    (grad,) = torch.autograd.grad(score, features)
    channels = 1 if features.dim() > 3 else 2  # tokens have theirs last
    places = [axis for axis in range(1, features.dim()) if axis != channels]
    return (grad.mean(places, keepdim=True) * features).sum(channels).clamp(min=0)
