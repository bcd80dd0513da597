"""Centred kernel alignment (CKA) of the layers of two networks, from one pass over batches of images.

    CKA(x, y) = sum_t B_t HSIC(K_t, L_t) / sqrt(sum_t B_t HSIC(K_t, K_t) * sum_t B_t HSIC(L_t, L_t))

K_t and L_t are the Gram matrices X X' and Y Y' of batch t, B_t is its number of images, and HSIC is the unbiased
estimator of Song et al. (Feature Selection via Dependence Maximization, JMLR 2012, equation 4). Because it is unbiased,
its sum over batches estimates the value for all images; the sum of a biased estimator does not (Nguyen, Raghu and
Kornblith: Do Wide and Deep Networks Learn the Same Things?, ICLR 2021, equation 3, where all batches have one size).
The weights B_t make every image count the same if the last batch is smaller. CKA is 1 for features that agree up to a
rotation and a common scale, and about 0 for unrelated ones; as an estimate, it can be slightly negative.

For N images in batches of B, the error is in proportion to sqrt((1/B - 1/N) / N): about N B of the N N pairs of images
are compared.

Unbiased HSIC is an inner product of U-centred Gram matrices (Székely and Rizzo: Partial Distance Correlation, Annals of
Statistics 2014). All pairs of layers therefore take one matrix product per batch.

Shapes: B images in a batch, N images in total, D features of a layer, L layers of one network, M layers of the other.
"""

import torch
from torch import Tensor

LEAST = 4
"""Unbiased HSIC needs at least this many images in a batch."""


def gram(features: Tensor) -> Tensor:
    """The Gram matrix of the features of B images, up to terms that centring removes.

    The first image's features are subtracted from all: a common offset does not change the centred Gram matrix, but a
    large one would leave it no digits in fp32. Features that do not depend on the image become exact zeros.

    Args:
        features: floating point [B, ...], in any memory format.

    Returns:
        fp32 [B, B]; float64 for float64 features.
    """
    if features.ndim == 4 and not features.is_contiguous():
        features = features.permute(0, 2, 3, 1)  # channels last: flattening then needs no copy
    if features.dtype != torch.float64:
        features = features.float()
    rows = (features - features[:1]).flatten(1)
    return rows @ rows.T


def u_centred(grams: Tensor) -> Tensor:
    """Gram matrices [L, B, B] of at least `LEAST` images -> U-centred, float64 [L, B, B], with zero diagonals.

    The sum of the products of two such matrices is B (B - 3) times their unbiased HSIC.
    """
    grams = grams.double()
    count = grams.shape[-1]
    diagonal = torch.eye(count, dtype=torch.bool, device=grams.device)
    grams = grams.masked_fill(diagonal, 0)
    means = grams.sum(dim=-1) / (count - 2)
    total = means.sum(dim=-1)[:, None, None] / (count - 1)
    return (grams - means[:, :, None] - means[:, None, :] + total).masked_fill(diagonal, 0)


class CKA:
    """Sums over batches, float64, on the device of the first batch: the memory does not grow with the images."""

    def __init__(self) -> None:
        self.cross: Tensor | float = 0.0
        self.own_a: Tensor | float = 0.0
        self.own_b: Tensor | float = 0.0

    def update(self, grams_a: Tensor, grams_b: Tensor) -> None:
        """Add a batch: the Gram matrices [L, B, B] and [M, B, B] of the same images, with B of at least `LEAST`."""
        a, b = u_centred(grams_a).flatten(1), u_centred(grams_b).flatten(1)
        weight = 1 / (grams_a.shape[-1] - 3)  # the products are B (B - 3) HSIC, and HSIC has the weight B
        self.cross = self.cross + weight * (a @ b.T)
        self.own_a = self.own_a + weight * a.square().sum(dim=1)
        self.own_b = self.own_b + weight * b.square().sum(dim=1)

    def matrix(self) -> Tensor:
        """CKA of every layer of one network with every layer of the other, float64 [L, M] on the CPU.

        NaN where the features of a layer do not depend on the image.
        """
        a, b = torch.as_tensor(self.own_a), torch.as_tensor(self.own_b)
        return (torch.as_tensor(self.cross) / (a[:, None].sqrt() * b.sqrt())).cpu()
