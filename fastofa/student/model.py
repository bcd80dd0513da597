"""A timm model with an exit at each of its four stages: images -> logits of all heads.

Shapes: B batch, S image side, C classes, H heads (the exits in stage order, then the model's own head), D width of the
pooled vector, the input of the model's classifier.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastofa.models.linear_head import check_linear_head, pooled_vector
from fastofa.models.timm_models import check_channels, create_model, first_line, input_size, normalization
from fastofa.models.weights import SavedWeights
from fastofa.student.exits import ConvExit, TokenExit
from fastofa.student.stages import ALL_STAGES, Feature, Stage, as_exit_input, as_map, probe_stages, run_found_stages
from fastofa.system.errors import BadInput


class Student(nn.Module):
    """Any timm model with OFA's exits: `student(images) -> logits [H, B, C]`; the last head is the model's own.

    Args:
        model_name: a timm name, or swin_nano_patch4_window7_224 / swin_pico_patch4_window7_224.
        num_classes: C.
        image_size: S in pixels; None for the model's own.
        teacher_dim: width of the teacher's last features; a CNN's exits use the larger width of teacher and student.
        stages: the stages that get an exit, 1 to 4; () for none.
        drop_path: rate of stochastic depth in the backbone; None for the model's own, 0 for none.
        mean: normalisation of RGB in 0..1; None for the model's own.
        std: see `mean`.
        init: initial weights of the backbone, see `create_model`.

    Images are uint8 [B, 3, S, S], which the student normalises, or floating-point and already normalised.

    Raises:
        BadInput: unknown model, or a stage that the model does not have; the message lists those it has.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        image_size: int | None = None,
        teacher_dim: int = 0,
        stages: tuple[int, ...] = ALL_STAGES,
        drop_path: float | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        init: str | SavedWeights | None = None,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.backbone = create_model(model_name, num_classes, image_size, drop_path, init)
        check_channels(self.backbone, f"student {model_name}")
        self.image_size = image_size or input_size(self.backbone)
        own_mean, own_std = normalization(self.backbone)
        self.register_buffer("mean", torch.tensor(mean or own_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or own_std).view(1, 3, 1, 1), persistent=False)
        self.stages: list[Stage] = []
        self.exits = nn.ModuleList()
        self.methods = nn.ModuleList()
        """Modules that distillation methods train with the student, such as projectors; not exported."""
        if stages:
            self._add_exits(model_name, num_classes, teacher_dim, stages)

    def _add_exits(self, model_name: str, num_classes: int, teacher_dim: int, stages: tuple[int, ...]) -> None:
        available = self.find_stages()
        if any(stage not in available for stage in stages):
            names = ", ".join(map(str, available)) or "none"
            remedy = f"give --stages {' '.join(map(str, available))}" if available else "choose another student"
            raise BadInput(
                f"student {model_name}: expected stages {' '.join(map(str, stages))}, it has {names} (a stage's "
                f"features are 4, 8, 16 or 32 times smaller than the image); {remedy}"
            )
        self.stages = [available[s] for s in sorted(stages)]
        width = self.backbone.num_features
        for stage in self.stages:
            if self.is_token_model:
                class_token = getattr(self.backbone, "cls_token", None) is not None and self.output_format == "NLC"
                exit_: nn.Module = TokenExit(stage.number, stage.grid, stage.channels, width, num_classes, class_token)
            else:
                exit_ = ConvExit(stage.number, stage.channels, max(width, teacher_dim), num_classes)
            self.exits.append(exit_)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images -> normalised fp32; floating-point images are returned unchanged."""
        return (images.float() / 255 - self.mean) / self.std if images.dtype == torch.uint8 else images

    def forward(self, images: Tensor) -> Tensor:
        if not self.stages:
            return self.classify(images)[None]
        final, features = run_found_stages(self.backbone, self.normalize(images), self.stages, self.output_format)
        return torch.stack([*self._exit_logits(features), self.backbone.forward_head(final)])

    def with_features(
        self, images: Tensor, pooled: bool = False, stages: Iterable[Stage] = ()
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """The logits [H, B, C], and features from the same forward pass.

        Args:
            pooled: return the pooled vector [B, D], from which the model's own head computes its logits. Needs a linear
                head, which `pooled_dim` checks.
            stages: some of `find_stages`, whose features are returned as maps [B, channels, height, width] by number.
        """
        images, stages = self.normalize(images), list(stages)
        features: dict[int, Feature] = {}
        if self.stages or stages:
            needed = [*self.stages, *stages]
            final, features = run_found_stages(self.backbone, images, needed, self.output_format)
        else:
            final = self.backbone.forward_features(images)
        vector = pooled_vector(self.backbone, final) if pooled else None
        own = self.backbone.forward_head(final) if vector is None else self.backbone.get_classifier()(vector)
        maps = {stage.number: as_map(features[stage.number]) for stage in stages}
        return torch.stack([*self._exit_logits(features), own]), vector, maps

    def _exit_logits(self, features: dict[int, Feature]) -> list[Tensor]:
        """The logits of each exit, from the features of its stage."""
        return [
            exit_(*as_exit_input(features[stage.number], self.is_token_model))
            for stage, exit_ in zip(self.stages, self.exits, strict=True)
        ]

    def find_stages(self) -> dict[int, Stage]:
        """The stages of the backbone by number. Raises BadInput if it does not accept images of its size."""
        self.is_token_model, self.output_format, stages = probe_stages(self.backbone, self.image_size)
        return stages

    def pooled_dim(self) -> int:
        """D. Raises BadInput unless the model's own logits are one linear layer of the pooled vector."""
        images = torch.rand(2, 3, self.image_size, self.image_size, device=self.mean.device)
        return check_linear_head(self.backbone, images, f"student {self.model_name}")

    def classify(self, images: Tensor) -> Tensor:
        """Only the model's own logits, [B, C], without running the exits."""
        return self.backbone(self.normalize(images))

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters on which no head depends: some timm models have layers that they do not use."""
        training, parameters = self.training, [*self.backbone.parameters(), *self.exits.parameters()]
        self.eval()
        images = torch.zeros(1, 3, self.image_size, self.image_size, device=self.mean.device)
        with torch.enable_grad():
            gradients = torch.autograd.grad(self(images).sum(), parameters, allow_unused=True)
        self.train(training)
        return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is None]

    @torch.no_grad()
    def check_sizes(self, sizes: Iterable[int]) -> None:
        """Raises BadInput unless the student accepts images of each of these sides in pixels."""
        for size in sorted(set(sizes) - {self.image_size}):
            images = torch.zeros(1, 3, size, size, device=self.mean.device)
            training = self.training
            try:
                self.eval()(images)
            except (RuntimeError, AssertionError, ValueError) as error:
                raise BadInput(
                    f"the student, built for images of {self.image_size} px, does not accept images of {size} px "
                    f"({first_line(error)}); omit --start-size and --eval-size, or choose a CNN"
                ) from None
            finally:
                self.train(training)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm exempts from weight decay besides biases and norms, such as position
        embeddings and tokens."""
        own = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else set()
        return {f"backbone.{name}" for name in own}
