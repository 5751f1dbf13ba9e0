"""One graph on one device, with proof of where it runs."""

from __future__ import annotations

import subprocess
import sys

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from dicom_xai.errors import ConfigError
from dicom_xai.infer import session as session_module
from dicom_xai.infer.session import Device, Session, resolve_device

CPU = Device("cpu")


def graph(*nodes: onnx.NodeProto) -> bytes:
    made = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
    )
    opset = helper.make_opsetid("", 18)
    return helper.make_model(made, opset_imports=[opset], ir_version=10).SerializeToString()


RELU = helper.make_node("Relu", ["x"], ["y"], name="relu")


def test_outputs_have_the_batch_of_the_input():
    session = Session(graph(RELU), CPU)
    x = torch.tensor([[-1.0, 0.0, 2.0], [3.0, -4.0, 5.0]])
    assert torch.equal(session.run({"x": x})["y"], x.clamp(min=0))


def test_an_input_that_is_not_contiguous_gives_the_same_answer():
    session = Session(graph(RELU), CPU)
    x = torch.arange(6.0).reshape(3, 2).T - 3
    assert torch.equal(session.run({"x": x})["y"], x.clamp(min=0))


def test_each_node_is_known_with_its_provider():
    session = Session(graph(RELU), CPU)
    assert session.nodes_by_provider() == {"CPUExecutionProvider": 1}
    assert session.nodes_by_provider(["relu"]) == {"CPUExecutionProvider": 1}
    assert session.nodes_by_provider(["another"]) == {}


def test_a_graph_that_does_not_load_is_a_config_error():
    with pytest.raises(ConfigError, match="refuses the graph on cpu"):
        Session(b"no model", CPU)


def test_auto_is_the_cpu_on_a_machine_without_nvidia_device():
    if session_module.Path("/dev/nvidia0").exists():
        assert resolve_device("auto").name == "cuda:0"
    else:
        assert resolve_device("auto") == CPU


@pytest.mark.promise("G1")
def test_a_gpu_that_is_asked_for_and_not_there_is_an_error_and_never_the_cpu():
    with pytest.raises(ConfigError, match=r"cuda:7.*devices: \[cpu\]"):
        resolve_device("cuda:7")


def test_the_cpu_is_never_lost():
    assert not CPU.is_lost


@pytest.mark.gpu
def test_a_device_is_lost_once_a_kernel_has_failed_on_it():
    told = """
import torch
from dicom_xai.infer.session import Device
device = Device("cuda:0")
print(device.is_lost)
torch.zeros(1, device=device.torch)[torch.tensor([7], device=device.torch)]
print(device.is_lost)
"""
    ran = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["False", "True"]


def test_a_device_knows_torchs_word_and_its_index():
    device = Device("cuda:3")
    assert (device.kind, device.index, str(device.torch)) == ("cuda", 3, "cuda:3")
