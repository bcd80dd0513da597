"""`bench.bench_features`: finer storage restores predictions more exactly, and its record holds every row and round."""

import json

import pytest

from bench import bench_features


@pytest.mark.slow
def test_a_record_of_what_is_stored(tmp_path, teacher):
    sizes = ["--image-size", "32", "--batch-size", "2", "--rounds", "2", "--calls", "1"]
    bench_features.main(["--teacher", teacher, *sizes, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "features.json").read_text())["result"]
    top, fp16, int8 = result["exactness"].values()
    assert (top["bytes_per_image"], fp16["bytes_per_image"], int8["bytes_per_image"]) == (8, 512, 260)
    assert 0 <= fp16["kl_mean"] < int8["kl_mean"] < top["kl_mean"]
    assert 1 >= fp16["gradient_cosine"] - 1e-6 > top["gradient_cosine"]
    assert all(len(row["rounds_ms"]) == 2 for row in result["steps"].values())
    assert len(result["steps"]) == 6
