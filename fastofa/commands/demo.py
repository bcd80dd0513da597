"""Distil a Transformer into a small CNN through a teacher cache, on real data, in minutes on a CPU.

    fastofa demo

The task is deliberately hard for the student: the teacher learns from 1,198 labelled digits, the student from 100. The
three students differ only in what they learn from the teacher.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table

from fastofa.commands.arguments import DemoConfig
from fastofa.data.open import open_dataset
from fastofa.pipelines import open_pipeline
from fastofa.reports.curves import draw_comparison
from fastofa.reports.metrics import top1
from fastofa.runs import recipes
from fastofa.system.errors import BadInput
from fastofa.system.files import write_json
from fastofa.system.locks import writing
from fastofa.system.progress import notice
from fastofa.teacher.precompute import precompute
from fastofa.teacher.precompute_config import PrecomputeConfig
from fastofa.training.export import export
from fastofa.training.loop import Result, train
from fastofa.views.table import center_views

TEACHER, STUDENT = "pvt_v2_b0", "test_resnet"
ALL_LABELS, FEW_LABELS = "digits:", "digits:100"  # with the colon, the name cannot refer to a folder
VIEWS, TOPK = 30, 5
METHODS = {
    "scratch": "labels only",
    "kd": "labels + KD (final logits)",
    "ofa": "labels + OFA (also four exits)",
}
MARKER = "demo.json"


def demo(out: Path) -> dict[str, Result]:
    """Run the demo in the folder `out`. Raises BadInput if `out` contains anything but an earlier demo."""
    with writing(out):
        return _demo(out)


def _demo(out: Path) -> dict[str, Result]:
    if out.exists():
        if not (out / MARKER).exists():
            raise BadInput(f"{out}: expected a new folder or an earlier demo, got something else; choose another --out")
        shutil.rmtree(out)
    write_json(out / MARKER, {"finished": False})
    results: dict[str, Result] = {}

    notice(f"1/4 training the teacher, a Transformer ({TEACHER}), on all labelled images")
    results["teacher"] = train_teacher(out)

    notice(f"2/4 caching its predictions for {VIEWS} views of the student's 100 images")
    began = time.monotonic()
    cache = precompute(PrecomputeConfig(FEW_LABELS, str(out / "teacher"), out / "cache", VIEWS, TOPK))
    precompute_s = time.monotonic() - began

    for method, sources in METHODS.items():
        notice(f"3/4 training the student, a small CNN ({STUDENT}), on 100 images: {sources}")
        config = recipes.digits(data=FEW_LABELS, cache=cache.path, student=STUDENT, method=method, out=out / method)
        results[method] = train(config)
    draw_comparison({sources: out / method for method, sources in METHODS.items()}, out / "curves.png")

    notice("4/4 exporting the OFA student and loading it with timm alone")
    line = export(out / "ofa", out / "student")
    timm_top1 = _top1_in_plain_timm(out / "student")
    values = {name: vars(result) for name, result in results.items()}
    write_json(out / MARKER, {"finished": True, "precompute_seconds": precompute_s, "timm_top1": timm_top1, **values})
    _print(results, cache.views * cache.num_samples / precompute_s, precompute_s)
    print(f"curves: {out / 'curves.png'}\ntimm alone, from {out / 'student'}: top-1 {timm_top1:.2%}\n{line}")
    if timm_top1 != results["ofa"].top1:
        raise RuntimeError(
            f"expected top-1 {results['ofa'].top1:.2%} as in the run, the exported student has {timm_top1:.2%}"
        )
    return results


def train_teacher(out: Path) -> Result:
    """Train the teacher in OUT/teacher-run and export it to OUT/teacher."""
    config = recipes.digits(
        data=ALL_LABELS, student=TEACHER, method="scratch", out=out / "teacher-run",
        epochs=10, batch_size=64, lr=1e-3, warmup_epochs=1, eval_every=5,
    )  # fmt: skip
    result = train(config)
    export(config.out, out / "teacher")
    return result


@torch.inference_mode()
def _top1_in_plain_timm(folder: Path) -> float:
    """Top-1 of the exported model, loaded by timm, with the normalisation in its config.json."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    dataset = open_dataset(ALL_LABELS, "val")
    config = model.pretrained_cfg
    normalize = (config["mean"], config["std"])
    pipeline = open_pipeline("resident", dataset, config["input_size"][-1], len(dataset), normalize=normalize)
    batch = next(iter(pipeline.epoch(center_views(dataset.sizes, config["crop_pct"]), np.arange(len(dataset)))))
    return top1(model(batch.images).topk(5).indices.numpy(), dataset.labels)


def _print(results: dict[str, Result], views_per_second: float, precompute_s: float) -> None:
    table = Table(title="599 validation digits; the students train on 100 images", title_justify="left")
    for name in ("model", "learns from"):
        table.add_column(name)
    for name in ("top-1", "images/s", "seconds"):
        table.add_column(name, justify="right")

    def row(model: str, sources: str, result: Result) -> None:
        speed = f"{result.images_per_second:,.0f}"
        table.add_row(model, sources, f"{result.top1:.2%}", speed, f"{result.seconds:.1f}")

    row(f"teacher {TEACHER}", "1,198 labelled images", results["teacher"])
    table.add_row("teacher cache", f"{VIEWS} views, top {TOPK}", "", f"{views_per_second:,.0f}", f"{precompute_s:.1f}")
    for method, sources in METHODS.items():
        row(f"student {STUDENT}", sources, results[method])
    Console().print(table)


def main(config: DemoConfig) -> None:
    demo(config.out)
