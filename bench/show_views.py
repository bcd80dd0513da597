"""Draw the augmentation: a row for each of four photographs, with its crop first, then several views of a recipe.

OMP_NUM_THREADS=1 python -m bench.show_views             writes docs/views.png
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images

from bench.lib import command_line
from fastofa.data.dataset import from_array
from fastofa.pipelines import open_pipeline
from fastofa.runs.recipes import default_policy
from fastofa.views.draw import draw_views
from fastofa.views.rand_augment import OPS
from fastofa.views.table import Views

RECIPE, SIZE, VIEWS, ROWS = "imagenet_vit_mlp", 112, 6, 4
OUT = Path(__file__).parent.parent / "docs" / "views.png"


def title(views: Views, i: int) -> str:
    """What the view does to sample i."""
    assert views.ops is not None
    assert views.amounts is not None
    assert views.partner is not None
    assert views.mix is not None
    assert views.mix_box is not None
    assert views.erase is not None
    done = [f"{OPS[op]} {amount:.3g}" for op, amount in zip(views.ops[i], views.amounts[i], strict=True) if op]
    kind = "cutmix" if views.mix_box[i, 2] else "mixup"
    return "\n".join(
        [
            ", ".join(done) or "no operation",
            f"{kind} {views.mix[i]:.2f} with {views.partner[i]}" + (", erased" if views.erase[i, 2] else ""),
        ]
    )


def main() -> None:
    command_line.parser(__doc__, out=None).parse_args()
    china, flower = load_sample_images().images
    pixels = np.stack([china[:427, :427], flower[:427, 100:527], china[:427, 213:], flower[:427, 213:]])
    dataset = from_array("photographs", "train", ("photo",), [f"{i}" for i in range(4)], np.zeros(4, int), pixels)
    policy = default_policy("photographs", RECIPE)
    pipeline = open_pipeline("resident", dataset, SIZE, batch_size=4)
    figure = Figure(figsize=(2.6 * (VIEWS + 1), 2.6 * ROWS), layout="constrained")
    axes = figure.subplots(ROWS, VIEWS + 1)
    for column in range(VIEWS + 1):
        views = draw_views(policy, dataset.sizes, seed=7, view=max(column - 1, 0))
        plain = Views(views.crop, views.flip, views.bicubic)
        (batch,) = pipeline.epoch(plain if column == 0 else views, np.arange(4))
        for i, image in enumerate(batch.images.permute(0, 2, 3, 1).numpy()):
            axes[i, column].imshow(image)
            axes[i, column].set_title(
                f"sample {i}, view 0:\nits crop alone" if column == 0 else f"view {column - 1}: {title(views, i)}",
                fontsize=8,
            )
            axes[i, column].axis("off")
    figure.savefig(OUT, dpi=64)
    print(OUT.relative_to(OUT.parent.parent))


if __name__ == "__main__":
    main()
