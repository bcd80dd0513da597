"""The log of a run: metrics.jsonl (one object per logged step and per epoch), TensorBoard, Weights & Biases."""

import hashlib
import importlib
import json
import math
import os
import shutil
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastofa.system.errors import BadInput, counted
from fastofa.system.files import read_file, reason, write_atomic
from fastofa.system.progress import notice

FILE, DAMAGED = "metrics.jsonl", "metrics.damaged.jsonl"
# Every evaluation has these; further metrics, which reports/metrics.py may add, are not checked.
ACCURACY = {"top1", "top5"}
RAW_AND_EMA = {"top1_raw", "top5_raw", "top1_ema", "top5_ema"}  # in addition, if there is a moving average
Row = dict[str, Any]


# --- The log ----------------------------------------------------------------------------------------------------------


def read_metrics(run: Path, until: float = math.inf) -> list[Row]:
    """The rows of metrics.jsonl up to a step; damaged lines are left out."""
    return [row for row, _ in _read_log(run)[0] if row["step"] <= until]


def damaged_lines(run: Path) -> int:
    """The number of damaged lines in metrics.jsonl."""
    return len(_read_log(run)[1])


def _read_log(run: Path) -> tuple[list[tuple[Row, bytes]], list[bytes]]:
    """The rows with their lines, in order of their steps, and the damaged lines.

    Steps increase from line to line. If they do not, as few lines as possible count as damaged, so that a damaged
    number affects only its own line. A last line that was cut off when the run was killed is in neither list.
    """
    if not os.path.lexists(run / FILE):
        return [], []
    data = read_file(run / FILE)
    *lines, last = data.split(b"\n")
    if _row(last) is not None:
        lines.append(last)
    rows = {i: row for i, row in enumerate(map(_row, lines)) if row is not None}
    numbers = list(rows)
    keys = [(row["step"], row["kind"] == "epoch") for row in rows.values()]
    good = {numbers[i] for i in _longest_increasing(keys)}
    return [(rows[i], lines[i]) for i in sorted(good)], [line for i, line in enumerate(lines) if i not in good]


def _row(line: bytes) -> Row | None:
    """Parse a line written by `MetricsLog.add`; None for any other line."""
    try:
        row = json.loads(line.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or row.get("kind") not in ("step", "epoch"):
        return None
    counts = all(type(row.get(name)) is int and row[name] >= 0 for name in ("step", "epoch"))
    numbers = all(type(value) in (int, float) and math.isfinite(value) for name, value in row.items() if name != "kind")
    if not (counts and numbers):
        return None
    shares = {name: value for name, value in row.items() if name.startswith("top")}
    if not all(0 <= value <= 1 for value in shares.values()):
        return None
    evaluated = shares.keys() & (ACCURACY | RAW_AND_EMA)
    complete = "loss" in row if row["kind"] == "step" else evaluated in (set(), ACCURACY, ACCURACY | RAW_AND_EMA)
    return row if complete else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _longest_increasing(keys: Sequence[Any]) -> list[int]:
    """Positions of a longest strictly increasing subsequence (patience sorting)."""
    least: list[Any] = []  # for each length, the smallest last key of a subsequence of that length
    ends: list[int] = []  # the position of that key
    before: list[int] = []  # for each position the previous one in its subsequence, -1 for none
    for i, key in enumerate(keys):
        length = bisect_left(least, key)
        before.append(ends[length - 1] if length else -1)
        least[length : length + 1], ends[length : length + 1] = [key], [i]
    positions, i = [], ends[-1] if ends else -1
    while i >= 0:
        positions.append(i)
        i = before[i]
    return positions[::-1]


class MetricsLog:
    """Appends to a run's log. Opening it at a step removes the rows of later steps, which a killed run may have left.

    Damaged lines are moved to metrics.damaged.jsonl. Every row is also sent to TensorBoard and to `wandb_run`, a run of
    Weights & Biases, if given; if one of them fails, this is reported once and logging continues without it.
    """

    def __init__(self, run: Path, step: int, wandb_run: Any = None) -> None:
        self.run, self.wandb_run, self.hook = run, wandb_run, threading.excepthook
        good, damaged = _read_log(run)
        if damaged:
            earlier = (run / DAMAGED).read_bytes() if (run / DAMAGED).exists() else b""
            write_atomic(run / DAMAGED, earlier + b"".join(line + b"\n" for line in damaged))
            notice(f"{run / FILE}: could not read {counted(len(damaged), 'line')}, moved to {run / DAMAGED}")
        write_atomic(run / FILE, b"".join(line + b"\n" for row, line in good if row["step"] <= step))
        threading.excepthook = self._in_thread
        with _write_errors(run):
            self.file = open(run / FILE, "a")  # noqa: SIM115 (closed by close)
        self.board: Any = None
        with self._optional("TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def add(self, kind: str, step: int, values: Row) -> None:
        """Append one row: {"kind": "step" or "epoch", "step": ..., **values}."""
        with _write_errors(self.run):
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.file.flush()
        if self.board is not None:
            with self._optional("TensorBoard"):
                for name, value in values.items():
                    self.board.add_scalar(f"{kind}/{name}", value, step)
        if self.wandb_run is not None:
            with self._optional("Weights & Biases"):
                self.wandb_run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Close all logs. Never fails: every row is already written, or `add` has raised."""
        closings: list[Callable[[], Any]] = [self.file.close]
        closings += [self.board.close] if self.board is not None else []
        closings += [self.wandb_run.finish] if self.wandb_run is not None else []
        for close in closings:
            with suppress(Exception):
                close()
        threading.excepthook = self.hook

    @contextmanager
    def _optional(self, name: str) -> Iterator[None]:
        """On any error report it and stop logging to TensorBoard or Weights & Biases."""
        try:
            yield
        except Exception as error:  # these libraries raise many types
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            notice(f"{name}: could not log to it ({reason}); the run continues without it; {FILE} has every row")
            if name == "TensorBoard":
                self.board = None
            else:
                self.wandb_run = None

    def _in_thread(self, args: threading.ExceptHookArgs) -> None:
        """Silence errors of TensorBoard's writer thread, which the next `add` reports in one line."""
        if not issubclass(args.exc_type, OSError):
            self.hook(args)


def import_wandb() -> Any:
    """Import Weights & Biases, which fastofa does not install. Raises BadInput if it is missing."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise BadInput("wandb: expected the package wandb, found none; pip install wandb, or omit --wandb") from None


def open_wandb(run: Path, project: str) -> Any:
    """Open the run at Weights & Biases; a resumed run continues the same one.

    Raises:
        BadInput: it could not be opened, for example without a login; the run's folder is left unchanged.
    """
    key = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    library, files = import_wandb(), run / "wandb"
    existed = files.exists()
    with _write_errors(run):
        run.mkdir(parents=True, exist_ok=True)  # otherwise wandb writes its files elsewhere
    try:
        return library.init(project=project, name=run.name, id=key, resume="allow", dir=str(run))
    except Exception as error:  # wandb raises many types
        if not existed:
            shutil.rmtree(files, ignore_errors=True)
        cause = " ".join(str(error).split())[:200]
        raise BadInput(f"wandb: could not open a run ({cause}); run `wandb login`, or omit --wandb") from None


@contextmanager
def _write_errors(run: Path) -> Iterator[None]:
    """Translate OSError into BadInput."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"could not write to {run}: {reason(error)}, then continue with --resume") from None
