"""An online teacher, which runs in every step of training, on the student's own images.

Shapes: B images in a part of a step, S side of the student's images, C classes of the data, D width of a pooled vector.
"""

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastofa.methods.find_method import needs_of
from fastofa.methods.method import Needs
from fastofa.methods.targets import Targets
from fastofa.models.linear_head import pooled_vector
from fastofa.models.timm_models import check_published, find_folder, resolve
from fastofa.pipelines import Batch
from fastofa.runs.config import TrainConfig
from fastofa.runs.recipes import teacher_normalization
from fastofa.student.stages import Feature, Stage, as_map, probe_stages, run_found_stages
from fastofa.system.device import choose_bf16, choose_compile
from fastofa.system.errors import BadInput
from fastofa.teacher.device_targets import DeviceTargets, MixedTargets
from fastofa.teacher.model import Teacher, open_teacher


class OnlineTeacher:
    """`teacher.of(batch)`: the teacher's targets for the images of a batch, without the rounding of a cache.

    It has its own normalisation and input size; images of another size are resized with a bilinear filter. It is in
    eval mode, has no gradients, and is not part of the student, its optimiser or its checkpoints.

    Args:
        teacher: the teacher to run.
        needs: what the methods need from it.
        compile_: whether to compile it, at the first batch of each shape, as one program from pixels to targets.

    Raises:
        BadInput: a method needs the pooled vector, and the teacher has no linear head.
    """

    def __init__(self, teacher: Teacher, needs: Collection[Needs], compile_: bool) -> None:
        self.teacher, self.all_classes = teacher, "all classes" in needs
        self.stages: dict[int, Stage] = {}
        """The teacher's stages by number, if a method needs their features."""
        self.pooled_dim = 0
        """D if a method needs the pooled vector, else 0."""
        side = teacher.image_size
        if "pooled vector" in needs:
            images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, device=teacher.device)
            self.pooled_dim = teacher.check_linear_head(images)
        if "stage features" in needs:
            self.stages = probe_stages(teacher.model, side)[2]
        self.compute = torch.compile(self.targets, dynamic=False) if compile_ else self.targets

    @torch.no_grad()  # tensors of the inference mode could not take part in the student's loss
    def of(self, batch: Batch) -> Targets:
        """The targets of the batch's images, with their sample ids."""
        return self.compute(batch.images)._replace(sample_ids=batch.sample_ids)

    def targets(self, images: Tensor) -> Targets:
        """Images uint8 [B, 3, S, S] -> classes int32 and log_probs fp32 [B, C] of all classes; and what else the
        methods need: pooled fp32 [B, D], all_log_probs fp32 [B, C], stages in the teacher's precision."""
        network, model, side = self.teacher.network, self.teacher.model, self.teacher.image_size
        if images.shape[-1] != side:
            images = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
        images = network.normalize(images)
        features: dict[int, Feature] = {}
        if self.stages:
            final, features = run_found_stages(model, images, self.stages.values(), "NCHW")
        else:
            final = model.forward_features(images)
        pooled = pooled_vector(model, final) if self.pooled_dim else None
        log_probs = network.log_probs(model.forward_head(final) if pooled is None else model.get_classifier()(pooled))
        values, classes = log_probs.topk(log_probs.shape[1])
        return Targets(
            classes.to(torch.int32),
            values,
            None if pooled is None else pooled.float(),
            all_log_probs=log_probs if self.all_classes else None,
            stages={number: as_map(feature) for number, feature in features.items()} or None,
        )

    def describe(self, image_size: int) -> str:
        """One line for a notice: when the teacher runs, and whether images of this side in pixels are resized."""
        side = self.teacher.image_size
        resized = f", resized from {image_size} to {side} px" if side != image_size else ""
        return f"teacher {self.teacher.name}: runs in every step, on the student's own images{resized}"


TargetSource = DeviceTargets | MixedTargets | OnlineTeacher  # a cache's predictions, or the teacher itself


def open_online_teacher(config: TrainConfig, classes: Sequence[str], device: torch.device) -> OnlineTeacher | None:
    """Open the online teacher of a run; None if it has none. Raises BadInput as `open_teacher` and `OnlineTeacher`."""
    if config.online_teacher is None:
        return None
    teacher = open_teacher_of(config, classes, device)
    return OnlineTeacher(teacher, needs_of(config.methods), choose_compile(config.compile, device))


def open_teacher_of(config: TrainConfig, classes: Sequence[str], device: torch.device) -> Teacher:
    """Open the model of a run's online teacher. Raises BadInput as `open_teacher`.

    As with `fastofa precompute --recipe`, recipes named cifar_* set the normalisation of the teacher's input.
    """
    assert config.online_teacher is not None
    mean, std = teacher_normalization(config.recipe)
    bf16 = choose_bf16(config.precision, device)
    name, checkpoint = config.online_teacher, config.teacher_checkpoint
    return open_teacher(name, classes, checkpoint, mean=mean, std=std, device=device, bf16=bf16)


def check_online_teacher(config: TrainConfig) -> None:
    """Early checks, before the dataset is indexed. Raises BadInput for an unknown name or a missing file."""
    name, checkpoint = config.online_teacher, config.teacher_checkpoint
    if name is None:
        return
    if checkpoint is not None and not checkpoint.exists():
        raise BadInput(
            f"{checkpoint}: expected a file with weights, but it does not exist; correct --teacher-checkpoint"
        )
    if checkpoint is not None:
        resolve(name)
    elif find_folder(name) is None:
        check_published(name)
