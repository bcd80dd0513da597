"""`bench.bench_cache`: its record has every size, and every flipped bit is found."""

import json

from bench import bench_cache


def test_a_record_of_sizes_and_damage(tmp_path):
    bench_cache.main(["--rows", "10000", "--rounds", "2", "--flips", "200", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "cache.json").read_text())["result"]
    (small,) = result["sizes"]
    assert (small["rows"], small["classes"]) == (10_000, 1000)
    assert 0 < small["load_peak_bytes"] < 1e8
    assert 43 < small["bytes_per_row"] < 45  # the names of 1,000 classes in the header take 1.6
    assert all(
        len(small[name][of]) == 2 for name in ("pack", "write", "open", "load") for of in ("seconds", "cpu_seconds")
    )
    assert result["damage"] == {"flipped": 200, "found_by_verify": 200, "found_by_training": 200}
