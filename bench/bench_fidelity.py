"""Measure what stored predictions change: the OFA loss and its gradient, for several K and for pooled vectors.

    python -m bench.bench_fidelity               writes bench/results/fidelity.json; trains two teachers, minutes

The teachers are those of the demo (PVTv2-B0, 10 digits) and a small CNN of 94 drawn characters, both in fp32. The
figures are those that `fastofa precompute` reports: up to 512 training images in a view that no cache stores, and the
less exact of two students, one with random logits and one near the teacher. The last predictions are made up: 1,000
classes, whose logits are normal with standard deviation 2. They are softer than those of a trained teacher.

Shapes: N images, C classes, K classes kept, D width of a vector.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bench.lib import command_line
from bench.lib.characters import characters
from bench.lib.record import markdown_table, write_record
from fastofa.commands.demo import train_teacher
from fastofa.data.open import open_dataset
from fastofa.pipelines import open_pipeline
from fastofa.runs import recipes
from fastofa.runs.recipes import default_policy
from fastofa.teacher.ensemble import Ensemble
from fastofa.teacher.fidelity import (
    HELD_BACK,
    LossFidelity,
    Sample,
    compare,
    held_back,
    held_back_order,
    less_exact,
    smallest_topk,
    top_k,
)
from fastofa.teacher.model import open_teacher
from fastofa.teacher.packed_rows import row_format
from fastofa.teacher.vectors import Classifier, stored
from fastofa.training.export import export
from fastofa.training.loop import train
from fastofa.views.draw import draw_views
from fastofa.views.policy import ViewPolicy

EPS = (1.0, 1.5)
TOPK = (4, 8, 16, 32)
MADE_UP = (512, 1000, 2.0)  # images, classes, standard deviation of the logits
CHARACTERS = ViewPolicy(scale=(0.6, 1.0), flip=0.0)
Form = Callable[[Tensor], Tensor]
"""A stored form: the teacher's log-probabilities fp32 [N, C] -> the probabilities [N, C] that a method sees."""


def predictions(folder: Path, data: str, policy: ViewPolicy) -> tuple[Sample, Tensor, Classifier]:
    """A teacher's predictions for the images held back, its vectors fp32 [N, D] for them, and its classifier."""
    dataset = open_dataset(data)
    teacher = open_teacher(str(folder), dataset.classes)
    pipeline = open_pipeline("auto", dataset, teacher.image_size, batch_size=64)
    sample = held_back(Ensemble((teacher,), (1.0,), (teacher.name,)), dataset, pipeline, policy, seed=0)
    batches = pipeline.epoch(draw_views(policy, dataset.sizes, 0, HELD_BACK), held_back_order(len(dataset)))
    vectors = [teacher.with_pooled(batch.images)[1].clone() for batch in batches]
    return sample, torch.cat(vectors).float(), teacher.classifier


def top_k_forms(num_classes: int) -> dict[str, tuple[int, Form]]:
    """Bytes per image and form, by name: each K below C, and all classes if there are few."""
    kept = [k for k in TOPK if k < num_classes] + [num_classes] * (num_classes < max(TOPK))
    formats = {k: row_format(k, num_classes) for k in kept}
    sizes = {k: 4 * k if rows is None else rows.num_bytes for k, rows in formats.items()}
    return {f"top {k}": (sizes[k], top_k(k)) for k in kept}


def vector_forms(vectors: Tensor, classifier: Classifier) -> dict[str, tuple[int, Form]]:
    """Bytes per image and form, as `top_k_forms`, for vectors [N, D] instead of log-probabilities."""

    def restored(features: str, _: Tensor) -> Tensor:
        return classifier.log_probs(stored(vectors, features).restored()).exp()

    width = vectors.shape[1]
    return {
        "pooled": (2 * width, partial(restored, "pooled")),
        "pooled-int8": (width + 4, partial(restored, "pooled-int8")),
    }


def rows(sample: Sample, forms: dict[str, tuple[int, Form]]) -> dict[str, dict[str, Any]]:
    """For each form its bytes per image, and what it changes for each eps and student."""
    return {
        name: {
            "bytes_per_image": size,
            "losses": [dataclasses.asdict(loss) for loss in compare(sample, form(sample.log_probs), EPS)],
        }
        for name, (size, form) in forms.items()
    }


def write_characters(folder: Path) -> None:
    """Write FOLDER/train/CLASS/NUMBER.png and FOLDER/val/..., the characters of `bench.lib.characters`."""
    for split in ("train", "val"):
        for number, (image, label) in enumerate(zip(*characters(split), strict=True)):
            path = folder / split / f"{label:02d}"
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert("RGB").save(path / f"{number:04d}.png")


def train_on_characters(folder: Path, epochs: int) -> float:
    """Train a small CNN on FOLDER/characters and export it to FOLDER/characters-teacher. Returns its top-1."""
    config = recipes.digits(
        data=str(folder / "characters"), student="test_resnet", method="scratch", out=folder / "characters-run",
        epochs=epochs, batch_size=64, lr=4e-3, warmup_epochs=1, eval_every=epochs, scale=(0.6, 1.0), flip=0.0,
    )  # fmt: skip
    top1 = train(config).top1
    export(config.out, folder / "characters-teacher")
    return top1


def made_up() -> Sample:
    count, num_classes, deviation = MADE_UP
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(count, num_classes, generator=random) * deviation
    return Sample(logits.log_softmax(dim=1), torch.randint(num_classes, (count,), generator=random))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = command_line.parser(__doc__)
    parser.add_argument("--digits", type=Path, help="folder of a teacher of the digits; by default it is trained")
    parser.add_argument("--epochs", type=int, default=40, help="of the teacher of the characters")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.digits is None:
            train_teacher(folder)
        write_characters(folder / "characters")
        top1 = train_on_characters(folder, args.epochs)
        of_digits = predictions(args.digits or folder / "teacher", "digits", default_policy("digits"))
        of_characters = predictions(folder / "characters-teacher", str(folder / "characters"), CHARACTERS)
    result: dict[str, Any] = {"eps": list(EPS), "characters_top1": top1, "teachers": {}}
    for name, sample, forms in (
        ("PVTv2-B0, digits", of_digits[0], vector_forms(*of_digits[1:])),
        ("test_resnet, characters", of_characters[0], vector_forms(*of_characters[1:])),
        ("made up", made_up(), {}),
    ):
        num_classes = sample.log_probs.shape[1]
        found = rows(sample, {**top_k_forms(num_classes), **forms})
        auto = smallest_topk(sample, EPS)
        result["teachers"][name] = {"classes": num_classes, "topk_auto": auto, "stored": found}
        print(f"{name}: {num_classes} classes, --topk auto: {auto}")
        print(table(found))
    write_record("fidelity", result, args.out)
    return result


def table(found: dict[str, dict[str, Any]]) -> str:
    """The less exact student of each eps, as a Markdown table."""
    columns = [f"eps {eps:g}: {figure}" for eps in EPS for figure in ("cosine", "gradient error", "loss error")]
    lines = []
    for name, row in found.items():
        losses = less_exact([LossFidelity(**loss) for loss in row["losses"]])
        cells = [(f"{loss.cosine:.5f}", f"{loss.gradient_error:.2%}", f"{loss.loss_error:.2%}") for loss in losses]
        lines.append([name, str(row["bytes_per_image"]), *(text for cell in cells for text in cell)])
    return markdown_table(["stored", "bytes", *columns], lines)


if __name__ == "__main__":
    main()
