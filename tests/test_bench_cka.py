"""`bench.bench_cka`: its figures follow from its rounds, and its errors from the law that it states."""

import json

import pytest

from bench import bench_cka


def test_a_record_of_the_comparison_against_the_forward_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_cka, "IMAGES", (256,))
    monkeypatch.setattr(bench_cka, "BATCHES", (16, 64))
    monkeypatch.setattr(bench_cka, "NETWORKS", {"resnet": ("test_resnet", {}), "vit": ("test_vit", {})})
    sizes = ["--images", "40", "--image-size", "32", "--batch-size", "16", "--rounds", "2"]
    bench_cka.main([*sizes, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("cka_*.json")
    result = json.loads(path.read_text())["result"]
    assert result["layers"] == [5, 7]
    for clock in ("seconds", "processor_seconds"):
        times = result[clock]
        ratios = [a / b for a, b in zip(times[bench_cka.COMPARISON], times[bench_cka.FORWARDS], strict=True)]
        assert len(ratios) == 2
        assert times["ratio"] == pytest.approx(sum(ratios) / 2)
    for few, many in zip(result["errors"][::2], result["errors"][1::2], strict=True):
        assert few["noise"] == many["noise"]
        assert many["rms"] < few["rms"] <= few["largest"]
    assert max(*result["invariances"].values(), *result["own_cka_from_1"].values()) < 1e-5
