"""Compiled graphs on disk: whole or not at all, and never another model's."""

from __future__ import annotations

import threading

import pytest

from dicom_xai.errors import ConfigError
from dicom_xai.explain import EXPLAINERS
from dicom_xai.explain import cache as cache_module
from dicom_xai.explain.cache import CompiledCache
from dicom_xai.infer.model import Model
from dicom_xai.infer.session import Device

GRAD_CAM = EXPLAINERS["grad-cam"]


@pytest.fixture(scope="module")
def model(cxr_card) -> Model:
    return Model(cxr_card, Device("cpu"), 1)


class Maker:
    """Compiles, and counts how often it was asked."""

    def __init__(self, model: Model, targets: int = 1) -> None:
        self.calls = 0
        self._model, self._targets = model, targets

    def __call__(self):
        self.calls += 1
        return GRAD_CAM.explain(self._model, self._targets)


def test_a_second_start_reads_what_the_first_one_compiled(model, tmp_path):
    first, second = Maker(model), Maker(model)
    made = CompiledCache(tmp_path).get(model, "grad-cam", 1, first)
    kept = CompiledCache(tmp_path).get(model, "grad-cam", 1, second)
    assert kept == made
    assert (first.calls, second.calls) == (1, 0)


def test_other_targets_and_another_compiler_are_compiled_anew(model, tmp_path, monkeypatch):
    cache, maker = CompiledCache(tmp_path), Maker(model)
    cache.get(model, "grad-cam", 1, maker)
    cache.get(model, "grad-cam", 2, maker)
    monkeypatch.setattr(cache_module, "COMPILER_VERSION", "another")
    cache.get(model, "grad-cam", 1, maker)
    assert maker.calls == 3


@pytest.mark.parametrize("keep", [0, 40, 500, -1])
def test_a_damaged_file_is_compiled_anew_and_mended(model, tmp_path, keep):
    cache, maker = CompiledCache(tmp_path), Maker(model)
    made = cache.get(model, "grad-cam", 1, maker)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    assert cache.get(model, "grad-cam", 1, maker) == made
    assert cache.get(model, "grad-cam", 1, maker) == made
    assert maker.calls == 2


def test_many_starts_at_once_leave_one_whole_file(model, tmp_path):
    graphs = []

    def start() -> None:
        graphs.append(CompiledCache(tmp_path).get(model, "grad-cam", 1, Maker(model)))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(graphs) == 8
    assert all(graph == graphs[0] for graph in graphs)
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_is_kept_of_a_model_that_cannot_be_compiled(model, tmp_path):
    def fail():
        raise ConfigError("it does not apply")

    with pytest.raises(ConfigError):
        CompiledCache(tmp_path).get(model, "grad-cam", 1, fail)
    assert list(tmp_path.iterdir()) == []


def test_why_methods_do_not_apply_is_found_out_once(model, tmp_path, monkeypatch):
    def make():
        calls.append(1)
        return dict(reasons)

    calls: list[int] = []
    reasons = {"cam": "it has no linear head"}
    cache = CompiledCache(tmp_path)
    assert [cache.reasons(model, make) for _ in range(2)] == [reasons] * 2
    assert len(calls) == 1
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert [cache.reasons(model, make) for _ in range(2)] == [reasons] * 2
    assert len(calls) == 2
    monkeypatch.setattr(cache_module, "__version__", "another")
    assert cache.reasons(model, make) == reasons
    assert len(calls) == 3
