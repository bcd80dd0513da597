"""`bench.bench_precompute`: the record holds every row and round, and its ratios follow from them."""

import json
import statistics

import pytest

from bench import bench_precompute


@pytest.mark.slow
def test_a_record_of_precompute_against_the_bare_forward(tmp_path):
    sizes = ["--image-size", "32", "--batch-size", "8", "--images", "18", "--rounds", "2", "--rank-rounds", "1"]
    bench_precompute.main(["--teacher", "test_vit", *sizes, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("precompute_*.json")
    record = json.loads(path.read_text())
    result = record["result"]
    assert record["environment"]["command"]
    assert result["images"] == 16  # whole batches
    assert result["default"] in result["rows"]
    assert len(result["rows"]) == 4
    for ranks in result["ranks"]["rows"].values():
        images = 16 * result["ranks"]["views"] + 8  # and the validation images
        assert ranks["images_per_second"] == pytest.approx(images * 1e3 / ranks["rounds_ms"][0])
    one, two = (result["ranks"]["rows"][number] for number in "12")
    assert one["of_one_rank"] == 1
    assert two["of_one_rank"] == pytest.approx(one["rounds_ms"][0] / two["rounds_ms"][0])
    baseline = result["rows"][bench_precompute.COMPILED]["rounds_ms"]
    for row in result["rows"].values():
        assert len(row["rounds_ms"]) == 2
        assert row["images_per_second"] == pytest.approx(16e3 / statistics.median(row["rounds_ms"]))
        ratios = [b / a for a, b in zip(row["rounds_ms"], baseline, strict=True)]
        assert row["of_compiled"] == pytest.approx(statistics.median(ratios))
