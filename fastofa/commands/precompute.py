"""Run the teacher once on every view of every image and store its predictions.

    fastofa precompute --data photos --teacher convnext_tiny.in12k_ft_in1k --views 300 --topk 16 --out cache
    fastofa precompute ... --recipe imagenet_vit_mlp        with the augmentation published for Transformers and MLPs

After an interruption, the same command continues where it stopped. A larger --views adds views to a cache, even while
runs are using it: they keep replaying the views they started with. A smaller --views changes nothing.
"""

from rich import filesize

from fastofa.system.errors import counted, escaped
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig


def main(config: PrecomputeConfig) -> None:
    cache = precompute(config)
    size = sum(file.stat().st_size for file in cache.path.iterdir())
    images, classes = counted(cache.num_samples, "image"), counted(cache.num_classes, "class")
    kept = f"top {cache.topk} of {classes}" + f", vectors of {cache.pooled_dim} numbers" * (cache.pooled_dim > 0)
    print(escaped(f"{cache.path}: {cache.finished_views} of {images}, {kept}, {filesize.decimal(size)}"))
