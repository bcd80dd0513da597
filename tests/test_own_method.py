"""A method of the user's, in a file: the documentation's example, and one with weights of its own, through a run."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastofa.runs import recipes
from fastofa.runs.config import TrainConfig
from fastofa.runs.log import read_metrics
from fastofa.runs.run import open_run
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors
from fastofa.teacher.cache import TeacherCache
from fastofa.training.export import export
from fastofa.training.loop import train
from runs import make_cache

ROOT = Path(__file__).parent.parent
WITH_WEIGHTS = """
import torch
from torch import nn
from fastofa.methods import Method

class Scaled(Method):
    def __init__(self, options, sizes):
        super().__init__(options, sizes)
        self.scale = nn.Linear(1, 1)

    def loss(self, outputs, targets, labels):
        away = outputs.logits.float().softmax(1) - targets.probs(outputs.logits.shape[1])
        return self.scale(away.square().sum(1, keepdim=True)).mean()
"""


@pytest.fixture(scope="module")
def digit_cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return make_cache("digits:100", 10, tmp_path_factory.mktemp("digits"), topk=4)


def config(method: str, cache: Path, out: Path, **values) -> TrainConfig:
    return recipes.digits(
        data="digits:100", student="test_resnet", cache=cache, out=out, method=method, epochs=2, batch_size=20,
        log_every=1, **values,
    )  # fmt: skip


def test_the_documented_method_trains_alone_and_beside_others(digit_cache, tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/methods.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) < 30
    file = tmp_path / "my_method.py"
    file.write_text(code)
    train(config(f"{file}:Squares", digit_cache.path, tmp_path / "alone"))
    row = read_metrics(tmp_path / "alone")[0]
    assert row["loss"] == pytest.approx(row["gt"] + row["squares"])
    assert 0 < row["squares"] <= 2
    train(config(f"ofa+{file}:Squares", digit_cache.path, tmp_path / "both"))
    row = read_metrics(tmp_path / "both")[0]
    assert row["loss"] == pytest.approx(row["gt"] + row["kd"] + row["ofa"] + row["squares"])


def test_a_methods_weights_are_trained_resumed_and_not_exported(digit_cache, tmp_path):
    file = tmp_path / "scaled.py"
    file.write_text(WITH_WEIGHTS)
    whole = config(f"{file}:Scaled", digit_cache.path, tmp_path / "whole", ema=0.9)
    train(whole)
    half = dataclasses.replace(whole, out=tmp_path / "half", epochs=1, schedule="step")
    straight = dataclasses.replace(whole, out=tmp_path / "straight", schedule="step")
    train(straight)
    train(half)
    train(dataclasses.replace(half, epochs=2, resume=True))
    states = []
    for run in (straight, half):
        checkpoint = max((run.out / "checkpoints").glob("step-*.safetensors"))
        states.append(load_tensors(checkpoint)[0])
    own = [name for name in states[0] if "methods." in name and name.startswith("student.")]
    assert sorted(own) == ["student.methods.0.scale.bias", "student.methods.0.scale.weight"]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    best = load_tensors(whole.out / "checkpoints" / "best.safetensors")[0]
    assert not [name for name in best if "methods" in name]
    export(whole.out, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == open_run(whole.out).build_student().backbone.state_dict().keys()


def test_a_missing_method_is_reported_before_anything_is_written(digit_cache, tmp_path):
    with pytest.raises(BadInput, match="expected a Python file, found none"):
        train(config(f"{tmp_path / 'none.py'}:Squares", digit_cache.path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
