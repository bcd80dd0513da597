"""fastofa: OFA knowledge distillation at full speed, from cached teacher logits."""

__version__ = "0.1.0"
