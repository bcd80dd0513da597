"""A run's folder: config.json says what the run is, so that it can be resumed, evaluated and exported."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fastofa import __version__
from fastofa.checkpoint import checkpoints, load_student
from fastofa.config import TrainConfig, Weights
from fastofa.environment import environment
from fastofa.errors import BadInput
from fastofa.files import read_json, write_json
from fastofa.metrics import read_metrics
from fastofa.student import Student

CONFIG, LAUNCHES = "config.json", "environment.json"


@dataclass(frozen=True)
class Run:
    path: Path
    config: TrainConfig
    classes: tuple[str, ...]
    teacher_dim: int
    """Width of the teacher's last features, which a CNN's exits take over; 0 without a teacher."""
    fingerprint: str
    """Of the training set."""
    answers: str = ""
    """Of the teacher cache: what it was made from, and its views; empty without one."""
    pages: str = ""
    """Of the pages that the samples lie in, where the order goes by them; else empty."""

    def build_student(self, init: str | None = None) -> Student:
        """The student as the configuration says, weights not loaded. Raises BadInput for what cannot be built."""
        c = self.config
        return Student(
            c.student, len(self.classes), c.image_size, self.teacher_dim, c.exits, c.drop_path, c.mean, c.std, init
        )

    def trained_student(self, weights: Weights = "last") -> Student:
        """The student in eval mode. Where there is a moving average, "last" is the better of both by top-1 in the
        newest evaluation, the average before the first."""
        student = self.build_student()
        load_student(self.path, student, self._better() if weights == "last" else weights)
        return student.eval()

    def _better(self) -> Weights:
        if self.config.ema is None or not checkpoints(self.path):
            return "last"
        until = int(checkpoints(self.path)[0].stem.partition("-")[2])
        evaluated = [row for row in read_metrics(self.path, until) if "top1_ema" in row]
        return "raw" if evaluated and evaluated[-1]["top1_raw"] > evaluated[-1]["top1_ema"] else "ema"

    def save(self) -> None:
        write_json(
            self.path / CONFIG,
            {
                "fastofa": __version__,
                "config": self.config.to_json(),
                "classes": list(self.classes),
                "teacher_dim": self.teacher_dim,
                "fingerprint": self.fingerprint,
                "answers": self.answers,
                "pages": self.pages,
            },
        )


def open_run(path: Path) -> Run:
    """Raises BadInput if the folder holds no run or its config.json was edited."""
    if not (path / CONFIG).is_file():
        raise BadInput(f"{path}: expected a run made by `fastofa train`, found no {CONFIG}")
    values = read_json(path / CONFIG)
    try:
        classes, teacher_dim = values["classes"], values["teacher_dim"]
        if not (all(isinstance(name, str) for name in classes) and isinstance(teacher_dim, int)):
            raise TypeError("names of classes or a number as teacher_dim")
        config = TrainConfig.from_json(values["config"])
        later = {name: values.get(name, "") for name in ("answers", "pages")}  # an older version had not these
        return Run(path, config, tuple(classes), teacher_dim, values["fingerprint"], **later)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path / CONFIG}: expected what `fastofa train` writes, it lacks {error}") from None


def log_launch(path: Path, step: int, ranks: int, pixel_difference: float | None = None) -> None:
    """environment.json: for each time the run was started or went on, when, where and with what.

    Args:
        pixel_difference: mean, 0 to 255, from those that the teacher saw; None if unknown (`fastofa.seen`).
    """
    launches = read_json(path / LAUNCHES) if (path / LAUNCHES).exists() else []
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    known = {} if pixel_difference is None else {"pixel_difference": round(pixel_difference, 3)}
    launch = {"date": now, "step": step, "ranks": ranks, **known, "fastofa": __version__, **environment()}
    write_json(path / LAUNCHES, [*launches, launch])
