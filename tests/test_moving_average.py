"""The moving average of the weights against timm's."""

import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fastofa.training.moving_average import MovingAverage


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_it_is_timms_average(name):
    """Bit for bit after several updates, including batch norm counters, and after the student's state is loaded."""
    student = timm.create_model(name, num_classes=10)
    expected, average = ModelEmaV3(student, decay=0.9), MovingAverage(student, 0.9)
    states = [copy.deepcopy(student.state_dict()) for _ in range(3)]
    for step, state in enumerate(states, start=1):
        student.load_state_dict({key: value + step for key, value in state.items()})
        expected.update(student, step)
        average.update(step)
    assert not average.module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    found = average.module.state_dict()
    assert found.keys() == expected.module.state_dict().keys()
    for key, value in expected.module.state_dict().items():
        assert torch.equal(found[key], value), key


def test_modules_of_methods_are_not_averaged():
    """They are those of the student alone, and its own modules are averaged as without them."""
    student = timm.create_model("test_efficientnet", num_classes=10)
    without = MovingAverage(copy.deepcopy(student), 0.9).module.state_dict()
    student.methods = nn.ModuleList([nn.Linear(3, 3)])
    average = MovingAverage(student, 0.9)
    found = average.module.state_dict()
    assert found.keys() == without.keys()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    average.update(2)
    name = "conv_stem.weight"
    assert torch.allclose(average.module.state_dict()[name], without[name] + 0.1, atol=1e-6)
    assert len(student.methods) == 1
