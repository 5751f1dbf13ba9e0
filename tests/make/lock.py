"""Give a lock file made by pip-compile its head, and take its tail away: `make lock`."""

from __future__ import annotations

import sys
from pathlib import Path

HEAD = """\
# The {kind} installation, each file by its hash. Made by `make lock`.
# torch is not in it: its builds for the CPU and for each CUDA share one version and differ, and
# come from the index that a site names; constraints.txt pins the version.
"""

if __name__ == "__main__":
    path, kind = Path(sys.argv[1]), sys.argv[2]
    pins, _, _ = path.read_text("utf-8").partition("\n# WARNING: ")
    path.write_text(HEAD.format(kind=kind) + pins.rstrip() + "\n", "utf-8")
