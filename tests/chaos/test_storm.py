"""The short form of `make chaos`: one site, one seed, every kind of fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.account import Counts
from tests.chaos.storm import KILL_EVERY, Fault, plan_round, run
from tests.make.disk import build_shim
from tests.make.models import write_models

SEED = 20261123
ROUNDS = 4 * KILL_EVERY


def test_a_seed_always_plans_the_same_rounds_with_every_kind_of_fault() -> None:
    plans = [plan_round(SEED, number) for number in range(200)]
    assert plans == [plan_round(SEED, number) for number in range(200)]
    assert {plan.fault for plan in plans} == set(Fault)
    assert plans != [plan_round(SEED + 1, number) for number in range(200)]


@pytest.mark.slow
@pytest.mark.peers("cc")
@pytest.mark.promise("D2")
@pytest.mark.promise("D3")
@pytest.mark.promise("D5")
@pytest.mark.promise("D8")
@pytest.mark.promise("D9")
@pytest.mark.promise("P5")
@pytest.mark.promise("N8")
@pytest.mark.promise("C2")
def test_nothing_is_lost_doubled_misattached_or_stuck(tmp_path: Path, total: Counts) -> None:
    models = write_models(tmp_path / "models")
    counts = run(tmp_path / "storm", models, build_shim(tmp_path), SEED, ROUNDS, print)
    total.add(counts)
    assert counts.rounds == ROUNDS
    assert (counts.lost, counts.duplicated, counts.misattached, counts.stuck) == (0, 0, 0, 0)
    assert counts.pictures > counts.rounds
    assert counts.mixed > 0
