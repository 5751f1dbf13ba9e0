"""The README's table of methods and architectures says what compiles, no more and no less."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from torch import nn

from dicom_xai import autodiff
from dicom_xai.autodiff.methods import METHODS
from dicom_xai.errors import ConfigError, UnsupportedOperatorError
from tests.make import networks
from tests.make.networks import exported, image, seeded

README = Path(__file__).parents[2] / "README.md"

ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet": (networks.ResNet, (33, 33)),
    "DenseNet": (networks.DenseNet, (32, 32)),
    "EfficientNet": (networks.EfficientNet, (32, 32)),
    "ConvNeXt": (networks.ConvNeXt, (32, 32)),
    "ViT": (networks.ViT, (32, 32)),
    "Swin": (networks.Swin, (32, 32)),
    "U-Net": (networks.UNet, (32, 32)),
    "ResNet 3D": (lambda: networks.ResNet(3), (17, 17, 17)),
}


def table() -> dict[str, dict[str, str]]:
    """The README's table: method to architecture to its cell."""
    lines = [line.strip() for line in README.read_text().splitlines()]
    (start,) = [i for i, line in enumerate(lines) if line.startswith("| method |")]
    heads = [cell.strip() for cell in lines[start].strip("|").split("|")]
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0].strip("`")] = dict(zip(heads[1:], cells[1:], strict=True))
    return rows


def test_the_table_names_every_method_and_architecture():
    rows = table()
    assert list(rows) == list(METHODS)
    assert all(list(row) == list(ARCHITECTURES) for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_method_compiles_where_the_table_says_so_and_nowhere_else(name, tmp_path):
    make, size = ARCHITECTURES[name]
    model = exported(seeded(make()), image(2, 1, *size), "dynamo", 18)
    found, refusals = {}, {}
    for method in METHODS:
        try:
            compiled = autodiff.compile(model, method, box=(-6.0, 6.0))
        except ConfigError as error:
            found[method], refusals[method] = "", error
        else:
            found[method] = "yes"
            assert LAGGING.isdisjoint(new_operators(compiled)), method
    assert found == {method: row[name] for method, row in table().items()}
    works = {method for method, cell in found.items() if cell}
    for method, error in refusals.items():
        words = set(re.findall(r"[\w+-]+", str(error)))
        assert works & words, f"{method}: {error}"
        if isinstance(error, UnsupportedOperatorError):
            assert (error.node, error.op_type) in named(model), f"{method}: {error}"


@pytest.mark.slow
def test_what_a_fused_attention_is_made_of_holds_no_operator_that_providers_lag_behind():
    network = seeded(networks.ViT(fused=True))
    model = exported(network, image(2, 1, 32, 32), "dynamo", 23)
    assert "Attention" in {node.op_type for node in model.graph.node}
    for method in METHODS:
        with suppress(ConfigError):
            assert LAGGING.isdisjoint(new_operators(autodiff.compile(model, method))), method


LAGGING = {"Pad", "ConstantOfShape", "Size"}
"""Operators whose schema keeps changing, so that no new node should be one."""


def new_operators(compiled: autodiff.Compiled) -> set[str]:
    """The kinds of the nodes that were added."""
    added = set(compiled.report.backward)
    return {node.op_type for node in compiled.model.graph.node if node.name in added}


def named(model: onnx.ModelProto) -> set[tuple[str, str]]:
    """The model's nodes and what each is."""
    return {(node.name, node.op_type) for node in model.graph.node}
