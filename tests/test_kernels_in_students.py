"""Students of every family with all kernels: the same losses, gradients, state dict and exported model as without."""

import pytest
import torch
from torch import Tensor

from fastofa.student.choose_kernels import SWITCHES
from fastofa.student.model import Student

# Name and image size, at which batch norms have enough values per channel not to amplify rounding. The first ones have
# batch norms and depthwise convolutions, the others tokens.
STUDENTS = {
    "resnet18": 32, "resnet50": 32, "mobilenetv2_050": 32, "mobilenetv3_small_050": 32, "efficientnet_lite0": 48,
    "regnetx_002": 32, "convnext_atto": 32, "deit_tiny_patch16_224": 32, "swin_pico_patch4_window7_224": 32,
    "resmlp_12_224": 32, "mixer_s32_224": 64,
}  # fmt: skip
# One of each family: the interpreter takes a minute or more for each of the others.
IN_BF16 = [
    name for name in STUDENTS if name not in ("resnet50", "mobilenetv2_050", "efficientnet_lite0", "regnetx_002")
]


def pair(name: str) -> tuple[Student, Student]:
    """A student with exits, and the same one with every kernel."""
    torch.manual_seed(0)
    plain, switched = (Student(name, 5, STUDENTS[name], teacher_dim=24, drop_path=0.0) for _ in range(2))
    for parameter in plain.parameters():  # timm initialises some scales with 0, which would hide what is behind them
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    switched.load_state_dict(plain.state_dict())
    count = sum(switch(switched) for switch in SWITCHES.values())
    assert count > 0
    return plain.to(memory_format=torch.channels_last), switched.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def batch(name: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = STUDENTS[name]
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    return images.contiguous(memory_format=torch.channels_last), torch.randint(0, 5, (4,), generator=generator)


def exact(images: Tensor) -> Tensor:
    """Images as normalised float64: that of uint8 images is rounded to fp32, with kernels and without."""
    return (images.double() / 255 - 0.45) / 0.22


def loss(student: Student, images: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(2)  # dropout
    heads = student.train()(images)
    return torch.stack([torch.nn.functional.cross_entropy(logits.to(heads.dtype), labels) for logits in heads]).sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_losses_and_gradients_in_float64(name):
    """Equal to those of PyTorch's own modules."""
    images, labels = batch(name)
    images = exact(images)
    results = []
    for student in pair(name):
        student.double()
        value = loss(student, images, labels)
        gradients = torch.autograd.grad(value, list(student.parameters()), allow_unused=True)
        results.append((value.detach(), [torch.zeros(()) if g is None else g for g in gradients]))
    (expected, without), (got, with_kernels) = results
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    size = torch.stack([g.double().norm() for g in without]).norm()
    assert all((a - b).norm() <= 1e-7 * size for a, b in zip(with_kernels, without, strict=True))


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.parametrize("name", IN_BF16)
def test_losses_in_bf16_up_to_its_rounding(name):
    """The kernels' loss is about as far from that in fp32 as the loss without kernels."""
    images, labels = batch(name)
    plain, switched = pair(name)
    truth = float(loss(plain.double(), images, labels))
    plain.float()
    with torch.autocast("cpu", torch.bfloat16):
        errors = [abs(float(loss(student, images, labels)) - truth) / truth for student in (plain, switched)]
    assert errors[1] <= 2 * errors[0] + 0.02


@pytest.mark.parametrize("name", STUDENTS)
def test_state_dict_and_evaluation_are_those_of_a_plain_student(name):
    """After a step with kernels, whose statistics change, a plain student takes the weights and predicts the same."""
    images, labels = batch(name)
    images = exact(images)
    plain, switched = pair(name)
    assert list(switched.state_dict()) == list(plain.state_dict())
    loss(switched.double(), images, labels)
    plain.double().load_state_dict(switched.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(switched.eval().classify(images), plain.eval().classify(images))
