"""bench.lib.start: a step starts in processes of its own that share one compiler cache."""

import os
from pathlib import Path

import pytest
import torch

from bench.lib.start import start_seconds
from bench.lib.steps import Job, StepOptions


@pytest.mark.slow
def test_a_start_is_timed_cold_and_warm(monkeypatch):
    """The cache is new, not the user's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    job = Job("test_resnet", "test_vit", 32, 2, 10, torch.device("cpu"))
    found = start_seconds(job, StepOptions(method="scratch", compile="on"))
    assert found["cold"] > found["warm"] > 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/nowhere"
