"""FitNet: against a float64 oracle written with loops, and between CNNs, Transformers and MLPs."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fastofa.methods.fitnet import FitNet
from fastofa.methods.method import Outputs, Sizes
from fastofa.methods.objective import Objective
from fastofa.methods.options import check_options
from fastofa.methods.targets import Targets
from fastofa.pipelines import Batch
from fastofa.runs import recipes
from fastofa.student.model import Student
from fastofa.student.stages import channels
from fastofa.system.errors import BadInput
from fastofa.teacher.model import LogProbs, Teacher
from fastofa.teacher.online import OnlineTeacher
from fastofa.training.step import Program

CPU, B, CLASSES = torch.device("cpu"), 3, 10
SIZES = Sizes(CLASSES, student_stages={1: 2, 2: 3, 4: 4}, teacher_stages={1: 3, 2: 5, 3: 7, 4: 2})
# Small networks of four families, each with the modules whose outputs are its stages, or None for its last features.
NETWORKS: dict[str, list[str | None]] = {
    "test_resnet": ["layer1", "layer2", "layer3", "layer4"],
    "mobilenetv2_050": ["blocks.1", "blocks.2", "blocks.4", None],
    "test_vit": ["blocks.1", "blocks.2", "blocks.4", "blocks.5"],
    "swin_pico_patch4_window7_224": ["layers.0", "layers.1", "layers.2", "layers.3"],
    "mixer_s32_224": ["blocks.1", "blocks.3", "blocks.5", "blocks.7"],
}
PAIRS = [
    ("mobilenetv2_050", "test_resnet"), ("test_vit", "test_resnet"), ("test_resnet", "test_vit"),
    ("swin_pico_patch4_window7_224", "test_resnet"), ("mixer_s32_224", "test_resnet"),
    ("test_vit", "swin_pico_patch4_window7_224"),
]  # fmt: skip
SIDE = 64  # px


# --- The formula ------------------------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resized(rows: list[float], length: int) -> list[float]:
    """A line of numbers at another length: each is a mean weighted by a triangle as wide as the coarser grid's step."""
    scale = len(rows) / length
    found = []
    for i in range(length):
        centre = (i + 0.5) * scale
        weights = [max(0.0, 1 - abs(j + 0.5 - centre) / max(scale, 1)) for j in range(len(rows))]
        found.append(sum(w * value for w, value in zip(weights, rows, strict=True)) / sum(weights))
    return found


def resized_map(rows: list[list[float]], side: int) -> list[list[float]]:
    wide = [resized(row, side) for row in rows]
    columns = [resized([row[x] for row in wide], side) for x in range(side)]
    return [[columns[x][y] for x in range(side)] for y in range(side)]


def fitnet(method: FitNet, outputs: Outputs, targets: Targets) -> float:
    assert outputs.stages is not None
    assert targets.stages is not None
    total = 0.0
    for stage, projector in zip(method.options.stages, method.projectors, strict=True):
        weight, student, teacher = projector.weight[:, :, 0, 0], outputs.stages[stage], targets.stages[stage]
        squares = []
        for b in range(B):
            for d in range(teacher.shape[1]):
                projected = sum(weight[d, c] * student[b, c] for c in range(student.shape[1]))
                given = resized_map(projected.tolist(), teacher.shape[2])
                for y, row in enumerate(given):
                    squares += [(value - teacher[b, d, y, x].item()) ** 2 for x, value in enumerate(row)]
        total += sum(squares) / len(squares)
    return total


def case(student_side: int, teacher_side: int) -> tuple[Outputs, Targets]:
    student = {k: random(B, c, student_side, student_side, seed=k) for k, c in SIZES.student_stages.items()}
    teacher = {k: random(B, c, teacher_side, teacher_side, seed=k + 9) for k, c in SIZES.teacher_stages.items()}
    empty = torch.empty(0)
    return Outputs(random(1, B, CLASSES), stages=student), Targets(empty, empty, stages=teacher)


def built(**options: Any) -> FitNet:
    torch.manual_seed(0)
    return FitNet(FitNet.Options(**options), SIZES).double()


@pytest.mark.parametrize(("student_side", "teacher_side"), [(4, 4), (8, 4), (4, 7), (7, 3), (1, 5), (5, 1)])
def test_it_equals_its_formula(student_side, teacher_side, agrees):
    """Student's grids equal to, finer and coarser than the teacher's; stages in any order, not all of them."""
    outputs, targets = case(student_side, teacher_side)
    method = built(stages=(4, 2))
    agrees(method, method.loss(outputs, targets, torch.empty(0)), fitnet(method, outputs, targets), 1e-9)


def test_equal_features_cost_nothing():
    method = built(stages=(1,))
    outputs, targets = case(4, 4)
    assert outputs.stages is not None
    same = targets._replace(stages={1: method.projectors[0](outputs.stages[1]).detach()})
    assert method.loss(outputs, same, torch.empty(0)).item() == 0


@pytest.mark.parametrize(("student_side", "teacher_side"), [(4, 3), (2, 3)])
def test_gradients(student_side, teacher_side):
    outputs, targets = case(student_side, teacher_side)
    method = built(stages=(1, 4))
    assert outputs.stages is not None
    given = [outputs.stages[k].clone().requires_grad_() for k in (1, 4)]

    def loss(first: Tensor, last: Tensor) -> Tensor:
        return method.loss(outputs._replace(stages={1: first, 4: last}), targets, torch.empty(0))

    assert torch.autograd.gradcheck(loss, given, atol=1e-6)


def test_bf16_features_give_an_fp32_loss():
    outputs, targets = case(4, 4)
    method = FitNet(FitNet.Options(stages=(2,)), SIZES)
    assert outputs.stages is not None
    assert targets.stages is not None
    low = outputs._replace(stages={2: outputs.stages[2].bfloat16()})
    loss = method.loss(low, targets._replace(stages={2: targets.stages[2].bfloat16()}), torch.empty(0))
    assert loss.dtype == torch.float32
    assert loss.isfinite()


# --- The features of student and teacher ------------------------------------------------------------------------------


def open_small(name: str) -> OnlineTeacher:
    """An online teacher with random weights."""
    torch.manual_seed(2)
    size = {} if "vit" not in name and "swin" not in name and "mixer" not in name else {"img_size": SIDE}
    model = timm.create_model(name.replace("pico_patch4", "tiny_patch4"), num_classes=CLASSES, **size, **extra(name))
    model.eval().requires_grad_(False)
    network = LogProbs(model, (0.5,) * 3, (0.25,) * 3).eval()
    teacher = Teacher(name, network, "", CPU, SIDE, 1.0, (0.5,) * 3, (0.25,) * 3, bf16=False)
    return OnlineTeacher(teacher, {"stage features"}, compile_=False)


def extra(name: str) -> dict[str, Any]:
    return {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)} if "pico" in name else {}


def batch(side: int = SIDE) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8, generator=generator)
    return Batch(images.contiguous(memory_format=torch.channels_last), *(torch.arange(B),) * 3)


def outputs_of(model: nn.Module, names: list[str | None]) -> list[Tensor]:
    """Filled with the outputs of these modules whenever the model runs, as maps without prefix tokens."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.ndim == 4 and output.shape[1] == output.shape[2] != output.shape[3]:  # Swin: channels last
            output = output.permute(0, 3, 1, 2)
        if output.ndim == 3:
            side = math.isqrt(output.shape[1])
            output = output[:, output.shape[1] - side**2 :].transpose(1, 2).reshape(len(output), -1, side, side)
        found.append(output.detach())

    for name in names:
        if name is not None:
            model.get_submodule(name).register_forward_hook(keep)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_teachers_stages_are_the_outputs_of_its_blocks(name):
    teacher = open_small(name)
    found = outputs_of(teacher.teacher.model, NETWORKS[name])
    targets = teacher.of(batch())
    assert targets.stages is not None
    for number, expected in zip((1, 2, 3, 4), found, strict=False):
        torch.testing.assert_close(targets.stages[number], expected)
    last = teacher.teacher.model.forward_features(teacher.teacher.network.normalize(batch().images))
    assert targets.stages[4].shape[2:] == ((2, 2) if name != "test_vit" else (4, 4))
    if None in NETWORKS[name]:
        torch.testing.assert_close(targets.stages[4], last)
    log_probs = torch.empty(B, CLASSES).scatter(1, targets.classes.long(), targets.log_probs)
    torch.testing.assert_close(log_probs, teacher.teacher.log_probs(batch().images).clone())


@pytest.mark.parametrize("exits", [(), (2, 3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_students_stages_come_out_of_the_forward_pass_that_gives_its_logits(name, exits):
    torch.manual_seed(4)
    student = Student(name, CLASSES, SIDE, stages=exits).eval()
    stages = student.find_stages().values()
    found = outputs_of(student.backbone, NETWORKS[name])
    with torch.no_grad():
        heads, pooled, maps = student.with_features(batch().images, stages=stages)
        once = found.copy()
        assert len(once) == sum(module is not None for module in NETWORKS[name])
        torch.testing.assert_close(heads, student(batch().images))
    assert pooled is None
    assert {number: map_.shape[1] for number, map_ in maps.items()} == channels(student.find_stages())
    for number, expected in zip((1, 2, 3, 4), once, strict=False):
        torch.testing.assert_close(maps[number], expected)


# --- Training ---------------------------------------------------------------------------------------------------------


def program(student_name: str, teacher: OnlineTeacher) -> Program:
    config = recipes.digits(
        data="digits:100", student=student_name, out=Path("unused"), online_teacher="unused", method="fitnet"
    )
    torch.manual_seed(5)
    student = Student(student_name, CLASSES, SIDE, stages=config.exits)
    of_student, of_teacher = channels(student.find_stages()), channels(teacher.stages)
    objective = Objective(config.objective, Sizes(CLASSES, student_stages=of_student, teacher_stages=of_teacher))
    student.methods = objective.methods
    return Program(student.train(), objective, config, CPU)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_any_two_families(student, teacher):
    """The loss is finite; its gradient reaches every projector and the student's first layer, not the teacher."""
    online = open_small(teacher)
    made = program(student, online)
    losses = made(batch().images, batch().labels, online.of(batch()))
    assert made.objective.parts == ("loss", "gt", "fitnet")
    losses[2].backward()
    assert losses.isfinite().all()
    method = made.objective.methods[0]
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())
    first = next(made.student.backbone.parameters())
    assert first.grad is not None
    assert all(p.grad is None for p in online.teacher.model.parameters())


@pytest.mark.slow
def test_the_step_is_one_graph():
    """As it is compiled on a GPU: student and projectors without a break, and the teacher."""
    online = open_small("test_vit")
    eager, compiled = (program("test_resnet", online) for _ in range(2))
    torch._dynamo.reset()
    compiled.compile(backend="eager", fullgraph=True, dynamic=False)
    targets = torch.compile(online.targets, backend="eager", fullgraph=True, dynamic=False)(batch().images)
    torch.testing.assert_close(targets.stages, online.of(batch()).stages, rtol=1e-4, atol=1e-4)
    found = [made(batch().images, batch().labels, targets).detach() for made in (eager, compiled)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


# --- What is refused --------------------------------------------------------------------------------------------------


def test_stages_that_a_network_lacks_are_named_with_those_that_both_have():
    with pytest.raises(BadInput, match=r"got 1 2 3 4, but the student has 1 2 4 .* give --fitnet.stages 1 2 4$"):
        FitNet(FitNet.Options(), SIZES)
    with pytest.raises(BadInput, match="the teacher none; choose another student or teacher"):
        FitNet(FitNet.Options(), Sizes(CLASSES, student_stages={1: 2}))


@pytest.mark.parametrize("stages", [(), (0,), (1, 1), (5,)])
def test_stages_that_do_not_exist_are_refused(stages):
    with pytest.raises(BadInput, match=r"fitnet.stages: expected some of 1 2 3 4"):
        check_options("fitnet", FitNet.Options(stages=stages))
