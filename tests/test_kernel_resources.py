"""Every Triton kernel in its hot form through NVIDIA's compiler, ahead of time: what the interpreter cannot show."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict[str, Any]]:
    """In a process of its own: in this one the kernels may belong to Triton's interpreter."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "bench.kernel_resources", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    return json.loads((folder / "kernel_resources.json").read_text())["result"]["rows"]


def test_every_kernel_is_compiled_for_both_architectures(compiled):
    assert {row["architecture"] for row in compiled} == {"sm_80", "sm_90"}
    assert {row["kernel"].split()[0] for row in compiled} == {"ofa_loss", "crop_resize", "depthwise", "norm", "stem"}


def test_nothing_is_spilled_and_nothing_is_computed_in_fp64(compiled):
    assert [row["kernel"] for row in compiled if row["stack"] or row["doubles"]] == []


def test_registers_leave_room_for_enough_threads(compiled):
    assert [row["kernel"] for row in compiled if row["registers"] > row["max_registers"]] == []


def test_memory_is_read_by_128_bits(compiled):
    promised = [row for row in compiled if row["promised_wide"]]
    assert promised
    assert [row["kernel"] for row in promised if not row["wide_loads"]] == []


def test_matrix_products_use_tensor_cores(compiled):
    promised = [row for row in compiled if row["promised_tensor_cores"]]
    assert promised
    assert [row["kernel"] for row in promised if not row["matrix_products"]] == []
