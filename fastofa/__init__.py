"""OFA-KD at full speed: a strong small vision model from any teacher, through cached teacher predictions.

    from fastofa import open_dataset, precompute, train, evaluate, export, predict

Each name is imported when it is first used; `import fastofa` itself imports nothing.
"""

from typing import TYPE_CHECKING

from fastofa.system.lazy import lazy

if TYPE_CHECKING:
    from fastofa.data.open import open_dataset as open_dataset
    from fastofa.runs.config import TrainConfig as TrainConfig
    from fastofa.runs.recipes import recipe as recipe
    from fastofa.student.model import Student as Student
    from fastofa.system.errors import BadInput as BadInput
    from fastofa.teacher.cache import TeacherCache as TeacherCache
    from fastofa.teacher.model import open_teacher as open_teacher
    from fastofa.teacher.precompute import precompute as precompute
    from fastofa.teacher.precompute_config import PrecomputeConfig as PrecomputeConfig
    from fastofa.training.evaluate import evaluate as evaluate
    from fastofa.training.export import export as export
    from fastofa.training.loop import train as train
    from fastofa.training.predict_files import Prediction as Prediction
    from fastofa.training.predict_files import predict as predict

__version__ = "0.1.0"

if not TYPE_CHECKING:  # otherwise a type checker would accept any name
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "BadInput": "fastofa.system.errors",
            "PrecomputeConfig": "fastofa.teacher.precompute_config",
            "Prediction": "fastofa.training.predict_files",
            "Student": "fastofa.student.model",
            "TeacherCache": "fastofa.teacher.cache",
            "TrainConfig": "fastofa.runs.config",
            "evaluate": "fastofa.training.evaluate",
            "export": "fastofa.training.export",
            "open_dataset": "fastofa.data.open",
            "open_teacher": "fastofa.teacher.model",
            "precompute": "fastofa.teacher.precompute",
            "predict": "fastofa.training.predict_files",
            "recipe": "fastofa.runs.recipes",
            "train": "fastofa.training.loop",
        },
    )
