"""The HTML report of a run, RUN/report.html: its training, the student's errors and the configuration.

The report is generated from the run's folder and its teacher cache, and omits what does not exist (yet). The page needs
no network, no other file and no script, so it can be mailed and archived. Names of classes and folders are untrusted
text: the template escapes all of them.

C classes, N validation images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastofa import __version__
from fastofa.reports.confusion import ClassResult, Pair, confusion, pairs, worst_classes, worst_pairs
from fastofa.reports.curves import Row, column, draw_svg, group_size, plot_accuracy, plot_loss, plot_steps, split_rows
from fastofa.reports.metrics import METRICS
from fastofa.runs.config import OWN_CLIP, SIZED, TrainConfig
from fastofa.runs.log import damaged_lines, read_metrics
from fastofa.runs.predictions import PREDICTIONS
from fastofa.runs.recipes import recipe
from fastofa.runs.run import LAUNCHES, Run, open_run
from fastofa.system.errors import BadInput
from fastofa.system.files import load_tensors, read_json, write_atomic
from fastofa.system.urls import is_url
from fastofa.teacher.cache_header import HEADER, read_header
from fastofa.teacher.fidelity import Fidelity, read_fidelity

FILE, TEMPLATE = "report.html", "report.html.jinja"
MAX_MATRIX_CLASSES = 64
"""With more classes the confusion matrix is not drawn; the tables always are."""
MAX_TABLE_ROWS = 20


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path. Folders with the same content give the same bytes.

    Raises:
        BadInput: the folder does not contain a run, or one of its files is damaged.
    """
    opened, rows = open_run(run), read_metrics(run)
    steps, epochs = split_rows(rows)
    launches, pace = _launches(run), _pace(steps, epochs, opened.config.batch_size)
    page = _template().render(
        version=__version__,
        run=opened,
        name=run.resolve().name,
        config=opened.config,
        step=rows[-1]["step"] if rows else 0,
        epochs_done=rows[-1]["epoch"] + (rows[-1]["kind"] == "epoch") if rows else 0,
        epochs=epochs,
        best=max(epochs, key=lambda row: row["top1"], default=None),  # the first one on a tie
        pace=pace,
        metrics=METRICS,
        averaged=any("top1_ema" in row for row in epochs),
        damaged=damaged_lines(run),
        plots=_plots(opened.config, steps, epochs, pace, launches),
        rows_per_point=group_size(steps),
        mistakes=_mistakes(opened),
        fidelity=_fidelity(opened),
        settings=_settings(opened.config),
        launches=launches,
        varying=_varying(launches),
    )
    write_atomic(run / FILE, page.encode(errors="replace"))  # the folder's name may not be valid Unicode
    return run / FILE


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "duration": _duration, "plain": _plain, "short": _short}
    return environment.get_template(TEMPLATE)


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pace:
    """The speed of training; None for values that were not logged."""

    images_per_second: float | None
    seconds: float | None
    """The time of the training steps, without evaluation."""
    waiting: float | None
    """Fraction of this time spent waiting for the loader."""
    epoch_seconds: float | None
    """Median wall time of an evaluated epoch, from its start to the next one's start."""
    eval_seconds: float | None
    """Median part of it that is evaluation."""


def _pace(steps: list[Row], epochs: list[Row], batch_size: int) -> _Pace:
    images = batch_size * np.diff(column(steps, "step"), prepend=0)
    speed, waiting = column(steps, "images_per_second"), column(steps, "loader_share")
    seconds = np.divide(images, speed, out=np.zeros_like(images), where=speed > 0)
    total, known = seconds.sum(), np.isfinite(waiting) & (seconds > 0)
    return _Pace(
        epochs[-1].get("images_per_second") if epochs else images[seconds > 0].sum() / total if total else None,
        total or None,
        np.average(waiting[known], weights=seconds[known]) if known.any() else None,
        _median(column(epochs, "epoch_seconds")),
        _median(column(epochs, "eval_seconds")),
    )


def _median(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else None


@dataclass(frozen=True)
class _Plot:
    name: str
    title: str
    caption: str
    svg: str


def _plots(
    config: TrainConfig, steps: list[Row], epochs: list[Row], pace: _Pace, launches: list[dict[str, Any]]
) -> list[_Plot]:
    """Plots of the logged values: older logs lack some columns, and a new run has no evaluation yet."""
    plots: list[_Plot] = []

    def add(name: str, title: str, caption: str, plot: Callable[..., None], *arguments: Any, **options: Any) -> None:
        plots.append(_Plot(name, title, caption, draw_svg(name, lambda axes: plot(axes, *arguments, **options))))

    def logged(name: str) -> np.ndarray:
        values = column(steps, name)
        return values[np.isfinite(values)]

    if (loss := logged("loss")).size:
        add("loss", "Training loss", f"From {loss[0]:.3g} to {loss[-1]:.3g}.", plot_loss, steps)
    if epochs:
        caption = f"Top-1 from {_percent(epochs[0]['top1'])} to {_percent(epochs[-1]['top1'])}."
        if "top1_ema" in epochs[-1]:
            caption = " and ".join(_percent(epochs[-1][name]) for name in ("top1_raw", "top1_ema"))
            caption = f"Final top-1 of the weights and of their moving average: {caption}."
        add("accuracy", "Validation accuracy", caption, plot_accuracy, epochs)
    if (lr := logged("lr")).size:
        caption = f"{config.schedule.capitalize()} schedule, at most {lr.max():.3g}."
        add("lr", "Learning rate", caption, plot_steps, steps, "lr", "learning rate")
    if logged("grad_norm").size:
        built_in = OWN_CLIP.get(config.optimizer)
        level = min((limit for limit in (config.clip, built_in) if limit is not None), default=None)
        source = f" by {config.optimizer} itself" if level == built_in else ""
        caption = f"Before clipping at {level:g}{source} (dashed line)." if level is not None else "Not clipped."
        add("norm", "Gradient norm", caption, plot_steps, steps, "grad_norm", "norm", level=level)
    if (speed := logged("images_per_second")).size:
        resumed = [launch["step"] for launch in launches if launch.get("step")]
        caption = f"Median {np.median(speed):,.0f} images/s."
        if resumed:
            caption += " Dotted lines: the run was resumed."
        add("speed", "Throughput", caption, plot_steps, steps, "images_per_second", "images/s", marks=resumed)
    if (waiting := logged("loader_share")).size:
        caption = f"{_percent(pace.waiting or 0)} of the time, at most {_percent(waiting.max())} between two log lines."
        add("waiting", "Waiting for the loader", caption, plot_steps, steps, "loader_share", "waiting (%)", scale=100)
    return plots


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mistakes:
    epoch: int
    images: int
    accuracy: float
    matrix: list[Pair] | None
    """The cells that are not zero; None if there are too many classes to draw."""
    pairs: list[Pair]
    classes: list[ClassResult]


def _mistakes(run: Run) -> _Mistakes | None:
    """The mistakes at the newest evaluation; None before the first."""
    path = run.path / PREDICTIONS
    if not path.exists():
        return None
    tensors, info = load_tensors(path)
    try:
        predictions, labels, epoch = tensors["best"][:, 0].numpy(), tensors["labels"].numpy(), int(info["epoch"])
        counts = confusion(predictions, labels, len(run.classes))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadInput(
            f"{path}: expected predictions written by `fastofa train`, got others ({error}); delete it"
        ) from None
    return _Mistakes(
        epoch,
        len(labels),
        float(counts.trace() / max(len(labels), 1)),
        pairs(counts) if len(run.classes) <= MAX_MATRIX_CLASSES else None,
        worst_pairs(counts, MAX_TABLE_ROWS),
        worst_classes(counts, MAX_TABLE_ROWS),
    )


# --- Teacher cache ----------------------------------------------------------------------------------------------------


def _fidelity(run: Run) -> Fidelity | None:
    """How exactly the run's cache represents the teacher's predictions; None if that is unknown.

    A run from a cache at a URL keeps a copy of the figures in its folder.
    """
    if run.cache is not None and is_url(run.cache):
        return read_fidelity(run.path, None)
    if run.cache is None or not Path(run.cache, HEADER).is_file():
        return None
    return read_fidelity(Path(run.cache), read_header(Path(run.cache)))


# --- Configuration and environment ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    name: str
    value: Any
    default: Any
    """The recipe's value."""

    @property
    def same(self) -> bool:
        return bool(self.value == self.default)


def _settings(config: TrainConfig) -> list[_Setting]:
    default = recipe(config.recipe)(data=config.data, student=config.student, out=config.out)
    defaults = default.flags | {name: "by dataset size" for name in SIZED if getattr(default, name) is None}
    return [_Setting(name, value, defaults.get(name)) for name, value in config.flags.items()]


def _launches(run: Path) -> list[dict[str, Any]]:
    """One object for each start of the run; empty if no start was recorded."""
    if not (run / LAUNCHES).exists():
        return []
    launches = read_json(run / LAUNCHES)
    if not (isinstance(launches, list) and all(isinstance(launch, dict) for launch in launches)):
        raise BadInput(f"{run / LAUNCHES}: expected a list of objects, one per launch; delete it")
    return [{key: value for key, value in launch.items() if key != "kernels"} for launch in launches]  # a long table


def _varying(launches: list[dict[str, Any]]) -> list[str]:
    """Date, step and the keys whose values differ between launches, in order of first appearance."""
    keys = dict.fromkeys(key for launch in launches for key in launch)
    return [
        key
        for key in keys
        if key in ("date", "step") or any(launch.get(key) != launches[0].get(key) for launch in launches)
    ]


# --- Text -------------------------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _plain(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _short(text: str) -> str:
    """A class name shortened for the matrix to its beginning and its end, which is often a number."""
    return text if len(text) <= 14 else f"{text[:6]}…{text[-7:]}"
