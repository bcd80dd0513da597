"""Write a run's student as a model that plain timm loads.

    fastofa export run student
    python -c 'import timm; model = timm.create_model("local-dir:student", pretrained=True)'
    fastofa export run student --onnx       also write student/model.onnx: uint8 pixels -> logits, opset 18

The model has no exits. The command loads it with timm and compares it with the run: its logits, and its predictions for
validation images preprocessed by timm's own transform.
"""

from fastofa.commands.arguments import ExportConfig
from fastofa.system.errors import escaped
from fastofa.training.export import export


def main(config: ExportConfig) -> None:
    line = export(config.run, config.out, config.weights, config.onnx)
    print(escaped(f"{config.out}: load it with"), escaped(line), sep="\n")
