"""The `dicom-xai` command and its roles as processes of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from dicom_xai.demo.site import Site
from tests.make.books import wait_until

START_TIMEOUT_S = 120.0
_COMMAND = [sys.executable, "-m", "dicom_xai.cli"]


def command(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `dicom-xai WORDS --config ...` to its end."""
    return subprocess.run(
        [*_COMMAND, *words, "--config", str(site.config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=START_TIMEOUT_S,
        env={**os.environ, "COLUMNS": "400"},
    )


class Running:
    """One `dicom-xai run`: all roles under a supervisor, or one role alone.

    Parameters
    ----------
    site : Site
        Whose config is served; its own service is not started. Output is added to its log.
    role : str
        receiver, worker or sender; all when empty.
    environment : mapping of str to str, optional
        Added to its environment.
    """

    def __init__(
        self, site: Site, role: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        self.role = role
        self._log = site.log
        self._from = site.log.stat().st_size if site.log.exists() else 0
        with site.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *_COMMAND,
                    *("run", "--config", str(site.config)),
                    *(("--role", role) if role else ()),
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                process_group=0,
            )

    @property
    def lines(self) -> list[str]:
        """What the log has got since the start, from all who write to it."""
        with self._log.open("rb") as log:
            log.seek(self._from)
            return log.read().decode(errors="replace").splitlines()

    def wait_until_ready(self) -> Running:
        """Return when the role, or every role, has said that it is ready."""
        wanted = f'"role": "{self.role or "all"}"'

        def is_ready() -> bool:
            assert self.process.poll() is None, "\n".join(self.lines[-12:])
            return any('"role-ready"' in line and wanted in line for line in self.lines)

        wait_until(is_ready, f"{self.role or 'the service'} is ready", START_TIMEOUT_S)
        return self

    def family(self) -> list[psutil.Process]:
        """The process, its roles, and the processes that decode for them."""
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def role_process(self, role: str) -> psutil.Process | None:
        """The process of one supervised role, if it runs."""
        for each in self.family()[1:]:
            try:
                if role in each.cmdline():
                    return each
            except psutil.NoSuchProcess:
                continue
        return None

    def kill(self) -> None:
        """End this process at once, its roles not."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; gives the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class DeathAt:
    """Kills a process when one of its threads makes the N-th of some system calls.

    The call itself is not made. Counted from when this returns, for each thread on its own.

    Parameters
    ----------
    pid : int
    calls : str
        System calls, separated by commas.
    when : int
        1 is the first.
    folder : Path
        Takes strace's own words.
    """

    def __init__(self, pid: int, calls: str, when: int, folder: Path) -> None:
        strace = shutil.which("strace")
        assert strace is not None
        words = folder / "strace.log"
        with words.open("wb") as out:
            self._process = subprocess.Popen(
                [
                    *(strace, "-f", "-p", str(pid), "-o", os.devnull),
                    *("-e", f"trace={calls}", "-e", f"inject={calls}:signal=KILL:when={when}"),
                ],
                stderr=out,
            )
        threads = psutil.Process(pid).num_threads()
        wait_until(
            lambda: (
                words.read_text().count(" attached") >= min(threads, 1)
                and "attached" in words.read_text()
            ),
            f"strace attached to {pid}",
        )

    def let_go(self) -> None:
        """Stop watching; a process that still lives goes on."""
        self._process.terminate()
        self._process.wait()
