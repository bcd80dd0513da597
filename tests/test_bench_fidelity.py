"""`bench.bench_fidelity`: more classes, and vectors, represent a teacher's predictions more exactly."""

import json

import pytest

from bench import bench_fidelity


@pytest.mark.slow
def test_a_record_of_what_each_form_changes(tmp_path, teacher, monkeypatch):
    """With an untrained teacher of the digits, one epoch in two fonts for that of the characters, and few images."""
    monkeypatch.setattr(bench_fidelity, "MADE_UP", (50, 40, 2.0))
    monkeypatch.setattr("fastofa.teacher.fidelity.IMAGES", 64)
    monkeypatch.setattr("bench.lib.characters.TRAIN_FONTS", ("DejaVuSans", "DejaVuSerif"))
    monkeypatch.setattr("bench.lib.characters.VAL_FONTS", ("DejaVuSansMono",))
    bench_fidelity.main(["--digits", teacher, "--epochs", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "fidelity.json").read_text())["result"]
    of_digits, of_characters, made_up = result["teachers"].values()
    assert (of_digits["classes"], of_characters["classes"], made_up["classes"]) == (10, 94, 40)
    assert [*of_characters["stored"]] == ["top 4", "top 8", "top 16", "top 32", "pooled", "pooled-int8"]
    assert [row["bytes_per_image"] for row in of_characters["stored"].values()][-1] == 96 + 4
    for found in (of_digits, of_characters, made_up):
        worst = {name: min(loss["cosine"] for loss in row["losses"]) for name, row in found["stored"].items()}
        kept = [worst[name] for name in found["stored"] if name.startswith("top")]
        assert kept == sorted(kept)
        assert 0.999 <= worst.get("pooled-int8", 1) <= worst.get("pooled", 1) <= 1 + 1e-9
