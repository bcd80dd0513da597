"""Write a run's student as a model that plain timm loads.

    fastofa export run student
    python -c 'import timm; model = timm.create_model("local-dir:student", pretrained=True)'

The exits are left out. What was written is loaded back with timm and its logits are compared with the run's.
"""

import json

import timm
import torch
from timm.models import save_for_hf

from fastofa.arguments import ExportConfig
from fastofa.errors import BadInput
from fastofa.files import new_folder
from fastofa.models import load_arguments
from fastofa.run import open_run
from fastofa.student import Student


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


def main(config: ExportConfig) -> None:
    print(f"{config.out}: load it with\n{export(config)}")
