"""``make chaos``: many randomised rounds, then the counts.

``python -m tests.chaos --rounds 200 --seed 7``; a failing run names its seed and round, and leaves
its folder for somebody to look at.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from tests.chaos.account import Counts
from tests.chaos.storm import run
from tests.make.disk import build_shim
from tests.make.models import write_models

ROUNDS_EACH = 100  #: on one site, before the next one starts from nothing


def main() -> None:
    """Play, print, and fail where anything was lost, duplicated, misattached or stuck."""
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    asked = parser.parse_args()
    print(f"seed {asked.seed}, {asked.rounds} rounds", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    models, shim = write_models(folder / "models"), build_shim(folder)
    total = Counts()
    for number, first in enumerate(range(0, asked.rounds, ROUNDS_EACH)):
        rounds = min(ROUNDS_EACH, asked.rounds - first)
        print(f"site {number}: python -m tests.chaos --seed {asked.seed + number}", flush=True)
        total.add(
            run(
                folder / f"site-{number}",
                *(models, shim, asked.seed + number, rounds),
                say=lambda line: print(line, flush=True),
            )
        )
    print(total)


if __name__ == "__main__":
    main()
