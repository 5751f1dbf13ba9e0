"""A process's name outlives it, and is never another's."""

from __future__ import annotations

import os
import subprocess
import sys

from dicom_xai.processes import boot_id, is_alive, name_of


def test_a_name_is_the_id_and_the_start_so_that_a_reused_id_is_another_process():
    ours = name_of(os.getpid())
    assert is_alive(ours)
    assert not is_alive(f"{os.getpid()}-1")


def test_nobody_is_not_alive():
    assert not is_alive("")
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        theirs = name_of(child.pid)
        child.wait()
    assert name_of(child.pid) == ""
    assert not is_alive(theirs)


def test_the_boot_has_a_name_that_stays():
    assert boot_id() == boot_id() != ""
