"""DCMTK's programs as a test starts them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dicom_xai.demo.site import ROUTINE

_SENDING = re.compile(r"^I: Sending file: (.*)$")
_ANSWER = re.compile(r"^I: Received Store Response \((.*)\)$")


def program(name: str) -> str | None:
    """Where one of its programs is; pynetdicom installs some of the same names beside Python."""
    ours = Path(sys.prefix, "bin")
    folders = [each for each in os.get_exec_path() if Path(each) != ours]
    return shutil.which(name, path=os.pathsep.join(folders))


def dcmtk(*words: object, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run one of its programs to the end; TCP_NODELAY as any peer that is compared has it."""
    name, *arguments = map(str, words)
    return subprocess.run(
        [program(name) or name, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env={**os.environ, "TCP_NODELAY": "1"},
    )


def storescu(
    port: int,
    files: Sequence[Path],
    *options: str,
    called: str = ROUTINE,
    required: bool = True,
) -> dict[Path, str]:
    """Send files over one association, whatever the answers; gives DCMTK's word for each.

    Only what the files need is proposed, because its usual list lacks Segmentation; unless
    `options` name a profile, beside which that cannot be asked for.
    """
    needed = ["-R"] if required else []
    done = dcmtk(
        "storescu", "-v", "-nh", *needed, *options, "-aec", called, "127.0.0.1", port, *files
    )
    answers: dict[Path, str] = {}
    path = Path()
    for line in done.stderr.splitlines():
        if sending := _SENDING.match(line):
            path = Path(sending[1])
        elif answer := _ANSWER.match(line):
            answers[path] = answer[1]
    assert answers.keys() == set(files), done.stderr
    return answers


def dump_complaints(file: Path) -> list[str]:
    """What dcmdump has to say against a file; nothing for a readable one."""
    done = dcmtk("dcmdump", "+L", file)
    said = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:", "F:"))]
    return said if done.returncode == 0 else [*said, f"exit status {done.returncode}"]


def rendered(file: Path, png: Path, *options: str, frame: int = 1) -> npt.NDArray[np.uint8]:
    """One frame as dcmj2pnm draws it: (rows, columns) or (rows, columns, 3) uint8."""
    done = dcmtk("dcmj2pnm", "+on", "+F", frame, *options, file, png)
    assert done.returncode == 0, done.stderr
    with Image.open(png) as image:
        return np.asarray(image)
