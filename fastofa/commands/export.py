"""Write a run's student, or a checkpoint, as a model that plain timm loads.

    fastofa export run student
    python -c 'import timm; model = timm.create_model("local-dir:student", pretrained=True)'
    fastofa export run student --onnx       also write student/model.onnx: uint8 pixels -> logits, opset 18
    fastofa export model_best.pth.tar student --student resnet18            a checkpoint of the official code

The model has no exits. The command loads it with timm and compares it with the run: its logits, and its predictions for
validation images preprocessed by timm's own transform.
"""

from fastofa.commands.arguments import ExportConfig
from fastofa.system.errors import escaped
from fastofa.training.export import export, export_checkpoint


def main(config: ExportConfig) -> None:
    c = config
    if c.student is None:
        line = export(c.run, c.out, c.weights, c.onnx)
    else:
        line = export_checkpoint(c.run, c.out, c.student, c.mean, c.std, c.eval_crop, c.onnx)
    print(escaped(f"{c.out}: load it with"), escaped(line), sep="\n")
