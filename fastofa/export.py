"""Write a run's student as a model that plain timm loads.

    fastofa export run student
    python -c 'import timm; model = timm.create_model("local-dir:student", pretrained=True)'

The exits are left out. What was written is loaded back with timm and its logits are compared with the run's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import timm
import torch
import tyro
from timm.models import save_for_hf

from fastofa.errors import BadInput
from fastofa.files import new_folder
from fastofa.models import load_arguments
from fastofa.run import open_run
from fastofa.student import Student


@dataclass(frozen=True)
class ExportConfig:
    """OUT/model.safetensors and OUT/config.json, for timm.create_model and for `fastofa precompute --teacher OUT`."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder that `fastofa train` wrote."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """New folder for the model."""
    weights: Literal["last", "best"] = "last"
    """As they are at the end, or as they were at the run's best evaluation."""


def export(config: ExportConfig) -> str:
    """Write the model, load it back with timm, compare its logits with the run's; returns the line that loads it.

    Raises:
        BadInput: no run, no checkpoint, a folder that exists already, a full disk.
    """
    run = open_run(config.run)
    student = run.trained_student(config.weights == "best")
    size = student.image_size
    with new_folder(config.out) as folder:
        save_for_hf(
            student.backbone,
            str(folder),
            model_config={"label_names": list(run.classes)},
            safe_serialization=True,
            data_config={
                "input_size": (3, size, size),
                "mean": tuple(student.mean.flatten().tolist()),
                "std": tuple(student.std.flatten().tolist()),
                "test_input_size": (3, run.config.eval_size or size, run.config.eval_size or size),
                "crop_pct": run.config.eval_crop,
                "interpolation": "bilinear",
            },
        )
        saved = json.loads((folder / "config.json").read_text())
        name, arguments = saved["architecture"], load_arguments(saved)
        model = timm.create_model(name, checkpoint_path=str(folder / "model.safetensors"), **arguments)
        _compare(student, model.eval())
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f'timm.create_model("{name}", checkpoint_path="{config.out / "model.safetensors"}"{given})'


@torch.inference_mode()
def _compare(student: Student, model: torch.nn.Module) -> None:
    images = torch.randn(2, 3, student.image_size, student.image_size, generator=torch.Generator().manual_seed(0))
    expected, got = student(images)[-1], model(images)
    if not torch.allclose(expected, got, rtol=1e-4, atol=1e-4):
        raise BadInput(f"export: timm's logits differ from the run's by up to {(expected - got).abs().max():.2g}")


def main(argv: list[str]) -> None:
    config = tyro.cli(ExportConfig, args=argv, description=__doc__, prog="fastofa export")
    print(f"{config.out}: load it with\n{export(config)}")
