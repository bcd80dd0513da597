"""A checkpoint restores everything the next step depends on, or reports why it does not fit and changes nothing."""

import copy
import json
import pickletools
import re
import struct
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fastofa.runs.checkpoint import (
    BEST,
    BEST_EMA,
    _restore_optimizer,
    checkpoints,
    load_newest,
    load_student,
    save_best,
    save_checkpoint,
)
from fastofa.runs.config import TrainConfig, Weights
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, save_tensors
from fastofa.training.optim import create_optimizer
from runs import newest

OPTIMIZERS = ["sgd", "adamw", "lamb"]
SIDE = 16


class Cnn(nn.Sequential):
    """Convolutions, channels-last as in a student, batch norm, dropout and a linear layer."""

    def __init__(self, classes: int = 4, width: int = 6) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.Dropout(0.3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, classes),
        )


class Training:
    """A model with its optimiser and moving average, created from a seed."""

    def __init__(self, optimizer: str, ema: bool = True, seed: int = 0, model: nn.Module | None = None) -> None:
        torch.manual_seed(seed)
        self.model = (Cnn() if model is None else model).to(memory_format=torch.channels_last)
        config = TrainConfig(
            data="digits",
            student="tiny",
            out=Path("run"),
            recipe="digits",
            optimizer=optimizer,
            lr=0.02,
            weight_decay=0.1,
        )
        self.optimizer = create_optimizer(self.model, config)
        self.ema = ModelEmaV3(self.model, decay=0.9) if ema else None

    @property
    def ema_module(self) -> nn.Module | None:
        return None if self.ema is None else self.ema.module

    def steps(self, first: int, count: int) -> None:
        """Train `count` steps; batches and dropout are functions of the step, as in a run."""
        self.model.train()
        for step in range(first, first + count):
            torch.manual_seed(step)
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(8, 3, SIDE, SIDE, generator=generator).contiguous(memory_format=torch.channels_last)
            F.cross_entropy(self.model(images), torch.randint(0, 4, (8,), generator=generator)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update(self.model, step + 1)

    def save(self, run: Path, step: int, keep: int = 2, **position) -> Path:
        save_checkpoint(run, step, self.model, self.optimizer, self.ema_module, position, keep)
        return newest(run)

    def load(self, run: Path) -> tuple[int, dict]:
        return load_newest(run, self.model, self.optimizer, self.ema_module)

    def everything(self) -> dict[str, Tensor]:
        """Weights, moving average and optimiser state by name."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": value for name, value in self.ema.module.state_dict().items()}
        state = self.optimizer.state_dict()
        for number, values in state["state"].items():
            tensors |= {f"state.{number}.{key}": torch.as_tensor(value) for key, value in values.items()}
        for number, group in enumerate(state["param_groups"]):
            if "step" in group:
                tensors[f"group.{number}.step"] = torch.as_tensor(group["step"])
        return {name: value.clone() for name, value in tensors.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The tensors and their dtypes are equal, bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


# --- Round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_everything_is_restored_bit_for_bit(tmp_path, optimizer, ema):
    """Into a model of another seed that has taken another number of steps."""
    before = Training(optimizer, ema)
    before.steps(0, 3)
    before.save(tmp_path, 3, sums=[0.1, 2.0], summed=2)
    saved = before.everything()
    assert any(name.startswith("state.") for name in saved)

    after = Training(optimizer, ema, seed=1)
    after.steps(7, 1)
    assert after.load(tmp_path) == (3, {"sums": [0.1, 2.0], "summed": 2})
    assert_same(after.everything(), saved)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, optimizer):
    """Ten more steps with dropout: weights, moving average and optimiser are equal to the last bit."""
    straight = Training(optimizer)
    straight.steps(0, 3)
    straight.save(tmp_path, 3)
    straight.steps(3, 10)
    expected = straight.everything()

    resumed = Training(optimizer, seed=1)
    resumed.load(tmp_path)
    resumed.steps(3, 10)
    assert_same(resumed.everything(), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_before_the_first_step(tmp_path, optimizer):
    """It holds no optimiser state, and restoring it clears the state that is there."""
    Training(optimizer).save(tmp_path, 0)
    straight = Training(optimizer)
    straight.steps(0, 2)
    expected = straight.everything()
    resumed = Training(optimizer, seed=1)
    resumed.steps(5, 2)
    resumed.load(tmp_path)
    resumed.steps(0, 2)
    assert_same(resumed.everything(), expected)


def test_a_timm_model_with_stochastic_depth_is_resumed_exactly(tmp_path):
    def build(seed: int) -> Training:
        torch.manual_seed(seed)
        return Training("adamw", model=timm.create_model("test_convnext", num_classes=4, drop_path_rate=0.3))

    straight = build(0)
    size = SIDE * 2

    def steps(training: Training, first: int, count: int) -> None:
        training.model.train()
        for step in range(first, first + count):
            torch.manual_seed(step)
            images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(step))
            training.model(images).pow(2).mean().backward()
            training.optimizer.step()
            training.optimizer.zero_grad()

    steps(straight, 0, 1)
    straight.save(tmp_path, 1)
    steps(straight, 1, 2)
    expected = straight.everything()
    resumed = build(1)
    resumed.load(tmp_path)
    steps(resumed, 1, 2)
    assert_same(resumed.everything(), expected)


# --- Checkpoints that do not fit --------------------------------------------------------------------------------------


def refused(file: Path, training: Training, message: str) -> None:
    """Loading raises BadInput with this message and changes nothing."""
    before = training.everything()
    with pytest.raises(BadInput, match=message):
        training.load(run_of(file))
    assert_same(training.everything(), before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    training = Training("adamw")
    training.steps(0, 2)
    return training.save(tmp_path, 2)


def run_of(file: Path) -> Path:
    return file.parent.parent


@pytest.fixture
def other() -> Training:
    training = Training("adamw", seed=1)
    training.steps(5, 1)
    return training


@pytest.mark.parametrize("part", ["student", "ema"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"does not fit this run's {}: missing 7.bias; unexpected none; of another shape none"),
        ("unexpected", r"does not fit this run's {}: missing none; unexpected 8.weight; of another shape none"),
        ("reshaped", r"does not fit this run's {}: missing none; unexpected none; of another shape 7.bias"),
    ],
)
def test_keys_that_do_not_fit_are_named_and_nothing_is_changed(saved, other, part, change, message):
    """Also if only the moving average, which is checked last, does not fit."""
    tensors, info = load_tensors(saved)
    if change == "missing":
        del tensors[f"{part}.7.bias"]
    elif change == "unexpected":
        tensors[f"{part}.8.weight"] = torch.zeros(2)
    else:
        tensors[f"{part}.7.bias"] = torch.zeros(5)
    save_tensors(saved, tensors, info)
    refused(saved, other, message.format(part))


def test_a_model_of_another_size_names_a_few_keys_and_counts_the_rest(saved):
    refused(
        saved, Training("adamw", model=Cnn(width=8)), r"of another shape 0.weight, 1.bias, 1.running_mean and 5 more"
    )


def test_checkpoints_with_and_without_a_moving_average_are_not_interchangeable(saved, tmp_path):
    refused(saved, Training("adamw", ema=False), "does not fit this run's ema: missing none; unexpected 0.weight")
    plain = Training("adamw", ema=False).save(tmp_path / "plain", 0)
    refused(plain, Training("adamw"), "does not fit this run's ema: missing 0.weight")


def test_the_average_of_a_methods_modules_in_an_earlier_checkpoint_is_ignored(saved, other):
    tensors, info = load_tensors(saved)
    save_tensors(saved, {**tensors, "ema.methods.0.memory": torch.zeros(3)}, info)
    assert other.load(saved.parents[1]) == (info["step"], info["position"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("7.bias.exp_avg", torch.zeros(5)), ("8.bias.exp_avg", torch.zeros(4)), ("group9.step", torch.tensor(3.0))],
)
def test_optimiser_state_that_does_not_fit_is_named_and_nothing_is_changed(saved, other, key, value):
    """Another shape than its parameter's, an unknown parameter, an unknown group."""
    tensors, info = load_tensors(saved)
    tensors[f"optimizer.{key}"] = value
    save_tensors(saved, tensors, info)
    refused(saved, other, f"does not fit this run's optimizer: {key};")


@pytest.mark.parametrize("load", ["everything", "student only"])
def test_damaged_files_and_pickles_are_refused(saved, other, load):
    """Truncated, one bit flipped, empty, missing, or replaced by a pickle, which is not loaded."""
    data = saved.read_bytes()
    flipped = bytearray(data)
    flipped[-5] ^= 1
    before = other.everything()

    def attempt(message: str) -> None:
        with pytest.raises(BadInput, match=message):
            other.load(run_of(saved)) if load == "everything" else load_student(run_of(saved), other.model)

    for content, message in (
        (data[: len(data) // 2], "truncated or damaged"),
        (b"", "truncated or damaged"),
        (bytes(flipped), "checksum does not match"),
        (safetensors.torch.save({"a": torch.zeros(1)}), "got another safetensors file"),
    ):
        saved.write_bytes(content)
        attempt(message)
    torch.save({"student": other.model.state_dict()}, saved)
    attempt("expected a safetensors file, got one that is a pickle")
    saved.unlink()
    attempt("expected a checkpoint, found none" if load == "everything" else "expected a checkpoint, found none yet")
    assert_same(other.everything(), before)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_restores_its_own_statistics_if_the_number_of_ranks_is_unchanged(tmp_path, ranks):
    """Two ranks saved them; any other number of ranks, evaluation and export use the mean."""
    training = Training("sgd")
    training.steps(0, 2)
    own = torch.arange(12.0).reshape(2, 6)
    by_rank = {"student.1.running_mean": own, "ema.1.running_mean": 10 * own, "student.1.running_var": torch.ones(2, 6)}
    before = training.everything()
    save_checkpoint(tmp_path, 2, training.model, training.optimizer, training.ema_module, {}, 2, by_rank)
    assert_same(training.everything(), before)
    by_rank_names = [name for name in load_tensors(newest(tmp_path))[0] if name.startswith("ranks.")]
    assert sorted(by_rank_names) == [
        "ranks.ema.1.running_mean",
        "ranks.student.1.running_mean",
    ]  # the ranks' other tensors are equal
    mean = torch.arange(3.0, 9.0)
    for rank in range(ranks):
        other = Training("sgd", seed=1)
        load_newest(tmp_path, other.model, other.optimizer, other.ema_module, rank, ranks)
        expected = own[rank] if ranks == 2 else mean
        changed = {"model.1.running_mean": expected, "ema.1.running_mean": 10 * expected}
        assert_same(other.everything(), {**before, **changed})
    student = Cnn()
    for weights, expected in (("raw", mean), ("ema", 10 * mean)):
        load_student(tmp_path, student, weights)
        assert torch.equal(student[1].running_mean, expected)


# --- Which are kept, and which is loaded ------------------------------------------------------------------------------


def names(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_few_are_kept(tmp_path, keep):
    """The best weights are kept as well, whatever their step."""
    training = Training("sgd")
    save_best(tmp_path, training.model, {"step": 2, "top1": 0.5})
    for step in (2, 4, 300, 12_345_678):
        training.save(tmp_path, step, keep)
    kept = ["step-00000002", "step-00000004", "step-00000300", "step-12345678"][-keep:]
    assert names(tmp_path) == sorted(f"{name}.safetensors" for name in (*kept, "best"))
    assert [file.stem for file in checkpoints(tmp_path)] == kept[::-1]


def test_keeping_fewer_than_before(tmp_path):
    for step in range(4):
        Training("sgd").save(tmp_path, step, keep=9)
    Training("sgd").save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000003.safetensors", "step-00000004.safetensors"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def make_pickle(file: Path) -> None:
    torch.save({"student": {}}, file)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, make_pickle])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_loaded(tmp_path, damage, capsys):
    training = Training("adamw")
    expected = {}
    for step in (1, 2, 3):
        training.steps(step, 1)
        training.save(tmp_path, step, keep=3, summed=step)
        expected[step] = training.everything()
    newest_first = checkpoints(tmp_path)
    for step, damaged in ((2, newest_first[0]), (1, newest_first[1])):
        damage(damaged)
        other = Training("adamw", seed=1)
        capsys.readouterr()
        assert other.load(tmp_path) == (step, {"summed": step})
        assert_same(other.everything(), expected[step])
        stderr = capsys.readouterr().err.splitlines()
        assert len(stderr) == 3 - step
        assert str(damaged) in stderr[-1]
        assert stderr[-1].endswith("; resuming from the checkpoint before it")
    damage(newest_first[2])
    with pytest.raises(BadInput, match=re.escape(str(newest_first[2]))):
        Training("adamw").load(tmp_path)


def test_a_newest_checkpoint_that_does_not_fit_is_refused_even_if_an_older_one_fits(tmp_path):
    """It is not damaged but belongs to another configuration."""
    Training("adamw", model=Cnn(width=8)).save(tmp_path, 1)
    Training("adamw").save(tmp_path, 2)
    with pytest.raises(BadInput, match="does not fit this run's student"):
        Training("adamw", model=Cnn(width=8)).load(tmp_path)


def test_the_best_weights_are_loaded_on_request(tmp_path):
    """They are those that were evaluated; their info has the step."""
    training = Training("sgd")
    assert training.ema is not None
    training.steps(0, 1)
    save_best(tmp_path, training.ema.module, {"step": 1, "top1": 0.5})
    best = copy.deepcopy(training.ema.module.state_dict())
    training.steps(1, 2)
    training.save(tmp_path, 3)
    student = Cnn()
    assert load_student(tmp_path, student, "best") == {"step": 1, "top1": 0.5}
    assert_same(student.state_dict(), best)
    assert load_student(tmp_path, student)["step"] == 3
    assert_same(student.state_dict(), training.ema.module.state_dict())


def test_without_an_evaluation_there_are_no_best_weights(tmp_path):
    Training("sgd").save(tmp_path, 3)
    with pytest.raises(BadInput, match="expected best weights, found none before the first evaluation"):
        load_student(tmp_path, Cnn(), "best")


def test_weights_and_moving_average_are_loaded_on_request(tmp_path):
    """Those of the newest checkpoint and of the best evaluations; `best` is whichever has the higher top-1."""
    training = Training("sgd")
    assert training.ema is not None
    saved: dict[Weights, dict[str, Tensor]] = {}
    for step, top1, file, name in ((1, 0.5, BEST, "best-raw"), (2, 0.6, BEST_EMA, "best-ema")):
        training.steps(step, 1)
        model = training.model if file == BEST else training.ema.module
        save_best(tmp_path, model, {"step": step, "top1": top1}, file)
        saved[name] = copy.deepcopy(model.state_dict())  # type: ignore[index]
    training.steps(2, 2)
    training.save(tmp_path, 4)
    saved |= {"raw": training.model.state_dict(), "ema": training.ema.module.state_dict(), "best": saved["best-ema"]}
    student = Cnn()
    for weights, expected in saved.items():
        load_student(tmp_path, student, weights)
        assert_same(student.state_dict(), expected)
    save_best(tmp_path, training.model, {"step": 4, "top1": 0.7})
    load_student(tmp_path, student, "best")
    assert_same(student.state_dict(), saved["raw"])

    other = tmp_path / "without an average"
    alone = Training("sgd", ema=False)
    alone.save(other, 1)
    save_best(other, alone.model, {"step": 1, "top1": 0.5})
    for averaged in ("ema", "best-ema"):
        with pytest.raises(BadInput, match=f"expected a moving average for --weights {averaged}, but the run has none"):
            load_student(other, student, averaged)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_not_loaded(tmp_path):
    """As those of a run that diverged."""
    training = Training("sgd", ema=False)
    with torch.no_grad():
        training.model[0].weight[0, 0, 0, 0] = torch.nan
    training.save(tmp_path, 1)
    student = Cnn()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(BadInput, match=r"expected finite weights, but these are not: 0.weight; the run diverged"):
        load_student(tmp_path, student)
    assert_same(student.state_dict(), before)


# --- The file ---------------------------------------------------------------------------------------------------------


def test_load_student_prefers_the_moving_average(tmp_path):
    for ema in (True, False):
        training = Training("sgd", ema)
        training.steps(0, 3)
        training.save(tmp_path, 3, summed=2)
        expected = (training.ema.module if ema else training.model).state_dict()
        student = Cnn()
        info = load_student(tmp_path, student)
        assert (info["step"], info["position"]) == (3, {"summed": 2})
        assert_same(student.state_dict(), expected)
        assert torch.equal(student[0].weight, training.model[0].weight) is not ema


def test_load_student_names_keys_that_do_not_fit(saved):
    student = Cnn(classes=5)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(BadInput, match=r"does not fit this run's ema: .*of another shape 7.bias, 7.weight"):
        load_student(run_of(saved), student)
    assert_same(student.state_dict(), before)


def test_the_file_is_safetensors_and_nothing_else(saved):
    """Its header accounts for every byte, it has one metadata key and no pickle; equal states give equal bytes."""
    data = saved.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert list(header.pop("__metadata__")) == ["fastofa"]
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert 8 + length + spans[-1][1] == len(data)
    assert {name.partition(".")[0] for name in header} == {"student", "ema", "optimizer"}
    with pytest.raises(ValueError):
        list(pickletools.genops(data))

    training = Training("adamw")
    training.steps(0, 2)
    training.save(run_of(saved), 2)
    assert saved.read_bytes() == data
    assert [file.name for file in saved.parent.iterdir()] == ["step-00000002.safetensors"]


def test_the_optimisers_state_is_restored_on_the_device_of_its_parameters(tmp_path):
    """Fused AdamW on a GPU needs its step count there. Here the device is `meta`, the only one beside the CPU."""
    training = Training("adamw", ema=False)
    training.steps(0, 2)
    path = training.save(tmp_path, 2)
    state = {n.removeprefix("optimizer."): t for n, t in load_tensors(path)[0].items() if n.startswith("optimizer.")}
    elsewhere = Training("adamw", ema=False)
    model = elsewhere.model.to("meta")
    optimizer = torch.optim.AdamW(model.parameters())
    _restore_optimizer(model, optimizer, state)
    assert {t.device.type for kept in optimizer.state.values() for t in kept.values()} == {"meta"}
