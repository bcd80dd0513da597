"""The kinds of the optimisers, their steps, and the parameters that have weight decay."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastofa.runs.config import TrainConfig
from fastofa.student.model import Student
from fastofa.system.errors import BadInput
from fastofa.training import optim
from fastofa.training.optim import create_optimizer, set_learning_rate


def config(**arguments) -> TrainConfig:
    return TrainConfig(
        **{"data": "digits", "student": "test_resnet", "out": Path("run"), "recipe": "digits", **arguments}
    )


def decays(student: nn.Module, c: TrainConfig) -> dict[str, float]:
    """The weight decay of every parameter by name; fails unless each is in exactly one group."""
    names = {parameter: name for name, parameter in student.named_parameters()}
    grouped = [(names[p], g["weight_decay"]) for g in create_optimizer(student, c).param_groups for p in g["params"]]
    assert sorted(name for name, _ in grouped) == sorted(names.values())
    return dict(grouped)


@pytest.mark.parametrize(
    ("model", "size", "exempt"),
    [
        ("deit_tiny_patch16_224", 32, {"backbone.cls_token", "backbone.pos_embed"}),
        ("swin_pico_patch4_window7_224", 32, "relative_position_bias_table"),
        ("test_resnet", 32, set()),
    ],
)
def test_biases_norms_and_embeddings_have_no_weight_decay(model, size, exempt):
    """One-dimensional parameters, biases and named embeddings: 0; others, exits included: the configured value."""
    student = Student(model, 10, size)
    got = decays(student, config(weight_decay=0.07))
    for name, parameter in student.named_parameters():
        named = name in exempt if isinstance(exempt, set) else name.endswith(exempt)
        assert got[name] == (0 if parameter.ndim <= 1 or name.endswith(".bias") or named else 0.07), name
    norms = {
        f"{name}.{part}"
        for name, module in student.named_modules()
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)
        for part, _ in module.named_parameters(recurse=False)
    }
    assert norms
    assert {got[name] for name in norms} == {0}
    decayed = {name.partition(".")[0] for name, value in got.items() if value}
    assert decayed == {"backbone", "exits"}
    if isinstance(exempt, set):
        assert exempt <= got.keys()
    else:
        assert any(name.endswith(exempt) for name in got)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_embeddings_may_have_weight_decay_as_published(name):
    """The published code exempts one-dimensional parameters and biases only."""
    student = Student("deit_tiny_patch16_224", 10, 32)
    got = decays(student, config(weight_decay=0.07, decay_embeddings=True, optimizer=name))
    assert got["backbone.pos_embed"] == got["backbone.cls_token"] == 0.07
    for name, parameter in student.named_parameters():
        assert got[name] == (0 if parameter.ndim <= 1 or name.endswith(".bias") else 0.07), name


def test_zero_weight_decay():
    assert set(decays(Student("test_resnet", 10, 32), config(weight_decay=0)).values()) == {0}


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("sgd", "SGD", {"momentum": 0.9, "nesterov": True}),
        ("adamw", "AdamW", {"betas": (0.9, 0.999)}),
        ("lamb", "Lamb", {}),
    ],
)
def test_each_name_creates_its_optimiser(name, kind, expected):
    """Class and settings of every group; one step changes every parameter that has a gradient."""
    student = Student("test_resnet", 10, 32)
    optimizer = create_optimizer(student, config(optimizer=name, lr=0.3, weight_decay=0.02))
    assert type(optimizer).__name__ == kind
    for group in optimizer.param_groups:
        assert group["lr"] == 0.3
        assert {key: group[key] for key in expected} == expected
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    student(torch.randn(4, 3, 32, 32)).pow(2).sum().backward()
    optimizer.step()
    unchanged = [n for n, p in student.named_parameters() if p.grad.abs().max() > 0 and torch.equal(p, before[n])]
    assert not unchanged


@pytest.mark.parametrize(("name", "plain"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_fused_optimisers_equal_plain_ones(name, plain):
    """Twenty steps of the same gradients on channels-last weights at a changing learning rate agree to 1e-5."""
    models = [Student("test_efficientnet", 10, 32).to(memory_format=torch.channels_last) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    c = config(optimizer=name, lr=0.03, weight_decay=0.02)
    fused = create_optimizer(models[0], c)
    assert all(group["fused"] for group in fused.param_groups)
    options = {"foreach": False, "fused": False, **({"momentum": 0.9, "nesterov": True} if name == "sgd" else {})}
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in create_optimizer(models[1], c).param_groups]
    expected = plain(groups, lr=0.03, **options)
    for step in range(20):
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in (fused, expected):
            set_learning_rate(optimizer, 0.03 / (1 + step))
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- NVIDIA's apex ----------------------------------------------------------------------------------------------------


class Fused(torch.optim.SGD):
    """Stands in for an optimiser of apex and records its arguments."""

    def __init__(self, params: Any, lr: float, **arguments: Any) -> None:
        self.arguments = arguments
        super().__init__(params, lr=lr)


@pytest.fixture
def apex(monkeypatch) -> SimpleNamespace:
    """A stand-in for NVIDIA's apex built with its CUDA extension."""
    optimizers = SimpleNamespace(**{name: type(name, (Fused,), {}) for name in ("FusedSGD", "FusedAdam", "FusedLAMB")})
    for name, module in (("amp_C", SimpleNamespace()), ("apex", SimpleNamespace()), ("apex.optimizers", optimizers)):
        monkeypatch.setitem(sys.modules, name, module)
    return optimizers


@pytest.fixture
def gpu(monkeypatch) -> None:
    """The student appears to be on a GPU."""
    check = optim.check_optimizer
    monkeypatch.setattr(optim, "check_optimizer", lambda name, _: check(name, torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("apex_sgd", "FusedSGD", {"momentum": 0.9, "nesterov": True}),
        ("apex_adam", "FusedAdam", {"adam_w_mode": True}),
        ("apex_lamb", "FusedLAMB", {}),
    ],
)
def test_apex_optimisers_are_created(apex, gpu, name, kind, expected):
    """With the same groups as other optimisers: all parameters, biases and norms without weight decay."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optimizer: Any = create_optimizer(model, config(optimizer=name, lr=0.3, weight_decay=0.02))
    assert type(optimizer) is getattr(apex, kind)
    assert {key: optimizer.arguments[key] for key in expected} == expected
    assert "fused" not in optimizer.arguments
    actual = {id(p): (g["weight_decay"], g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    assert actual == {id(p): (0.02 if p.ndim > 1 else 0, 0.3) for p in model.parameters()}


@pytest.mark.parametrize("name", ["apex_sgd", "apex_adam", "apex_lamb"])
def test_apex_without_a_gpu_is_refused(apex, name):
    with pytest.raises(BadInput, match=r"apex_.*: expected a GPU, but the student is on cpu; use sgd, adamw or lamb"):
        create_optimizer(nn.Linear(3, 2), config(optimizer=name))


@pytest.mark.parametrize("lacking", ["amp_C", "apex.optimizers", "apex"])
def test_other_packages_named_apex_are_refused(apex, gpu, monkeypatch, lacking):
    """PyPI's apex has no optimisers; NVIDIA's without its CUDA extension has no amp_C."""
    if lacking == "apex":
        monkeypatch.delitem(sys.modules, "apex.optimizers")
    monkeypatch.setitem(sys.modules, lacking, None)
    with pytest.raises(BadInput, match=r"expected NVIDIA's apex built with --cuda_ext .*on PyPI is"):
        create_optimizer(nn.Linear(3, 2), config(optimizer="apex_sgd"))


def test_sgd_uses_nesterov_momentum():
    """Two steps equal the update rule, weight decay included, in float64."""
    layer = nn.Linear(3, 2, bias=False).double()
    w = layer.weight.detach().clone()
    optimizer = create_optimizer(layer, config(optimizer="sgd", lr=0.1, weight_decay=0.01))
    momentum = torch.zeros_like(w)
    for _ in range(2):
        gradient = torch.randn(2, 3, dtype=torch.float64)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        gradient = gradient + 0.01 * w
        momentum = 0.9 * momentum + gradient
        w = w - 0.1 * (gradient + 0.9 * momentum)
    torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-12, atol=0)


def test_set_learning_rate_keeps_the_scale_of_a_group():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr_scale": 0.25}, {"params": [b]}], lr=1.0)
    for lr in (0.8, 0.4):
        set_learning_rate(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr / 4, lr])
