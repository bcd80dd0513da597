"""The step: parts add up to the batch, random numbers follow from seed, step and rank, and no device is waited for."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch.utils._python_dispatch import TorchDispatchMode

from fastofa.data.dataset import Dataset
from fastofa.methods.method import Sizes
from fastofa.methods.objective import Objective
from fastofa.methods.targets import Targets
from fastofa.pipelines import Batch, open_pipeline
from fastofa.runs.config import TrainConfig
from fastofa.runs.recipes import RECIPES
from fastofa.student.fused_depthwise import DepthwiseConv2d
from fastofa.student.model import Student
from fastofa.system.errors import BadInput
from fastofa.teacher.cache_columns import topk_targets
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.training import step
from fastofa.training.distributed import World
from fastofa.training.step import Step
from fastofa.views.order import epoch_order
from fastofa.views.table import center_views

CPU, SIZE, BATCH = torch.device("cpu"), 32, 20


def config(**given: Any) -> TrainConfig:
    values = {"data": "digits:100", "student": "test_vit", "out": Path("run"), "optimizer": "sgd", "lr": 0.05}
    return RECIPES["digits"](**{**values, **given})


def make_step(rank: int = 0, device: torch.device = CPU, **given: Any) -> Step:
    """A step of a Transformer, which has no batch norm, with a teacher's predictions; always the same weights."""
    c = config(**given)
    torch.manual_seed(7)
    student = Student(c.student, 10, SIZE, stages=c.exits, drop_path=c.drop_path)
    return Step(student.train(), c, device, World(rank=rank))


def some_targets(device: torch.device = CPU, **given: Any) -> DeviceTargets:
    """Targets of a hundred samples; always the same."""
    generator = torch.Generator().manual_seed(8)
    return DeviceTargets(topk_targets(torch.randn(100, 10, generator=generator).log_softmax(-1), 4), device, **given)


@pytest.fixture
def batches(digits: Dataset) -> list[Batch]:
    """An epoch of five batches."""
    pipeline = open_pipeline("resident", digits, SIZE, BATCH)
    return list(pipeline.epoch(center_views(digits.sizes), epoch_order(len(digits), 0, 0)))


def in_parts(batch: Batch, parts: int) -> list[Batch]:
    pieces = [value.chunk(parts) for value in (batch.images, batch.labels, batch.sample_ids, batch.rows)]
    return [Batch(*piece) for piece in zip(*pieces, strict=True)]


# --- Parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("parts", [2, 5])
def test_parts_add_up_to_the_batch(batches, parts):
    """Losses of every step to 1e-6, hence also gradient norm and weights, clipped and averaged."""
    whole, divided = (make_step(clip=1.0, ema=0.9) for _ in range(2))
    for batch in batches:
        for made, pieces in ((whole, [batch]), (divided, in_parts(batch, parts))):
            made.reset_sums()
            made(pieces, some_targets(), lr=0.05)
        assert divided.sums.tolist() == pytest.approx(whole.sums.tolist(), rel=1e-6)
    assert (divided.steps, divided.summed) == (5, 1)
    for a, b in ((whole.student, divided.student), (whole.ema.module, divided.ema.module)):
        for name, value in a.state_dict().items():
            torch.testing.assert_close(b.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.kernel
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes its steps on a CPU, in the interpreter")
def test_the_loss_kernel_takes_the_same_steps(batches):
    """Losses, gradient norm and weights agree up to the order of sums in fp32."""
    plain, kernel = (make_step(kernels=kernels) for kernels in ((), ("loss",)))
    for batch in batches[:3]:
        for made in (plain, kernel):
            made([Batch(*(value[:4] for value in batch[:4]))], some_targets(), lr=0.05)
    assert kernel.sums.tolist() == pytest.approx(plain.sums.tolist(), rel=1e-5)
    for name, value in plain.student.state_dict().items():
        torch.testing.assert_close(kernel.student.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_the_exits_kernel_runs_in_student_and_average():
    made = make_step(kernels=("exits",), student="test_resnet", ema=0.9)
    for model in (made.student, made.ema.module):
        assert any(isinstance(module, DepthwiseConv2d) for module in model.modules())


def test_kernels_need_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BadInput, match=r"kernels: expected a GPU for loss, .* omit these kernels"):
        make_step(kernels=("loss",))


def test_sums_add_up_over_the_steps(batches):
    """Until they are reset; the gradient norm is that before clipping."""
    together, alone = make_step(clip=0.1), make_step(clip=0.1)
    expected = torch.zeros(len(alone.names))
    for batch in batches[:3]:
        together([batch], some_targets(), lr=0.01)
        alone.reset_sums()
        alone([batch], some_targets(), lr=0.01)
        assert alone.sums[-1] > 0.1
        expected += alone.sums
    assert together.sums.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert (together.summed, alone.summed) == (3, 1)


# --- Random numbers ---------------------------------------------------------------------------------------------------


def test_random_numbers_follow_from_seed_step_and_rank(batches):
    """Whatever was drawn before; another seed, step or rank drops other blocks, also for numbers with many bits."""

    def loss(seed: int = 0, number: int = 0, rank: int = 0) -> float:
        made = make_step(rank, seed=seed, drop_path=0.5)
        assert any(isinstance(module, DropPath) for module in made.student.modules())
        made.steps = number
        made([batches[0]], some_targets(), lr=0.0)
        return made.sums[0].item()

    first = loss()
    torch.rand(10)
    assert loss() == first
    others = [loss(seed=1), loss(number=1), loss(rank=1), loss(seed=2**21), loss(number=2**20), loss(seed=2**40)]
    assert len({first, *others}) == 7


# --- Never waits ------------------------------------------------------------------------------------------------------


@pytest.fixture
def meta(monkeypatch) -> torch.device:
    """A device without values, on which any read of a value fails; missing operators are added."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu" if str(device) == "meta" else device))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    return torch.device("meta")


ASKING = {
    "item": torch.Tensor.item,
    "tolist": torch.Tensor.tolist,
    "float": float,
    "if": bool,
    "cpu": torch.Tensor.cpu,
    "numpy": torch.Tensor.numpy,
    "nonzero": torch.nonzero,
    "mask": lambda tensor: tensor[tensor > 0],
}


@pytest.mark.parametrize("how", ASKING)
def test_reading_a_value_of_the_meta_device_fails(meta, how):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError), match="meta"):
        ASKING[how](torch.ones(1, device=meta))


class NoValues(TorchDispatchMode):
    """Fails if a value is read from any device, or a tensor is created from a list, which copies it to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in ("_local_scalar_dense", "lift_fresh")), "numbers of Python"
        return func(*args, **(kwargs or {}))


class NoTransfers(TorchDispatchMode):
    """Fails if a tensor is copied between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        assert "_to_copy" not in str(func) or found.device == args[0].device, "a transfer"
        return found


@pytest.mark.parametrize("student", ["test_vit", "test_efficientnet"])
def test_the_step_reads_no_value(meta, student):
    """With everything: parts, mixed images, exits, clipping, average, drop path; sums stay on the device, too.

    With LAMB, since the fused optimisers do not support this device.
    """
    c = config(student=student, optimizer="lamb", clip=1.0, ema=0.9, smoothing=0.1, temperature=2.0)
    made = Step(Student(student, 10, SIZE, drop_path=0.2).train(), c, meta)
    targets = some_targets(meta, rows=np.arange(100))
    images = torch.zeros(BATCH, 3, SIZE, SIZE, dtype=torch.uint8, device=meta)
    ids = torch.zeros(BATCH, dtype=torch.int64, device=meta)
    plain = Batch(images, ids, ids, ids)
    mixed = plain._replace(partner_labels=ids, mix=torch.rand(BATCH, device=meta))
    with pytest.raises(AssertionError, match="a transfer"), NoTransfers():
        torch.ones(1).to(meta)
    with NoTransfers():
        made([plain, plain], targets, lr=0.01)
        made([mixed], targets, lr=0.01)
    assert made.steps == 2
    assert {tensor.device for tensor in (made.sums, *made.parameters, *made.ema.module.buffers())} == {meta}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_fused_optimisers_read_no_value(batches, optimizer):
    """In the same steps."""
    one = torch.ones(1)
    for wait in (one.item, lambda: float(one), lambda: bool(one), lambda: torch.tensor([1.0])):
        with pytest.raises(AssertionError, match="numbers of Python"), NoValues():
            wait()
    made = make_step(optimizer=optimizer, clip=1.0, ema=0.9, smoothing=0.1, temperature=2.0, drop_path=0.2)
    made(batches[:1], some_targets(), lr=0.01)  # makes what is made once
    mixed = batches[2]._replace(partner_labels=batches[2].labels, mix=torch.rand(BATCH))
    targets = some_targets(rows=np.arange(100))
    with NoValues():
        made(batches[:2], targets, lr=0.01)
        made([mixed], targets, lr=0.01)
    assert made.steps == 3


# --- One program ------------------------------------------------------------------------------------------------------

FAMILIES = """
    resnet18 mobilenetv2_100 convnext_atto deit_tiny_patch16_224 swin_nano_patch4_window7_224 resmlp_12_224 mvitv2_tiny
    efficientformer_l1
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.split())
def test_students_of_every_family_trace_without_a_graph_break(name: str):
    """torch.compile with fullgraph, the default on a GPU, would fail on a break."""
    torch._dynamo.reset()
    size = 224 if name in ("resmlp_12_224", "efficientformer_l1") else 32
    c = config(student=name)
    program = step.Program(Student(name, 10, size, teacher_dim=192), Objective(c.objective, Sizes(10)), c, CPU)
    program.compile(backend="eager", fullgraph=True, dynamic=False)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    losses = program(images, torch.arange(2), Targets(torch.arange(4).repeat(2, 1), torch.zeros(2, 4) - 2))
    losses[0].backward()
    assert losses.isfinite().all()


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_a_compiled_cnn_takes_the_same_steps(batches):
    """With two exits, through inductor: losses, weights and the statistics of batch norm."""
    torch._dynamo.reset()
    eager, compiled = (make_step(student="test_resnet", stages=(1, 4), compile=mode) for mode in ("off", "on"))
    assert (eager.compiled, compiled.compiled) == (False, True)
    assert len(compiled.student.exits) == 2
    for batch in batches[:2]:
        for made in (eager, compiled):
            made([batch], some_targets(), lr=0.05)
    assert compiled.sums.tolist() == pytest.approx(eager.sums.tolist(), rel=1e-6)
    for name, value in eager.student.state_dict().items():
        torch.testing.assert_close(compiled.student.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("graphs", ["auto", "on", "off"])
def test_there_are_no_cuda_graphs_on_a_cpu(batches, graphs, capsys):
    """Nothing is measured or reported."""
    made = make_step(cuda_graphs=graphs)
    made([batches[0]], some_targets(), lr=0.01)
    assert not made.cuda_graphs
    assert "CUDA graphs" not in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", ["auto", "on"])
def test_cuda_graphs_take_the_same_steps(batches, graphs, capsys):
    """auto measures, reports its choice once, and leaves statistics and random numbers as they were."""
    torch._dynamo.reset()
    device = torch.device("cuda")
    sums = []
    for chosen in ("off", graphs):
        made = make_step(device=device, student="test_resnet", cuda_graphs=chosen, drop_path=0.2, kernels=("off",))
        for batch in batches[:4]:
            images = batch.images.to(device, memory_format=torch.channels_last)
            made([Batch(images, *(value.to(device) for value in batch[1:4]))], some_targets(device), lr=0.01)
        sums.append(made.sums.tolist())
    assert sums[1] == pytest.approx(sums[0], rel=0.02)
    assert capsys.readouterr().err.count("CUDA graphs") == (graphs == "auto")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_a_compiled_cnn_in_bf16_takes_nearly_the_same_steps(batches, kernels):
    """As training on a GPU by default, against eager fp32 on the CPU; large batches keep the noise low."""
    torch._dynamo.reset()
    device = torch.device("cuda")
    truth = make_step(student="test_resnet", kernels=("off",))
    made = make_step(device=device, student="test_resnet", kernels=(kernels,))
    assert (made.compiled, made.bf16) == (True, True)
    filters = [p for p in made.parameters if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    before = flat(truth)
    images, *numbers = (torch.cat(column) for column in list(zip(*batches, strict=True))[:4])
    on_gpu = Batch(images.to(device, memory_format=torch.channels_last), *(value.to(device) for value in numbers))
    for _ in range(2):
        truth([Batch(images, *numbers)], some_targets(), lr=0.01)
        made([on_gpu], some_targets(device), lr=0.01)
    assert made.sums[0].item() == pytest.approx(truth.sums[0].item(), rel=0.01)
    moved, expected = flat(made) - before, flat(truth) - before
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.95
    assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.05)


def flat(made: Step) -> torch.Tensor:
    """All weights as one vector."""
    return torch.cat([parameter.detach().float().cpu().flatten() for parameter in made.parameters])
