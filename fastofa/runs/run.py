"""A run's folder. Its config.json contains everything needed to resume, evaluate and export the run."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fastofa import __version__
from fastofa.models.timm_models import find_folder
from fastofa.models.weights import SavedWeights
from fastofa.runs.checkpoint import checkpoints, load_student
from fastofa.runs.config import TrainConfig, Weights
from fastofa.runs.config_file import BUILT_IN, from_folder
from fastofa.runs.log import read_metrics
from fastofa.student.model import Student
from fastofa.system.environment import environment
from fastofa.system.errors import BadInput
from fastofa.system.files import read_json, write_json
from fastofa.system.urls import is_url

CONFIG, LAUNCHES = "config.json", "environment.json"
# Objects that a launch records, see `log_launch`.
KERNELS, METHOD_FILES = "kernels", "method_sha256"
MAX_FEATURES = 1 << 20  # width of a teacher's last features


@dataclass(frozen=True)
class Run:
    path: Path
    config: TrainConfig
    classes: tuple[str, ...]
    teacher_dim: int
    """Width of the teacher's last features, which a CNN's exits use if it exceeds the student's; 0 without a
    teacher."""
    fingerprint: str
    """Fingerprint of the training set."""
    view_digests: tuple[str, ...] = ()
    """The digest of each view of the teacher cache that the run replays; empty without a cache."""
    val_fingerprint: str = ""
    """Fingerprint of the validation set."""
    pages: str = ""
    """Fingerprint of the assignment of samples to pages with `order` pages, else empty."""
    teacher: dict[str, Any] | None = None
    """The online teacher as `teacher.model.Teacher.describe` describes it, with the digest of its weights; None if the
    run has none."""
    folder: str = ""
    """Folder in which the run was started. Relative paths in its configuration are relative to it."""

    def build_student(self, init: str | None = None) -> Student:
        """The student that the configuration describes.

        Args:
            init: initial weights (see `create_model`), or a run's folder for the weights of its student; None: random.

        Raises:
            BadInput: the student cannot be built, or the weights do not fit.
        """
        c, start = self.config, _weights_of_run(init)
        return Student(
            c.student, len(self.classes), c.image_size, self.teacher_dim, c.exits, c.drop_path, c.mean, c.std, start
        )

    def trained_student(self, weights: Weights = "last") -> Student:
        """The trained student in eval mode.

        With a moving average, "last" is the weights or their average, whichever had the higher top-1 in the newest
        evaluation; the average before the first evaluation.
        """
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
                "view_digests": list(self.view_digests),
                "pages": self.pages,
                "teacher": self.teacher,
            },
        )

    @property
    def cache(self) -> str | None:
        """The path or URL of the teacher cache, valid from any working directory."""
        cache = self.config.cache
        return cache if cache is None or is_url(str(cache)) else str(Path(self.folder, cache))

    @property
    def online_teacher(self) -> str | None:
        """The name of the online teacher, valid from any working directory; likewise `teacher_checkpoint`."""
        name = self.config.online_teacher
        return None if name is None else from_folder(self.folder, name, BUILT_IN["online_teacher"])

    @property
    def teacher_checkpoint(self) -> Path | None:
        file = self.config.teacher_checkpoint
        return None if file is None else Path(self.folder, file)

    @property
    def data(self) -> str:
        """The name of the dataset, valid from any working directory."""
        return from_folder(self.folder, self.config.data, BUILT_IN["data"])


def is_run(path: Path) -> bool:
    """Whether `fastofa train` wrote the folder. (An exported model's folder also has a config.json.)"""
    values = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    return isinstance(values, dict) and "config" in values


def _weights_of_run(init: str | None) -> str | SavedWeights | None:
    """`init`, or the weights of the run's student if `init` is a run's folder."""
    folder = None if init in (None, "pretrained") else find_folder(init)
    if folder is None:
        return init
    if not is_run(folder):
        return init
    return SavedWeights(str(folder), open_run(folder).trained_student().backbone.state_dict())


def open_run(path: Path) -> Run:
    """Raises BadInput if the folder contains no run or its config.json was edited."""
    if not (path / CONFIG).is_file():
        raise BadInput(f"{path}: expected a run made by `fastofa train`, found no {CONFIG}")
    values = read_json(path / CONFIG)
    texts, lists = ("fingerprint", "val_fingerprint", "pages", "folder"), ("classes", "view_digests")
    try:
        kinds = {"config": dict, "teacher_dim": int, **dict.fromkeys(texts, str), **dict.fromkeys(lists, list)}
        wrong = [name for name, kind in kinds.items() if not isinstance(values[name], kind)]
        wrong += [name for name in lists if not all(isinstance(text, str) for text in values[name])]
        teacher = values.get("teacher")  # files of earlier versions have none
        if not (teacher is None or (isinstance(teacher, dict) and isinstance(teacher.get("sha256"), str))):
            wrong.append("teacher")
        if wrong or not 0 <= values["teacher_dim"] <= MAX_FEATURES:
            raise TypeError(f"a valid {' and '.join(wrong) or 'teacher_dim'}")
        config = TrainConfig.from_json(values["config"])
    except BadInput as error:
        raise BadInput(f"{path / CONFIG}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{path / CONFIG}: expected what `fastofa train` writes, but it lacks {error}; restore the original file"
        ) from None
    classes, view_digests = (tuple(values[name]) for name in lists)
    data, val, pages, folder = (values[name] for name in texts)
    return Run(path, config, classes, values["teacher_dim"], data, view_digests, val, pages, teacher, folder)


def log_launch(
    path: Path,
    step: int,
    ranks: int,
    pixel_difference: float | None = None,
    kernels: dict[str, Any] | None = None,
    method_files: dict[str, str] | None = None,
) -> None:
    """Append to environment.json when, where and with which versions the run was started or resumed.

    Args:
        step: number of optimizer steps already done.
        ranks: number of processes.
        pixel_difference: mean difference, 0 to 255, between the student's and the teacher's images; None if unknown
            (see `teacher.reference_images`).
        kernels: the chosen kernels (see `student.measure_kernels`); empty or None if there was nothing to choose.
        method_files: sha256 of the file of each method in a user's file.
    """
    launches = read_json(path / LAUNCHES) if (path / LAUNCHES).exists() else []
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    known = {} if pixel_difference is None else {"pixel_difference": round(pixel_difference, 3)}
    launch = {"date": now, "step": step, "ranks": ranks, **known, "fastofa": __version__, **environment()}
    objects = {KERNELS: kernels, METHOD_FILES: method_files}
    write_json(path / LAUNCHES, [*launches, launch | {name: value for name, value in objects.items() if value}])


def recorded(path: Path, name: str) -> dict[str, Any]:
    """The object of this name that the newest launch recorded; empty if there is none or the file is damaged."""
    with suppress(BadInput, IndexError, KeyError, TypeError):
        value = read_json(path / LAUNCHES)[-1][name]
        return value if isinstance(value, dict) else {}
    return {}
