"""One ONNX Runtime session on one device, with proof of where each node runs.

ONNX Runtime falls back to the CPU with a warning when a provider is missing. Here that is an error:
the session is asked which provider took each node, and a GPU session in which CUDA took none, or in
which ONNX Runtime dropped CUDA, is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from dicom_xai.errors import ConfigError, DeviceBusyError

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

_TORCH_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(int64)": torch.int64,
}
_NUMPY_NAMES = {torch.float32: "float32", torch.int64: "int64"}
#: ONNX Runtime's own errors: they have no common base but Exception.
_ORT_ERRORS = (
    RuntimeError,
    ort_state.EPFail,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
_OUT_OF_MEMORY = re.compile(r"out of memory|Failed to allocate|CUBLAS_STATUS_ALLOC", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Device:
    """Where a worker computes."""

    name: str  #: ``cpu`` or ``cuda:N``: torch's own word

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.name.partition(":")[0]

    @property
    def index(self) -> int:
        """Which of several."""
        return int(self.name.partition(":")[2] or 0)

    @property
    def torch(self) -> torch.device:
        """The same, for tensors."""
        return torch.device(self.name)

    @property
    def is_lost(self) -> bool:
        """Whether nothing runs on it any more in this process.

        A failed kernel spoils the process's context: CUDA then answers every call with its error
        (CUDA Runtime API, cudaErrorIllegalAddress and cudaErrorAssert).
        """
        if self.kind == "cpu":
            return False
        try:
            torch.cuda.synchronize(self.torch)
        except RuntimeError:
            return True
        return False


def resolve_device(asked: str) -> Device:
    """The device that a config word means on this machine.

    Parameters
    ----------
    asked : str
        ``cpu``, ``cuda:N``, or ``auto``: the first GPU when the machine has an NVIDIA device, else
        the CPU.

    Raises
    ------
    ConfigError
        A GPU is asked for, or is there, and CUDA does not load: never a silent CPU.
    """
    has_nvidia = Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()
    name = ("cuda:0" if has_nvidia else "cpu") if asked == "auto" else asked
    device = Device(name)
    if device.kind == "cuda":
        if CUDA_PROVIDER not in ort.get_available_providers():
            raise ConfigError(
                f"device {asked!r}: this onnxruntime has no {CUDA_PROVIDER}; install the [gpu] "
                "extra instead of [cpu], or write `devices: [cpu]`"
            )
        if not torch.cuda.is_available() or device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"device {asked!r}: torch sees {torch.cuda.device_count()} CUDA devices; check the "
                "driver, or write `devices: [cpu]`"
            )
    return device


class Session:
    """A loaded graph, bound to a device.

    Parameters
    ----------
    model : bytes
        A serialised ONNX model.
    device : Device
    threads : int
        Of the CPU provider within one node; 0 lets ONNX Runtime choose.
    tf32 : bool
        Whether a GPU may round the factors of products to 10 bits (the provider's `use_tf32`).

    Raises
    ------
    ConfigError
        The graph does not load, or the device was not taken.
    """

    def __init__(
        self, model: bytes, device: Device, threads: int = 0, *, tf32: bool = True
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            self._session = ort.InferenceSession(
                model, sess_options=options, providers=_providers(device, tf32=tf32)
            )
        except (*_ORT_ERRORS, ValueError) as error:
            raise ConfigError(f"ONNX Runtime refuses the graph on {device.name}") from error
        self.device = device
        self.inputs = {item.name: tuple(item.shape) for item in self._session.get_inputs()}
        self.outputs = {item.name: tuple(item.shape) for item in self._session.get_outputs()}
        self._dtypes = {
            item.name: item.type
            for item in (*self._session.get_inputs(), *self._session.get_outputs())
        }
        self.providers = self._assignment()
        if device.kind == "cuda" and (
            CUDA_PROVIDER not in self._session.get_providers()
            or CUDA_PROVIDER not in self.providers.values()
        ):
            raise ConfigError(
                f"device {device.name}: ONNX Runtime put no node on {CUDA_PROVIDER}; check that "
                "its CUDA and cuDNN libraries load"
            )

    def nodes_by_provider(self, names: Sequence[str] | None = None) -> Mapping[str, int]:
        """How many nodes each provider took; of these nodes only, where names are given.

        Nodes that ONNX Runtime folded or fused away are counted for nobody.
        """
        chosen = self.providers if names is None else {n: self.providers.get(n, "") for n in names}
        counts = Counter(provider for provider in chosen.values() if provider)
        return dict(counts)

    def run(
        self, feeds: Mapping[str, torch.Tensor], wanted: Sequence[str] = ()
    ) -> dict[str, torch.Tensor]:
        """One run; inputs and outputs stay on the device.

        Parameters
        ----------
        feeds : mapping
            Input name to a tensor on the session's device; a view is made contiguous for the run.
        wanted : sequence of str
            Names of outputs; all by default.

        Returns
        -------
        dict
            Output name to tensor. A free size other than the batch is not served.

        Raises
        ------
        DeviceBusyError
            The device has no memory for it now.
        """
        binding = self._session.io_binding()
        batch = next(iter(feeds.values())).shape[0]
        held = {}
        for name, tensor in feeds.items():
            held[name] = tensor.contiguous()
            self._bind(binding.bind_input, name, held[name])
        outputs = {}
        for name in wanted or self.outputs:
            shape = self.outputs[name]
            sizes = [size if isinstance(size, int) else batch for size in shape]
            dtype = _TORCH_DTYPES[self._dtypes[name]]
            outputs[name] = torch.empty(sizes, dtype=dtype, device=self.device.torch)
            self._bind(binding.bind_output, name, outputs[name])
        if self.device.kind == "cuda":
            torch.cuda.synchronize(self.device.torch)  # what feeds the input ran on torch's stream
        try:
            self._session.run_with_iobinding(binding)
        except _ORT_ERRORS as error:
            if _OUT_OF_MEMORY.search(str(error)):
                busy = f"{self.device.name} has no memory for {batch} images"
                raise DeviceBusyError(busy) from error
            raise
        return outputs

    def _bind(self, bind: Callable[..., None], name: str, tensor: torch.Tensor) -> None:
        bind(
            name,
            self.device.kind,
            self.device.index,
            _NUMPY_NAMES[tensor.dtype],
            list(tensor.shape),
            tensor.data_ptr(),
        )

    def _assignment(self) -> dict[str, str]:
        """Node name to the provider that took it, as ONNX Runtime recorded at load."""
        taken = {}
        for part in self._session.get_provider_graph_assignment_info():
            for node in part.get_nodes():
                taken[node.name] = part.ep_name
        return taken


def _providers(device: Device, *, tf32: bool) -> list[object]:
    if device.kind == "cpu":
        return [CPU_PROVIDER]
    # heuristic search: the exhaustive one tunes anew for each batch size
    cuda = {
        "device_id": str(device.index),
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": str(int(tf32)),
    }
    return [(CUDA_PROVIDER, cuda), CPU_PROVIDER]
