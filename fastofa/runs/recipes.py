"""Training recipes: functions that return a complete configuration.

Five are those published for OFA-KD (appendix A; configs/ of the official code). Two more are what its authors ran on
CIFAR-100, by their answers in the issues of the official repository.

    recipes.imagenet_cnn(data="/data/imagenet", cache=Path("cache"), student="resnet18", out=Path("run"))

Batch sizes are totals over the 8 GPUs of the published runs. The augmentation, in VIEWS, belongs to the teacher cache:
`fastofa precompute --recipe NAME` draws it and training replays it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from fastofa.runs.config import TrainConfig
from fastofa.system.errors import BadInput
from fastofa.views.policy import ViewPolicy

STUDENTS_OWN = {"eval_crop": None, "eval_interpolation": "student"}
CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def photos(**overrides: Any) -> TrainConfig:
    """AdamW for your own photographs, hundreds to millions of them; `with_size_defaults` chooses the rest by dataset
    size.

    Weight decay, clipping and smoothing are those of the published Transformer recipes below, which also suit CNNs.
    """
    values: dict[str, Any] = {
        "epochs": None,
        "batch_size": None,
        "image_size": 224,
        "optimizer": "adamw",
        "lr": None,
        "weight_decay": 0.05,
        "warmup_epochs": None,
        "clip": 5.0,
        "smoothing": 0.1,
        "eval_every": 5,
        "log_every": 10,
    }
    return TrainConfig(**{"recipe": "photos", **values, **overrides})


def digits(**overrides: Any) -> TrainConfig:
    """A small CNN on scikit-learn's digits, trained in seconds on a CPU."""
    values: dict[str, Any] = {
        "epochs": 60,
        "batch_size": 50,
        "image_size": 32,
        "eval_crop": 1.0,
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "warmup_epochs": 5,
        "clip": 5.0,
        "eval_every": 10,
        "log_every": 10,
    }
    return TrainConfig(**{"recipe": "digits", **values, **overrides})


def imagenet_cnn(**overrides: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "epochs": 100,
        "batch_size": 512,
        "optimizer": "sgd",
        "lr": 0.1,
        "min_lr": 1e-6,
        "weight_decay": 1e-4,
        "schedule": "step",
        "decay_epochs": 30,
        "decay_rate": 0.1,
        "warmup_epochs": 3,
        "warmup_lr": 1e-4,
        "smoothing": 0.1,
    }
    return TrainConfig(**{"recipe": "imagenet_cnn", **values, **overrides})


def imagenet_vit_mlp(**overrides: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "epochs": 300,
        "batch_size": 1024,
        "optimizer": "adamw",
        "lr": 5e-4,
        "min_lr": 1e-6,
        "weight_decay": 0.05,
        "warmup_epochs": 20,
        "warmup_lr": 5e-7,
        "clip": 5.0,
        "smoothing": 0.1,
        "ema": 0.99996,
        **STUDENTS_OWN,
    }
    return TrainConfig(**{"recipe": "imagenet_vit_mlp", **values, **overrides})


def imagenet_stronger(**overrides: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "epochs": 300,
        "batch_size": 2048,
        "optimizer": "lamb",
        "lr": 5e-3,
        "min_lr": 1e-6,
        "weight_decay": 0.02,
        "warmup_epochs": 5,
        "warmup_lr": 1e-6,
        "gt_loss": "bce",
        "drop_path": 0.05,
        "ema": 0.9998,
        "eval_crop": 0.95,
        "eval_interpolation": "student",
    }
    return TrainConfig(**{"recipe": "imagenet_stronger", **values, **overrides})


def cifar_cnn(**overrides: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "epochs": 300,
        "batch_size": 1024,
        "image_size": 224,
        "optimizer": "sgd",
        "lr": 0.05,
        "min_lr": 1e-3,
        "weight_decay": 2e-3,
        "warmup_epochs": 3,
        "warmup_lr": 1e-4,
        "smoothing": 0.1,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
    }
    return TrainConfig(**{"recipe": "cifar_cnn", **values, **overrides})


def cifar_vit_mlp(**overrides: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "epochs": 300,
        "batch_size": 1024,
        "image_size": 224,
        "optimizer": "adamw",
        "lr": 5e-4,
        "min_lr": 1e-5,
        "weight_decay": 0.05,
        "warmup_epochs": 20,
        "warmup_lr": 5e-7,
        "clip": 5.0,
        "smoothing": 0.1,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        **STUDENTS_OWN,
    }
    return TrainConfig(**{"recipe": "cifar_vit_mlp", **values, **overrides})


def cifar_cnn_authors(**overrides: Any) -> TrainConfig:
    """What the authors ran for ResNet-18 (issue 14 of the official repository), in fp32."""
    values = {"lr": 0.1, "ofa_weight": 0.1, "precision": "fp32", "lr_updates": "epoch"}
    return cifar_cnn(**{"recipe": "cifar_cnn_authors", **values, **overrides})


def cifar_vit_mlp_authors(**overrides: Any) -> TrainConfig:
    """What the authors ran for DeiT-T and Swin-Pico (issue 19 of the official repository), without drop-path."""
    values = {"min_lr": 1e-6, "ema": 0.99996, "drop_path": 0.0, "lr_updates": "epoch", "decay_embeddings": True}
    return cifar_vit_mlp(**{"recipe": "cifar_vit_mlp_authors", **values, **overrides})


def imagenet_fast(epochs: int = 16, **overrides: Any) -> TrainConfig:
    """A CNN in few epochs (16, 32, 88): image sizes grow, evaluation uses larger images and their mirror images.

    Based on ffcv-imagenet's ResNet-18 recipe, which reaches 66.9 % in 16 and 72.4 % in 88 epochs from labels alone. It
    uses blur pooling, as the student `resnetblur18` does. `--start-size 128` is faster still.
    """
    values: dict[str, Any] = {
        "batch_size": 1024,
        "image_size": 192,
        "start_size": 160,
        "eval_size": 256,
        "eval_flip": True,
        "optimizer": "sgd",
        "lr": 0.5,
        "weight_decay": 5e-5,
        "schedule": "linear",
        "warmup_epochs": 2,
        "warmup_lr": 5e-5,
        "smoothing": 0.1,
    }
    return TrainConfig(**{"recipe": "imagenet_fast", "epochs": epochs, **values, **overrides})


RECIPES: dict[str, Callable[..., TrainConfig]] = {
    "photos": photos,
    "digits": digits,
    "imagenet_fast": imagenet_fast,
    "imagenet_cnn": imagenet_cnn,
    "imagenet_vit_mlp": imagenet_vit_mlp,
    "imagenet_stronger": imagenet_stronger,
    "cifar_cnn": cifar_cnn,
    "cifar_vit_mlp": cifar_vit_mlp,
    "cifar_cnn_authors": cifar_cnn_authors,
    "cifar_vit_mlp_authors": cifar_vit_mlp_authors,
}

# The published augmentation. The published files set `color_jitter: 0.4`, but timm disables it with RandAugment
# (transforms_factory.py: `disable_color_jitter`).
_CNN = ViewPolicy(bicubic=0.5)
_VIT_MLP = dataclasses.replace(_CNN, auto_augment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, erase=0.25)
_CIFAR_VIT_MLP = dataclasses.replace(_VIT_MLP, mean=CIFAR_MEAN, std=CIFAR_STD)
VIEWS = {
    "imagenet_cnn": _CNN,
    "imagenet_vit_mlp": _VIT_MLP,
    "imagenet_stronger": dataclasses.replace(_CNN, auto_augment="rand-m7-mstd0.5", mixup=0.1, cutmix=1.0, repeats=3),
    "cifar_cnn": _CNN,
    "cifar_vit_mlp": _CIFAR_VIT_MLP,
    "cifar_cnn_authors": _CNN,
    "cifar_vit_mlp_authors": _CIFAR_VIT_MLP,
}


def recipe(name: str) -> Callable[..., TrainConfig]:
    """Return the recipe of this name. Raises BadInput for an unknown one."""
    if name not in RECIPES:
        raise BadInput(
            f"recipe: expected --recipe with one of {', '.join(RECIPES)}, got {repr(name) if name else 'none'}"
        )
    return RECIPES[name]


def default_recipe(data: str) -> str:
    """The name of a dataset's recipe, for a command line without --recipe."""
    return {"digits": "digits", "cifar100": "cifar_cnn"}.get(data.partition(":")[0], "photos")


def with_size_defaults(config: TrainConfig, images: int, rows: int, multiple: int) -> TrainConfig:
    """Return `config` with its unset values (None) chosen by the size of the training set.

    Batch size: the largest power of two from 8 to 128 that gives at least 8 steps per epoch. Epochs: 3 million
    images in total, 30 to 300 epochs (DeiT trains for 300); with --init 300,000 images, 30 to 100 epochs (Swin and
    ConvNeXt are fine-tuned for 30 epochs, BiT with 256,000 images). Learning rate: AdamW's usual 1e-3 at batch size
    128, a tenth of it for fine-tuning, scaled with the square root of the batch size, as suits Adam (Malladi et al.
    2022). Warm-up: a twentieth of the epochs (DeiT a sixtieth, Swin a fifteenth).

    Args:
        images: number of training images.
        rows: how many of them an epoch uses.
        multiple: the chosen batch size is a multiple of this.
    """
    batch, fine_tuned = config.batch_size, config.init is not None
    if batch is None:
        eighth = 2 ** int(math.log2(max(rows // 8, 1)))
        batch = max(min(max(eighth, 8), 128, rows) // multiple, 1) * multiple
    total, max_epochs, lr = (300_000, 100, 1e-4) if fine_tuned else (3_000_000, 300, 1e-3)
    epochs = min(max(total // max(images, 1), 30), max_epochs) if config.epochs is None else config.epochs
    return dataclasses.replace(
        config,
        batch_size=batch,
        epochs=epochs,
        lr=float(f"{lr * math.sqrt(batch / 128):.2g}") if config.lr is None else config.lr,
        warmup_epochs=epochs / 20 if config.warmup_epochs is None else config.warmup_epochs,
    )


def teacher_normalization(recipe: str) -> tuple[tuple[float, ...], tuple[float, ...]] | tuple[None, None]:
    """The (mean, std) with which a recipe's published code normalises every teacher's input; None: the teacher's own.

    On ImageNet, the published code normalises a teacher's input like the student's, which is a mistake if they differ.
    """
    return (CIFAR_MEAN, CIFAR_STD) if recipe.startswith("cifar_") else (None, None)


def default_policy(data: str, recipe: str = "") -> ViewPolicy:
    """The published augmentation of a recipe; without flips for digits, since a mirrored digit is a different
    symbol."""
    policy = VIEWS.get(recipe, ViewPolicy())
    if data.partition(":")[0] == "digits":
        return dataclasses.replace(policy, scale=(0.6, 1.0), flip=0.0)
    return policy


def augmentation_differences(recipe: str, policy: ViewPolicy) -> str:
    """Describe how the published augmentation of the recipe differs from `policy`; empty if it does not."""
    published = VIEWS.get(recipe, ViewPolicy())
    names = ("bicubic", "auto_augment", "mixup", "cutmix", "erase", "repeats")
    values = {name: (getattr(published, name), getattr(policy, name)) for name in names}
    return ", ".join(
        f"{name.replace('_', '-')} {'none' if wanted == '' else wanted} (not {'none' if actual == '' else actual})"
        for name, (wanted, actual) in values.items()
        if wanted != actual
    )
