"""The supervisor goes on whatever a new config does to the process that proves it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from dicom_xai.service.role import Context
from dicom_xai.service.supervisor import Supervisor
from dicom_xai.telemetry import Log


@pytest.mark.promise("K1")
def test_a_config_whose_proof_hangs_is_refused_with_the_reason_and_the_next_is_looked_at(
    context: Context, tmp_path: Path, log: io.StringIO
) -> None:
    hanging = tmp_path / "dicom-xai.yaml"
    os.mkfifo(hanging)  # whoever opens it waits for a writer
    supervisor = Supervisor(hanging, Log(log), proof_at_most_s=0.5)
    for number in (1, 2):
        supervisor._prove_and_reload(context)
        refused = context.metrics.registry.get_sample_value(
            "dicom_xai_config_reloads_total", {"outcome": "refused"}
        )
        assert refused == number
    lines = [line for line in log.getvalue().splitlines() if "config-refused" in line]
    assert len(lines) == 2
    assert "did not end in 0.5 s" in lines[0]
