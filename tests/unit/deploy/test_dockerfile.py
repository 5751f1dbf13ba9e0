"""docker/Dockerfile, read and run without a container engine.

Executed: every RUN step of the CPU branch, in order, with the COPY steps between them, as shell
commands in an empty folder that stands for the image's root: absolute paths of the image become
paths in it, and the base image is stood in for by the Python that runs the tests. Without root,
`install` keeps the caller as owner. Only read: FROM, the GPU branch (its apt step and its CUDA
wheels), USER, VOLUME, HEALTHCHECK and the rest. No image is built.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
DOCKERFILE = REPOSITORY / "docker/Dockerfile"


@dataclass
class Build:
    """A Dockerfile's stages by name, and the instructions of each."""

    arguments: dict[str, str] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)
    steps: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def of(self, accelerator: str) -> list[tuple[str, str]]:
        """What is carried out, in order, for this build argument."""
        base = self.bases["service"].replace("${ACCELERATOR}", accelerator)
        return self.steps[base] + self.steps["service"]

    def only(self, instruction: str) -> str:
        """The one instruction of this name in the final stage."""
        (found,) = (text for name, text in self.steps["service"] if name == instruction)
        return found


@pytest.fixture(scope="module")
def build() -> Build:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.MULTILINE)
    parsed = Build()
    stage = ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line.strip():
            continue
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, stage = rest.split()
            parsed.bases[stage] = base
            parsed.steps[stage] = []
        elif not stage:
            name, _, default = rest.partition("=")
            parsed.arguments[name] = default
        else:
            parsed.steps[stage].append((instruction, rest))
    return parsed


def test_gpu_is_the_default_and_both_branches_exist(build: Build) -> None:
    assert build.arguments["ACCELERATOR"] == "gpu"
    assert set(build.bases) == {"base-gpu", "base-cpu", "service"}


def test_every_base_image_is_pinned(build: Build) -> None:
    for stage in ("base-gpu", "base-cpu"):
        image, _, tag = build.bases[stage].partition(":")
        assert image
        assert re.search(r"\d+\.\d+", tag), f"{stage} stands on {build.bases[stage]}"


def test_gpu_branch_brings_cudnn_and_a_python_that_makes_venvs(build: Build) -> None:
    """Linted only: no CUDA image is at hand to run it in."""
    assert re.fullmatch(r"nvidia/cuda:13\.\S+-cudnn-runtime-ubuntu24\.04", build.bases["base-gpu"])
    ((instruction, command),) = build.steps["base-gpu"]
    assert instruction == "RUN"
    assert {"python3", "python3-venv"} <= set(command.split())
    assert "rm -rf /var/lib/apt/lists/*" in command


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_installed_extra_exists_and_its_runtime_is_pinned(build: Build, accelerator: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    (requirement,) = project["optional-dependencies"][accelerator]
    runtime = re.split(r"[<>=]", requirement)[0]
    pins = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    assert any(pin.startswith(f"{runtime}==") for pin in pins)
    installs = [text for name, text in build.of(accelerator) if name == "RUN" and ".[" in text]
    assert installs
    assert all("-c constraints.txt" in text and "${ACCELERATOR}" in text for text in installs)


def test_service_runs_as_a_plain_user_and_stops_on_sigterm(build: Build) -> None:
    user, _, group = build.only("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert build.only("STOPSIGNAL") == "SIGTERM"
    assert build.only("VOLUME") == "/var/lib/dicom-xai"
    last_run = max(i for i, (name, _) in enumerate(build.steps["service"]) if name == "RUN")
    where = [name for name, _ in build.steps["service"]].index("USER")
    assert where > last_run, "RUN steps after USER would run without rights"


def test_commands_are_lists_that_need_no_shell(build: Build) -> None:
    check = build.only("HEALTHCHECK")
    probe = json.loads(check[check.index("[") :])
    assert "/livez" in probe[-1], "a dead destination must not restart the service"
    compile(probe[-1], "HEALTHCHECK", "exec")
    command = json.loads(build.only("ENTRYPOINT")) + json.loads(build.only("CMD"))
    assert command[1:] == ["run", "--config", "/etc/dicom-xai/dicom-xai.yaml"]


def test_context_holds_exactly_what_is_copied(build: Build) -> None:
    ignore = (REPOSITORY / "docker/Dockerfile.dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = [text.split()[:-1] for name, text in build.steps["service"] if name == "COPY"]
    sources = {source for names in copied for source in names}
    assert {name for name in sources if not name.startswith("config/")} == allowed
    assert all((REPOSITORY / source).exists() for source in sources)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """An empty folder for the image's root, removed at once: it will hold more than 1 GB."""
    folder = tmp_path / "image"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_run_steps_of_the_cpu_branch_work_in_an_empty_folder(build: Build, root: Path) -> None:
    folder = root
    environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment |= {
        "ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin",
        "LANG": "C.UTF-8",
    }
    ran = []
    for instruction, text in build.of("cpu"):
        if instruction == "ENV":
            pairs = dict(item.split("=", 1) for item in text.split())
            environment |= {name: _in_image(value, root) for name, value in pairs.items()}
        elif instruction == "WORKDIR":
            folder = root / text.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            *sources, into = text.split()
            _copy(sources, folder / _in_image(into, root), many=into.endswith("/"))
        elif instruction == "RUN":
            done = subprocess.run(
                ["/bin/sh", "-c", _as_this_user(_in_image(text, root))],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            ran.append(text)
    assert len(ran) == sum(name == "RUN" for name, _ in build.of("cpu"))
    python = root / "opt/dicom-xai/bin/python"
    question = "import dicom_xai, onnxruntime; print(dicom_xai.__file__)"
    answer = subprocess.run(
        [python, "-c", question], cwd=root, capture_output=True, text=True, check=True
    )
    assert answer.stdout.startswith(str(root / "opt")), "the image must not need /src"
    package = Path(answer.stdout.strip()).parent
    assert _files(package, "*.py") == _files(REPOSITORY / "dicom_xai", "*.py")
    assert _files(package / "bundled", "*.*") == _files(REPOSITORY / "config", "*.*")
    assert (root / "var/lib/dicom-xai").stat().st_mode & 0o777 == 0o700


def _files(folder: Path, pattern: str) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob(pattern)}


def _in_image(text: str, root: Path) -> str:
    """The same words with the image's absolute paths moved under `root`."""
    return re.sub(r"(?<![\w./\]}])/(?=(opt|var|etc|usr|src)/)", f"{root}/", text)


def _copy(sources: list[str], into: Path, *, many: bool) -> None:
    for source in sources:
        path = REPOSITORY / source
        if path.is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, into, symlinks=True, dirs_exist_ok=True, ignore=skip)
        else:
            target = into / path.name if many else into
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def _as_this_user(command: str) -> str:
    if os.geteuid() == 0:
        return command
    return re.sub(r" --(owner|group)=\d+", "", command)
