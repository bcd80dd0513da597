"""Every Triton kernel is compiled ahead of time by NVIDIA's compiler, to check what the interpreter cannot."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict[str, Any]]:
    """In a process of its own, since in this one the kernels may be interpreted."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "bench.kernel_resources", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    return json.loads((folder / "kernel_resources.json").read_text())["result"]["rows"]


def test_every_kernel_is_compiled_for_both_architectures(compiled):
    assert {row["architecture"] for row in compiled} == {"sm_80", "sm_90"}
    assert {row["kernel"].split()[0] for row in compiled} == {
        "ofa_loss",
        "crop_resize",
        "depthwise",
        "norm",
        "gelu",
        "layer_norm",
        "augment",
        "stem",
    }


def test_nothing_is_spilled_and_nothing_is_computed_in_fp64(compiled):
    """But where the twin's bits need fp64."""
    assert [row["kernel"] for row in compiled if row["stack"] or (row["doubles"] and not row["exact"])] == []


def test_kernels_that_are_bit_equal_to_their_twins_round_every_product(compiled):
    exact = [row for row in compiled if row["exact"]]
    assert exact
    assert [row["kernel"] for row in exact if row["fused"]] == []


def test_registers_leave_room_for_enough_threads(compiled):
    assert [row["kernel"] for row in compiled if row["registers"] > row["max_registers"]] == []


def test_memory_is_read_128_bits_at_a_time(compiled):
    promised = [row for row in compiled if row["promised_wide"]]
    assert promised
    assert [row["kernel"] for row in promised if not row["wide_loads"]] == []


def test_matrix_products_use_tensor_cores(compiled):
    promised = [row for row in compiled if row["promised_tensor_cores"]]
    assert promised
    assert [row["kernel"] for row in promised if not row["matrix_products"]] == []
