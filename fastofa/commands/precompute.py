"""Run the teacher once on every view of every image and store its predictions.

    fastofa precompute --data photos --teacher convnext_tiny.in12k_ft_in1k --views 300 --topk 16 --out cache
    fastofa precompute ... --recipe imagenet_vit_mlp        with the augmentation published for Transformers and MLPs
    fastofa precompute ... --plan                           estimate hours and disk space from batches timed here
    torchrun --no-python --nproc-per-node 8 fastofa precompute ...      the same cache on eight GPUs

After an interruption, the same command continues where it stopped, on any number of GPUs. A larger --views adds views
to a cache, even while runs are using it: they keep replaying the views they started with. A smaller --views changes
nothing.
"""

from rich import filesize

from fastofa.system import torchrun
from fastofa.system.errors import counted, escaped
from fastofa.teacher.fidelity import in_one_line, read_fidelity
from fastofa.teacher.plan import Plan, plan
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig


def main(config: PrecomputeConfig) -> None:
    if config.plan:
        if estimate := plan(config):
            print_plan(estimate, config)
        return
    cache = precompute(config)
    if not torchrun.is_main():
        return
    size = sum(file.stat().st_size for file in cache.path.iterdir())
    images, classes = counted(cache.num_samples, "image"), counted(cache.num_classes, "class")
    kept = f"top {cache.topk} of {classes}" + " of each teacher" * cache.keeps_each
    kept += f", vectors of {cache.pooled_dim} numbers" * (cache.pooled_dim > 0)
    print(escaped(f"{cache.path}: {cache.finished_views} of {images}, {kept}, {filesize.decimal(size)}"))
    if (fidelity := read_fidelity(cache.path, cache.header)) is not None:
        print(escaped(f"{cache.path}: {in_one_line(fidelity, cache.topk)}"))


def print_plan(plan: Plan, config: PrecomputeConfig) -> None:
    exist = f" ({plan.finished} finished)" if plan.finished else ""
    views, ranks, ms = counted(plan.views, "view"), counted(plan.ranks, "rank"), 1e3 / plan.rate
    one, two, four, eight = (f"{plan.epochs(students):,}" for students in (1, 2, 4, 8))
    seconds = f" ({plan.hours * 3600:,.0f} s)" if plan.hours < 0.1 else ""
    lines = (
        f"{' + '.join(config.teachers)}: {views}{exist} of {counted(plan.images, 'image')}, top {plan.topk}",
        f"  teacher passes  {plan.passes:,}, validation included",
        f"  images/s        {plan.rate:,.0f} on {ranks}, {ms:,.3f} ms per image; the teacher alone {plan.teacher:,.0f}",
        f"  hours           {plan.hours:,.2f}{seconds}; {plan.rank_hours:,.2f} GPU hours with one GPU per rank",
        f"  disk            {filesize.decimal(plan.bytes)} of views, {plan.row_bytes:,.1f} bytes per image and view",
        "A teacher that runs in training takes a pass per image, epoch and student. The cache takes fewer passes if",
        f"1, 2, 4 or 8 students train for at least {one}, {two}, {four} or {eight} epochs each.",
        f"An epoch replays one view, so views repeat after {counted(plan.views, 'epoch')}. Nothing was written.",
    )
    print("\n".join(map(escaped, lines)))
