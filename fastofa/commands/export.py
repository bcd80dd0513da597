"""Write a run's student as a model that plain timm loads.

    fastofa export run student
    python -c 'import timm; model = timm.create_model("local-dir:student", pretrained=True)'
    fastofa export run student --onnx       student/model.onnx, too: uint8 pixels -> logits, opset 18

The exits are left out. What was written is loaded back with timm: its logits are compared with the run's, and its
answers to validation images that went through timm's own transform with those of the run's own evaluation.
"""

from fastofa.commands.arguments import ExportConfig
from fastofa.system.errors import escaped
from fastofa.training.export import export


def main(config: ExportConfig) -> None:
    line = export(config.run, config.out, config.weights, config.onnx)
    print(escaped(f"{config.out}: load it with"), escaped(line), sep="\n")
