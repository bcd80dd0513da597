"""Export a classifier, including its normalisation, as an ONNX file.

    input   pixels: uint8 [batch, 3, S, S], RGB, 0 to 255; any batch size
    output  logits: float32 [batch, C]; their softmax gives probabilities

The input is uint8, as image decoders return it: a quarter of the bytes of float32. This also prevents errors, since a
graph with float input cannot distinguish pixels in 0..1 from pixels in 0..255. The graph scales and normalises the
pixels; the caller crops the central square and resizes it, as the file's metadata describes. The metadata also contains
the class names.
"""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from fastofa import __version__
from fastofa.models.normalized import Normalized
from fastofa.models.timm_models import first_line
from fastofa.system.errors import BadInput

OPSET = 18
FILE = "model.onnx"


@torch.inference_mode()
def export_onnx(
    model: Normalized, folder: Path, classes: tuple[str, ...], image_size: int, crop: float, interpolation: str
) -> str:
    """Write FOLDER/model.onnx and, if onnxruntime is installed, compare its logits with the model's.

    Args:
        model: on the CPU, in eval mode.
        image_size: S, in pixels.
        crop: side of the central square, as a fraction of the image's shorter side; for the metadata.
        interpolation: bilinear or bicubic; for the metadata.

    Returns:
        A line that describes the file, its input and output, and the comparison.

    Raises:
        BadInput: the model cannot be converted, or its logits differ.
    """
    pixels = torch.randint(0, 256, (2, 3, image_size, image_size), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's exporter warns about its own code
            program = torch.onnx.export(
                model,
                (pixels,),
                input_names=["pixels"],
                output_names=["logits"],
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # of any type, for example if ONNX lacks an operator that the model uses
        raise BadInput(f"onnx: PyTorch cannot convert this model ({first_line(error)}); leave --onnx out") from None
    assert program is not None
    program.model.metadata_props.update(
        {
            "fastofa": __version__,
            "input": f"uint8 RGB pixels [batch, 3, {image_size}, {image_size}]; the graph normalises them",
            "output": f"float32 logits [batch, {len(classes)}]; their softmax gives probabilities",
            "preprocessing": json.dumps(
                {
                    "crop_mode": "center",
                    "crop_pct": crop,
                    "size": image_size,
                    "interpolation": f"{interpolation}, antialiased",
                }
            ),
            "normalization": json.dumps({name: getattr(model, name).flatten().tolist() for name in ("mean", "std")}),
            "classes": json.dumps(list(classes), ensure_ascii=False),
        }
    )
    program.save(folder / FILE, external_data=False)
    checked = _compare(folder / FILE, model, pixels)
    return (
        f"{FILE}, opset {OPSET}: uint8 RGB pixels [batch, 3, {image_size}, {image_size}], normalised by the graph -> "
        f"logits [batch, {len(classes)}]; {checked}"
    )


def _compare(file: Path, model: Normalized, pixels: torch.Tensor) -> str:
    """Compare onnxruntime's logits with the model's and describe the result. Raises BadInput if they differ."""
    if find_spec("onnxruntime") is None:
        return "not compared with the run, since onnxruntime is not installed"
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    expected, got = model(pixels), torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
    difference = float((expected - got).abs().max())
    if not torch.allclose(expected, got, rtol=1e-4, atol=1e-4):
        raise BadInput(
            f"onnx: expected the run's logits, but onnxruntime's differ by up to {difference:.2g}; leave --onnx out"
        )
    return f"onnxruntime's logits differ from the run's by at most {difference:.1g}"
