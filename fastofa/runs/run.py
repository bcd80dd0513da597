"""A run's folder: config.json says what the run is, so that it can be resumed, evaluated and exported."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fastofa import __version__
from fastofa.models.timm_models import find_folder
from fastofa.models.weights import SavedWeights
from fastofa.runs.checkpoint import checkpoints, load_student
from fastofa.runs.config import BUILT_IN, TrainConfig, Weights, from_folder
from fastofa.runs.log import read_metrics
from fastofa.student.model import Student
from fastofa.system.environment import environment
from fastofa.system.errors import BadInput
from fastofa.system.files import read_json, write_json

CONFIG, LAUNCHES = "config.json", "environment.json"
MAX_FEATURES = 1 << 20  # of a teacher's last layer


@dataclass(frozen=True)
class Run:
    path: Path
    config: TrainConfig
    classes: tuple[str, ...]
    teacher_dim: int
    """Width of the teacher's last features, which a CNN's exits take over; 0 without a teacher."""
    fingerprint: str
    """Of the training set."""
    answers: tuple[str, ...] = ()
    """A digest of each view of the teacher cache that the run replays; empty without one."""
    val_fingerprint: str = ""
    """Of the validation set."""
    pages: str = ""
    """Of the pages that the samples lie in, where the order goes by them; else empty."""
    folder: str = ""
    """Where the run was started: relative paths of its configuration begin there."""

    def build_student(self, init: str | None = None) -> Student:
        """The student as the configuration says, with the weights of `init` if any (see `create_model`), or of a run.

        Raises BadInput for what cannot be built.
        """
        c, start = self.config, _weights_of_run(init)
        return Student(
            c.student, len(self.classes), c.image_size, self.teacher_dim, c.exits, c.drop_path, c.mean, c.std, start
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
                "folder": self.folder or str(Path.cwd()),
                "classes": list(self.classes),
                "teacher_dim": self.teacher_dim,
                "fingerprint": self.fingerprint,
                "val_fingerprint": self.val_fingerprint,
                "answers": list(self.answers),
                "pages": self.pages,
            },
        )

    @property
    def cache(self) -> Path | None:
        """The teacher cache, found from any folder."""
        return None if self.config.cache is None else Path(self.folder, self.config.cache)

    @property
    def data(self) -> str:
        """The data set, found from any folder."""
        return from_folder(self.folder, self.config.data, BUILT_IN["data"])


def is_run(path: Path) -> bool:
    """Does the folder hold what `fastofa train` writes? A model's folder has a config.json, too."""
    values = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    return isinstance(values, dict) and "config" in values


def _weights_of_run(init: str | None) -> str | SavedWeights | None:
    """Its student's, where `init` is a run's folder."""
    folder = None if init in (None, "pretrained") else find_folder(init)
    if folder is None:
        return init
    if not is_run(folder):
        return init
    return SavedWeights(str(folder), open_run(folder).trained_student().backbone.state_dict())


def open_run(path: Path) -> Run:
    """Raises BadInput if the folder holds no run or its config.json was edited."""
    if not (path / CONFIG).is_file():
        raise BadInput(f"{path}: expected a run made by `fastofa train`, found no {CONFIG}")
    values = read_json(path / CONFIG)
    texts, lists = ("fingerprint", "val_fingerprint", "pages", "folder"), ("classes", "answers")
    try:
        kinds = {"config": dict, "teacher_dim": int, **dict.fromkeys(texts, str), **dict.fromkeys(lists, list)}
        odd = [name for name, kind in kinds.items() if not isinstance(values[name], kind)]
        odd += [name for name in lists if not all(isinstance(text, str) for text in values[name])]
        if odd or not 0 <= values["teacher_dim"] <= MAX_FEATURES:
            raise TypeError(f"{', '.join(odd) or 'teacher_dim'} of its kind")
        config = TrainConfig.from_json(values["config"])
    except BadInput as error:
        raise BadInput(f"{path / CONFIG}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path / CONFIG}: expected what `fastofa train` writes, it lacks {error}") from None
    classes, answers = (tuple(values[name]) for name in lists)
    data, val, pages, folder = (values[name] for name in texts)
    return Run(path, config, classes, values["teacher_dim"], data, answers, val, pages, folder)


def log_launch(path: Path, step: int, ranks: int, pixel_difference: float | None = None) -> None:
    """environment.json: for each time the run was started or went on, when, where and with what.

    Args:
        pixel_difference: mean, 0 to 255, from those that the teacher saw; None if unknown (`teacher.reference_images`).
    """
    launches = read_json(path / LAUNCHES) if (path / LAUNCHES).exists() else []
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    known = {} if pixel_difference is None else {"pixel_difference": round(pixel_difference, 3)}
    launch = {"date": now, "step": step, "ranks": ranks, **known, "fastofa": __version__, **environment()}
    write_json(path / LAUNCHES, [*launches, launch])
