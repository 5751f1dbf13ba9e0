"""`make bench`: our figures beside those of peers, all in one run, never a pass or fail.

Two busy cores give noisy times: read the ratios, not the milliseconds. Each comparison interleaves
its contestants and prints medians.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tests.bench import (
    compiler,
    decode,
    deliver,
    encode,
    explain,
    hour,
    receive,
    send,
    series,
    triage,
    volumes,
)

PARTS = {
    "explain": explain.run,
    "compiler": compiler.run,
    "decode": decode.run,
    "encode": encode.run,
    "receive": receive.run,
    "send": send.run,
    "deliver": deliver.run,
    "volumes": volumes.run,
    "triage": triage.run,
    "series": series.run,
    "hour": hour.run,
}


def main() -> int:
    """Run the parts named on the command line, or all."""
    console = Console(width=110, highlight=False)
    wanted = sys.argv[1:] or list(PARTS)
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        console.print(f"no part {', '.join(unknown)}; known: {', '.join(PARTS)}")
        return 2
    console.print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    )
    for name in wanted:
        with tempfile.TemporaryDirectory(prefix="dicom-xai-bench-") as folder:
            console.print(PARTS[name](Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
