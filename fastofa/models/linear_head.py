"""The linear classifier at the end of a timm model, and its input, the pooled vector.

Shapes: B images, D width of the pooled vector, O outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastofa.models.timm_models import first_line
from fastofa.system.errors import BadInput

ROUNDING, ROUNDING_BF16 = 1e-4, 2e-2  # largest difference of logits, relative to the largest logit


def pooled_vector(model: Any, features: Tensor) -> Tensor:
    """The input of the model's classifier [B, D], from its final features."""
    return model.forward_head(features, pre_logits=True)


@torch.no_grad()
def check_linear_head(model: Any, images: Tensor, name: str) -> int:
    """Compare the model's logits with its linear classifier applied to the pooled vector, in eval mode.

    Args:
        model: a timm model.
        images: normalised [B, 3, S, S], in the model's precision.
        name: of the model, for the message.

    Returns:
        D.

    Raises:
        BadInput: the model does not classify one vector with one linear layer.
    """
    training = model.training
    model.eval()
    try:
        logits = model(images)
        vectors, classifier = pooled_vector(model, model.forward_features(images)), model.get_classifier()
    except (TypeError, AttributeError, NotImplementedError) as error:
        raise _not_linear(name, first_line(error)) from None
    finally:
        model.train(training)
    if not isinstance(classifier, nn.Linear):
        parts = isinstance(classifier, tuple | list) and f"{len(classifier)} classifiers"
        raise _not_linear(name, f"it has {parts or type(classifier).__name__}")
    if not isinstance(vectors, Tensor) or vectors.shape != (len(images), classifier.in_features):
        got = list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise _not_linear(name, f"its classifier has {classifier.in_features} inputs, its features are {got}")
    rebuilt = nn.functional.linear(vectors, classifier.weight, classifier.bias)
    away, largest = (rebuilt - logits).abs().max().item(), logits.abs().max().item()
    rounding = ROUNDING_BF16 if logits.dtype == torch.bfloat16 else ROUNDING
    if not away <= rounding * largest:  # also if one is NaN
        raise _not_linear(name, f"the linear layer's outputs differ from its logits by {away:.2g} of {largest:.2g}")
    return classifier.in_features


def _not_linear(name: str, reason: str) -> BadInput:
    return BadInput(f"{name}: expected a model whose logits are one linear layer of one vector, but {reason}")
