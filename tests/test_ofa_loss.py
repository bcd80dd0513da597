"""kernels.ofa_loss against the formula of the published loss, implemented again here in float64 numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from torch import Tensor

from fastofa.kernels import ofa_loss
from fastofa.kernels.reference import dense_probs, ofa_loss_dense

VARIANTS = ("official", "paper")
both_variants = pytest.mark.parametrize("variant", VARIANTS)


def make_case(H=3, B=6, C=11, K=4, std=2.0, dtype=torch.float64, label="some", seed=0):
    """Random logits, labels and a teacher's top-K; label is among the K classes of "all", "none" or "some" samples."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, std, (H, B, C))).to(dtype)
    log_prob = log_softmax(rng.normal(0, 2, (B, C)), axis=1)
    ranked = np.argsort(-log_prob, axis=1)
    classes, log_probs = ranked[:, :K], np.take_along_axis(log_prob, ranked[:, :K], axis=1)
    low, high = {"all": (0, K), "none": (K, C), "some": (0, C)}[label]
    labels = ranked[np.arange(B), rng.integers(low, high, B)]
    log_probs = torch.from_numpy(log_probs).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return logits, torch.from_numpy(labels), torch.from_numpy(classes.copy()), log_probs


def teacher(classes: Tensor, log_probs: Tensor, C: int, T: float) -> np.ndarray:
    """The teacher's distribution [B, C]: p_k at its classes, the rest of the mass spread evenly, to the power 1/T."""
    out = np.empty((len(classes), C))
    for row, k, lp in zip(out, classes.long().numpy(), log_probs.double().numpy(), strict=True):
        p = np.exp(lp)
        row[:] = max(0.0, 1 - p.sum()) / max(C - len(k), 1)
        row[k] = p
        row **= 1 / T
        row /= row.sum()
    return out


def oracle(logits, labels, classes, log_probs, eps, T=1.0, variant="official") -> np.ndarray:
    """The published loss, one head and one sample at a time."""
    H, B, C = logits.shape
    q = teacher(classes, log_probs, C, T)
    log_student = log_softmax(logits.detach().double().numpy() / T, axis=-1)
    loss = np.zeros(H)
    for h, power in enumerate(np.broadcast_to(eps, H)):
        for b, y in enumerate(labels.tolist()):
            m = np.zeros(C)
            m[y] = 1
            if variant == "official":
                w = (q[b] + m) ** power - m
            else:
                w = q[b].copy()
                w[y] = (1 + q[b, y]) ** power
            loss[h] -= (w * log_student[h, b]).sum() / B
    return loss


def close(got: Tensor, expected, rtol: float) -> None:
    np.testing.assert_allclose(got.detach().double().numpy(), expected, rtol=rtol, atol=1e-10)


@both_variants
@pytest.mark.parametrize("label", ["all", "none", "some"])
@pytest.mark.parametrize(("eps", "T"), [(1.0, 1.0), (1.5, 1.0), ([1.0, 1.3, 0.7], 1.0), (1.4, 4.0), ([0.5, 1, 2], 0.5)])
def test_equals_the_formula_in_float64(variant, label, eps, T):
    case = make_case(label=label)
    close(ofa_loss(*case, eps, T, variant=variant), oracle(*case, eps, T, variant), rtol=1e-10)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_formula_for_any_shape_and_ignores_shift_and_column_order(data):
    """Random H, B, C, K, eps, T; logits shifted per row and permuted K columns give the same loss."""
    C = data.draw(st.integers(1, 30))
    shape = {"H": data.draw(st.integers(1, 4)), "B": data.draw(st.integers(1, 5)), "C": C}
    K = data.draw(st.integers(1, C))
    seed = data.draw(st.integers(0, 10**6))
    logits, labels, classes, log_probs = make_case(**shape, K=K, seed=seed, std=data.draw(st.floats(0.1, 30)))
    power = st.floats(0.2, 3)
    eps = data.draw(power | st.lists(power, min_size=shape["H"], max_size=shape["H"]))
    T, variant = data.draw(st.floats(0.3, 8)), data.draw(st.sampled_from(VARIANTS))

    expected = oracle(logits, labels, classes, log_probs, eps, T, variant)
    np.testing.assert_array_less(-1e-9, expected)  # every weight is >= 0
    close(ofa_loss(logits, labels, classes, log_probs, eps, T, variant=variant), expected, rtol=1e-9)
    shifted = logits + 50 * torch.randn(logits.shape[:2]).double()[..., None]
    columns = torch.randperm(K)
    again = ofa_loss(shifted, labels, classes[:, columns], log_probs[:, columns], eps, T, variant=variant)
    close(again, expected, rtol=1e-9)


@both_variants
@pytest.mark.parametrize("T", [1.0, 3.0])
def test_all_classes_kept_equals_dense_in_fp32(variant, T):
    """K = C: equal to the dense definition at fp32 precision; both equal float64."""
    logits, labels, classes, log_probs = make_case(H=4, B=64, C=100, K=100, dtype=torch.float32)
    eps = torch.tensor([1.0, 1.1, 1.5, 2.0])
    probs = torch.from_numpy(teacher(classes, log_probs, 100, T)).float()
    dense = ofa_loss_dense(logits, labels, probs, eps, T, variant)
    sparse = ofa_loss(logits, labels, classes, log_probs, eps, T, variant=variant)
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=0)
    close(sparse, oracle(logits, labels, classes, log_probs, eps.numpy(), T, variant), rtol=1e-5)


@both_variants
@pytest.mark.parametrize("T", [1.0, 3.0])
def test_top_k_equals_dense_on_the_spread_out_distribution(variant, T):
    """K < C: the dense loss of the distribution that the top K represent, built independently."""
    logits, labels, classes, log_probs = make_case(H=2, B=16, C=50, K=5)
    spread = torch.from_numpy(teacher(classes, log_probs, 50, T))
    torch.testing.assert_close(dense_probs(classes, log_probs, 50, T), spread, rtol=1e-12, atol=0)
    dense = ofa_loss_dense(logits, labels, spread, torch.tensor([0.8, 1.5]).double(), T, variant)
    sparse = ofa_loss(logits, labels, classes, log_probs, torch.tensor([0.8, 1.5]).double(), T, variant=variant)
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=0)


@pytest.mark.parametrize("K", [3, 11])
def test_eps_1_is_soft_label_cross_entropy(K):
    """Official: cross_entropy(z/T, p), nothing else. Paper: w_y = 1 + p_y, so the hard-label cross-entropy is added."""
    logits, labels, classes, log_probs = make_case(H=1, K=K)
    for T in (1.0, 2.0):
        soft = F.cross_entropy(logits[0] / T, torch.from_numpy(teacher(classes, log_probs, 11, T)))
        hard = F.cross_entropy(logits[0] / T, labels)
        for variant, expected in (("official", soft), ("paper", soft + hard)):
            loss = ofa_loss(logits, labels, classes, log_probs, 1.0, T, variant=variant)
            torch.testing.assert_close(loss[0], expected, rtol=1e-10, atol=0)


@both_variants
@pytest.mark.parametrize(("label", "K", "T"), [("all", 3, 1.0), ("none", 3, 1.0), ("some", 1, 2.0), ("some", 7, 0.7)])
def test_gradient_is_the_derivative(variant, label, K, T):
    logits, *rest = make_case(H=2, B=3, C=7, K=K, label=label)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ofa_loss(z, *rest, [1.4, 0.8], T, variant=variant), (logits,))


@both_variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite_and_correct(variant, dtype):
    """Logits with std 100 (log(softmax) of the published code overflows at 30): loss and gradient as in float64."""
    logits, *rest = make_case(H=2, B=8, C=100, K=10, std=100, dtype=dtype)
    logits.requires_grad_()
    loss = ofa_loss(logits, *rest, 1.5, variant=variant)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == dtype
    close(loss, oracle(logits, *rest, 1.5, 1.0, variant), rtol=1e-5)

    q = teacher(*rest[1:], 100, 1.0)
    m = np.eye(100)[rest[0].numpy()]
    w = (q + m) ** 1.5 - m if variant == "official" else np.where(m == 1, (1 + q) ** 1.5, q)
    gradient = (w.sum(-1, keepdims=True) * softmax(logits.detach().double().numpy(), axis=-1) - w) / 8
    eps = max(torch.finfo(dtype).eps, 3e-6)  # of fp32 the last bits are the processor's
    np.testing.assert_allclose(logits.grad.double().numpy(), gradient, rtol=3 * eps, atol=0.1 * eps)


@both_variants
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 1), (1, 1, 2, 2), (4, 1, 1, 1), (3, 5, 1000, 1), (1, 7, 257, 256), (2, 3, 21841, 20)]
)
def test_odd_shapes(variant, shape):
    """Extreme values of (H, B, C, K), up to ImageNet-21K's number of classes, in fp32."""
    H, B, C, K = shape
    case = make_case(H, B, C, K, dtype=torch.float32)
    close(ofa_loss(*case, 1.3, 2.0, variant=variant), oracle(*case, 1.3, 2.0, variant), rtol=1e-5)


@both_variants
def test_empty_batch_is_zero(variant):
    logits, *rest = make_case(H=3, B=0)
    logits.requires_grad_()
    loss = ofa_loss(logits, *rest, 1.5, variant=variant)
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert logits.grad.shape == (3, 0, 11)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32])
def test_class_numbers_of_any_integer_type(dtype):
    """A cache stores uint16; class numbers above 32767 must be preserved."""
    logits, labels, classes, log_probs = make_case(H=1, B=2, C=40_000, K=3)
    classes = torch.tensor([[39_999, 0, 33_000], [1, 40_000 - 2, 5]])
    labels = torch.tensor([33_000, 7])
    expected = oracle(logits, labels, classes, log_probs, 1.2)
    close(ofa_loss(logits, labels, classes.to(dtype), log_probs, 1.2), expected, rtol=1e-10)


GOOD = {
    "logits": torch.zeros(2, 3, 5),
    "labels": torch.zeros(3, dtype=torch.int64),
    "classes": torch.zeros(3, 2, dtype=torch.int32),
    "log_probs": torch.full((3, 2), -1.0),
    "eps": 1.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 5)}, r"logits: expected floating \[H, B, C\], got torch.float32 \(3, 5\)"),
        ({"logits": torch.zeros(2, 3, 5, dtype=torch.int64)}, "logits: expected floating"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels: expected int64 \[3\], got torch.int64 \(4,\)"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels: expected int64"),
        ({"classes": torch.zeros(3, dtype=torch.int32)}, r"classes: expected integer \[3, K\]"),
        ({"classes": torch.zeros(2, 2, dtype=torch.int32)}, r"classes: expected integer \[3, K\]"),
        ({"classes": torch.zeros(3, 2)}, "classes: expected integer .*got torch.float32"),
        ({"classes": torch.zeros(3, 6, dtype=torch.int32)}, "K between 1 and C = 5, got K = 6"),
        ({"classes": torch.zeros(3, 0, dtype=torch.int32)}, "K between 1 and C = 5, got K = 0"),
        ({"log_probs": torch.zeros(3, 1)}, r"log_probs: expected floating \(3, 2\), got torch.float32 \(3, 1\)"),
        ({"log_probs": torch.zeros(3, 2, dtype=torch.int32)}, "log_probs: expected floating"),
        ({"labels": torch.zeros(3, dtype=torch.int64, device="meta")}, "on one device, got .*cpu.*meta"),
        ({"eps": 0.0}, r"eps: expected numbers > 0, got \[0.0, 0.0\]"),
        ({"eps": [1.0, float("nan")]}, "eps: expected numbers > 0"),
        ({"eps": [1.0, 1.0, 1.0]}, r"eps: expected one number or 2 \(one per head\), got shape \(3,\)"),
        ({"eps": torch.ones(2, 2)}, r"eps: expected one number or 2"),
        ({"temperature": 0.0}, "temperature: expected > 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature: expected > 0, got nan"),
        ({"impl": "numpy"}, "impl: expected .*got 'numpy'"),
        ({"variant": "mine"}, r"variant: expected one of \('official', 'paper'\), got 'mine'"),
    ],
)
def test_invalid_arguments_are_refused(change, message):
    """Each ValueError names the argument, the expected and the given value."""
    with pytest.raises(ValueError, match=message):
        ofa_loss(**{**GOOD, **change})
