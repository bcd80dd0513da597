"""The teacher as one program, compiled for one batch shape: uint8 pixels -> what a cache stores, still on the device.

Shapes: B images in a batch, S image side, C classes, K classes kept.
"""

import torch
from torch import Tensor

from fastofa.models.timm_models import first_line
from fastofa.system.progress import notice
from fastofa.teacher.cache_columns import best_classes
from fastofa.teacher.model import Teacher
from fastofa.teacher.vectors import stored


class LogProbsProgram:
    """`program(images)`: uint8 [B, 3, S, S] on the teacher's device -> {"log_probs": fp32 [B, C]}, for B up to
    `batch_size`; with `features`, also the columns of `Vectors`.

    The first call compiles the program for `batch_size` images, which can take minutes. A smaller batch is padded,
    because another shape would be compiled again. If the compiler fails, a notice says so, and the program runs
    uncompiled.

    Args:
        teacher: the teacher to run.
        batch_size: the largest B.
        compile_: whether to compile. An uncompiled program does not pad.
        features: none, pooled or pooled-int8 (`fastofa.teacher.vectors`); the last two need a linear head.
    """

    def __init__(self, teacher: Teacher, batch_size: int, compile_: bool, features: str = "none") -> None:
        self.teacher, self.batch_size, self.features = teacher, batch_size, features
        self.to_compile = compile_
        self.compiled = torch.compile(self._compute, dynamic=False) if compile_ else None

    @torch.no_grad()  # inference mode cannot be compiled
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        if self.to_compile:
            self._compile()
        if self.compiled is None:
            if self.features == "none":
                return self._columns(self.teacher.log_probs(images))
            return self._columns(*self.teacher.with_pooled(images))
        count, missing = len(images), self.batch_size - len(images)
        if missing:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        columns = self.compiled(images.contiguous(memory_format=torch.channels_last))
        return {name: values[:count] for name, values in columns.items()}

    def _compute(self, images: Tensor) -> dict[str, Tensor]:
        if self.features == "none":
            return self._columns(self.teacher.network(images))
        return self._columns(*self.teacher.network.with_pooled(images))

    def _columns(self, log_probs: Tensor, vectors: Tensor | None = None) -> dict[str, Tensor]:
        columns = self._kept(log_probs)
        return columns if vectors is None else {**columns, **stored(vectors, self.features).columns()}

    def _kept(self, log_probs: Tensor) -> dict[str, Tensor]:
        return {"log_probs": log_probs}

    def _compile(self) -> None:
        """Compile on a black batch. An error here is the compiler's: `open_teacher` has tried the teacher itself."""
        self.to_compile = False
        assert self.compiled is not None
        size, device = self.teacher.image_size, self.teacher.device
        images = torch.zeros(self.batch_size, 3, size, size, dtype=torch.uint8, device=device)
        notice(f"compiling teacher {self.teacher.name}, which can take minutes")
        try:
            self.compiled(images.contiguous(memory_format=torch.channels_last))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.compiled = None
            reason = first_line(getattr(error, "inner_exception", error))
            notice(f"teacher {self.teacher.name}: runs uncompiled, because the compiler failed ({reason})")


class TopKProgram(LogProbsProgram):
    """The same, but with the columns of `best_classes` for K = `topk` instead of all log-probabilities."""

    def __init__(self, teacher: Teacher, topk: int, batch_size: int, compile_: bool, features: str = "none") -> None:
        super().__init__(teacher, batch_size, compile_, features)
        self.topk = topk

    def _kept(self, log_probs: Tensor) -> dict[str, Tensor]:
        return best_classes(log_probs, self.topk)._asdict()
