"""The report agrees with the run's files, whatever they hold or lack, and contains no code from them."""

import inspect
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from timm.optim import Lamb

import fastofa.reports.page
from fastofa.reports.confusion import confusion, pairs, worst_classes, worst_pairs
from fastofa.reports.curves import MAX_POINTS, draw_comparison, draw_curves, draw_svg, plot_loss, plot_steps
from fastofa.reports.metrics import METRICS, Metric, measure
from fastofa.reports.page import MAX_TABLE_ROWS, write_report
from fastofa.runs import recipes
from fastofa.runs.run import Run
from fastofa.system.errors import BadInput
from fastofa.system.files import save_tensors, write_json

CHROMIUM = shutil.which("chromium")
HOSTILE = (
    "<script>alert(1)</script>",
    "\"' onmouseover='alert(1)' x=\"",
    "x" * 200,
    "</title></svg></style>&amp;",
    "{{ 7 * 7 }} {% raw %}",
    "日本語 🐈 é",
    "\u202eright to left \u2066",
    "not unicode \udcff",
    "$\\frac$",
    "javascript:alert(1)",
)
DIGITS = tuple("0123456789")
LAUNCH = {"date": "2026-11-25T07:12:10+00:00", "step": 0, "host": "one", "gpu": None, "ranks": 1, "torch": "2.11.0"}


# --- Runs -------------------------------------------------------------------------------------------------------------


def make_run(
    path: Path, classes: tuple[str, ...] = DIGITS, rows: list[dict[str, Any]] | None = None, **overrides: Any
) -> Path:
    """A run's folder with its configuration and, if `rows` are given, its log."""
    values = {"data": "digits", "student": "test_resnet", "cache": Path("my-cache"), "out": path, "epochs": 3}
    Run(path, recipes.digits(**{**values, **overrides}), classes, 64, "fingerprint").save()
    if rows is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def log_of(epochs: int, steps: int = 4, every: int = 1) -> list[dict[str, Any]]:
    """The rows of a run with rising accuracy: `steps` log lines per epoch, one every `every` steps."""
    rows: list[dict[str, Any]] = []
    for line in range(1, epochs * steps + 1):
        step, epoch = line * every, (line - 1) // steps
        parts = {"gt": 2 / line, "kd": 3 / line, "ofa": 4 / line}
        rows.append(
            {
                "kind": "step", "step": step, "epoch": epoch, "lr": 0.1 / line, "images_per_second": 100.0 * line,
                "loader_share": 0.01 * (line % 7), "loss": 9 / line, **parts, "grad_norm": 5 / line,
            }
        )  # fmt: skip
        if line % steps == 0:
            top1 = 1 - 0.9 ** (epoch + 1)
            rows.append(
                {"kind": "epoch", "step": step, "epoch": epoch, "images_per_second": 777.0, "top1": top1, "top5": 0.99}
            )
    return rows


def predict(run: Path, predictions: np.ndarray, labels: np.ndarray, classes: int, epoch: int = 2) -> Path:
    """Write the run's val_predictions.safetensors, with wrong classes behind the top one."""
    best = np.stack([(predictions + i) % classes for i in range(min(5, classes))], axis=1)
    tensors = {"best": torch.from_numpy(best).to(torch.int16), "labels": torch.from_numpy(labels).long()}
    save_tensors(run / "val_predictions.safetensors", tensors, {"step": 12, "epoch": epoch})
    return run


def steps_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "step"]


def guesses(classes: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels, about two thirds of them correct."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    return np.where(rng.random(images) < 0.67, labels, rng.integers(0, classes, images)), labels


@dataclass
class Page(HTMLParser):
    """A parsed page: the `rows` of each table by its caption, the `facts` of the lists, all text and all tags."""

    source: str
    text: str = ""
    title: str = ""
    rows: dict[str, list[list[str]]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    cells: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("meta", "br", "link", "img"):
            return
        self.stack.append(tag)
        self.content = {**getattr(self, "content", {}), tag: ""}
        if tag == "table":
            self.table: list[list[str]] = []
        if tag == "tr":
            self.table.append([])

    def handle_data(self, data: str) -> None:
        for tag in {"title", "caption", "td", "th", "dt", "dd"} & set(self.stack):
            self.content[tag] += data
        if "style" not in self.stack:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, "tags are not nested"
        content = " ".join(self.content[tag].split())
        if tag in ("td", "th"):
            self.table[-1].append(content)
        if tag == "title" and "svg" in self.stack:
            self.cells.append(content)
        elif tag == "title":
            self.title = content
        if tag == "table":
            self.rows[" ".join(self.content.get("caption", "").split())] = self.table
            self.content["caption"] = ""
        if tag == "dd":
            self.facts[" ".join(self.content["dt"].split())] = content

    def attributes(self, name: str) -> list[str | None]:
        return [values[name] for _, values in self.tags if name in values]


def report(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose classes have hostile names. Tests must not change it."""
    run = make_run(tmp_path_factory.mktemp("report") / "my run", HOSTILE, log_of(3), clip=4.0)
    write_json(run / "environment.json", [LAUNCH, {**LAUNCH, "date": "2026-11-26", "step": 6, "host": "<b>two</b>"}])
    return predict(run, *guesses(10, 500), classes=10)


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return report(finished)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 epochs, 100,000 lines of log, 1,000 classes, 50,000 images."""
    names = tuple(f"n{i:08d} a class with a name" for i in range(1000))
    rows = log_of(300, steps=334, every=10)
    run = make_run(tmp_path_factory.mktemp("large") / "run", names, rows, epochs=300, log_every=10)
    return predict(run, *guesses(1000, 50_000), classes=1000, epoch=299)


# --- Content ----------------------------------------------------------------------------------------------------------


def test_headline(page):
    """Final and best accuracy, speed, time, and the teacher cache, recipe and data."""
    assert page.title == "my run: test_resnet, top-1 27.10%"
    facts = page.facts
    assert facts["Top-1"] == "27.10%after epoch 3"
    assert facts["Top-5"] == "99.00%after epoch 3"
    assert facts["Best top-1"].startswith("27.10%after epoch 3")
    assert facts["Images/s"].startswith("777")  # the last epoch's, which the command prints
    assert (facts["Teacher cache"], facts["Recipe"], facts["Data"]) == ("my-cache", "digits", "digits")
    assert (
        "OFA: the final logits and the exits of stages 1 2 3 4 learn from a teacher, 3 epochs, finished." in page.text
    )


def test_time_and_loader_share_count_the_steps_alone(tmp_path):
    """By hand: 50 images per step; 4 steps at 100/s, 2 at 50/s, 2 at an unknown speed."""
    rows = [
        {"kind": "step", "step": 4, "epoch": 0, "images_per_second": 100.0, "loader_share": 0.5, "loss": 1.0},
        {"kind": "step", "step": 6, "epoch": 0, "images_per_second": 50.0, "loader_share": 0.25, "loss": 1.0},
        {"kind": "step", "step": 8, "epoch": 0, "loss": 1.0},
    ]
    page = report(make_run(tmp_path / "run", rows=rows))
    assert page.facts["Time"].startswith("4.0 s8 steps")
    assert page.facts["Images/s"].startswith("75")
    assert "37.50% of the time, at most 50.00%" in page.text  # two seconds each
    assert "0 of 3 epochs so far." in page.text


def test_wall_time_of_an_epoch_and_of_its_evaluation(tmp_path):
    """The median of the epochs that have them."""
    rows = log_of(4)
    epochs = [row for row in rows if row["kind"] == "epoch"]
    for row, seconds in zip(epochs[1:], (90, 70, 300), strict=True):
        row |= {"epoch_seconds": float(seconds), "eval_seconds": seconds / 10}
    page = report(make_run(tmp_path / "run", rows=rows))
    assert page.facts["Epoch"].startswith("1.5 min")
    assert page.facts["Epoch"].endswith("evaluation 9.0 s")


def test_the_best_epoch_is_the_first_of_equals(tmp_path):
    rows = log_of(4)
    for row, top1 in zip([row for row in rows if row["kind"] == "epoch"], [0.1, 0.8, 0.8, 0.7], strict=True):
        row["top1"] = top1
    page = report(make_run(tmp_path / "run", rows=rows, epochs=9))
    assert page.facts["Top-1"] == "70.00%after epoch 4"
    assert page.facts["Best top-1"].startswith("80.00%after epoch 2")
    assert "4 of 9 epochs so far." in page.text


def test_plots_and_their_captions(page):
    labels = [label for label in page.attributes("aria-label") if label and label.startswith("Curve")]
    assert labels == [
        "Curve: Training loss. From 9 to 0.75.",
        "Curve: Validation accuracy. Top-1 from 10.00% to 27.10%.",
        "Curve: Learning rate. Cosine schedule, at most 0.1.",
        "Curve: Gradient norm. Before clipping at 4 (dashed line).",
        "Curve: Throughput. Median 650 images/s. Dotted lines: the run was resumed.",
        "Curve: Waiting for the loader. 2.39% of the time, at most 6.00% between two log lines.",
    ]
    for name in ("sum", "labels", "teacher, final logits", "teacher, exits (summed)", "top-1 (%)", "images/s"):
        assert name in page.text


def test_evaluations_are_also_a_table(page):
    """For readers who cannot see the plot."""
    assert page.rows[""][1:] == [
        ["1", "4", "10.00%", "99.00%"],
        ["2", "8", "19.00%", "99.00%"],
        ["3", "12", "27.10%", "99.00%"],
    ]


def test_configuration(page):
    """Changed settings beside the recipe's values, and all settings below."""
    assert page.rows["Settings that differ from recipe digits"][1:] == [
        ["--cache", "my-cache", "none"],
        ["--epochs", "3", "60"],
        ["--clip", "4.0", "5.0"],
    ]
    assert page.facts["--stages"] == "1 2 3 4"
    assert page.facts["--resume"] == "no"
    assert page.facts["--ema"] == "none"


def test_an_unchanged_recipe(tmp_path):
    page = report(make_run(tmp_path / "run", cache=None, epochs=60))
    assert "All settings are those of recipe digits." in page.text


def test_environment(page):
    """A row per launch with the values that differ; below it the values that do not."""
    assert page.rows["2 launches"] == [
        ["date", "step", "host"],
        ["2026-11-25T07:12:10+00:00", "0", "one"],
        ["2026-11-26", "6", "<b>two</b>"],
    ]
    assert (page.facts["gpu"], page.facts["ranks"], page.facts["torch"]) == ("none", "1", "2.11.0")


def test_environment_of_one_launch_and_of_launches_with_different_keys(tmp_path):
    run = make_run(tmp_path / "run")
    write_json(run / "environment.json", [LAUNCH])
    assert report(run).rows["1 launch"] == [["date", "step"], [LAUNCH["date"], "0"]]
    write_json(run / "environment.json", [{"commit": "abc"}, {"new": [1, 2]}])
    assert report(run).rows["2 launches"] == [["commit", "new"], ["abc", "none"], ["none", "1 2"]]


# --- Metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_equal_scikit_learns():
    scores = np.random.default_rng(0).random((200, 7))
    labels = np.random.default_rng(1).integers(0, 7, 200)
    best = np.argsort(-scores, axis=1)[:, :5]
    expected = {f"top{k}": top_k_accuracy_score(labels, scores, k=k, labels=range(7)) for k in (1, 5)}
    assert measure(best, labels) == pytest.approx(expected)


def test_every_metric_is_shown(tmp_path, monkeypatch):
    """In its own format; epochs that were logged before it existed lack it."""
    added = Metric("wrong", "wrong images", lambda best, labels: int((best[:, 0] != labels).sum()), "{:,.0f} of them")
    monkeypatch.setattr(fastofa.reports.page, "METRICS", (*METRICS, added))
    rows = log_of(2)
    rows[-1]["wrong"] = 1234
    page = report(make_run(tmp_path / "run", rows=rows))
    assert page.rows[""][0] == ["epoch", "step", "top-1", "top-5", "wrong images"]
    assert [row[-1] for row in page.rows[""][1:]] == ["-", "1,234 of them"]
    assert page.facts["Wrong images"] == "1,234 of themafter epoch 2"


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=60))
def test_confusion_equals_scikit_learns(drawn):
    predictions, labels = (np.array([pair[i] for pair in drawn], np.int64) for i in (0, 1))
    counts = confusion(predictions, labels, 5)
    expected = confusion_matrix(labels, predictions, labels=range(5)) if drawn else np.zeros((5, 5))
    assert np.array_equal(counts, expected)
    actual = {(pair.truth, pair.predicted): (pair.count, pair.share) for pair in pairs(counts)}
    cells = zip(*np.nonzero(expected), strict=True)
    assert actual == {(t, p): (expected[t, p], expected[t, p] / expected[t].sum()) for t, p in cells}


def test_worst_pairs_and_classes_by_hand():
    """Class 0: 3 of 4 correct. 1: 1 of 4, twice predicted as 2. 2: all correct. 3: no images. 4: 0 of 1."""
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 4])
    predictions = np.array([0, 0, 0, 1, 1, 2, 2, 0, 2, 2, 0])
    counts = confusion(predictions, labels, 5)
    worst = [(p.truth, p.predicted, p.count, p.share) for p in worst_pairs(counts, 10)]
    assert worst == [(1, 2, 2, 0.5), (0, 1, 1, 0.25), (1, 0, 1, 0.25), (4, 0, 1, 1.0)]
    assert worst_pairs(counts, 2) == worst_pairs(counts, 10)[:2]
    weakest = [(c.index, c.images, c.recall, c.rival) for c in worst_classes(counts, 10)]
    assert weakest == [(4, 1, 0.0, 0), (1, 4, 0.25, 2), (0, 4, 0.75, 1), (2, 2, 1.0, None)]
    assert worst_classes(counts, 1) == worst_classes(counts, 10)[:1]


@pytest.mark.parametrize(("predictions", "labels"), [([5], [0]), ([0], [5]), ([-1], [1]), ([0, 1], [0])])
def test_a_number_that_is_not_a_class_is_refused(predictions, labels):
    with pytest.raises(ValueError, match="among 5 classes"):
        confusion(np.array(predictions), np.array(labels), 5)


def test_the_matrix_equals_scikit_learns(tmp_path):
    """Every cell that is not zero, with count and share, and the epoch of the evaluation."""
    predictions, labels = guesses(10, 300)
    page = report(predict(make_run(tmp_path / "run"), predictions, labels, classes=10, epoch=6))
    expected = confusion_matrix(labels, predictions)
    cells = [re.fullmatch(r"(\d) predicted as (\d): (\d+) \((.+)%\)", cell).groups() for cell in page.cells]
    assert {(int(t), int(a)): int(n) for t, a, n, _ in cells} == {
        (t, a): expected[t, a] for t, a in np.argwhere(expected).tolist()
    }
    for truth, predicted, count, share in cells:
        assert float(share) == pytest.approx(100 * int(count) / expected[int(truth)].sum(), abs=0.005), predicted
    accuracy = f"{expected.trace() / 300:.2%}"
    assert f"After epoch 7 the student predicts {accuracy} of 300 validation images correctly." in page.text


def test_the_tables_of_mistakes(tmp_path):
    labels = np.array([0, 0, 0, 1, 1, 1, 2])
    predictions = np.array([0, 0, 1, 2, 2, 1, 2])
    page = report(predict(make_run(tmp_path / "run", ("a", "b", "c")), predictions, labels, classes=3))
    assert page.rows["Most frequent confusions"][1:] == [["b", "c", "2", "66.67%"], ["a", "b", "1", "33.33%"]]
    assert page.rows["Weakest classes"][1:] == [
        ["b", "33.33%", "3", "c"],
        ["a", "66.67%", "3", "b"],
        ["c", "100.00%", "1", "none"],
    ]


def test_a_student_without_mistakes(tmp_path):
    labels = np.arange(10)
    page = report(predict(make_run(tmp_path / "run"), labels, labels, classes=10))
    assert page.rows["Most frequent confusions"][1:] == [["None: every prediction is correct."]]


def test_the_matrix_is_drawn_up_to_64_classes(tmp_path):
    for classes, drawn in ((64, True), (65, False)):
        names = tuple(f"class {i}" for i in range(classes))
        page = report(predict(make_run(tmp_path / str(classes), names), *guesses(classes, 900), classes=classes))
        assert bool(page.cells) is drawn
        assert len(page.rows["Most frequent confusions"]) == len(page.rows["Weakest classes"]) == MAX_TABLE_ROWS + 1
    assert any(cell.startswith("class 7 predicted as") for cell in report(tmp_path / "64").cells)


# --- Incomplete and unusual runs --------------------------------------------------------------------------------------


def test_an_empty_run_says_so(tmp_path):
    page = report(make_run(tmp_path / "run"))
    assert page.title == "run: test_resnet"
    assert "Nothing has been logged yet." in page.text
    assert "There is no evaluation yet" in page.text
    assert "has no record of where it was trained" in page.text
    assert page.facts["Top-1"] == "\N{EN DASH}not evaluated yet"
    assert not page.attributes("role").count("img")


def test_columns_that_were_not_logged_are_not_plotted(tmp_path):
    """No gradient norm, no loader share; epochs that were not evaluated have no accuracy."""
    rows = log_of(3)
    for row in rows:
        for name in ("grad_norm", "loader_share"):
            row.pop(name, None)
    rows = [{k: v for k, v in row.items() if k not in ("top1", "top5")} if row["step"] == 4 else row for row in rows]
    page = report(make_run(tmp_path / "run", rows=rows))
    names = [label.split(".")[0] for label in page.attributes("aria-label") if label and label.startswith("Curve")]
    assert names == ["Curve: Training loss", "Curve: Validation accuracy", "Curve: Learning rate", "Curve: Throughput"]
    assert [row[0] for row in page.rows[""][1:]] == ["2", "3"]


def test_a_run_killed_while_it_wrote_a_line(tmp_path):
    run = make_run(tmp_path / "run", rows=log_of(2))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 9, "ep')
    page = report(run)
    assert page.facts["Time"].split("s")[1].strip() == "8"
    assert "2 of 3 epochs so far." in page.text


def test_damaged_log_lines_are_reported(tmp_path):
    rows = log_of(2)
    page = report(make_run(tmp_path / "run", rows=rows))
    assert "could not be read" not in page.text
    rows[1]["loss"] = float("nan")  # not a JSON number
    page = report(make_run(tmp_path / "run", rows=rows))
    assert "A line of metrics.jsonl could not be read: plots and tables leave it out." in page.text
    assert "Curve: Training loss. From 9 to 1.12." in page.attributes("aria-label")
    del rows[4]["step"]
    page = report(make_run(tmp_path / "run", rows=rows))
    assert "2 lines of metrics.jsonl could not be read: plots and tables leave them out." in page.text


def test_the_clipping_of_lamb_itself_is_shown(tmp_path):
    """LAMB clips at timm's default of 1; only a smaller --clip takes effect."""
    assert inspect.signature(Lamb).parameters["max_grad_norm"].default == 1
    for optimizer, clip, expected in (
        ("lamb", None, "at 1 by lamb itself (dashed line)."),
        ("lamb", 5.0, "at 1 by lamb itself (dashed line)."),
        ("lamb", 0.5, "at 0.5 (dashed line)."),
        ("apex_lamb", None, "at 1 by apex_lamb itself (dashed line)."),
        ("adamw", None, None),
    ):
        page = report(make_run(tmp_path / "run", rows=log_of(1), optimizer=optimizer, clip=clip))
        caption = "Not clipped." if expected is None else f"Before clipping {expected}"
        assert f"Curve: Gradient norm. {caption}" in page.attributes("aria-label")


def test_weights_and_their_moving_average(tmp_path):
    """Both are in the plot and the table; the headline gives the better one and names it."""
    rows = log_of(2)
    for row, raw, ema in zip([row for row in rows if row["kind"] == "epoch"], (0.5, 0.6), (0.1, 0.7), strict=True):
        row |= {"top1": max(raw, ema), "top1_raw": raw, "top1_ema": ema, "top5_raw": 0.9, "top5_ema": 0.9}
    page = report(make_run(tmp_path / "run", rows=rows, ema=0.9))
    assert page.facts["Top-1"] == "70.00%after epoch 2, moving average"
    assert [row[-2:] for row in page.rows[""]] == [
        ["top-1 of weights", "top-1 of average"], ["50.00%", "10.00%"], ["60.00%", "70.00%"],
    ]  # fmt: skip
    caption = "Final top-1 of the weights and of their moving average: 60.00% and 70.00%."
    assert f"Curve: Validation accuracy. {caption}" in page.attributes("aria-label")
    rows[-1]["top1_ema"] = 0.2
    assert report(make_run(tmp_path / "run", rows=rows, ema=0.9)).facts["Top-1"].endswith("epoch 2, weights")


def test_settings_chosen_by_dataset_size_are_marked(tmp_path):
    run = tmp_path / "run"
    values = {"data": "photos", "student": "test_resnet", "out": run, "epochs": 30, "lr": 1e-3, "warmup_epochs": 1.5}
    Run(run, recipes.photos(**values, batch_size=64), DIGITS, 64, "fingerprint").save()
    changed = report(run).rows["Settings that differ from recipe photos"][1:]
    assert changed == [
        [flag, value, "by dataset size"]
        for flag, value in (("--epochs", "30"), ("--batch-size", "64"), ("--lr", "0.001"), ("--warmup-epochs", "1.5"))
    ]


def test_labels_only(tmp_path):
    """Without a teacher the label loss is the total loss, so only the total is plotted."""
    rows = [{**row, "kd": 0.0, "ofa": 0.0} for row in log_of(1)]
    page = report(make_run(tmp_path / "run", rows=rows, method="scratch", cache=None))
    assert "The student learns from labels only, 1 of 3 epochs so far." in page.text.replace("  ", " ")
    assert page.facts["Teacher cache"] == "none"
    assert "teacher, final logits" not in page.text


def test_equal_runs_give_equal_bytes(finished, page, tmp_path):
    """Also in another folder of the same name, at another time."""
    shutil.copytree(finished, tmp_path / finished.name)
    assert write_report(tmp_path / finished.name).read_bytes() == (finished / "report.html").read_bytes()
    assert [path.name for path in finished.iterdir() if path.name.startswith(".")] == []


def test_the_report_of_a_long_run_is_small(large):
    page = report(large)
    assert (large / "report.html").stat().st_size < 1_000_000
    assert not page.cells
    assert "Each point combines 251 lines of the log" in page.text
    assert len(page.rows[""]) == 301
    predictions, labels = guesses(1000, 50_000)
    wrong = Counter((int(t), int(p)) for t, p in zip(labels, predictions, strict=True) if t != p)
    table = page.rows["Most frequent confusions"][1:]
    assert [int(row[2]) for row in table] == [count for _, count in wrong.most_common(MAX_TABLE_ROWS)]
    for truth, predicted, count, _ in table:
        assert wrong[int(truth[1:9]), int(predicted[1:9])] == int(count)


def test_foreign_files_are_refused_in_one_line(tmp_path):
    def refuses(text: str) -> None:
        with pytest.raises(BadInput, match=text) as caught:
            write_report(tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run" / "report.html").exists()

    (tmp_path / "run").mkdir()
    refuses("expected a run made by `fastofa train`")
    run = make_run(tmp_path / "run")
    (run / "environment.json").write_text('{"date": 1}')
    refuses(r"environment\.json: expected a list")
    (run / "environment.json").write_text('[{"da')
    refuses("expected JSON")
    (run / "environment.json").unlink()
    predict(run, np.array([1, 2]), np.array([1, 10]), classes=10)
    refuses("a prediction and a label among 10 classes")
    save_tensors(run / "val_predictions.safetensors", {"labels": torch.zeros(3)}, {})
    refuses(r"val_predictions\.safetensors: expected predictions written by `fastofa train`")
    (run / "val_predictions.safetensors").write_bytes(b"123")
    refuses("truncated or damaged")


# --- Safe and accessible ----------------------------------------------------------------------------------------------


def test_hostile_names_are_escaped(page):
    """They appear verbatim, even if they close tags, attributes or template expressions."""
    names = {row[0] for row in page.rows["Weakest classes"][1:]}
    assert names == {" ".join(name.replace("\udcff", "?").split()) for name in HOSTILE}
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "h3", "p", "small",
        "dl", "div", "dt", "dd", "b", "bdi", "code", "figure", "figcaption", "details", "summary", "table", "caption",
        "thead", "tbody", "tr", "th", "td", "svg", "g", "path", "defs", "clippath", "use", "rect", "text", "tspan",
    }  # fmt: skip
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]


def test_a_hostile_folder_and_configuration(tmp_path):
    name = "<img src=x onerror=alert(1)> $x^$"
    page = report(make_run(tmp_path / name, data="<script>", rows=log_of(1)))
    assert page.title == f"{name}: test_resnet, top-1 10.00%"
    assert page.facts["Data"] == "<script>"
    assert not {"img", "script"} & {tag for tag, _ in page.tags}


def test_the_page_needs_no_other_file(page):
    """Neither styles nor plots refer to one."""
    links = [
        value for name in ("src", "href", "xlink:href", "srcset", "data", "action") for value in page.attributes(name)
    ]
    assert links
    assert all(link and link.startswith("#") for link in links)
    source = re.sub(r' xmlns(:xlink)?="http://www\.w3\.org/[a-z0-9/]+"', "", page.source)
    for name in HOSTILE:
        source = source.replace(name, "")
    assert "://" not in source
    assert "@import" not in source
    assert all(url.startswith("#") for url in re.findall(r"url\((.*?)\)", source))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link} <= set(ids)


def test_the_page_is_accessible_to_screen_readers(page):
    """It has a language, headings in order, a label for each plot and a scope for each table heading."""
    tags = page.tags
    assert ("html", {"lang": "en"}) in tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(values.get("aria-label") for _, values in tags if values.get("role") in ("img", "region", "group"))
    assert all(values.get("scope") in ("row", "col") for tag, values in tags if tag == "th")
    assert sum(values.get("role") == "img" for _, values in tags) == sum(tag == "svg" for tag, _ in tags) == 7


# --- Curves -----------------------------------------------------------------------------------------------------------


def test_a_long_column_is_drawn_in_groups():
    """Means, in a band from minimum to maximum. Non-finite values are ignored; a group of these leaves a gap."""
    values = np.random.default_rng(0).random(10 * MAX_POINTS - 7)
    values[[3, *range(20, 30)]] = [np.inf, *[np.nan] * 10]
    rows = [{"step": i, "value": value} for i, value in enumerate(values.tolist())]
    axes = Figure().subplots()
    plot_steps(axes, rows, "value", "unit", scale=2)
    (line,) = axes.lines
    x, y = (np.ma.filled(data, np.nan) for data in line.get_data(orig=True))
    assert len(x) == MAX_POINTS
    assert (x[0], x[-1]) == (4.5, np.arange(10 * MAX_POINTS - 10, 10 * MAX_POINTS - 7).mean())
    assert y[0] == pytest.approx(2 * np.delete(values[:10], 3).mean())
    assert np.flatnonzero(np.isnan(y)).tolist() == [2]
    assert y[7] == pytest.approx(2 * values[70:80].mean())
    edges = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
    at = edges[edges[:, 0] == x[7], 1]
    assert (at.min(), at.max()) == pytest.approx((2 * values[70:80].min(), 2 * values[70:80].max()))


def test_a_short_column_is_drawn_point_by_point():
    axes = Figure().subplots()
    plot_loss(axes, steps_of(log_of(3)))
    assert [line.get_label() for line in axes.lines] == [
        "sum",
        "labels",
        "teacher, final logits",
        "teacher, exits (summed)",
    ]
    x, y = axes.lines[0].get_data()
    assert x.tolist() == list(range(1, 13))
    assert y.tolist() == [9 / line for line in range(1, 13)]
    assert not axes.collections


def test_plots_take_the_pages_colour_and_font():
    svg = draw_svg("loss", lambda axes: plot_loss(axes, steps_of(log_of(3))))
    assert "currentColor" in svg
    assert "#000000" not in svg
    assert "<style" not in svg  # it would apply to the whole page
    assert ">step</text>" in svg
    assert svg == draw_svg("loss", lambda axes: plot_loss(axes, steps_of(log_of(3))))


def test_curves_are_drawn_for_any_folder_name_and_for_many_runs(tmp_path):
    runs = {str(i): make_run(tmp_path / f"$x^$ {i}", rows=log_of(2)) for i in range(6)}
    draw_curves(runs["0"])
    draw_comparison(runs, tmp_path / "all.png")
    for path in (runs["0"] / "curves.png", tmp_path / "all.png"):
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"


# --- In a browser -----------------------------------------------------------------------------------------------------

# At a phone's and a desktop's width, side by side. `wide`: elements wider than the page outside of scrolling boxes.
HARNESS = """<!doctype html><title>harness</title><body style="margin:0">
<iframe src="report.html" width="390" height="900" frameborder="0"></iframe>
<iframe src="report.html" width="1280" height="900" frameborder="0"></iframe><pre></pre><script>
const look = frame => {
  const page = frame.contentDocument, root = page.documentElement, style = page.defaultView.getComputedStyle(page.body);
  const all = selector => [...page.querySelectorAll(selector)], box = node => node.getBoundingClientRect();
  all("details").forEach(details => { details.open = true; });
  return {
    title: page.title, width: root.clientWidth, scroll: root.scrollWidth,
    ink: style.color, paper: style.backgroundColor,
    wide: all("body *:not(.scroll *)").filter(node => box(node).right > root.clientWidth + 1).map(n => n.outerHTML),
    plots: all("svg, img").map(node => [box(node).width, box(node).height]),
  };
};
onload = () => {
  const views = [...document.querySelectorAll("iframe")].map(look);
  document.querySelector("pre").textContent = JSON.stringify(views);
};
</script>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)], ids=["dark", "light"])
def test_a_browser_renders_the_report(finished, page, tmp_path, scheme, dark):
    """The console is empty, seven plots are shown, nothing is wider than the window, and the text has contrast."""
    shutil.copy(finished / "report.html", tmp_path)
    (tmp_path / "harness.html").write_text(HARNESS)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --allow-file-access-from-files --hide-scrollbars "
        f"--enable-logging=stderr --window-size=1700,950 --blink-settings=preferredColorScheme={scheme} "
    ).split()
    outputs = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'screenshot.png'}", "--dump-dom"]
    command = [CHROMIUM, *flags, *outputs, (tmp_path / "harness.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    views = json.loads(Page(done.stdout).text.rpartition("harness")[2].partition("const look")[0])
    assert [view["width"] for view in views] == [390, 1280]
    for view in views:
        assert view["title"] == page.title
        assert view["scroll"] == view["width"]
        assert view["wide"] == []
        assert len(view["plots"]) == 7
        assert all(width > 250 and height > 150 for width, height in view["plots"])
        ink, paper = (sum(map(int, re.findall(r"\d+", view[name])[:3])) / 765 for name in ("ink", "paper"))
        assert (ink > 0.8 and paper < 0.2) if dark else (ink < 0.2 and paper > 0.8)
    with Image.open(tmp_path / "screenshot.png") as image:
        assert image.size[0] == 1700
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100
