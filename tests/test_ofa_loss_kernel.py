"""The Triton kernels of the loss against float64: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastofa.kernels import distillation_loss, ofa_loss
from test_ofa_loss import make_case

pytestmark = pytest.mark.kernel
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Beyond the error that the twin makes in the same dtype, relative to the greatest number of the truth. The interpreter
# cuts off where it stores bf16. A GPU's
# exponential of x is off by about 2^-24 |x|, and logits lie up to 20 below the greatest.
TOLERANCE = {torch.float32: 4e-6 if DEVICE == "cuda" else 2e-6}
TOLERANCE |= {torch.float16: 2**-10, torch.bfloat16: 2**-7 if DEVICE == "cuda" else 3 * 2**-8}
HALVES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that a kernel does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def kernel_case(H=3, B=2, C=37, K=4, dtype=torch.float32, label="some", seed=0, std=2.0, **types):
    """As from a cache: classes int32 (or as in `types`), log-probabilities float16."""
    logits, labels, classes, log_probs = make_case(H, B, C, K, std, torch.float32, label, seed)
    classes, log_probs = classes.to(types.get("classes", torch.int32)), log_probs.to(types.get("probs", torch.float16))
    return [t.to(DEVICE) for t in (logits.to(dtype), labels, classes, log_probs)]


def run(function, case: list[Tensor], impl: str, dtype: torch.dtype, **options) -> tuple[Tensor, Tensor]:
    """Losses and the logits' gradient, for incoming gradients that are not 1, in float64."""
    logits, *rest = case
    logits = logits.detach().to(dtype, copy=True).requires_grad_()
    rest[2] = rest[2].to(torch.promote_types(dtype, rest[2].dtype))
    out = function(logits, *rest, impl=impl, **options)
    if isinstance(out, tuple):  # of distillation_loss, only the total can be differentiated
        losses = torch.cat([out[0][None], out[1]])
        (-1.5 * out[0]).backward()
    else:
        losses = out
        (out @ torch.linspace(-1, 2, len(out), dtype=out.dtype, device=DEVICE)).backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    return losses.detach().double(), logits.grad.double()


def check(function, case: list[Tensor], **options) -> None:
    """|truth - kernel| <= |truth - twin in the same dtype| + tolerance, for losses and gradient."""
    dtype = case[0].dtype
    truth = run(function, case, "torch", torch.float64, **options)
    twin = run(function, case, "torch", dtype, **options)
    kernel = run(function, case, "triton", dtype, **options)
    for name, exact, plain, got in zip(("losses", "gradient"), truth, twin, kernel, strict=True):
        scale = exact.abs().amax().clamp(min=1e-3)
        tolerance = TOLERANCE[torch.float32 if name == "losses" else dtype] * scale
        error = (got - exact).abs()
        assert not torch.isnan(error).any(), name
        assert (error <= (plain - exact).abs() + tolerance).all(), (name, error.max().item(), tolerance.item())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize(("eps", "temperature"), [(1.0, 1.0), ([1.5, 0.7, 1.0], 1.0), (1.4, 3.0)])
def test_equals_float64(dtype, variant, eps, temperature):
    for label in ("all", "none", "some"):
        check(ofa_loss, kernel_case(dtype=dtype, label=label), eps=eps, temperature=temperature, variant=variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("C", "K"), [(2, 1), (2, 2), (7, 3), (8, 8), (100, 10), (257, 128), (1000, 16), (1001, 1), (8191, 3), (21841, 16)]
)
def test_every_size_of_a_row(dtype, C, K):
    """One block or several, rows that begin anywhere between 16-byte boundaries, K up to C."""
    check(ofa_loss, kernel_case(H=1, B=3, C=C, K=K, dtype=dtype), eps=1.3, temperature=1.0)


def test_all_of_many_classes_kept():
    """K = C = 1,500: the teacher's classes take two blocks."""
    check(ofa_loss, kernel_case(H=1, B=2, C=1500, K=1500, probs=torch.float32), eps=1.3, temperature=1.5)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_equals_float64_for_any_case(data):
    """Random shapes, dtypes, weights, temperature, smoothing, mixed or not: everything in the objective."""
    H, B, C = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(2, 70))
    K = data.draw(st.integers(1, C))
    case = kernel_case(
        H, B, C, K,
        dtype=data.draw(st.sampled_from(HALVES)),
        label=data.draw(st.sampled_from(["all", "some"])),
        seed=data.draw(st.integers(0, 10**6)),
        std=data.draw(st.floats(0.1, 30)),
        classes=data.draw(st.sampled_from([torch.uint16, torch.int32, torch.int64])),
    )  # fmt: skip
    options = {
        name: data.draw(st.sampled_from([0.0, 0.3, 1.0, 3.0])) for name in ("gt_weight", "kd_weight", "ofa_weight")
    }
    if data.draw(st.booleans()):
        options["partner_labels"] = torch.randint(0, C, (B,)).to(DEVICE)
        options["mix"] = torch.tensor(
            data.draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), min_size=B, max_size=B))
        ).to(DEVICE)
    eps = data.draw(st.lists(st.floats(0.5, 2.5), min_size=H, max_size=H))
    temperature, smoothing = data.draw(st.sampled_from([1.0, 0.5, 4.0])), data.draw(st.sampled_from([0.0, 0.1]))
    variant = data.draw(st.sampled_from(["official", "paper"]))
    check(distillation_loss, case, eps=eps, temperature=temperature, smoothing=smoothing, variant=variant, **options)


@pytest.mark.parametrize(("own_kept", "partner_kept"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("mix", [0.2, 0.5, 0.8])
def test_both_labels_in_or_out_of_the_top_k(own_kept, partner_kept, mix):
    """A label among the teacher's classes must get the share of both."""
    logits, _, classes, log_probs = kernel_case(H=2, B=2, C=12, K=4)
    others = torch.tensor([[c for c in range(12) if c not in row] for row in classes.tolist()]).to(DEVICE)
    labels = classes[:, 1].long() if own_kept else others[:, 0]
    partners = classes[:, 2].long() if partner_kept else others[:, 3]
    shares = torch.full((2,), mix, device=DEVICE)
    check(
        distillation_loss, [logits, labels, classes, log_probs],
        eps=1.4, smoothing=0.1, partner_labels=partners, mix=shares,
    )  # fmt: skip


def test_an_image_mixed_with_another_of_its_class():
    logits, labels, classes, log_probs = kernel_case(H=2, B=3, C=12, K=4)
    check(
        distillation_loss, [logits, labels, classes, log_probs],
        eps=1.4, partner_labels=labels, mix=torch.tensor([0.3, 0.5, 1.0]).to(DEVICE),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
def test_extreme_logits(dtype):
    check(ofa_loss, kernel_case(C=100, dtype=dtype, std=100), eps=1.5, temperature=1.0)


@pytest.mark.parametrize("function", [ofa_loss, distillation_loss])
def test_empty_batch_is_zero(function):
    losses, gradient = run(function, kernel_case(B=0), "triton", torch.float32, eps=1.5)
    assert not losses.any()
    assert gradient.shape == (3, 0, 37)


@pytest.mark.parametrize("where", ["labels", "classes"])
@pytest.mark.parametrize("number", [-1, 37, 10**6])
def test_an_invalid_class_gives_nan(where, number):
    """Checking on the host would wait for the device; the step's check for finite values detects it."""
    logits, labels, classes, log_probs = kernel_case(H=2, B=2)
    {"labels": labels, "classes": classes}[where][1] = number
    assert ofa_loss(logits, labels, classes, log_probs, 1.0, impl="triton").isnan().all()


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_a_nan_of_the_teacher_is_propagated(variant):
    logits, labels, classes, log_probs = kernel_case(H=2, B=2)
    log_probs[1, 0] = float("nan")
    assert ofa_loss(logits, labels, classes, log_probs, 1.3, impl="triton", variant=variant).isnan().all()


def test_without_a_gradient_the_loss_is_the_same():
    case = kernel_case()
    with_gradient = ofa_loss(case[0].clone().requires_grad_(), *case[1:], 1.2, impl="triton")
    with torch.no_grad():
        assert torch.equal(ofa_loss(*case, 1.2, impl="triton"), with_gradient)


def test_logits_of_any_strides():
    logits, *rest = kernel_case(H=2, B=2, C=10, K=3)
    wide = torch.full((2, 2, 16), float("nan"), device=DEVICE)
    wide[..., :10] = logits
    assert torch.equal(ofa_loss(wide[..., :10], *rest, 1.2, impl="triton"), ofa_loss(logits, *rest, 1.2, impl="triton"))


@pytest.mark.parametrize("mixed", [False, True])
def test_is_an_operator_of_pytorch(mixed):
    """opcheck: schema, fake tensors, autograd registration, compilation with dynamic shapes."""
    logits, labels, classes, log_probs = kernel_case(H=2, B=2, C=9, K=3)
    logits.requires_grad_()
    eps = torch.tensor([1.0, 1.5], device=DEVICE)
    common = (logits, labels, classes, log_probs, eps, 2.0, "official")
    mixing = (labels.flip(0), torch.full((2,), 0.4, device=DEVICE)) if mixed else (None, None)
    labelled = (*common, [1.0, 0.5, 2.0], 0.1, *mixing)
    torch.library.opcheck(torch.ops.fastofa.ofa_loss, common)
    torch.library.opcheck(torch.ops.fastofa.distillation_loss, labelled)
    with torch.no_grad():
        quick = {"test_utils": ("test_schema", "test_faketensor")}  # the others are in the forward operators'
        torch.library.opcheck(torch.ops.fastofa.ofa_loss_backward, (eps, *common), **quick)
        torch.library.opcheck(torch.ops.fastofa.distillation_loss_backward, (eps[:1], *labelled), **quick)


def test_compiles_as_one_graph():
    logits, labels, classes, log_probs = kernel_case(H=2, B=2, C=9, K=3)

    def both(logits):
        total, parts = distillation_loss(2 * logits, labels, classes, log_probs, 1.3, impl="triton")
        return total + ofa_loss(2 * logits, labels, classes, log_probs, 1.3, impl="triton").sum(), parts

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        total, parts = function(leaf)
        total.backward()
        results.append((total.detach(), parts, leaf.grad))
    torch.testing.assert_close(results[0], results[1])


def test_float64_uses_the_twin():
    with pytest.raises(ValueError, match=r"expected fp32, bf16 or fp16 for 'triton', got torch.float64"):
        ofa_loss(*(t.to(DEVICE) for t in make_case()), 1.0, impl="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_refuses_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="impl: expected tensors on a GPU for 'triton', got cpu; leave impl out"):
        ofa_loss(*kernel_case(), 1.0, impl="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
@pytest.mark.parametrize("mixed", [False, True])
def test_on_a_cpu_the_operators_are_the_twins(mixed, monkeypatch):
    """As in an exported program: losses, and the closed-form gradient against autograd's."""
    monkeypatch.delenv("TRITON_INTERPRET")
    logits, labels, classes, log_probs = kernel_case(H=3, B=4)
    eps, weights = torch.tensor([1.0, 1.4, 0.8]), [0.5, 2.0, 1.5]
    mixing = {"partner_labels": labels.flip(0), "mix": torch.tensor([0.2, 0.5, 0.7, 1.0])} if mixed else {}
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    arguments = (labels, classes, log_probs, eps, 2.0)
    losses = torch.ops.fastofa.distillation_loss(
        leaf, *arguments, "paper", weights, 0.1, mixing.get("partner_labels"), mixing.get("mix")
    )
    (3 * losses[0]).backward()
    total, parts = distillation_loss(other, *arguments, *weights, 0.1, **mixing, variant="paper")
    (3 * total).backward()
    torch.testing.assert_close(losses, torch.cat([total[None], parts]))
    torch.testing.assert_close(leaf.grad, other.grad)

    found = []
    for function in (torch.ops.fastofa.ofa_loss, ofa_loss):
        leaf.grad = None
        heads = function(leaf, *arguments, variant="paper")
        (heads @ torch.tensor([1.0, -2.0, 0.5])).backward()
        found.append((heads.detach(), leaf.grad))
    torch.testing.assert_close(*found)


def test_the_incoming_gradient_is_applied_before_rounding_to_fp16():
    """A gradient of 1e-9 is 0 in fp16; multiplied by a loss scaler's 2^20 it is not."""
    logits, *rest = kernel_case(H=2, B=3, C=9, K=3, std=0.5)
    rest[2] = rest[2].double()
    found = []
    for dtype, impl in ((torch.float16, "triton"), (torch.float64, "torch")):
        leaf = logits.half().to(dtype).requires_grad_()
        total, _ = distillation_loss(leaf, *rest, 1.2, 1.0, 1e-8, 1e-8, 1e-8, impl=impl)
        (2.0**20 * total).backward()
        found.append(leaf.grad.double())
    assert found[1].abs().max() < 0.01
    torch.testing.assert_close(*found, rtol=2e-3, atol=1e-7)
