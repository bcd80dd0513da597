"""The training objective against its formula, written independently here in dense float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from fastofa.kernels import distillation_loss
from fastofa.kernels.reference import heavier, mixed_labels
from fastofa.methods.method import Outputs, Sizes
from fastofa.methods.objective import Objective
from fastofa.methods.targets import Targets
from fastofa.runs.config import TrainConfig
from fastofa.teacher.cache_columns import topk_targets

B, C, K = 6, 9, 4


def config(**overrides) -> TrainConfig:
    values = {"data": "digits", "student": "test_resnet", "out": Path("run"), "recipe": "digits"}
    return TrainConfig(**{**values, **overrides})


class ObjectiveOf:
    """The objective of a configuration, for logits [H, B, C]."""

    def __init__(self, c: TrainConfig) -> None:
        self.objective = Objective(c.objective, Sizes(C))
        self.parts = self.objective.parts

    def __call__(self, logits: Tensor, *arguments: Any) -> Tensor:
        return self.objective(Outputs(logits), *arguments)


def case(heads: int, seed: int = 0) -> tuple[Tensor, Tensor, Targets]:
    """Logits of every head, labels, and targets as a cache stores them, with the label among the K classes or not."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(heads, B, C, generator=generator)
    labels = torch.randint(0, C, (B,), generator=generator)
    targets = topk_targets(torch.log_softmax(2 * torch.randn(B, C, generator=generator), dim=-1), K)
    return logits, labels, Targets(targets.classes.to(torch.int32), targets.log_probs)


def truth(c: TrainConfig, logits: Tensor, labels: Tensor, targets: Targets | None) -> Tensor:
    """loss = gt_weight CE(final, label) + kd_weight L(final; eps[-1]) + ofa_weight sum_k L(exit_k; eps[k]).

    kd: without the exits, eps 1, and T^2 times L.
    """
    z, m = logits.double(), F.one_hot(labels, C).double()
    soft = (1 - c.smoothing) * m + c.smoothing / C
    if c.gt_loss == "ce":
        gt = -(soft * z[-1].log_softmax(-1)).sum(-1).mean()
    else:
        gt = -(soft * z[-1].sigmoid().log() + (1 - soft) * (-z[-1]).sigmoid().log()).mean()
    if targets is None:
        return torch.stack([c.gt_weight * gt, gt])

    known = targets.log_probs.double().exp()
    p = ((1 - known.sum(1)).clamp(min=0) / (C - K))[:, None].repeat(1, C)
    p = p.scatter(1, targets.classes.long(), known) ** (1 / c.temperature)
    p = p / p.sum(1, keepdim=True)
    eps = c.eps * len(z) if c.exits else (1.0,)
    if len(c.eps) > 1:  # eps are in the order of `stages`, heads in stage order
        eps = [power for _, power in sorted(zip(c.stages, c.eps, strict=False))]
        eps = [*eps, c.eps[-1]]
    heads = []
    for head, power in zip(z, eps, strict=True):
        w = (p + m) ** power - m if c.variant == "official" or not c.exits else torch.where(m > 0, (1 + p) ** power, p)
        heads.append(-(w * (head / c.temperature).log_softmax(-1)).sum(-1).mean())
    if not c.exits:
        kd = c.temperature**2 * heads[-1]
        return torch.stack([c.gt_weight * gt + c.kd_weight * kd, gt, kd])
    kd, ofa = heads[-1], sum(heads[:-1], torch.zeros(()).double())
    return torch.stack([c.gt_weight * gt + c.kd_weight * kd + c.ofa_weight * ofa, gt, kd, ofa])


def check(c: TrainConfig, logits: Tensor, labels: Tensor, targets: Targets | None) -> None:
    """All four parts and the gradient of the total equal those in float64."""
    logits, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    actual = ObjectiveOf(c)(logits, labels, targets)
    expected = truth(c, exact, labels, targets)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-6)
    actual[0].backward()
    expected[0].backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=2e-6)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_objective_equals_the_formula(data):
    """Any method, stages, eps (one, or one per head), weights, label loss, smoothing, temperature and variant."""
    method = data.draw(st.sampled_from(["ofa", "kd", "scratch"]))
    stages = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, unique=True)))
    heads = len(stages) + 1 if method == "ofa" else 1
    power = st.floats(0.5, 2.5)
    number = {name: data.draw(st.floats(0, 3)) for name in ("gt_weight", "kd_weight", "ofa_weight")}
    c = config(
        method=method,
        stages=stages,
        eps=tuple(data.draw(st.lists(power, min_size=1, max_size=1) | st.lists(power, min_size=heads, max_size=heads))),
        temperature=data.draw(st.floats(0.5, 4)),
        variant=data.draw(st.sampled_from(["official", "paper"])),
        gt_loss=data.draw(st.sampled_from(["ce", "bce"])),
        smoothing=data.draw(st.sampled_from([0.0, 0.1, 0.5])),
        **number,
    )
    logits, labels, targets = case(heads, data.draw(st.integers(0, 10**6)))
    check(c, logits, labels, None if method == "scratch" else targets)


def test_each_head_has_its_own_eps():
    """eps are in the order of the heads: exits from stage 1 up, then the final logits."""
    logits, labels, targets = case(5)
    logits = logits[:1].repeat(5, 1, 1)
    eps = (0.7, 1.0, 1.3, 1.6, 2.0)
    alone = [ObjectiveOf(config(stages=(1,), eps=(1.0, e)))(logits[:2], labels, targets)[2] for e in eps]
    parts = ObjectiveOf(config(eps=eps))(logits, labels, targets)
    assert len({round(x.item(), 4) for x in alone}) == 5
    torch.testing.assert_close(parts[2], alone[-1])
    torch.testing.assert_close(parts[3], torch.stack(alone[:-1]).sum())


def test_the_parts_are_unweighted_and_the_loss_is_their_weighted_sum():
    logits, labels, targets = case(5)
    c = config(gt_weight=0.5, kd_weight=2.0, ofa_weight=0.1, smoothing=0.1)
    parts = dict(zip(ObjectiveOf(c).parts, ObjectiveOf(c)(logits, labels, targets), strict=True))
    plain = dict(zip(ObjectiveOf(c).parts, ObjectiveOf(config(smoothing=0.1))(logits, labels, targets), strict=True))
    assert [parts[name] for name in ("gt", "kd", "ofa")] == [plain[name] for name in ("gt", "kd", "ofa")]
    torch.testing.assert_close(parts["loss"], 0.5 * parts["gt"] + 2 * parts["kd"] + 0.1 * parts["ofa"])
    torch.testing.assert_close(plain["loss"], plain["gt"] + plain["kd"] + plain["ofa"])
    assert min(plain.values()) > 0


def test_kd_is_the_sum_of_hard_and_soft_label_cross_entropy():
    """With all classes kept, no probability is spread, and PyTorch's two cross-entropies are the whole loss."""
    logits, labels, _ = case(1)
    log_probs = torch.log_softmax(torch.randn(B, C), dim=-1)
    targets = Targets(torch.arange(C).repeat(B, 1), log_probs)
    parts = ObjectiveOf(config(method="kd"))(logits, labels, targets)
    hard, soft = F.cross_entropy(logits[0], labels), F.cross_entropy(logits[0], log_probs.exp())
    torch.testing.assert_close(parts, torch.stack([hard + soft, hard, soft]))


def test_scratch_learns_from_labels_only():
    logits, labels, _ = case(1)
    hard = F.cross_entropy(logits[0], labels)
    parts = ObjectiveOf(config(method="scratch", kd_weight=3, ofa_weight=3))(logits, labels, None)
    assert parts.tolist() == [hard.item(), hard.item()]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, [True] * 5),
        ({"ofa_weight": 0}, [False, False, False, False, True]),
        ({"gt_weight": 0, "kd_weight": 0}, [True, True, True, True, False]),
        ({"gt_weight": 0}, [True] * 5),
        ({"kd_weight": 0}, [True] * 5),
        ({"gt_weight": 0, "kd_weight": 0, "ofa_weight": 0}, [False] * 5),
    ],
)
def test_a_head_has_a_gradient_only_if_its_weight_is_not_zero(weights, expected):
    """Label loss and KD reach only the last head, OFA only the exits."""
    logits, labels, targets = case(5)
    logits.requires_grad_()
    ObjectiveOf(config(**weights))(logits, labels, targets)[0].backward()
    assert [bool(g.abs().max() > 0) for g in logits.grad] == expected


# --- Mixed images -----------------------------------------------------------------------------------------------------


def mixed_case(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Partner labels, some equal to the labels, and shares that include 0, 1 and a tie."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(B, generator=generator)
    shares[:3] = torch.tensor([0.0, 1.0, 0.5])
    return torch.randint(0, C, (B,), generator=generator), shares


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gt_loss", ["ce", "bce"])
def test_mixed_labels_equal_timms(gt_loss, smoothing):
    """mixup_target of each pair, then the loss of timm's recipes; the OFA loss enhances the argmax of the target."""
    logits, labels, targets = case(5)
    partner_labels, mix = mixed_case()
    pairs = torch.stack([labels, partner_labels], dim=1)
    target = torch.stack([mixup_target(p, C, lam, smoothing)[0] for p, lam in zip(pairs, mix, strict=True)])
    torch.testing.assert_close(mixed_labels(labels, partner_labels, mix, C, smoothing), target)
    assert torch.equal(heavier(labels, partner_labels, mix), target.argmax(dim=1))

    c = config(gt_loss=gt_loss, smoothing=smoothing, eps=(1.3,))
    objective = ObjectiveOf(c)
    actual = objective(logits, labels, targets, partner_labels, mix)
    by_timm = SoftTargetCrossEntropy() if gt_loss == "ce" else BinaryCrossEntropy(smoothing=smoothing)
    torch.testing.assert_close(actual[1], by_timm(logits[-1], target))
    hard = objective(logits, target.argmax(dim=1), targets)
    assert torch.equal(actual[2:], hard[2:])
    torch.testing.assert_close(actual[0], actual[1:].sum())


def test_eps_follow_the_order_of_stages_on_the_command_line():
    """--stages 4 1 --eps 1.1 1.9 1.5: the exit of stage 1, the first head, has eps 1.9."""
    logits, labels, targets = case(3)
    written = ObjectiveOf(config(stages=(4, 1), eps=(1.1, 1.9, 1.5)))
    in_order = ObjectiveOf(config(stages=(1, 4), eps=(1.9, 1.1, 1.5)))
    assert written.objective.methods[0].eps.tolist() == pytest.approx([1.9, 1.1, 1.5])
    assert torch.equal(written(logits, labels, targets), in_order(logits, labels, targets))
    assert config(stages=(4, 2, 1), eps=(1.0,)).head_eps == (1.0,) * 4
    assert config(method="kd", stages=(4, 1), eps=(1.2,)).head_eps == (1.2,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gt_loss", ["ce", "bce"])
def test_mix_of_any_floating_dtype(gt_loss, dtype):
    """The loss is fp32 and equals that of fp32 shares; the mixed labels are at least fp32."""
    logits, labels, targets = case(5)
    partner_labels, mix = mixed_case()
    mix = mix.to(dtype)
    objective = ObjectiveOf(config(gt_loss=gt_loss, smoothing=0.1))
    actual = objective(logits, labels, targets, partner_labels, mix)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, objective(logits, labels, targets, partner_labels, mix.float()))
    shares = mixed_labels(labels, partner_labels, mix, C, 0.1)
    assert shares.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(B, dtype=shares.dtype))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_distillation_loss_accepts_mix_of_any_floating_dtype(dtype, impl):
    logits, labels, targets = case(3)
    partner_labels, mix = mixed_case()
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    mix = mix.to(dtype)

    def loss(z: Tensor, share: Tensor, impl: str) -> Tensor:
        arguments = (labels, targets.classes, targets.log_probs, [1.3] * 3)
        moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
        return distillation_loss(
            z.to(device),
            *moved,
            smoothing=0.1,
            partner_labels=partner_labels.to(device),
            mix=share.to(device),
            impl=impl,
        )[0]

    actual = loss(logits, mix, impl)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.cpu(), loss(logits, mix.float(), "torch").cpu())
    exact = loss(logits.double(), mix, "torch")
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), actual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gt_loss", ["ce", "bce"])
def test_a_share_of_1_equals_no_mixing(gt_loss):
    logits, labels, targets = case(5)
    objective = ObjectiveOf(config(gt_loss=gt_loss, smoothing=0.1))
    plain = objective(logits, labels, targets)
    torch.testing.assert_close(objective(logits, labels, targets, labels.flip(0), torch.ones(B)), plain)
    torch.testing.assert_close(objective(logits, labels, targets, labels, torch.rand(B)), plain)
    assert torch.equal(objective(logits, labels, targets, None, None), plain)


@pytest.mark.parametrize("gt_loss", ["ce", "bce"])
def test_bf16_logits_add_no_error_but_their_own_rounding(gt_loss):
    """The loss is computed in fp32: the same logits in bf16 and in fp32 give the same parts."""
    logits, labels, targets = case(5)
    logits = logits.bfloat16()
    check(config(gt_loss=gt_loss, eps=(1.4,)), logits.float(), labels, targets)
    objective = ObjectiveOf(config(gt_loss=gt_loss, eps=(1.4,)))
    torch.testing.assert_close(objective(logits, labels, targets), objective(logits.float(), labels, targets))
