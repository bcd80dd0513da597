"""Which kernels run in a student: what is named, and what measures fastest at its sizes."""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastofa.kernels.comparison import Chooses, Comparison, Measured, random_like
from fastofa.runs import recipes
from fastofa.runs.run import KERNELS, log_launch, recorded
from fastofa.student import choose_kernels, measure_kernels
from fastofa.student.choose_kernels import record_comparisons, use_kernels
from fastofa.student.fused_depthwise import DepthwiseConv2d
from fastofa.student.fused_norms import NormAct2d
from fastofa.student.fused_stem import NormActPool2d, StridedConv2d
from fastofa.student.measure_kernels import KernelChoice
from fastofa.student.model import Student
from fastofa.system.errors import BadInput
from fastofa.training import job
from fastofa.training.distributed import World
from fastofa.training.loop import train
from fastofa.training.step import Step

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
DEVICE = GPU if torch.cuda.is_available() else CPU  # where kernels run, on a CPU in Triton's interpreter
FUSED = {NormAct2d, NormActPool2d, StridedConv2d, DepthwiseConv2d}


class Timer:
    """Reports that the candidate `fastest` takes 1 ms and others 2 ms; counts the comparisons."""

    def __init__(self, fastest: str) -> None:
        self.fastest, self.calls = fastest, 0

    def __call__(self, calls: Any) -> dict[str, float]:
        self.calls += 1
        return {name: 1.0 if name == self.fastest else 2.0 for name in calls}


@pytest.fixture
def choice(tmp_path) -> Callable[..., KernelChoice]:
    """Choices that share a cache, with a budget that no test exceeds."""
    return partial(KernelChoice, CPU, cache=tmp_path / "cache" / "kernels.json", budget_s=1e9)


def student() -> Student:
    return Student("resnet18", 5, 32)


def kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


class Doubling:
    """An object with one choice between three ways to double a number."""

    impl = "fast"

    def __init__(self, wrong: Callable[[Tensor], Tensor] | None = None, size: int = 8) -> None:
        self.wrong, self.size = wrong, size

    def comparisons(self) -> dict[str, Comparison]:
        ways = {"fast": self.wrong or (lambda x: x + x), "torch": lambda x: 2 * x, "other": lambda x: x * 2}
        return {"impl": Comparison("double", f"{self.size}", random_like(torch.empty(self.size)), ways)}


def chosen(choice: KernelChoice, *owners: Doubling) -> list[str]:
    choice.choose((owner, *each) for owner in owners for each in owner.comparisons().items())
    return [owner.impl for owner in owners]


# --- What is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fastest", ["fast", "torch", "other"])
def test_the_fastest_is_chosen_and_recorded(choice, fastest):
    found = choice(timer=Timer(fastest))
    assert chosen(found, Doubling(), Doubling(size=9)) == [fastest] * 2
    row = found.record()["choices"][0]
    assert row["chosen"] == min(row["ms"], key=row["ms"].get) == fastest
    assert set(row["ms"]) == {"fast", "torch", "other"}
    assert (row["kernel"], row["size"], row["source"], row["uses"]) == ("double", "8", "measured", 1)


def test_equal_sizes_are_measured_once(choice):
    found, timer = choice(timer=Timer("other")), Timer("other")
    found.timer = timer
    assert chosen(found, *(Doubling() for _ in range(3))) == ["other"] * 3
    assert timer.calls == 1
    assert found.record()["choices"][0]["uses"] == 3


def raises(x: Tensor) -> Tensor:
    raise ValueError("unsupported")


@pytest.mark.parametrize("wrong", [lambda x: x + 2, raises])
def test_a_wrong_or_failing_one_is_dropped_with_a_notice(choice, wrong, capsys):
    assert chosen(choice(timer=Timer("fast")), Doubling(wrong)) == ["torch"]
    assert capsys.readouterr().err.count("double by fast is not used") == 1


def test_a_measurement_that_fails_keeps_the_default_and_is_not_kept(choice, capsys):
    def broken(calls: Any) -> dict[str, float]:
        raise torch.OutOfMemoryError("tried to allocate")

    assert chosen(choice(timer=broken), Doubling()) == ["fast"]
    assert "double could not be measured and keeps its default (OutOfMemoryError" in capsys.readouterr().err
    assert chosen(choice(timer=Timer("other")), Doubling()) == ["other"]


def test_what_does_not_fit_the_budget_keeps_its_default_until_the_next_run(choice):
    """The first takes a fifth of a second; a second one like it would exceed the budget."""

    def slow(calls: Any) -> dict[str, float]:
        time.sleep(0.2)
        return Timer("other")(calls)

    owners = [Doubling(size=size) for size in (8, 9, 10)]
    found = choice(timer=slow, budget_s=0.3)
    assert chosen(found, *owners) == ["other", "fast", "fast"]
    assert "1 measured, 2 not in time" in found.line()
    timer = Timer("torch")
    assert chosen(choice(timer=timer), *owners) == ["other", "torch", "torch"]
    assert timer.calls == 2


def test_random_numbers_do_not_depend_on_what_is_measured(choice):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    chosen(choice(timer=Timer("fast")), Doubling())
    assert torch.equal(torch.rand(1), expected)


# --- The cache --------------------------------------------------------------------------------------------------------


def test_a_second_run_measures_nothing(choice):
    chosen(choice(timer=Timer("other")), Doubling())
    timer = Timer("fast")
    found = choice(timer=timer)
    assert chosen(found, Doubling()) == ["other"]
    assert timer.calls == 0
    assert found.record()["choices"][0]["ms"] == {"fast": 2.0, "torch": 2.0, "other": 1.0}
    assert "1 as cached" in found.line()


def test_another_size_gpu_version_or_compilation_measures_again(choice, monkeypatch):
    chosen(choice(timer=Timer("other")), Doubling())
    assert chosen(choice(timer=Timer("fast")), Doubling(size=9)) == ["fast"]
    assert chosen(choice(timer=Timer("fast"), compiled=True), Doubling()) == ["fast"]
    for name, value in (("__version__", "9.9.9"), ("version", lambda name: "9.9.9")):
        with monkeypatch.context() as patch:
            patch.setattr(measure_kernels, name, value)
            measure_kernels._environment.cache_clear()
            assert chosen(choice(timer=Timer("fast")), Doubling()) == ["fast"]
    measure_kernels._environment.cache_clear()
    assert chosen(choice(timer=Timer("fast")), Doubling()) == ["other"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "\0"])
def test_a_damaged_cache_is_replaced(choice, content):
    path = choice().cache
    path.parent.mkdir()
    path.write_text(content)
    assert chosen(choice(timer=Timer("other")), Doubling()) == ["other"]
    assert chosen(choice(timer=Timer("fast")), Doubling()) == ["other"]


@pytest.mark.parametrize("row", [None, 3, {}, {"chosen": "gone"}, {"chosen": ["other"]}, {"chosen": {}}])
def test_an_entry_that_makes_no_sense_is_measured_again(choice, row):
    found = choice(timer=Timer("other"))
    chosen(found, Doubling())
    values = json.loads(found.cache.read_text())
    found.cache.write_text(json.dumps(dict.fromkeys(values, row)))
    assert chosen(choice(timer=Timer("fast")), Doubling()) == ["fast"]


def test_a_cache_that_cannot_be_written_is_no_error(choice, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "kernels.json", None):
        assert chosen(choice(timer=Timer("other"), cache=path), Doubling()) == ["other"]


def test_it_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = KernelChoice(CPU).cache
    assert path is not None
    assert path.is_relative_to(tmp_path / "fastofa")


# --- Resuming, and several ranks --------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_choice(choice, tmp_path):
    """Even what it could not measure in time and another run has measured since."""
    first = choice(timer=Timer("other"), budget_s=-1)
    assert chosen(first, Doubling()) == ["fast"]
    log_launch(tmp_path, 0, 1, kernels=first.record())
    assert chosen(choice(timer=Timer("other")), Doubling()) == ["other"]
    timer = Timer("other")
    resumed = choice(timer=timer, recorded=recorded(tmp_path, KERNELS))
    assert chosen(resumed, Doubling()) == ["fast"]
    assert timer.calls == 0
    assert "1 as before in this run" in resumed.line()
    log_launch(tmp_path, 5, 1, kernels=resumed.record())
    assert chosen(choice(recorded=recorded(tmp_path, KERNELS)), Doubling()) == ["fast"]


def test_a_run_records_its_choice_and_resumes_with_it(on_photos, monkeypatch, tmp_path, capsys):
    """As on a GPU, except that nothing is computed: the default is not the fastest, and another is when it resumes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET")
    for module in (choose_kernels, job):
        monkeypatch.setattr(module, "measures_kernels", lambda *_: True)
    fastest = {"name": "torch"}
    monkeypatch.setattr(measure_kernels, "compare", lambda *_: Measured((fastest["name"],), {}, {}))
    config = on_photos(student="test_resnet", pipeline="torchvision", epochs=1)
    train(config)
    (launch,) = json.loads((config.out / "environment.json").read_text())
    kernels = {row["kernel"]: row["chosen"] for row in launch["kernels"]["choices"]}
    assert kernels["norm_act"] == kernels["loss"] == kernels["depthwise_conv3x3 input gradient"] == "torch"
    assert "kernels: none instead of PyTorch's" in " ".join(capsys.readouterr().err.split())
    fastest["name"] = "triton"
    (tmp_path / "cache" / "fastofa" / "kernels.json").unlink()
    train(dataclasses.replace(config, epochs=2, resume=True))
    assert "as before in this run" in " ".join(capsys.readouterr().err.split())
    first, second = json.loads((config.out / "environment.json").read_text())
    assert [row["chosen"] for row in second["kernels"]["choices"]] == ["torch"] * len(first["kernels"]["choices"])
    assert {row["source"] for row in second["kernels"]["choices"]} == {"as before in this run"}


@pytest.mark.parametrize("content", [None, "", "[]", "[1]", '[{"kernels": 3}]', '[{"kernels": {"choices": 3}}]'])
def test_a_damaged_record_is_no_record(choice, tmp_path, content):
    if content is not None:
        (tmp_path / "environment.json").write_text(content)
    found = choice(timer=Timer("other"), recorded=recorded(tmp_path, KERNELS))
    found.recorded = {**found.recorded, "environment": found.environment}
    assert chosen(found, Doubling()) == ["other"]


def test_rank_0_decides(choice):
    """The others measure nothing and take its number."""
    sent: list[int] = []
    main = choice(timer=Timer("other"), agree=lambda number: sent.append(number) or number)
    assert chosen(main, Doubling(), Doubling(size=9)) == ["other"] * 2
    timer, numbers = Timer("fast"), iter(sent)
    second = choice(timer=timer, is_main=False, agree=lambda _: next(numbers))
    assert chosen(second, Doubling(), Doubling(size=9)) == ["other"] * 2
    assert timer.calls == 0
    assert second.record() == {}


# --- A student --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ((), set()),
        (("off",), set()),
        (("loss",), set()),
        (("norms",), {NormAct2d}),
        (("stem", "norms"), {NormAct2d, NormActPool2d, StridedConv2d}),
        (("auto",), FUSED),
    ],
)
def test_what_is_named_runs(choice, kernels, expected):
    model, found = student(), choice(budget_s=-1)
    use_kernels(model, kernels, GPU, found, 2, bf16=True)
    assert kinds(model) & FUSED == expected
    assert bool(found.record()) == (kernels == ("auto",))


def test_on_a_cpu_auto_changes_and_measures_nothing(choice):
    model = student()
    before, timer = kinds(model), Timer("torch")
    found = choice(timer=timer)
    assert use_kernels(model, ("auto",), CPU, found, 2, bf16=False) is None
    assert (kinds(model), timer.calls, found.record(), found.line()) == (before, 0, {}, "")


def test_a_student_is_recorded_without_changing_it():
    """Sizes are those of a batch in training at the dtype of autocast."""
    model = student().eval()
    for switch in choose_kernels.SWITCHES.values():
        switch(model)
    before = {name: tensor.clone() for name, tensor in [*model.state_dict().items(), *model.named_buffers()]}
    state = torch.get_rng_state()
    logits, found = record_comparisons(model, 256, bf16=True)
    assert (logits.shape, logits.dtype) == ((5, 256, 5), torch.bfloat16)
    assert {type(owner) for owner, _, _ in found} == FUSED
    sizes = {comparison.kernel: comparison.size for _, _, comparison in found}
    assert sizes["norm_act_pool"] == "256x64x16x16 bfloat16"
    owners = {(id(owner), name) for owner, name, _ in found}
    assert (
        len(owners)
        == len(found)
        == sum(3 if type(m) is DepthwiseConv2d else 1 for m in model.modules() if isinstance(m, Chooses))
    )
    assert not model.training
    after = dict([*model.state_dict().items(), *model.named_buffers()])
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.kernel
@pytest.mark.slow
def test_every_candidate_of_a_student_is_correct(choice):
    """Against the twin in fp32; and where PyTorch's implementations are faster, they run."""
    model, found = Student("test_resnet", 5, 32, stages=(3,)).to(DEVICE), choice(timer=Timer("torch"))
    logits = use_kernels(model, ("auto",), GPU, found, 2, bf16=True)
    assert logits.shape == (2, 2, 5)
    rows = found.record()["choices"]
    assert len(rows) > 10
    assert not any(row["dropped"] for row in rows)
    assert {row["chosen"] for row in rows} == {"torch"}
    assert all(m.impl == "torch" for m in model.modules() if isinstance(m, NormAct2d))
    assert all(m.weight_gradient_impl == "torch" for m in model.modules() if isinstance(m, DepthwiseConv2d))


@pytest.mark.kernel
@pytest.mark.parametrize("fastest", ["triton", "torch"])
def test_any_choice_trains_alike(choice, fastest):
    """Logits and gradients of a student are the same whatever its modules run."""
    torch.manual_seed(0)
    model, plain = (Student("test_resnet", 5, 32, stages=(3,)) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    for switch in choose_kernels.SWITCHES.values():
        switch(model)
    for owner, name, comparison in record_comparisons(model, 4, bf16=False)[1]:
        setattr(owner, name, fastest if fastest in comparison.candidates else comparison.default)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    results = []
    for each in (model, plain):
        logits = each.train()(images)
        logits.square().sum().backward()
        results.append([logits.detach(), each.exits[0].blocks[0][0].weight.grad, each.backbone.fc.weight.grad])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= 1e-3 * expected.norm()


def test_auto_without_triton_is_one_notice(choice, monkeypatch, capsys):
    monkeypatch.setattr(choose_kernels, "HAS_TRITON", False)
    model = student()
    before = kinds(model)
    use_kernels(model, ("auto",), GPU, choice(), 2, bf16=True)
    assert kinds(model) == before
    assert capsys.readouterr().err.count("kernels auto: Triton is not installed") == 1


def test_a_student_that_cannot_be_switched_stays_as_it_was(choice, monkeypatch, capsys):
    """Half switched when it fails; named kernels fail with the error."""

    def fails(module: nn.Module) -> int:
        raise AttributeError("no drop_block")

    monkeypatch.setitem(choose_kernels.SWITCHES, "norms", fails)
    model = student()
    before = [type(module) for module in model.modules()]
    use_kernels(model, ("auto",), GPU, choice(), 2, bf16=True)
    assert [type(module) for module in model.modules()] == before
    assert "kernels auto: AttributeError in this student (no drop_block)" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(AttributeError, match="no drop_block"):
        use_kernels(model, ("norms",), GPU, choice(), 2, bf16=True)


def test_named_kernels_need_a_gpu(choice, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BadInput, match=r"kernels: expected a GPU for exits norms, .* omit these kernels"):
        use_kernels(student(), ("exits", "norms"), CPU, choice(), 2, bf16=True)


# --- A step -----------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
def test_the_loss_is_chosen_too(choice, tmp_path):
    config = recipes.digits(data="digits", student="test_resnet", out=tmp_path, eps=(1.2,), smoothing=0.1)
    step = Step(Student("test_resnet", 5, 32), config, DEVICE, World())
    objective = step.program.objective
    objective.impl = "torch"
    found = choice(timer=Timer("triton"))
    logits = torch.empty(5, 4, 5, device=DEVICE)
    found.choose((objective, *each) for each in objective.comparisons(logits).items())
    assert objective.impl == "triton"
    assert not found.record()["choices"][0]["dropped"]
