"""`bench.bench_precompute`: the record holds every row and round, and its ratios follow from them."""

import json
import statistics

import pytest

from bench import bench_precompute


@pytest.mark.slow
def test_a_record_of_precompute_against_the_bare_forward(tmp_path):
    sizes = ["--image-size", "32", "--batch-size", "8", "--images", "18", "--rounds", "2"]
    bench_precompute.main(["--teacher", "test_vit", *sizes, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("precompute_*.json")
    record = json.loads(path.read_text())
    result = record["result"]
    assert record["environment"]["command"]
    assert result["images"] == 16  # whole batches
    assert result["default"] in result["rows"]
    assert len(result["rows"]) == 4
    baseline = result["rows"][bench_precompute.COMPILED]["rounds_ms"]
    for row in result["rows"].values():
        assert len(row["rounds_ms"]) == 2
        assert row["images_per_second"] == pytest.approx(16e3 / statistics.median(row["rounds_ms"]))
        ratios = [b / a for a, b in zip(row["rounds_ms"], baseline, strict=True)]
        assert row["of_compiled"] == pytest.approx(statistics.median(ratios))
