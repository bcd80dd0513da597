"""Compiled evaluation: one shape, the eager predictions."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from fastofa.data.dataset import Dataset
from fastofa.pipelines import open_pipeline
from fastofa.student.model import Student
from fastofa.training.validate import best_classes_each

SIZE = 32


def students() -> list[Student]:
    """One in training, and as its average a copy without gradients whose predictions differ; both far from uniform."""
    torch._dynamo.reset()
    student = Student("test_resnet", 10, SIZE, stages=(4,)).to(memory_format=torch.channels_last).train()
    for parameter in student.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    average = copy.deepcopy(student).eval().requires_grad_(False)
    nn.init.kaiming_normal_(average.backbone.get_classifier().weight)
    return [student, average]


def predictions(models: list[Student], dataset: Dataset, compiled: bool) -> list[np.ndarray]:
    """In batches of 30, 30, 30 and 10."""
    pipeline = open_pipeline("resident", dataset, SIZE, 30)
    return best_classes_each(models, pipeline, dataset, 0.9, bf16=False, flip=True, compiled=compiled)


def test_every_batch_has_one_shape(digits, monkeypatch):
    """Each student is traced once, without a break; the smaller last batch and a second evaluation trace nothing."""
    graphs, shapes = [], set()

    def backend(graph, inputs):
        graphs.append(graph)

        def run(*given):
            shapes.update(tuple(value.shape) for value in given if value.dtype == torch.uint8)
            return graph.forward(*given)

        return run

    models = students()
    expected = predictions(models, digits, compiled=False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for _ in range(2):
        got = predictions(models, digits, compiled=True)
        assert len(graphs) == 2
        for mine, eager in zip(got, expected, strict=True):
            np.testing.assert_array_equal(mine, eager)
    assert shapes == {(30, 3, SIZE, SIZE)}
    assert not np.array_equal(*expected)
    assert [model.training for model in models] == [True, False]


@pytest.mark.slow
def test_compiled_predictions_are_the_eager_ones(digits):
    """By inductor; but for ties."""
    models = students()
    expected, got = (predictions(models, digits, compiled) for compiled in (False, True))
    for mine, eager in zip(got, expected, strict=True):
        assert (mine == eager).mean() > 0.99
