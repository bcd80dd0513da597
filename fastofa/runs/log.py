"""Accuracy, and the log of a run: metrics.jsonl (one object per logged step and per epoch), TensorBoard, wandb."""

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

from fastofa.system.errors import BadInput
from fastofa.system.files import read_file, reason, write_atomic
from fastofa.system.progress import notice

FILE, DAMAGED = "metrics.jsonl", "metrics.damaged.jsonl"
ACCURACY = {"top1", "top5"}
OF_BOTH = {"top1_raw", "top5_raw", "top1_ema", "top5_ema"}  # besides, where there is a moving average
Row = dict[str, Any]


# --- The log ----------------------------------------------------------------------------------------------------------


def read_metrics(run: Path, until: float = math.inf) -> list[Row]:
    """Rows of metrics.jsonl up to a step; lines that cannot be read are left out."""
    return [row for row, _ in _read_log(run)[0] if row["step"] <= until]


def damaged_lines(run: Path) -> int:
    """Lines of metrics.jsonl that cannot be read."""
    return len(_read_log(run)[1])


def _read_log(run: Path) -> tuple[list[tuple[Row, bytes]], list[bytes]]:
    """The rows, each with its line, in the order of their steps; and the lines that are no rows.

    Steps rise from line to line. Where they do not, as few lines as possible are at fault: a damaged number costs its
    own line and none after it. A last line that a kill cut off is neither.
    """
    if not os.path.lexists(run / FILE):
        return [], []
    data = read_file(run / FILE)
    *lines, last = data.split(b"\n")
    if _row(last) is not None:
        lines.append(last)
    rows = {i: row for i, row in enumerate(map(_row, lines)) if row is not None}
    places = list(rows)
    rise = {places[i] for i in _longest_rise([(row["step"], row["kind"] == "epoch") for row in rows.values()])}
    return [(rows[i], lines[i]) for i in sorted(rise)], [line for i, line in enumerate(lines) if i not in rise]


def _row(line: bytes) -> Row | None:
    """A line's object if it is what `MetricsLog.add` writes, else None."""
    try:
        row = json.loads(line.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or row.get("kind") not in ("step", "epoch"):
        return None
    whole = all(type(row.get(name)) is int and row[name] >= 0 for name in ("step", "epoch"))
    numbers = all(type(value) in (int, float) and math.isfinite(value) for name, value in row.items() if name != "kind")
    if not (whole and numbers):
        return None
    shares = {name: value for name, value in row.items() if name.startswith("top")}
    if not all(0 <= value <= 1 for value in shares.values()):
        return None
    complete = "loss" in row if row["kind"] == "step" else shares.keys() in (set(), ACCURACY, ACCURACY | OF_BOTH)
    return row if complete else None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _longest_rise(keys: Sequence[Any]) -> list[int]:
    """Positions of a longest strictly rising subsequence (patience sorting)."""
    least: list[Any] = []  # of the rises of each length, the least last key
    ends: list[int] = []  # and its position
    before: list[int] = []  # the position before each one in its rise; -1: none
    for i, key in enumerate(keys):
        length = bisect_left(least, key)
        before.append(ends[length - 1] if length else -1)
        least[length : length + 1], ends[length : length + 1] = [key], [i]
    rise, at = [], ends[-1] if ends else -1
    while at >= 0:
        rise.append(at)
        at = before[at]
    return rise[::-1]


class MetricsLog:
    """Appends to a run's log; opened at a step, it forgets what was logged after it (a killed run's last steps).

    Lines that cannot be read are moved to metrics.damaged.jsonl. Every row goes to TensorBoard, too, and to `page`, a
    page of Weights & Biases; where they fail, it says so once and goes on without them.
    """

    def __init__(self, run: Path, step: int, page: Any = None) -> None:
        self.run, self.page, self.hook = run, page, threading.excepthook
        good, damaged = _read_log(run)
        if damaged:
            aside = (run / DAMAGED).read_bytes() if (run / DAMAGED).exists() else b""
            write_atomic(run / DAMAGED, aside + b"".join(line + b"\n" for line in damaged))
            notice(f"{run / FILE}: {len(damaged)} of its lines could not be read and are kept aside in {run / DAMAGED}")
        write_atomic(run / FILE, b"".join(line + b"\n" for row, line in good if row["step"] <= step))
        threading.excepthook = self._in_thread
        with _told(run):
            self.file = open(run / FILE, "a")  # noqa: SIM115 (closed by close)
        self.board: Any = None
        with self._optional("TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter  # seconds to import

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def add(self, kind: str, step: int, values: Row) -> None:
        """One row: {"kind": "step" or "epoch", "step": ..., values}."""
        with _told(self.run):
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.file.flush()
        if self.board is not None:
            with self._optional("TensorBoard"):
                for name, value in values.items():
                    self.board.add_scalar(f"{kind}/{name}", value, step)
        if self.page is not None:
            with self._optional("Weights & Biases"):
                self.page.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Never fails: every row is written already, or `add` has told why not."""
        closings: list[Callable[[], Any]] = [self.file.close]
        closings += [self.board.close] if self.board is not None else []
        closings += [self.page.finish] if self.page is not None else []
        for close in closings:
            with suppress(Exception):
                close()
        threading.excepthook = self.hook

    @contextmanager
    def _optional(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the many kinds of others' libraries
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            notice(f"{name}: could not be written to ({reason}); the run goes on without it, {FILE} has every row")
            if name == "TensorBoard":
                self.board = None
            else:
                self.page = None

    def _in_thread(self, args: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread; where that fails the next `add` tells it, in one line."""
        if not issubclass(args.exc_type, OSError):
            self.hook(args)


def import_wandb() -> Any:
    """Weights & Biases, which is no part of what fastofa installs. Raises BadInput where it is missing."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise BadInput("wandb: expected Weights & Biases; pip install wandb, or leave --wandb out") from None


def open_wandb(run: Path, project: str) -> Any:
    """The run's page; a resumed run goes on in the same one.

    Raises:
        BadInput: it cannot begin, without its login, say; the run's folder is then as it was.
    """
    key = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    library, files = import_wandb(), run / "wandb"
    existed = files.exists()
    with _told(run):
        run.mkdir(parents=True, exist_ok=True)  # or it would write its files elsewhere
    try:
        return library.init(project=project, name=run.name, id=key, resume="allow", dir=str(run))
    except Exception as error:  # its many kinds
        if not existed:
            shutil.rmtree(files, ignore_errors=True)
        cause = " ".join(str(error).split())[:200]
        raise BadInput(f"wandb: could not begin ({cause}); `wandb login`, or leave --wandb out") from None


@contextmanager
def _told(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"could not write to {run}: {reason(error)}, then go on with --resume") from None
