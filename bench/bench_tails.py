"""Compare what a cache could keep of the classes outside the top K, at equal bytes: does a sample beat an even tail?

    OMP_NUM_THREADS=1 python -m bench.bench_tails                    writes bench/results/tails.json
    OMP_NUM_THREADS=1 python -m bench.bench_tails --only random      a part of it: bench/results/tails_random.json

Each form gets a teacher's probabilities of all classes and returns the weights that the OFA loss would use:

    even        the K best classes; the rest of the probability spread evenly over the others (what a cache stores)
    sampled     fewer classes exactly, and S of the others drawn with a chance proportional to their probability, with
                weights that make the expected loss exact for every eps; drawn anew for each view and image
    difference  as sampled, but only the difference from the even tail is estimated
    vector      the teacher's logits projected on their r principal components, int8, in place of a pooled vector

Bytes are those of the packed predictions of one image and view (fastofa/teacher/packed_rows.py); a component takes 8
bits.

For each form it measures the gradient of the loss at the student's logits against that of all classes (bias, standard
deviation of one view, cosine of one view, all relative to the exact gradient), the Kullback-Leibler divergences, and
the top-1 of students that replay 20 views six times, for two embedded datasets: digits (10 classes) and rendered
characters (94). There the teacher is a CNN and the student an MLP.

Shapes: N images, C classes, K classes kept, S classes sampled, V views, B batch.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench.lib import command_line
from bench.lib.characters import characters
from bench.lib.record import markdown_table, write_record
from fastofa.kernels.reference import dense_probs
from fastofa.methods.targets import TopK
from fastofa.teacher.packed_rows import RowFormat

EPS = (1.0, 1.5)
DRAWS = 100  # views over which bias and variance are measured
VIEWS, CYCLES, BATCH = 20, 6, 64

# --- Forms: probabilities [N, C], labels [N], eps -> weights of the loss [N, C] ---------------------------------------

Weights = Callable[[Tensor, Tensor, float, torch.Generator], Tensor]


def exact(probs: Tensor, labels: Tensor, eps: float, _: torch.Generator) -> Tensor:
    """w = (p + m)^eps - m, with m the one-hot label."""
    target = F.one_hot(labels, probs.shape[1]).to(probs.dtype)
    return (probs + target) ** eps - target


def even(topk: int, probs: Tensor, labels: Tensor, eps: float, draw: torch.Generator) -> Tensor:
    return exact(evened(probs, topk), labels, eps, draw)


def evened(probs: Tensor, topk: int) -> Tensor:
    """The K largest probabilities, and the mean of the others in place of each."""
    values, classes = probs.topk(topk, dim=1)
    rest = (1 - values.sum(dim=1, keepdim=True)).clamp(min=0) / max(probs.shape[1] - topk, 1)
    return rest.expand_as(probs).scatter(1, classes, values)


def sampled(
    topk: int, samples: int, over_even: bool, probs: Tensor, labels: Tensor, eps: float, draw: torch.Generator
) -> Tensor:
    """The weights of K classes, and w / E[count] for each time that a class of the others was drawn.

    A systematic sample: class c is drawn E[count] = S p_c / rest times on average, rounded up or down, so that S
    classes are drawn in all. With `over_even`, the tail is the even one plus a sample of the difference, drawn with
    chances proportional to the size of the difference.
    """
    whole = exact(probs, labels, eps, draw)
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter(1, probs.topk(topk, dim=1).indices, True)
    base = exact(evened(probs, topk), labels, eps, draw) if over_even else torch.zeros_like(whole)
    chance = (evened(probs, topk) - probs).abs() if over_even else probs
    chance = chance.masked_fill(kept, 0)
    expected = samples * chance / chance.sum(dim=1, keepdim=True).clamp(min=1e-30)
    # The order of the classes is shuffled, so that neighbours are not always drawn together.
    shuffled = torch.rand(probs.shape, generator=draw).argsort(dim=1)
    upper = expected.gather(1, shuffled).cumsum(dim=1)
    start = torch.rand(len(probs), 1, generator=draw, dtype=probs.dtype)
    counts = (upper + start).floor().diff(dim=1, prepend=torch.zeros_like(start))
    count = torch.zeros_like(probs).scatter(1, shuffled, counts)
    tail = base + torch.where(count > 0, (whole - base) * count / expected.clamp(min=1e-30), 0)
    return torch.where(kept, whole, tail)


def projected(
    components: int, every: Tensor, probs: Tensor, labels: Tensor, eps: float, draw: torch.Generator
) -> Tensor:
    """Logits restored from r int8 numbers; the components are those of `every`, the logits of all training images."""
    mean = every.mean(dim=0)
    _, _, axes = torch.linalg.svd((every - mean)[:: max(len(every) // 4096, 1)], full_matrices=False)
    axes = axes[:components]
    step = ((every - mean) @ axes.T).abs().amax(dim=0) / 127
    numbers = (((centred(probs) - mean) @ axes.T) / step).round().clamp(-127, 127)
    return exact((numbers * step @ axes + mean).softmax(dim=1), labels, eps, draw)


def centred(probs: Tensor) -> Tensor:
    """Log-probabilities with a mean of 0 over the classes, at least 1e-12."""
    logs = probs.clamp(min=1e-12).log()
    return logs - logs.mean(dim=1, keepdim=True)


@dataclass(frozen=True)
class Form:
    name: str
    num_bytes: int
    weights: Weights


def forms(probs: Tensor, topk: int) -> list[Form]:
    """All forms with the bytes of the top K, those that keep fewer classes included; `probs` [N, C] of the data."""
    size = RowFormat(topk, probs.shape[1]).num_bytes
    found = [Form(f"even, K = {topk}", size, partial(even, topk))]
    for samples in (topk // 4, topk // 2):
        for over_even, name in ((False, "sampled"), (True, "difference")):
            shown = f"{name}, K = {topk - samples}, S = {samples}"
            found.append(Form(shown, size, partial(sampled, topk - samples, samples, over_even)))
    components = min(size, probs.shape[1] - 1)
    found.append(Form(f"vector, r = {components}", components, partial(projected, components, centred(probs))))
    return found


# --- Gradient and divergence ------------------------------------------------------------------------------------------


def gradient(weights: Tensor, student: Tensor) -> Tensor:
    """dL/dz [N, C] of each row's loss, at the student's probabilities."""
    return weights.sum(dim=1, keepdim=True) * student - weights


def fidelity(form: Form, probs: Tensor, labels: Tensor, logits: Tensor, eps: float) -> dict[str, float | None]:
    """How the form's gradient at `logits` [N, C] differs from the exact one, over many views of the same images."""
    draw, student = torch.Generator().manual_seed(0), logits.softmax(dim=1)
    expected = gradient(exact(probs, labels, eps, draw), student)
    total, squares, cosines = torch.zeros_like(expected), torch.zeros(len(probs), dtype=probs.dtype), []
    is_random = isinstance(form.weights, partial) and form.weights.func is sampled
    draws = DRAWS if is_random else 1
    for _ in range(draws):
        found = gradient(form.weights(probs, labels, eps, draw), student)
        total += found
        squares += found.square().sum(dim=1)
        cosines.append(F.cosine_similarity(found, expected, dim=1).mean().item())
    mean = total / draws
    variance = (squares / draws - mean.square().sum(dim=1)).clamp(min=0) * (draws / max(draws - 1, 1))
    bias = ((mean - expected).square().sum(dim=1) - variance / draws).clamp(min=0)
    scale = expected.square().sum(dim=1).mean()
    stored = form.weights(probs, torch.zeros_like(labels), 1.0, draw)  # at eps = 1 the weights are probabilities
    proper = bool((stored >= -1e-9).all())
    return {
        "bias": math.sqrt(bias.mean() / scale),
        "deviation": math.sqrt(variance.mean() / scale),
        "cosine": statistics.mean(cosines),
        "kl_of_stored": None if is_random else divergence(probs, stored),
        "kl_to_teacher": divergence(stored, probs) if proper else None,
    }


def divergence(p: Tensor, q: Tensor) -> float:
    return (torch.xlogy(p, p) - torch.xlogy(p, q.clamp(min=1e-30))).sum(dim=1).mean().item()


def soft_teacher(deviation: float, classes: int = 1000, images: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of random logits, labels drawn from them, and a student's logits: the teacher's and noise of 1."""
    draw = torch.Generator().manual_seed(0)
    logits = deviation * torch.randn(images, classes, generator=draw, dtype=torch.float64)
    probs = logits.softmax(dim=1)
    return probs, torch.multinomial(probs, 1, generator=draw)[:, 0], noisy(probs)


def noisy(probs: Tensor) -> Tensor:
    noise = torch.randn(probs.shape, generator=torch.Generator().manual_seed(1), dtype=probs.dtype)
    return centred(probs) + noise


# --- Students of embedded data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    name: str
    images: Tensor
    """fp32 [N, 1, S, S] in 0..1; the student's part comes first."""
    labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    student_images: int
    """The number of images that the student sees."""
    topk: int
    blur: float
    """Deviation of the noise added to each view."""


def digits() -> Data:
    found = load_digits()
    images, labels = torch.from_numpy(found.images / 16).float()[:, None], torch.from_numpy(found.target)
    val = torch.arange(len(labels)) % 3 == 0
    return Data("digits", images[~val], labels[~val], images[val], labels[val], 200, 4, 0.15)


def rendered() -> Data:
    train, val = (
        (torch.from_numpy(images)[:, None].float() / 255, torch.from_numpy(labels))
        for images, labels in map(characters, ("train", "val"))
    )
    small = [F.interpolate(images, 20, mode="area") for images, _ in (train, val)]
    return Data("characters", small[0], train[1], small[1], val[1], 3 * 94, 16, 0.2)


def view(images: Tensor, blur: float, draw: torch.Generator) -> Tensor:
    """Each image turned, sheared, scaled and moved at random, with noise."""
    change = torch.randn(len(images), 2, 3, generator=draw) * 0.12
    theta = torch.eye(2, 3) + change
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    noise = torch.randn(images.shape, generator=draw) * blur
    return F.grid_sample(images, grid, align_corners=False) + noise


def train_teacher(data: Data, classes: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(48 * 16, classes),
    )  # fmt: skip
    fit(model, 30, len(data.labels), 3e-3, lambda epoch, rows, draw: (view(data.images[rows], data.blur, draw), rows),
        lambda logits, rows: F.cross_entropy(logits, data.labels[rows]))  # fmt: skip
    return model.eval()


def fit(
    model: nn.Module,
    epochs: int,
    count: int,
    lr: float,
    batch: Callable[[int, Tensor, torch.Generator], tuple[Tensor, Any]],
    loss: Callable[[Tensor, Any], Tensor],
    seed: int = 0,
) -> None:
    """Train with AdamW and a cosine over all steps."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    steps = -(-count // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(epochs):
        for rows in torch.randperm(count, generator=draw).split(BATCH):
            images, given = batch(epoch, rows, draw)
            optimizer.zero_grad()
            loss(model(images), given).backward()
            optimizer.step()
            schedule.step()


@dataclass(frozen=True)
class Replay:
    """What a cache replays: views of the student's images and the teacher's probabilities."""

    images: Tensor
    """[V, N, 1, S, S]."""
    probs: Tensor
    """float64 [V, N, C]."""


@torch.no_grad()
def replay(data: Data, teacher: nn.Module) -> Replay:
    draw = torch.Generator().manual_seed(1)
    images = torch.stack([view(data.images[: data.student_images], data.blur, draw) for _ in range(VIEWS)])
    return Replay(images, torch.stack([teacher(part).double().softmax(dim=1) for part in images]))


def student_top1(data: Data, stored: Replay, weights: Tensor, seed: int) -> float:
    """Top-1 on the validation images of a student that learned from the weights [V, N, C] only."""
    torch.manual_seed(seed)
    size, classes = stored.images.shape[-1], weights.shape[-1]
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(size * size, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes)
    )

    def batch(epoch: int, rows: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor]:
        return stored.images[epoch % VIEWS, rows], weights[epoch % VIEWS, rows]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()

    fit(model, VIEWS * CYCLES, data.student_images, 3e-3, batch, loss, seed)
    with torch.no_grad():
        return (model(data.val_images).argmax(dim=1) == data.val_labels).double().mean().item()


def students(data: Data, seeds: int) -> dict[str, Any]:
    """For each eps and form: fidelity on the student's images, and top-1 of its students."""
    classes = int(data.labels.max()) + 1
    teacher = train_teacher(data, classes)
    with torch.no_grad():
        teacher_top1 = (teacher(data.val_images).argmax(dim=1) == data.val_labels).double().mean().item()
    stored = replay(data, teacher)
    labels = data.labels[: data.student_images]
    flat, repeated = stored.probs.flatten(0, 1), labels.repeat(VIEWS)
    some = torch.arange(0, len(flat), max(len(flat) // 128, 1))
    every = [Form("all classes", 0, exact), *forms(flat, data.topk)]
    rows: dict[str, Any] = {}
    for eps in EPS:
        for form in every:
            weights = form.weights(flat, repeated, eps, torch.Generator().manual_seed(2))
            weights = weights.float().reshape(stored.probs.shape)
            top1 = [student_top1(data, stored, weights, seed) for seed in range(seeds)]
            measured = fidelity(form, flat[some], repeated[some], noisy(flat[some]), eps)
            rows[f"eps {eps:g}, {form.name}"] = {"bytes": form.num_bytes, **measured, **summary(top1)}
    kept = flat.topk(data.topk, dim=1).values.sum(dim=1).mean().item()
    settings = {"classes": classes, "images": data.student_images, "kept_mass": kept, "teacher_top1": teacher_top1}
    return {**settings, "rows": rows}


def summary(top1: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(top1) if len(top1) > 1 else 0.0
    return {"top1": list(top1), "top1_mean": statistics.mean(top1), "top1_sd": deviation}


def random_teachers() -> dict[str, Any]:
    found = {}
    for deviation in (1.5, 3.0, 6.0):
        probs, labels, logits = soft_teacher(deviation)
        rows = {
            f"eps {eps:g}, {form.name}": {"bytes": form.num_bytes, **fidelity(form, probs, labels, logits, eps)}
            for eps in EPS
            for form in forms(probs, 16)
        }
        kept = probs.topk(16, dim=1).values.sum(dim=1).mean().item()
        found[f"random logits, deviation {deviation:g}"] = {"classes": 1000, "kept_mass": kept, "rows": rows}
    return found


def packing() -> dict[str, Any]:
    """What rounding alone costs: the K classes and the even tail as packed rows, and as float16, against float64."""
    found = {}
    for deviation in (1.5, 3.0, 6.0):
        probs, _, logits = soft_teacher(deviation)
        values, classes = probs.log().topk(16, dim=1)
        row_format = RowFormat(16, probs.shape[1])
        unpacked = row_format.unpack(row_format.pack(TopK(classes, values))).log_probs
        rows: dict[str, Any] = {}
        for temperature in (1.0, 4.0):
            expected, *given = (
                dense_probs(classes, stored.double(), probs.shape[1], temperature)
                for stored in (values, unpacked, values.half())
            )
            student = (logits / temperature).softmax(dim=1)
            for name, size, stored in (("packed", row_format.num_bytes, given[0]), ("float16", 64, given[1])):
                rows[f"T = {temperature:g}, {name}"] = {
                    "bytes": size,
                    "kl_of_stored": divergence(expected, stored),
                    "1 - cosine": 1 - F.cosine_similarity(student - stored, student - expected).mean().item(),
                }
        found[f"packing, random logits, deviation {deviation:g}"] = {"classes": 1000, "rows": rows}
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = command_line.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=("random", "digits", "characters"), nargs="+")
    args = parser.parse_args(arguments)
    only = args.only or ("random", "digits", "characters")
    result = packing() | random_teachers() if "random" in only else {}
    for name, make in (("digits", digits), ("characters", rendered)):
        if name in only:
            result[name] = students(make(), args.seeds)
    for name, found in result.items():
        print(f"\n{name}, {found['classes']} classes")
        columns = [key for key in next(iter(found["rows"].values())) if key != "top1"]
        cells = [
            [row, *("" if values[key] is None else f"{values[key]:.4g}" for key in columns)]
            for row, values in found["rows"].items()
        ]
        print(markdown_table(["form", *columns], cells))
    write_record("_".join(["tails", *(args.only or [])]), result, args.out)
    return result


if __name__ == "__main__":
    main()
