"""Every method against its paper's formula, written independently here in float64, mostly with loops.

pytest tests/test_methods.py tests/test_fitnet.py -s     ends with each method's largest difference, see docs/methods.md
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastofa.methods.bkd import BKD
from fastofa.methods.cc import CC
from fastofa.methods.crd import CRD
from fastofa.methods.dist import DIST
from fastofa.methods.dkd import DKD
from fastofa.methods.find_method import method_class
from fastofa.methods.kd import KD
from fastofa.methods.lskd import LSKD
from fastofa.methods.method import Method, Outputs, Sizes
from fastofa.methods.objective import Objective
from fastofa.methods.ofa import OFA
from fastofa.methods.options import (
    BUILT_IN,
    CRDOptions,
    DKDOptions,
    KDOptions,
    LSKDOptions,
    ObjectiveOptions,
    OFAOptions,
    check_options,
)
from fastofa.methods.rkd import RKD
from fastofa.methods.rsd import RSD
from fastofa.methods.targets import Targets
from fastofa.system.errors import BadInput

B, C, S, T = 6, 5, 4, 7  # images, classes, widths of the pooled vectors of student and teacher
SIZES = Sizes(C, S, T, (3, 2, 4, 3, 3))
IMAGES = sum(SIZES.images_per_class)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(seed: int = 0) -> tuple[Outputs, Targets, Tensor]:
    """Outputs of a student, targets of a teacher whose classes are all kept, labels."""
    generator = torch.Generator().manual_seed(seed + 100)
    labels = torch.randint(0, C, (B,), generator=generator)
    log_probs, classes = random(B, C, seed=seed).mul(2).log_softmax(1).sort(dim=1, descending=True)
    starts = torch.tensor([0, *SIZES.images_per_class]).cumsum(0)
    outputs = Outputs(random(2, B, C, seed=seed + 1), random(B, S, seed=seed + 2))
    return outputs, Targets(classes, log_probs, random(B, T, seed=seed + 3), starts[labels]), labels


def teacher_logits(targets: Targets) -> Tensor:
    """[B, C]: any logits with these probabilities; here with a different constant for each image."""
    dense = torch.full((B, C), torch.nan, dtype=torch.float64).scatter(1, targets.classes, targets.log_probs)
    return dense + torch.arange(B, dtype=torch.float64)[:, None]


def softmax(row: Tensor, temperature: float = 1.0) -> list[float]:
    powers = [math.exp(z / temperature) for z in row.tolist()]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def pearson(a: list[float], b: list[float]) -> float:
    return float(torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1])


# --- The formulas -----------------------------------------------------------------------------------------------------


def ofa(o: Any, outputs: Outputs, targets: Targets, labels: Tensor) -> float:
    """Of the final logits and of one exit."""
    total = 0.0
    for head, eps, weight in zip(outputs.heads, o.eps, (o.ofa_weight, o.kd_weight), strict=True):
        for t, s, y in zip(teacher_logits(targets), head, labels.tolist(), strict=True):
            p, q = softmax(t, o.temperature), softmax(s, o.temperature)
            for c in range(C):
                hit = 1.0 if c == y else 0.0
                power = eps if o.variant == "official" or c == y else 1.0
                kept = (p[c] + hit) ** power - (hit if o.variant == "official" else 0.0)
                total -= weight * kept * math.log(q[c])
    return total / B


def kd(o: Any, outputs: Outputs, targets: Targets, labels: Tensor) -> float:
    rows = zip(teacher_logits(targets), outputs.heads[-1], strict=True)
    pairs = [(softmax(t, o.temperature), softmax(s, o.temperature)) for t, s in rows]
    cross = [-sum(a * math.log(b) for a, b in zip(p, q, strict=True)) for p, q in pairs]
    return o.temperature**2 * sum(cross) / B


def bkd(o: Any, outputs: Outputs, targets: Targets, labels: Tensor) -> float:
    total = 0.0
    for t, s in zip(teacher_logits(targets), outputs.heads[-1].tolist(), strict=True):
        for p, z in zip(softmax(t), s, strict=True):
            total -= p * math.log(1 / (1 + math.exp(-z))) + (1 - p) * math.log(1 / (1 + math.exp(z)))
    return total / (B * C)


def dkd(o: Any, outputs: Outputs, targets: Targets, labels: Tensor) -> float:
    total = 0.0
    for t, s, y in zip(teacher_logits(targets), outputs.heads[-1], labels.tolist(), strict=True):
        p, q = softmax(t, o.temperature), softmax(s, o.temperature)
        others = [c for c in range(C) if c != y]
        tckd = kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        nckd = kl([p[c] / (1 - p[y]) for c in others], [q[c] / (1 - q[y]) for c in others])
        total += o.temperature**2 * (o.alpha * tckd + o.beta * nckd)
    return total / B


def dist(o: Any, outputs: Outputs, targets: Targets, labels: Tensor) -> float:
    p = [softmax(row, o.temperature) for row in teacher_logits(targets)]
    q = [softmax(row, o.temperature) for row in outputs.heads[-1]]
    inter = sum(1 - pearson(a, b) for a, b in zip(p, q, strict=True)) / B
    intra = sum(1 - pearson([row[c] for row in p], [row[c] for row in q]) for c in range(C)) / C
    return o.temperature**2 * (o.beta * inter + o.gamma * intra)


def lskd(o: Any, outputs: Outputs, targets: Targets, labels: Tensor) -> float:
    def scores(row: Tensor) -> Tensor:
        return (row - row.mean()) / row.std()

    rows = zip(teacher_logits(targets), outputs.heads[-1], strict=True)
    divergences = [kl(softmax(scores(t), o.temperature), softmax(scores(s), o.temperature)) for t, s in rows]
    return o.temperature**2 * sum(divergences) / B


def rkd(o: Any, outputs: Outputs, targets: Targets, labels: Tensor) -> float:
    def huber(a: float, b: float) -> float:
        away = abs(a - b)
        return away**2 / 2 if away < 1 else away - 0.5

    def between(x: Tensor) -> list[list[float]]:
        found = [[math.dist(a, b) for b in x.tolist()] for a in x.tolist()]
        mean = sum(map(sum, found)) / (B * (B - 1))
        return [[d / mean for d in row] for row in found]

    def angle(x: Tensor, i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        return float(F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0))

    s, t = outputs.pooled, targets.pooled
    assert s is not None
    assert t is not None
    ds, dt, n = between(s), between(t), range(B)
    distances = sum(huber(ds[i][j], dt[i][j]) for i in n for j in n) / B**2
    angles = sum(huber(angle(s, i, j, k), angle(t, i, j, k)) for i in n for j in n for k in n) / B**3
    return o.distance * distances + o.angle * angles


LOGITS = {KD: kd, BKD: bkd, DKD: dkd, DIST: dist, LSKD: lskd}
OPTIONS: dict[type[Method], list[dict[str, Any]]] = {
    KD: [{}, {"temperature": 4.0}],
    BKD: [{}],
    DKD: [{}, {"alpha": 0.5, "beta": 8.0, "temperature": 4.0}, {"beta": 0.0}],
    DIST: [{}, {"beta": 2.0, "gamma": 0.5, "temperature": 3.0}],
    LSKD: [{}, {"temperature": 1.0}],
    RKD: [{}, {"distance": 1.0, "angle": 0.0}, {"distance": 0.0, "angle": 2.0}],
}
METHODS = [(method, options) for method, each in OPTIONS.items() for options in each]


def built(method: type[Method], **options: Any) -> Method:
    torch.manual_seed(0)
    return method(method.Options(**options), SIZES).double()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_method_equals_its_formula(method, options, seed, agrees):
    outputs, targets, labels = case(seed)
    built_method = built(method, **options)
    expected = {**LOGITS, RKD: rkd}[method](built_method.options, outputs, targets, labels)
    agrees(built_method, built_method.loss(outputs, targets, labels), expected, 1e-6, 1e-9)


@pytest.mark.parametrize(
    "options", [{"eps": (1.0, 1.0)}, {"eps": (1.5, 0.7), "temperature": 2.0}, {"eps": (1.3, 1.3), "variant": "paper"}]
)
def test_ofa_equals_its_formula(options, agrees):
    outputs, targets, labels = case()
    method = built(OFA, kd_weight=0.5, ofa_weight=2.0, **options)
    loss = (method.losses(outputs, targets, labels) * torch.tensor(method.weights)).sum()
    agrees(method, loss, ofa(method.options, outputs, targets, labels), 1e-6)


def test_cc_equals_its_formula(agrees):
    outputs, targets, labels = case()
    method = built(CC, scale=0.5, width=3)
    assert isinstance(method, CC)
    s, t = method.of_student(outputs.pooled).detach(), method.of_teacher(targets.pooled).detach()
    expected = sum(
        abs(float(s[b, d] - t[b, d])) * abs(float(s[b + 1, d] - t[b + 1, d])) for b in range(B - 1) for d in range(3)
    )
    agrees(method, method.loss(outputs, targets, labels), 0.5 * expected / (B - 1), 1e-6)


def test_rsd_equals_its_formula(agrees):
    outputs, targets, labels = case()
    method = built(RSD, kappa=0.3, expansion=2).train()
    assert isinstance(method, RSD)
    s, t = method.projector(outputs.pooled).detach(), targets.pooled
    assert t is not None
    expected = 0.0
    for i in range(T):
        for j in range(T):
            a, b = (x - x.mean() for x in (t[:, i], s[:, j]))
            scales = [float(x.square().mean()) ** 0.5 + 1e-5 for x in (a, b)]  # the constant is the published code's
            correlation = float((a * b).mean()) / math.prod(scales)
            expected += (1.0 if i == j else 0.3) * (correlation - (1.0 if i == j else 0.0)) ** 2
    agrees(method, method.loss(outputs, targets, labels), expected, 1e-6)
    assert sum(p.numel() for p in method.parameters()) == S * 2 * S + 2 * 2 * S + 2 * S * T


def test_rsd_is_zero_for_uncorrelated_dimensions_that_agree():
    """Columns of an orthogonal design: the teacher's dimensions do not correlate with one another."""
    design = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    method = RSD(RSD.Options(), Sizes(C, 3, 3)).double()
    method.projector = torch.nn.Sequential()  # type: ignore[assignment]
    outputs, targets = Outputs(random(1, 4, C), 5 + 2 * design), Targets(torch.empty(0), torch.empty(0), design)
    assert method.loss(outputs, targets, torch.zeros(4)).item() == pytest.approx(0, abs=1e-8)


# --- CRD --------------------------------------------------------------------------------------------------------------


def test_crd_contrasts_an_image_with_those_of_other_classes(agrees):
    """With one image of another class, it is every negative, and the loss has a closed form."""
    sizes = Sizes(2, S, T, (3, 1))
    torch.manual_seed(1)
    method = CRD(CRD.Options(width=4, negatives=5, temperature=0.5, momentum=0.25), sizes).double()
    memories = {name: getattr(method, name).clone() for name in ("of_student", "of_teacher")}
    ids, labels = torch.tensor([2, 0]), torch.tensor([0, 0])
    outputs, targets = (
        Outputs(random(1, 2, 2), random(2, S)),
        Targets(torch.empty(0), torch.empty(0), random(2, T), ids),
    )
    s = F.normalize(method.embed_student(outputs.pooled), dim=1)
    t = F.normalize(method.embed_teacher(targets.pooled), dim=1)
    total = 0.0
    for memory, vectors in ((memories["of_teacher"], s), (memories["of_student"], t)):
        scores = [
            [math.exp(float(memory[i] @ v.detach()) / 0.5) for i in (int(own), 3, 3, 3, 3, 3)]
            for own, v in zip(ids, vectors, strict=True)
        ]
        z = 4 * sum(map(sum, scores)) / 12
        for row in scores:
            h = [score / z / (score / z + 5 / 4) for score in row]
            total -= math.log(h[0]) + sum(math.log(1 - value) for value in h[1:])
    agrees(method, method.loss(outputs, targets, labels), total / 2, 1e-5)
    for name, vectors in (("of_student", s), ("of_teacher", t)):
        memory, before = getattr(method, name), memories[name]
        assert torch.equal(memory[[1, 3]], before[[1, 3]])
        torch.testing.assert_close(memory[ids], F.normalize(0.25 * before[ids] + 0.75 * vectors, dim=1))


def test_crd_keeps_the_constants_of_the_first_batch():
    method = built(CRD, negatives=8, width=3)
    assert isinstance(method, CRD)
    outputs, targets, labels = case()
    method.loss(outputs, targets, labels)
    first = method.constants.clone()
    outputs, targets, labels = case(5)
    method.loss(outputs, targets, labels)
    assert torch.equal(method.constants, first)
    assert (first > 0).all()


def test_crds_negatives_are_uniform_over_the_other_classes():
    method = CRD(CRD.Options(negatives=20_000), SIZES)
    starts = [0, 3, 5, 9, 12, 15]
    for label in range(C):
        ids = method._negatives(torch.tensor([label]))[0]
        counts = torch.bincount(ids, minlength=IMAGES).float()
        assert counts[starts[label] : starts[label + 1]].sum() == 0
        others = torch.cat([counts[: starts[label]], counts[starts[label + 1] :]])
        assert (others / others.mean() - 1).abs().max() < 0.2


# --- Gradients and limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [KD, BKD, DKD, DIST, LSKD, CC, RKD, RSD])
def test_gradients(method):
    outputs, targets, labels = case()
    built_method = built(method).train()
    heads, pooled = outputs.heads.clone().requires_grad_(), outputs.pooled.clone().requires_grad_()

    def loss(heads: Tensor, pooled: Tensor) -> Tensor:
        return built_method.loss(Outputs(heads, pooled), targets, labels)

    assert torch.autograd.gradcheck(loss, (heads, pooled), atol=1e-6)


@pytest.mark.parametrize("method", list(LOGITS))
@pytest.mark.parametrize("scale", [0.0, 50.0])
def test_the_loss_and_its_gradient_are_finite_for_extreme_logits(method, scale):
    """A student without a preference, and one as sure as a student can be; a teacher rounded to fp16, K < C."""
    outputs, targets, labels = case()
    logits = (scale * outputs.heads).float().requires_grad_()
    kept = Targets(targets.classes[:, :2], (100 * targets.log_probs).log_softmax(1)[:, :2].half())
    loss = method(method.Options(), SIZES).loss(Outputs(logits), kept, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("method", list(LOGITS))
def test_bf16_outputs_give_an_fp32_loss_close_to_the_exact_one(method):
    outputs, targets, labels = case()
    low = Outputs(outputs.heads.bfloat16())
    method = method(method.Options(), SIZES)
    loss = method.loss(low, Targets(targets.classes, targets.log_probs.half()), labels)
    assert loss.dtype == torch.float32
    exact = method.loss(Outputs(low.heads.double()), targets, labels)
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)


@pytest.mark.parametrize("method", [KD, DKD, LSKD, DIST])
def test_a_student_that_equals_the_teacher_has_no_gradient(method):
    _, targets, labels = case()
    logits = teacher_logits(targets)[None].requires_grad_()
    method(method.Options(), SIZES).loss(Outputs(logits), targets, labels).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-5


def test_kds_gradient_does_not_shrink_with_the_temperature():
    """At high temperatures it tends to the difference of the centred logits over the classes (Hinton, eq. 4)."""
    outputs, targets, labels = case()
    logits = outputs.heads.clone().requires_grad_()
    KD(KD.Options(temperature=1000.0), SIZES).loss(Outputs(logits), targets, labels).backward()
    away = logits[-1].detach() - teacher_logits(targets)
    expected = (away - away.mean(dim=1, keepdim=True)) / (B * C)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[-1], expected, rtol=2e-2, atol=1e-4)


def test_classes_that_are_not_kept_share_the_remaining_probability():
    targets = Targets(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.2]]).log())
    torch.testing.assert_close(targets.probs(5), torch.tensor([[0.2, 0.1, 0.5, 0.1, 0.1]]))
    squared = torch.tensor([[0.2, 0.1, 0.5, 0.1, 0.1]]) ** 2
    torch.testing.assert_close(targets.probs(5, 0.5), squared / squared.sum())


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (DKDOptions(temperature=0), "x.temperature: expected a number above 0, got 0"),
        (DKDOptions(beta=math.nan), "x.beta: expected a number of at least 0, got nan"),
        (LSKDOptions(weight=-1), "x.weight: expected a number of at least 0, got -1"),
        (CRDOptions(momentum=1), "x.momentum: expected a number from 0 to below 1, got 1"),
        (CRDOptions(negatives=0), "x.negatives: expected a number above 0, got 0"),
    ],
)
def test_an_option_out_of_range_is_refused(options, said):
    with pytest.raises(BadInput, match=said):
        check_options("x", options)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_method_has_valid_defaults_and_is_found_by_its_name(name):
    found = method_class(name)
    assert found.__name__.lower() == name
    check_options(name, found.Options())


# --- A method of one's own --------------------------------------------------------------------------------------------

OWN = """
from dataclasses import dataclass
import torch
from torch import nn
from fastofa.methods import Method

class Squares(Method):
    @dataclass(frozen=True)
    class Options:
        weight: float = 0.5

    def __init__(self, options, sizes):
        super().__init__(options, sizes)
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, outputs, targets, labels):
        p = targets.probs(outputs.logits.shape[1])
        return (self.scale * outputs.logits.float().softmax(1) - p).square().sum(1).mean()
"""


def test_a_method_of_ones_own_is_added_to_others(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    outputs, targets, labels = case()
    options = ObjectiveOptions((("kd", KDOptions(2.0)), (f"{file}:Squares", None)), gt_weight=0.25)
    objective = Objective(options, SIZES)
    assert objective.parts == ("loss", "gt", "kd", "squares")
    total, gt, kd, own = objective(Outputs(outputs.heads.float()), labels, targets).double()
    expected = (outputs.heads[-1].softmax(1) - teacher_logits(targets).softmax(1)).square().sum(1).mean()
    assert own.item() == pytest.approx(expected.item(), rel=1e-5)
    assert total.item() == pytest.approx((0.25 * gt + 2 * kd + 0.5 * own).item(), rel=1e-6)
    assert len(list(objective.parameters())) == 1


@pytest.mark.parametrize(
    ("code", "name", "said"),
    [
        (OWN, "Cubes", "expected a subclass of fastofa.methods.Method called Cubes .* it has Squares"),
        ("x = 1", "x", "expected a subclass .* it has none"),
        ("1 / 0", "x", "own.py:x: line 1, `1 / 0`: ZeroDivisionError"),
        ("def (", "x", r"own.py:x: line 1, `def \(`: SyntaxError"),
        (None, "x", "expected a Python file, found none"),
    ],
)
def test_a_file_without_the_method_is_refused_in_one_line(tmp_path, code, name, said):
    file = tmp_path / "own.py"
    if code is not None:
        file.write_text(code)
    with pytest.raises(BadInput, match=said) as error:
        method_class(f"{file}:{name}")
    assert "\n" not in str(error.value)


def test_two_losses_of_one_name_are_refused():
    options = ObjectiveOptions((("ofa", OFAOptions((1.0,) * 5)), ("kd", KDOptions())))
    with pytest.raises(BadInput, match=r"ofa\+kd: .*called kd"):
        Objective(options, SIZES)


LOSS = "    def loss(self, outputs, targets, labels):\n        return outputs.logits.float().mean()\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "    def loss(self, o, t, y):\n        return o.logits.float().mean(1)\n",
            "its loss to return a scalar, .*got shape",
        ),
        (
            LOSS + "    @dataclass(frozen=True)\n    class Options:\n        scale: float = 1.0\n",
            "expected a field `weight",
        ),
        (
            LOSS + "    @dataclass(frozen=True)\n    class Options:\n        weight: float\n",
            "expected a default for .*weight",
        ),
        (LOSS + "    @dataclass\n    class Options:\n        weight: list = None\n", "Options.weight to be bool, int"),
        (LOSS + "    class Options:\n        weight = 1.0\n", "expected a dataclass as its Options"),
        ("    x = 1\n", r"expected loss\(self, outputs, targets, labels\), found none"),
        ("    def loss(self, outputs):\n        return 1\n", r"expected loss\(.*, got loss\(self, outputs\)"),
        ("    def __init__(self):\n        pass\n" + LOSS, r"expected __init__\(self, options, sizes\)"),
        ("    def loss(self, o, t, y):\n        return 1.0\n", "its loss to return a scalar, .*got float"),
    ],
)
def test_a_wrong_method_is_refused_in_one_line(tmp_path, body, said):
    head = "from dataclasses import dataclass\nfrom fastofa.methods import Method\n\nclass Wrong(Method):\n"
    file = tmp_path / "wrong.py"
    file.write_text(head + body)
    outputs, targets, labels = case()
    with pytest.raises(BadInput, match=said) as error:
        Objective(ObjectiveOptions(((f"{file}:Wrong", None),)), SIZES)(outputs, labels, targets)
    assert "\n" not in str(error.value)
