"""Measure how exactly stored vectors restore a teacher's predictions, and what they cost compared with the top K.

    python -m bench.bench_features --teacher demo/teacher      writes bench/results/features.json

The teacher is the one of `fastofa demo`, in fp32, on one view of the 1,198 training digits. The predictions restored
from each form of storage are compared with its log-probabilities of all classes: mean and largest KL divergence, how
often the best class is the same, and the mean cosine of the gradients of dkd's loss with respect to random student
logits (normal, standard deviation 3). The step is one of ResNet-18 with `dkd` on synthetic images of 1,000 classes and
vectors of DeiT-S's width. A cache with vectors holds the top K as well, since ofa and kd learn from it; its bytes are
left out.

Shapes: N images, C classes, D width of a vector, K classes kept.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lib import command_line
from bench.lib.record import markdown_table, write_record
from bench.lib.steps import Job, StepOptions, open_step
from bench.lib.timing import interleaved_ms, median_ratio
from fastofa.data.open import open_dataset
from fastofa.methods.dkd import DKD
from fastofa.methods.method import Outputs, Sizes
from fastofa.methods.targets import Targets
from fastofa.pipelines import open_pipeline
from fastofa.runs.recipes import default_policy
from fastofa.teacher.cache_columns import topk_targets
from fastofa.teacher.device_targets import DeviceTargets
from fastofa.teacher.model import open_teacher
from fastofa.teacher.packed_rows import RowFormat, packed
from fastofa.teacher.vectors import Classifier, stored
from fastofa.views.draw import draw_views

DATA, KEPT = "digits", 5
FEATURES = ("pooled", "pooled-int8")
WIDTH, CLASSES, TOPK = 384, 1000, 16  # of the step


def predictions(folder: str) -> tuple[Tensor, Tensor, Classifier]:
    """The teacher's log-probabilities [N, C] and vectors [N, D] for view 0 of the digits, and its classifier."""
    dataset = open_dataset(DATA)
    teacher = open_teacher(folder, dataset.classes)
    views = draw_views(default_policy(DATA), dataset.sizes, seed=0, view=0)
    batches = open_pipeline("resident", dataset, teacher.image_size, 128).epoch(views, np.arange(len(dataset)))
    log_probs, vectors = zip(*(teacher.with_pooled(batch.images) for batch in batches), strict=True)
    return torch.cat(log_probs).clone(), torch.cat(vectors).clone(), teacher.classifier


def exactness(log_probs: Tensor, vectors: Tensor, classifier: Classifier) -> dict[str, dict[str, float]]:
    """For each form of storage, how its predictions differ from `log_probs` [N, C], and its bytes per image."""
    count, num_classes = log_probs.shape
    labels = log_probs.argmax(dim=1)
    student = torch.randn(count, num_classes, generator=torch.Generator().manual_seed(0)) * 3
    dkd = DKD(DKD.Options(), Sizes(num_classes))

    def gradient(targets: Targets) -> Tensor:
        logits = student.clone().requires_grad_()
        dkd.loss(Outputs(logits[None]), targets, labels).backward()
        assert logits.grad is not None
        return logits.grad

    reference = log_probs.double().log_softmax(dim=1)
    rows = RowFormat(KEPT, num_classes)
    best = rows.unpack(rows.pack(topk_targets(log_probs, KEPT)))
    top = Targets(best.classes.int(), best.log_probs)
    exact = gradient(top._replace(all_log_probs=log_probs))
    ways = {f"top {KEPT}": (top, rows.num_bytes)}
    for features in FEATURES:
        kept = stored(vectors, features)
        size = sum(values.numel() * values.element_size() for values in kept.columns().values()) // count
        ways[features] = (top._replace(all_log_probs=classifier.log_probs(kept.restored())), size)
    found = {}
    for name, (targets, size) in ways.items():
        probs = targets.probs(num_classes).double()
        divergence = (reference.exp() * (reference - (probs / probs.sum(dim=1, keepdim=True)).log())).sum(dim=1)
        found[name] = {
            "bytes_per_image": size,
            "kl_mean": divergence.mean().item(),
            "kl_largest": divergence.max().item(),
            "same_best_class": (probs.argmax(dim=1) == labels).double().mean().item(),
            "gradient_cosine": F.cosine_similarity(gradient(targets), exact).mean().item(),
        }
    return found


def step_ms(batch_size: int, image_size: int, rounds: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds of a step with dkd from the top K and from each kind of vectors, one figure per round."""
    job = Job("resnet18", "deit_small_patch16_224", image_size, batch_size, CLASSES, torch.device("cpu"))
    step, _ = open_step(job, StepOptions(method="dkd"))
    batch = job.batch()
    torch.manual_seed(0)
    classifier = Classifier(torch.randn(CLASSES, WIDTH) / WIDTH**0.5, torch.zeros(CLASSES))
    vectors = torch.randn(batch_size, WIDTH) * 3
    best = packed(topk_targets(classifier.log_probs(vectors), TOPK), CLASSES)
    tables = {f"top {TOPK}": DeviceTargets(best, job.device)}
    for features in FEATURES:
        tables[features] = DeviceTargets(best, job.device, vectors=stored(vectors, features), classifier=classifier)
    steps = {name: (lambda table=table: step([batch], table, lr=1e-3)) for name, table in tables.items()}
    lookups = {f"lookup, {name}": (lambda table=table: table.lookup(batch.rows)) for name, table in tables.items()}
    return {
        **interleaved_ms(steps, job.device, rounds, calls, warmup=1),
        **interleaved_ms(lookups, job.device, rounds, 20 * calls, warmup=1),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = command_line.parser(__doc__)
    parser.add_argument("--teacher", required=True, help="folder of a teacher of the digits")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=64, help="of the step, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3)
    args = parser.parse_args(arguments)
    log_probs, vectors, classifier = predictions(args.teacher)
    found = exactness(log_probs, vectors, classifier)
    times = step_ms(args.batch_size, args.image_size, args.rounds, args.calls)
    baseline = f"top {TOPK}"
    steps = {
        name: {"rounds_ms": rounds, "median_ms": statistics.median(rounds)}
        | ({} if name.startswith("lookup") else {"relative_time": 1 / median_ratio(times, name, baseline)})
        for name, rounds in times.items()
    }
    result = {
        "teacher": Path(args.teacher).name,
        "images": len(log_probs),
        "classes": log_probs.shape[1],
        "width": vectors.shape[1],
        "exactness": found,
        "step": {"batch_size": args.batch_size, "image_size": args.image_size, "classes": CLASSES, "width": WIDTH},
        "steps": steps,
    }
    rows = [[n, *(f"{v:.6g}" for v in values.values())] for n, values in found.items()]
    print(markdown_table(["stored", *next(iter(found.values()))], rows))
    print(markdown_table(["dkd from", "ms"], [[n, f"{row['median_ms']:.3g}"] for n, row in steps.items()]))
    write_record("features", result, args.out)
    return result


if __name__ == "__main__":
    main()
