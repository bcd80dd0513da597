"""Contrastive representation distillation (Tian et al., ICLR 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastofa.methods.method import Method, Outputs, Sizes
from fastofa.methods.options import CRDOptions
from fastofa.methods.targets import Targets, full

TINY = 1e-7


class CRD(Method):
    """Noise-contrastive estimation of the same image among K images of other classes, for student and teacher (eq. 18).

    Two memories keep a vector of every training image, for student and teacher. For each image the student's vector is
    compared with the teacher's memory, and the teacher's with the student's. The normalising constants are those of the
    first batch, as in the authors' code. Each rank has its own memory.
    """

    Options = CRDOptions
    needs = "pooled vector"
    of_student: Tensor
    of_teacher: Tensor
    constants: Tensor
    starts: Tensor

    def __init__(self, options: CRDOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        self.embed_student = nn.Linear(sizes.student_dim, options.width)
        self.embed_teacher = nn.Linear(sizes.teacher_dim, options.width)
        self.images = sum(sizes.images_per_class)
        bound = (options.width / 3) ** -0.5
        for name in ("of_student", "of_teacher"):
            self.register_buffer(name, torch.empty(self.images, options.width).uniform_(-bound, bound))
        self.register_buffer("constants", torch.full((2,), -1.0))  # negative until the first batch
        counts = torch.tensor((0, *sizes.images_per_class))
        self.register_buffer("starts", counts.cumsum(0), persistent=False)  # first sample id of each class

    def loss(self, outputs: Outputs, targets: Targets, labels: Tensor) -> Tensor:
        assert outputs.pooled is not None
        assert targets.pooled is not None
        assert targets.sample_ids is not None
        o, ids = self.options, targets.sample_ids
        student = F.normalize(self.embed_student(full(outputs.pooled)), dim=1)
        teacher = F.normalize(self.embed_teacher(full(targets.pooled)), dim=1)
        compared = torch.cat([ids[:, None], self._negatives(labels)], dim=1)
        scores = [
            torch.einsum("bkd,bd->bk", memory[compared], vector).div(o.temperature).exp()
            for memory, vector in ((self.of_teacher, student), (self.of_student, teacher))
        ]
        with torch.no_grad():
            first = torch.stack([score.mean() for score in scores]) * self.images
            self.constants.copy_(torch.where(self.constants < 0, first, self.constants))
        total = sum(self._contrast(score / z) for score, z in zip(scores, self.constants.clone(), strict=True))
        self._update(self.of_student, ids, student)
        self._update(self.of_teacher, ids, teacher)
        return torch.as_tensor(total)

    def _negatives(self, labels: Tensor) -> Tensor:
        """Sample ids [B, K], uniformly from the images of other classes."""
        begin, end = self.starts[labels][:, None], self.starts[labels + 1][:, None]
        others = self.images - (end - begin)
        draws = torch.rand(len(labels), self.options.negatives, device=labels.device, dtype=torch.float64)
        ids = (draws * others).long().clamp(max=others - 1)
        return torch.where(ids < begin, ids, ids + end - begin)

    def _contrast(self, scores: Tensor) -> Tensor:
        """-mean_b [log h(positive) + sum_k log(1 - h(negative_k))], h(x) = x / (x + K / N) (eq. 19)."""
        noise = self.options.negatives / self.images
        positive, negative = scores[:, 0], scores[:, 1:]
        hits = (positive / (positive + noise + TINY)).log()
        misses = (noise / (negative + noise + TINY)).log().sum(dim=1)
        return -(hits + misses).mean()

    @torch.no_grad()
    def _update(self, memory: Tensor, ids: Tensor, vectors: Tensor) -> None:
        kept = self.options.momentum
        memory.index_copy_(0, ids, F.normalize(kept * memory[ids] + (1 - kept) * vectors, dim=1))
