"""The implementations that a run uses, chosen by measuring them at its sizes on its GPU, like cuDNN's benchmark mode.

A measurement takes milliseconds, but compiling a kernel for the first time takes up to seconds. A part that is not
measured within BUDGET_S seconds keeps its default in this run, and is measured when the next run starts. Results are
kept in a file of the user's cache folder, by GPU, versions and size. Delete it to measure again. `python -m
bench.kernel_choice` measures everything, however long it takes.

A resumed run keeps the choice that its environment.json records, if GPU, versions and sizes are the same, so that it
continues with the same numerics. With several ranks, rank 0 chooses for all.
"""

import functools
import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastofa import __version__, kernels
from fastofa.kernels.comparison import TWIN, Comparison, Timer, compare, cuda_ms
from fastofa.system.errors import BadInput, counted
from fastofa.system.files import read_json, write_json
from fastofa.system.progress import notice

BUDGET_S = 5.0
COMPILE_S = 2.0  # expected time of the first comparison with a compiled candidate
Owners = list[tuple[object, str]]  # objects and the attributes that name the implementation they run
SOURCES = ("measured", "as cached", "as before in this run", "not in time", "failed")


@dataclass
class KernelChoice:
    """Chooses implementations, and records each choice in `rows`."""

    device: torch.device
    compiled: bool = False
    """Whether torch.compile compiles the program in which the kernels run."""
    recorded: dict[str, Any] = field(default_factory=dict)
    """`record()` of an earlier start of the same run."""
    is_main: bool = True
    """Whether this is rank 0."""
    agree: Callable[[int], int] = int
    """Returns rank 0's number on every rank."""
    timer: Timer = cuda_ms
    budget_s: float = BUDGET_S
    cache: Path | None = field(default_factory=lambda: cache_path())
    """The file with earlier results; None: neither read nor write it."""
    rows: list[dict[str, Any]] = field(default_factory=list, init=False)
    spent_s: float = field(default=0.0, init=False)
    longest_s: dict[bool, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.environment = _environment(self.device, self.compiled)
        self.longest_s = {False: 0.0, True: COMPILE_S if self.compiled else 0.0}

    def choose(self, comparisons: Iterable[tuple[object, str, Comparison]]) -> None:
        """For each (object, attribute, comparison), choose an implementation and store its name in the attribute."""
        grouped: dict[tuple[str, str], tuple[Comparison, Owners]] = {}
        for owner, attribute, comparison in comparisons:
            owners = grouped.setdefault((comparison.kernel, comparison.size), (comparison, []))[1]
            owners.append((owner, attribute))
        # Comparisons that need no compilation first; among equals, those with the most work.
        found = sorted(grouped.values(), key=lambda each: (bool(each[0].fused), -each[0].elements * len(each[1])))
        rows = self._rows(found) if self.is_main else [{"chosen": each.default} for each, _ in found]
        for (comparison, owners), row in zip(found, rows, strict=True):
            names = list(comparison.candidates)
            row["chosen"] = names[self.agree(names.index(row["chosen"]))]
            for owner, attribute in owners:
                setattr(owner, attribute, row["chosen"])
        self.rows += rows if self.is_main else []

    def record(self) -> dict[str, Any]:
        """The choice in full, for environment.json; empty if there was nothing to choose."""
        return {"environment": self.environment, "choices": self.rows} if self.rows else {}

    def line(self) -> str:
        """The choice in one line; empty if there was nothing to choose."""
        uses, ours = defaultdict[str, int](int), defaultdict[str, int](int)
        sources = defaultdict[str, int](int)
        for row in self.rows:
            uses[row["kernel"]] += row["uses"]
            ours[row["kernel"]] += row["uses"] * (row["chosen"] != TWIN)
            sources[row["source"]] += 1
        chosen = [f"{kernel} ({ours[kernel]} of {uses[kernel]})" for kernel in uses if ours[kernel]]
        parts = [f"{sources[each]} {each}" for each in SOURCES if sources[each]]
        text = f"kernels: {', '.join(chosen) or 'none'} instead of PyTorch's"
        return f"{text}; {counted(len(self.rows), 'size')} in {self.spent_s:.1f} s: {', '.join(parts)}" if parts else ""

    def _rows(self, found: list[tuple[Comparison, Owners]]) -> list[dict[str, Any]]:
        before = self._from_record()
        cached = _read(self.cache)
        rows, new = [], {}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # a run's random numbers do not depend on what was measured
            for comparison, owners in found:
                key = f"{self.environment} | {comparison.kernel} | {comparison.size}"
                row = _valid(before.get((comparison.kernel, comparison.size)), comparison)
                source = "as before in this run"
                if row is None:
                    row, source = _valid(cached.get(key), comparison), "as cached"
                if row is None:
                    row, source = self._measure(comparison)
                    if source == "measured":
                        new[key] = row
                about = {"kernel": comparison.kernel, "size": comparison.size, "uses": len(owners)}
                rows.append({**about, **row, "source": source})
        if new:
            _write(self.cache, {**_read(self.cache), **new})
        return rows

    def _measure(self, comparison: Comparison) -> tuple[dict[str, Any], str]:
        """The chosen implementation with times and reasons, and where they come from."""
        began, fused = time.monotonic(), bool(comparison.fused)
        if self.spent_s + self.longest_s[fused] > self.budget_s:
            return {"chosen": comparison.default, "ms": {}, "dropped": {}}, "not in time"
        try:
            measured = compare(comparison, self.timer, self.compiled)
        except Exception as error:  # such as too little memory
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            self._report(f"kernels: {comparison.kernel} could not be measured and keeps its default ({reason})")
            return {"chosen": comparison.default, "ms": {}, "dropped": {comparison.default: reason}}, "failed"
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.longest_s[fused] = max(self.longest_s[fused], time.monotonic() - began)
            self.spent_s += time.monotonic() - began
        for name, reason in measured.dropped.items():
            self._report(f"kernels: {comparison.kernel} by {name} is not used for {comparison.size}: {reason}")
        ms = {name: round(value, 4) for name, value in measured.ms.items()}
        return {"chosen": measured.fastest or TWIN, "ms": ms, "dropped": measured.dropped}, "measured"

    def _from_record(self) -> dict[tuple[str, str], Any]:
        """The rows recorded by an earlier start, if it had the same GPU and versions."""
        if self.recorded.get("environment") != self.environment:
            return {}
        with suppress(KeyError, TypeError):
            return {(row["kernel"], row["size"]): row for row in self.recorded["choices"]}
        return {}

    def _report(self, text: str) -> None:
        if self.is_main:
            notice(text)


# --- The cache --------------------------------------------------------------------------------------------------------


def cache_path() -> Path | None:
    """The file in the user's cache folder; None if the user has no home folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if folder.startswith("~") else Path(folder) / "fastofa" / "kernels.json"


def _read(path: Path | None) -> dict[str, Any]:
    """Results by key; none if the file is missing or damaged."""
    with suppress(BadInput):
        values = {} if path is None else read_json(path)
        return values if isinstance(values, dict) else {}
    return {}


def _write(path: Path | None, results: dict[str, Any]) -> None:
    """Replace the file if it is writable."""
    if path is not None:
        with suppress(BadInput):
            write_json(path, results)


def _valid(row: Any, comparison: Comparison) -> dict[str, Any] | None:
    """The parts of a recorded row that say what was chosen and why; None if it is not such a row."""
    if not isinstance(row, dict) or row.get("chosen") not in list(comparison.candidates):
        return None
    parts = {name: row.get(name) for name in ("ms", "dropped")}
    return {"chosen": row["chosen"], **{name: part if isinstance(part, dict) else {} for name, part in parts.items()}}


@functools.cache
def _environment(device: torch.device, compiled: bool) -> str:
    """Everything but the size on which a choice depends."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(kernels.__path__[0]).glob("*.py"))))
    return (
        f"{gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton}, fastofa {__version__} "
        f"({code.hexdigest()[:8]}), {'compiled' if compiled else 'eager'}"
    )
