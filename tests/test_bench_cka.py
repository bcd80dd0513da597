"""`bench.bench_cka`: its figures follow from its rounds, and its errors from the law that it states."""

import json

from bench import bench_cka


def test_a_record_of_the_comparison_against_the_forward_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_cka, "SIZES", ((256, 16), (256, 64)))
    monkeypatch.setattr(bench_cka, "NETWORKS", {"resnet": ("test_resnet", {}), "vit": ("test_vit", {})})
    sizes = ["--images", "40", "--image-size", "32", "--batch-size", "16", "--rounds", "2"]
    bench_cka.main([*sizes, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("cka_*.json")
    result = json.loads(path.read_text())["result"]
    assert result["layers"] == [5, 7]
    a, b = (result["rounds_ms"][name] for name in (bench_cka.COMPARISON, bench_cka.FORWARDS))
    assert len(a) == len(b) == 2
    assert min(x / y for x, y in zip(a, b, strict=True)) <= result["relative_time"]
    for few, many in zip(result["errors"][::2], result["errors"][1::2], strict=True):
        assert few["noise"] == many["noise"]
        assert many["rms"] < few["rms"] <= few["largest"]
    assert max(result["invariances"].values()) < 1e-5
